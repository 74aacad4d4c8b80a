"""Supervised fine-tuning: the stage ``sft``, and the same training for other stages with conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.config.schema import Method
from posttrain.data.records import Document
from posttrain.engine.attention import causal_model
from posttrain.engine.checkpoint import Position
from posttrain.engine.config import FineTuneConfig
from posttrain.engine.loop import Training
from posttrain.engine.stage import carry_out, check_vocabulary, make_training, stored_rows
from posttrain.errors import BadInput, Problem
from posttrain.model.loading import added_token_ids, check_finite, load_model, new_adapter
from posttrain.model.quantisation import NF4
from posttrain.sft.advice import Known
from posttrain.sft.examples import Rendering, count_shared, make_evaluation, mix_rows, split_eval
from posttrain.tokens.markers import family_faults
from posttrain.tokens.packing import Packing, PackingCounts
from posttrain.tokens.table import Documents, TokenTable

if TYPE_CHECKING:
    from posttrain.context import StageContext

Model: TypeAlias = PreTrainedModel | PeftModel


def run(context: StageContext) -> None:
    """Train on the stage's records, from the base or from an earlier SFT."""
    finetune(context, context.records, policy)


def finetune(context: StageContext, records: Sequence[Document], load: Callable[[StageContext], Model]) -> None:
    """Render, pack, train, save; ``load`` returns the model to train. The context's config is a FineTuneConfig.

    Raises:
        BadInput: A record cannot be rendered or does not fit the model, or nothing is trained.
        Interrupted: A stop was requested; a checkpoint holds the last step.
        Diverged: The loss or the gradient is not finite.
    """
    config: FineTuneConfig = context.config
    tokenizer = context.tokenizer()
    table = documents_of(context, records, tokenizer)
    documents, held_out = split_eval(table.all(), config.eval_share, context.seed, context.clusters)
    measured = [held_out, documents_of(context, context.eval_records, tokenizer).all()]
    evaluation = make_evaluation(measured, config)
    mixed = mix_rows(documents, config, context.seed)
    for note in mixed.notes():
        context.progress.note(note)
    packing = mixed.packing
    model = load(context)
    check_vocabulary((int(each.column("largest").max(initial=0)) for each in [documents, *measured]), model)
    training = make_training(context, model, packing.rows, evaluation)
    chats = table.chats()
    unusual = config.departures(known(training, packing.counts, documents, measured))
    for line in [*family_faults(tokenizer, chats, stop_tokens(model)), *unusual]:
        context.warn(line)
    position = carry_out(context, training)
    context.metrics.update(figures(training, packing, position))
    context.metrics["sources"] = [share.figures() for share in mixed.shares]
    context.save(model)


def policy(context: StageContext) -> Model:
    """Return the model to train: a new adapter, on quantised weights or not, the parent's adapter, or all weights."""
    method: Method = context.config.method
    if method is Method.full and context.parent.adapter is not None:
        raise BadInput(
            Problem(
                where=f"{context.name}.method",
                what=f"full fine-tuning cannot start from an adapter ({context.parent.adapter})",
                fix="Set method=lora, which continues with that adapter, or start from full weights",
            )
        )
    if method is Method.full or context.parent.adapter is not None:
        return context.policy()
    parent = replace(context.parent, quantization=NF4) if method is Method.qlora else context.parent
    base = load_model(parent, context.dtype, mapped=context.slices)
    check_finite(base, parent)
    return new_adapter(base, context.config.lora, context.seed, added_token_ids(parent))


def stop_tokens(model: Model) -> list[int | None]:
    """Return the tokens at which the model's own generation settings stop."""
    ends = causal_model(model).generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


def documents_of(context: StageContext, records: Sequence[Document], tokenizer: Any) -> TokenTable:
    """Return the records as token ids with their masks, each read back, from the store of all runs.

    Raises BadInput for a record that cannot be rendered or read back.
    """
    rendering = Rendering(tokenizer, context.config.train_on)
    return stored_rows(context, records, tokenizer, rendering.rows, train_on=context.config.train_on.value)


def known(training: Training, counts: PackingCounts, documents: Documents, measured: Sequence[Documents]) -> Known:
    """Return the facts for the rules of advice, known once records are packed and the model is loaded."""
    order, config = training.order, causal_model(training.model).config.get_text_config()
    return Known(
        examples=counts.packed,
        passes=order.total / order.steps_per_epoch,
        documents_per_step=counts.packed * min(1.0, order.per_step / order.rows),
        truncated=counts.truncated / counts.packed,
        refusals=int(documents.column("flag").sum()) / len(documents),
        overlap=count_shared(documents, measured),
        parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        positions=getattr(config, "max_position_embeddings", None),
    )


def figures(training: Training, packing: Packing, position: Position) -> dict[str, int | float]:
    """Return the training's figures for the manifest; ``epoch_*`` counts one pass over the rows."""
    counts, tokens, trained = packing.counts, packing.rows.tokens, packing.rows.trained
    return {
        "records": counts.documents,
        "untrained": counts.untrained,
        "truncated": counts.truncated,
        "split": counts.split,
        "pieces": counts.pieces,
        "cut_tokens": counts.cut_tokens,
        "unpredicted_tokens": counts.unpredicted,
        "rows": counts.rows,
        "epoch_tokens": counts.tokens,
        "epoch_trained_tokens": counts.trained_tokens,
        "tokens": sum(int(tokens[step].sum()) for step in training.order),
        "trained_tokens": sum(int(trained[step].sum()) for step in training.order),
        "steps": position.step,
        "final_loss": position.loss,
    }
