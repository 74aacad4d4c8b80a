"""What a stage is handed: settings, parent, records, and everything that it may call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.artifact import ModelSource
    from posttrain.data.records import Document
    from posttrain.engine.checkpoint import CheckpointFolder, Position
    from posttrain.stage import Progress
    from posttrain.tokens.chat import ChatRenderer


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """Everything that a stage's ``run`` may use. It leaves its result in ``output`` through ``save``."""

    name: str
    """Name of the stage's node in the recipe."""
    config: Any
    """The stage's typed settings: an instance of its config dataclass."""
    parent: ModelSource
    """The verified weights to start from."""
    records: Sequence[Any]
    """Prepared records in the shape that the stage asked for; ``feedback`` is Feedback and Preference, mixed."""
    eval_records: Sequence[Any] = ()
    """Records of the same shape for the eval loss; never trained."""
    seed: int
    """Seeds everything random in the stage."""
    dtype: str
    """``float32`` or ``bfloat16``."""
    progress: Progress
    """Receiver of the stage's steps."""
    stop_requested: Callable[[], bool]
    """Whether the user or the scheduler asked to stop: save a checkpoint and raise Interrupted."""
    checkpoints: Path
    """Folder for what resuming needs; kept until the stage is promoted."""
    output: Path
    """Empty folder for the result."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Deterministic figures for the manifest (token counts, final loss): filled in by ``run``."""

    def warn(self, text: str) -> None:
        """Say what is unusual or went wrong without stopping the stage: at once, in the manifest and in the report."""
        self.progress.note(f"warning: {text}")
        self.metrics.setdefault("warnings", []).append(text)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's tokenizer with its pinned chat template."""
        from posttrain.model.loading import load_tokenizer

        return load_tokenizer(self.parent)

    def renderer(self) -> ChatRenderer:
        """Turns conversations into token ids with the mask of trained tokens."""
        from posttrain.tokens.chat import ChatRenderer

        return ChatRenderer(self.tokenizer())

    def policy(self) -> PreTrainedModel | Any:
        """The parent's model, ready to train: its adapter (named ``default``) trainable, or all weights."""
        from posttrain.model.loading import load_trainable

        return load_trainable(self.parent, dtype=self.dtype)

    def device(self) -> torch.device:
        """The device that the stage trains on."""
        from posttrain.model.loading import default_device

        return default_device()

    def finetune(self, records: Sequence[Document]) -> None:
        """Train ``policy()`` on the answers of ``records`` with SFT's loop and save it.

        ``config`` has to be a FineTuneConfig. Masks, packing, progress, eval loss and exact resume are those of
        SFT, and so are the figures in ``metrics``. Raises BadInput when the records cannot be trained on, Interrupted
        when the run was asked to stop.
        """
        from posttrain.sft.stage import finetune

        finetune(self, records, StageContext.policy)

    def restore(self, model: Any, optimizer: torch.optim.Optimizer) -> Position:
        """Put the newest sound checkpoint into model, optimizer and torch's generator of random numbers.

        Returns the step and the loss that it was saved with: step 0 when there is none. Damaged ones are passed over.
        """
        from posttrain.engine.checkpoint import Position, restore

        if (found := self._checkpoints().newest()) is None:
            return Position(step=0, loss=float("nan"))
        position, state = found
        restore(model, optimizer, state)
        return position

    def checkpoint(self, step: int, loss: float, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Save what going on after ``step`` needs: trained weights, optimizer, torch's random numbers.

        It is there whole or not at all; the newest two are kept. Raises OSError when the disk refuses.
        """
        from posttrain.engine.checkpoint import Position, capture

        self._checkpoints().save(Position(step=step, loss=loss), capture(model, optimizer))

    def _checkpoints(self) -> CheckpointFolder:
        from posttrain.engine.checkpoint import CheckpointFolder

        return CheckpointFolder(self.checkpoints, identity=self.name, note=self.progress.note)

    def save(self, model: Any) -> None:
        """Write the adapter ``default`` of a PEFT model, or full weights, into ``output``.

        What ``model`` computes is noted beside it: before publishing, the pipeline loads the result and compares.
        """
        from posttrain.model.probe import leave_probe
        from posttrain.model.saving import save_model

        save_model(model, self.parent, self.output, self.dtype)
        leave_probe(model, self.parent, self.output)
