"""Callbacks of transformers' training loop: they report every step to the pipeline and obey a requested stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from posttrain import Progress, require_finite

METRICS = {
    "loss": "loss",
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards_margin": "rewards/margins",
    "rewards_accuracy": "rewards/accuracies",
    "nll": "nll_loss",
    "kl": "kl",
}
"""Names of a step's figures here and in TRL; those of the rewards are means over the step's rows."""


class Reporting(TrainerCallback):
    """Callback that reports every optimizer step to the pipeline."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tokens = 0
        self.batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Announce the steps, and those of a checkpoint as done."""
        self.tokens = state.log_history[-1]["tokens"] if state.log_history else 0
        self.progress.start(state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Begin to count the step's batches."""
        self.batches = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Report one batch of a step with several."""
        self.batches += 1
        self.progress.part(self.batches, args.gradient_accumulation_steps, "batch")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **unused: Any) -> None:
        """Report one step; raises Diverged when its gradient is not finite."""
        if "loss" not in logs:
            return  # TRL's closing summary of the run
        require_finite(state.global_step, "gradient norm", logs["grad_norm"])
        seen = int(logs["tokens"])
        self.progress.step(state.global_step, step_metrics(logs) | {"tokens": seen - self.tokens})
        self.tokens = seen


class Stopping(TrainerCallback):
    """Callback that ends training with a checkpoint after the step of a requested stop."""

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        self.stop_requested = stop_requested

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> Any:
        """Save and stop when the run was asked to."""
        if self.stop_requested():
            control.should_save = control.should_training_stop = True
        return control


def step_metrics(logs: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a step under our names."""
    return {ours: logs[theirs] for ours, theirs in METRICS.items() if theirs in logs}
