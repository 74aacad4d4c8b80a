"""The context of a stage: its settings, parent and records, and the services it may call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.artifact import ModelSource
    from posttrain.config.schema import GateTask
    from posttrain.data.records import Document, Feedback, Preference, Question
    from posttrain.engine.answer_objective import AnswerLoss
    from posttrain.engine.answers import AnsweredRow
    from posttrain.engine.checkpoint import CheckpointFolder, Position
    from posttrain.rewards.scorer import Scorer
    from posttrain.sampling.objective import PolicyLoss
    from posttrain.stage import Progress, Stage
    from posttrain.tokens.chat import ChatRenderer
    from posttrain.tokens.judged import JudgedAnswer


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """The only argument of a stage's ``run``. ``save`` writes the result into ``output``."""

    name: str
    """Name of the stage's node in the recipe."""
    config: Any
    """The stage's typed settings: an instance of its config dataclass."""
    parent: ModelSource
    """The verified weights to start from."""
    records: Sequence[Any]
    """Prepared records in the shape ``Stage.records`` names; ``feedback`` mixes Feedback and Preference."""
    eval_records: Sequence[Any] = ()
    """Records of the same shape for the eval loss; never trained."""
    seed: int
    """Seed of everything random in the stage."""
    dtype: str
    """``float32`` or ``bfloat16``."""
    progress: Progress
    """Receiver of the stage's steps."""
    stop_requested: Callable[[], bool]
    """Check for a request to stop; when it returns True, save a checkpoint and raise Interrupted."""
    checkpoints: Path
    """Folder for checkpoints, kept until the stage is promoted."""
    output: Path
    """Empty folder for the result."""
    engine: str = "single"
    """Way to train on the devices of this launch: ``single``, ``ddp``, ``fsdp`` or ``deepspeed``."""
    launch: Callable[[Stage, StageContext], None] | None = None
    """Start of the processes that run the stage in place of this one; None runs it here."""
    kept: Path | None = None
    """Folder, shared by all runs, for what can be computed again; beside the checkpoints when absent."""
    data_workers: int | None = None
    """Processes that render records; None for one on each core."""
    scorer: Scorer | None = None
    """Rewards of the stage's sampled answers; None for a stage whose settings name none."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """Number of the cluster of records alike, by ``where``, as preparation found them; records in none are absent."""
    trail: Path | None = None
    """Folder for the answers that the stage samples, kept with the run; with the checkpoints when absent."""
    gate_tasks: Mapping[str, GateTask] = field(default_factory=dict)
    """Tasks of the stage's gate by name, to be followed while answers are sampled; empty for other stages."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Deterministic figures for the manifest, such as token counts and the final loss; filled in by ``run``."""

    def warn(self, text: str) -> None:
        """Report a problem without stopping the stage: on screen at once, in the manifest and in the report."""
        self.progress.note(f"warning: {text}")
        self.metrics.setdefault("warnings", []).append(text)

    @property
    def slices(self) -> bool:
        """True when each process holds slices of the weights, which are left in their files until then."""
        return self.engine in ("fsdp", "deepspeed")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the parent's tokenizer with its pinned chat template."""
        from posttrain.model.loading import load_tokenizer

        return load_tokenizer(self.parent)

    def renderer(self) -> ChatRenderer:
        """Return the renderer of conversations into token ids and the mask of trained tokens."""
        from posttrain.tokens.chat import ChatRenderer

        return ChatRenderer(self.tokenizer())

    def answers(self, records: Sequence[Preference | Feedback]) -> Iterator[JudgedAnswer]:
        """Yield the answers of ``records`` as token ids: both of a preference, the chosen one first, one of feedback.

        They are rendered by ``data_workers`` once for all runs, and read from the store of ``kept``. Raises BadInput
        for a record that cannot be rendered, Interrupted after ``stop_requested``.
        """
        from posttrain.engine.stage import judged_answers

        return judged_answers(self, records)

    def policy(self) -> PreTrainedModel | Any:
        """Return the parent's model, ready to train: its adapter (named ``default``) trainable, or all weights."""
        from posttrain.model.loading import load_trainable

        return load_trainable(self.parent, self.dtype, mapped=self.slices)

    def device(self) -> torch.device:
        """Return the device to train on."""
        from posttrain.model.device import default_device

        return default_device()

    def finetune(self, records: Sequence[Document]) -> None:
        """Train ``policy()`` on the answers of ``records`` with SFT's loop and save it.

        Needs a FineTuneConfig as ``config``. Masks, packing, progress, eval loss, exact resume and the figures in
        ``metrics`` are those of SFT. Raises BadInput when the records cannot be trained on, Interrupted after
        ``stop_requested``.
        """
        from posttrain.sft.stage import finetune

        finetune(self, records, StageContext.policy)

    def train_answers(
        self,
        rows: Sequence[AnsweredRow],
        loss: AnswerLoss,
        start: Callable[[Sequence[Any], Sequence[Sequence[float]]], float],
        eval_rows: Sequence[AnsweredRow] = (),
    ) -> None:
        """Train ``policy()`` on answers, with a loss of their log-probabilities, on SFT's loop, and save it.

        Needs a LoopConfig as ``config``. Nothing is padded, and a prompt is computed once for all of its answers where
        the kernel can. A loss with a reference gets the log-probabilities by the parent, computed once before the first
        step. ``start`` returns the loss of a batch from the parent's log-probabilities: training starts from this value
        alone. Dropout is off. Progress, eval loss, exact resume and the figures in ``metrics`` are those of SFT.

        Raises BadInput when the rows do not fit the model, ArtifactDamaged when training would not start at the parent,
        Interrupted after ``stop_requested``.
        """
        from posttrain.engine.stage import train_answers

        train_answers(self, rows, loss, start, eval_rows)

    def train_sampled(self, questions: Sequence[Question], loss: PolicyLoss) -> None:
        """Train ``policy()`` on its own answers to ``questions``, with a loss of their tokens, on SFT's loop; save it.

        Needs a SampledConfig as ``config``. In each step the policy as it is answers the step's questions, the stage's
        rewards score the answers, and the loss makes advantages of them. The answers of all steps stay in ``trail``.
        Dropout is off. Progress, exact resume and the figures in ``metrics`` are those of SFT. At every measurement a
        sample of the documents of ``gate_tasks`` is asked, too, and scored as the gate does; they change nothing.

        Raises BadInput when the questions do not fit the model or nothing is learnt any more, ArtifactDamaged when
        training would not start at the parent, Interrupted after ``stop_requested``.
        """
        from posttrain.sampling.stage import train_sampled
        from posttrain.scoring.sample import sample_gate

        sample = sample_gate(self.config.gate, self.gate_tasks, self.tokenizer(), self.progress.note)
        train_sampled(self, questions, loss, sample)

    def restore(self, model: Any, optimizer: torch.optim.Optimizer) -> Position:
        """Load the newest sound checkpoint into the model, the optimizer and torch's random number generator.

        Returns its step and loss: step 0 when there is no checkpoint. Skips damaged ones with a note.
        """
        from posttrain.engine.checkpoint import Position, restore

        if (found := self._checkpoints().newest()) is None:
            return Position(step=0, loss=float("nan"))
        position, state = found
        restore(model, optimizer, state)
        return position

    def checkpoint(self, step: int, loss: float, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Save everything needed to resume after ``step``: trained weights, optimizer, torch's random state.

        Writes all of it or nothing, and keeps the newest two. Raises OSError when the disk is full or fails.
        """
        from posttrain.engine.checkpoint import Position, capture

        self._checkpoints().save(Position(step=step, loss=loss), capture(model, optimizer))

    def _checkpoints(self) -> CheckpointFolder:
        from posttrain.engine.checkpoint import CheckpointFolder

        return CheckpointFolder(self.checkpoints, identity=self.name, note=self.progress.note)

    def save(self, model: Any) -> None:
        """Write the adapter ``default`` of a PEFT model, or full weights, into ``output``.

        Saves its logits on a few tokens, too: before publishing, the pipeline reloads the result and compares. What
        training reached, by kind of matrix, goes into ``metrics``. Every process calls it; process 0 writes.
        """
        from posttrain.model.probe import leave_probe
        from posttrain.model.saving import save_model
        from posttrain.model.targets import measure_reach

        self.metrics["reach"] = [asdict(each) for each in measure_reach(model)]
        save_model(model, self.parent, self.output, self.dtype)
        leave_probe(model, self.parent, self.output)
