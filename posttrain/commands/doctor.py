"""``posttrain doctor``: the proof that the SFT gradient is right, on the recipe's own model and data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from posttrain import environment
from posttrain.artifact import ModelSource
from posttrain.config.compose import compose
from posttrain.config.schema import Method
from posttrain.data.reading import read_source
from posttrain.data.records import Document
from posttrain.engine.config import TrainOn
from posttrain.errors import BadInput, Problem, ProofFailed
from posttrain.host import plugins
from posttrain.model.base import resolve_base
from posttrain.plan import CORE, Plan, Step, make_plan
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.masks import mask_fault

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from posttrain.sft.config import SFTConfig
    from posttrain.sft.proof import Check

READ = 100
"""Records per source, at most, whose mask is read back."""


def main(words: list[str]) -> int:
    """Compare the gradient of one optimizer step with plain float64 and print every comparison.

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
    checks = _prove(plan, step, base, documents)
    failed = [f"{check.name} ({check.error:.1e} from {check.against})" for check in checks if check.failed]
    if failed:
        raise ProofFailed(f"the SFT gradient of {plan.recipe} is wrong: {', '.join(failed)}")
    missing = [check.name for check in checks if check.error is None]
    extent = f"every comparison that was run; not run: {', '.join(missing)}" if missing else "every comparison"
    print(f"The SFT gradient of {plan.recipe} is right in {extent}.")
    return 0


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
    last_only = train_on is not TrainOn.all
    documents = []
    for source in step.sources:
        read = [each for each in islice(read_source(source, step.stage.records), READ) if isinstance(each, Document)]
        for each in read:
            for record in rows_of(each, train_on):
                documents.append(renderer.document(record, last_only=last_only))
                if fault := mask_fault(record, documents[-1], tokenizer, last_only=last_only):
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
    print(f"{trained:,} of {sum(p.numel() for p in parameters):,} parameters trained, on {proof.model.device}")
    print(f"step       {len(proof.documents)} documents in {len(proof.rows)} rows\n")
    print(f"{'gradient of one step':<44}{'against':<10}{'error':>8}{'limit':>9}")
    checks = []
    # the name as the comparison begins, its result as it ends: each takes seconds, or minutes on a large model
    for check in proof.checks(began=lambda name: print(f"{name:<44}", end="", flush=True)):
        print(_result(check), flush=True)
        checks.append(check)
    print(f"\nattention  {proof.attention[0]}")
    return checks


def _model(config: SFTConfig, base: ModelSource, seed: int) -> PreTrainedModel | PeftModel:
    """Load the model as the stage trains it, but in float32; for qlora, with the base before quantisation."""
    from posttrain.model.loading import added_token_ids, load_model, load_trainable, new_adapter

    if config.method is Method.full:
        return load_trainable(base, "float32")
    return new_adapter(load_model(base, "float32"), config.lora, seed, added_token_ids(base))


def _result(check: Check) -> str:
    if check.error is None:
        return f"not run: {check.reason}"
    verdict = "FAILED" if check.failed else "ok"
    return f"{check.against:<10}{check.error:>8.1e}{check.limit:>9.1e}  {verdict}"
