"""``posttrain doctor``: the proof that the gradients of a recipe are right, on its own model and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import environment
from posttrain.artifact import ModelSource
from posttrain.config.compose import compose
from posttrain.config.schema import Method
from posttrain.context import StageContext
from posttrain.data.reading import read_source
from posttrain.data.records import Document
from posttrain.data.shapes import QUESTIONS
from posttrain.engine.config import FineTuneConfig, LoopConfig, TrainOn
from posttrain.errors import BadInput, Problem, ProofFailed
from posttrain.host import plugins
from posttrain.launch.plugin import run_here
from posttrain.model.base import resolve_base
from posttrain.plan import CORE, Plan, Step, make_plan
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.masks import MaskProof

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from posttrain.engine.answer_objective import AnswerLoss
    from posttrain.engine.answers import AnsweredRow
    from posttrain.sft.answer_proof import AnswerProof
    from posttrain.sft.config import SFTConfig
    from posttrain.sft.proof import Check, Proof

READ = 100
"""Records per source, at most, whose mask is read back."""
SPREAD = 10_000
"""Records per source over which those of a stage on answers are spread."""
CHECKPOINTS = Path("checkpoints")
"""Folder of a proof's context, to which nothing is written."""


def main(words: list[str]) -> int:
    """Compare the gradient of one optimizer step with plain float64, for SFT and each stage on answers; print all.

    Raises ProofFailed naming the comparisons that fail: this model must not be trained.
    """
    host = plugins.load()
    plan = make_plan(compose(host, words), host)
    for line in plan.shadows:
        print(line)
    environment.prepare()
    step = _core(plan)
    base = resolve_base(plan.model)
    documents = _documents(step, base)
    found = {"SFT": _prove(plan, step, base, documents)}
    for each in plan.steps:
        if isinstance(each.config, LoopConfig) and not isinstance(each.config, FineTuneConfig):
            found[each.name] = _prove_answers(plan, each, step, base)
    _conclude(plan.recipe, found)
    return 0


def _conclude(recipe: str, found: Mapping[str, Sequence[Check]]) -> None:
    """Print what is proven; raise ProofFailed naming the stages and the comparisons that fail."""
    wrong = [name for name, checks in found.items() if any(check.failed for check in checks)]
    checks = [check for each in found.values() for check in each]
    failed = [f"{check.name} ({check.error:.1e} from {check.against})" for check in checks if check.failed]
    if failed:
        raise ProofFailed(f"the {' and '.join(wrong)} gradient of {recipe} is wrong: {', '.join(failed)}")
    missing = [check.name for check in checks if check.error is None]
    extent = f"every comparison that was run; not run: {', '.join(missing)}" if missing else "every comparison"
    print(f"The {' and '.join(found)} gradient of {recipe} is right in {extent}.")


def _core(plan: Plan) -> Step:
    for step in plan.steps:
        if step.stage.name == CORE:
            return step
    raise BadInput(Problem(where="stages", what="the recipe trains no SFT stage", fix="Leave out start_from"))


def _documents(step: Step, base: ModelSource) -> list[Rendered]:
    """Render the first records of every source. Raises ProofFailed for a mask that cannot be read back."""
    from posttrain.model.loading import load_tokenizer
    from posttrain.sft.examples import rows_of

    tokenizer = load_tokenizer(base)
    renderer = ChatRenderer(tokenizer)
    train_on: TrainOn = step.config.train_on  # type: ignore[attr-defined]
    last_only, proof = train_on is not TrainOn.all, MaskProof(tokenizer)
    documents = []
    for source in (source for source in step.sources if source.on_policy is None):
        first = islice(read_source(source, step.stage.records, step.cache), READ)
        read = [each for each in first if isinstance(each, Document)]
        for each in read:
            for record in rows_of(each, train_on):
                documents.append(renderer.document(record, last_only=last_only))
                if fault := proof.fault(record, documents[-1], last_only=last_only):
                    raise ProofFailed(f"the mask of {record.where} is wrong: {fault}")
    total, trained = sum(len(each.ids) for each in documents), sum(sum(each.mask) for each in documents)
    print(f"mask       {len(documents)} records: every answer trained with its stop token, ", end="")
    print(f"{trained:,} of {total:,} tokens ({trained / max(total, 1):.1%})")
    return documents


def _prove(plan: Plan, step: Step, base: ModelSource, documents: Sequence[Rendered]) -> list[Check]:
    """Run and print every comparison."""
    from posttrain.sft.proof import Proof, sample

    config: SFTConfig = step.config  # type: ignore[assignment]
    proof = Proof(
        model=_model(config, base, plan.seed), documents=sample(documents, config.sequence_length), config=config
    )
    parameters = list(proof.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    print(f"model      {plan.model.path}, {config.method.value}, ", end="")
    print(f"{trained:,} of {sum(p.numel() for p in parameters):,} parameters trained, on {_place(proof.model.device)}")
    print(f"step       {len(proof.documents)} documents in {len(proof.rows)} rows\n")
    print(f"{'gradient of one step':<44}{'against':<10}{'error':>8}{'limit':>9}")
    checks = _shown(proof)
    print(f"\nattention  {proof.attention[0]}")
    return checks


def _shown(proof: Proof | AnswerProof) -> list[Check]:
    """Run and print every comparison of ``proof``."""
    checks = []
    # the name as the comparison begins, its result as it ends: each takes seconds, or minutes on a large model
    for check in proof.checks(began=lambda name: print(f"{name:<44}", end="", flush=True)):
        print(_result(check), flush=True)
        checks.append(check)
    return checks


def _prove_answers(plan: Plan, step: Step, core: Step, base: ModelSource) -> list[Check]:
    """Run a stage on answers up to its training, and prove that instead; print every comparison."""
    from posttrain.sft.proof import Check

    if step.stage.records == QUESTIONS or any(source.on_policy for source in step.sources):
        return [Check(name=step.name, reason="it trains on answers that the model writes when the stage starts")]
    config: SFTConfig = core.config  # type: ignore[assignment]
    proving = Proving(
        name=step.name, config=step.config, parent=base, records=_spread(step), seed=plan.seed, dtype="float32",
        progress=Silent(), stop_requested=lambda: False, checkpoints=CHECKPOINTS, output=CHECKPOINTS,
        model=_model(config, base, plan.seed),
    )  # fmt: skip
    try:
        run_here(step.stage, proving, writes=False)
    except OwnLoop:
        proving.checks.append(Check(name=step.name, reason="it has a training loop of its own"))
    return proving.checks


def _spread(step: Step) -> list[Any]:
    """Return some records of every source, from all over it: files are often sorted."""
    found: list[Any] = []
    for source in step.sources:
        read = list(islice(read_source(source, step.stage.records, step.cache), SPREAD))
        found += read[:: max(1, len(read) // READ)][:READ]
    return found


class OwnLoop(Exception):
    """Raised by a proof for a stage that asks for the model to train it by itself."""


@dataclass(frozen=True, kw_only=True)
class Proving(StageContext):
    """The context of a stage on answers whose training is proven in place of being carried out."""

    model: PreTrainedModel | PeftModel
    """The model to prove it with, in float32."""
    checks: list[Check] = field(default_factory=list)

    def policy(self) -> Any:
        """Raise OwnLoop."""
        raise OwnLoop

    def train_answers(
        self, rows: Sequence[AnsweredRow], loss: AnswerLoss, start: object, eval_rows: Sequence[AnsweredRow] = ()
    ) -> None:
        """Prove the loss and the gradient of a few rows."""
        from posttrain.sft.answer_proof import AnswerProof, sample_rows

        chosen = sample_rows(rows)
        proof = AnswerProof(
            stage=self.name, model=self.model, rows=chosen, loss=loss, config=self.config, progress=self.progress
        )
        print(f"\n{self.name:<10} {len(chosen)} rows of {len(rows):,}")
        self.checks.extend(_shown(proof))
        times = "once for all of its answers" if proof.shared else "again for each answer, as the kernel needs it"
        print(f"prompts    each is computed {times}")


class Silent:
    """Progress of a proof, which shows nothing but its comparisons."""

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Show nothing."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def part(self, done: int, total: int, what: str) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""


def _model(config: SFTConfig, base: ModelSource, seed: int) -> PreTrainedModel | PeftModel:
    """Load the model as the stage trains it, but in float32, where float64 is; for qlora, before quantisation."""
    from posttrain.model.device import default_device, exact_device
    from posttrain.model.loading import added_token_ids, load_model, load_trainable, new_adapter

    if config.method is Method.full:
        model = load_trainable(base, "float32")
    else:
        model = new_adapter(load_model(base, "float32"), config.lora, seed, added_token_ids(base))
    return model.to(exact_device(default_device()))


def _place(device: torch.device) -> str:
    """Return the device of the comparisons, with the reason where it is not that of training."""
    from posttrain.model.device import default_device

    training = default_device()
    return f"{device}, as {training.type} has no float64" if device.type != training.type else str(device)


def _result(check: Check) -> str:
    if check.error is None:
        return f"not run: {check.reason}"
    verdict = "FAILED" if check.failed else "ok"
    return f"{check.against:<10}{check.error:>8.1e}{check.limit:>9.1e}  {verdict}"
