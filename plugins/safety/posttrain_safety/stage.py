"""The safety stage: mix both kinds of answers, audit the words of requests, fine-tune the parent."""

from __future__ import annotations

from posttrain import StageContext
from posttrain_safety.config import SafetySettings
from posttrain_safety.exchanges import exchanges
from posttrain_safety.mixing import Kinds, Mix
from posttrain_safety.triggers import audit


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, on declining and helpful answers.

    Raises BadInput when one of the two kinds is missing, and otherwise as ``StageContext.finetune`` does.
    """
    settings: SafetySettings = context.config
    replayed = [record for record in context.records if record.origin.share]
    kinds = Kinds.of(context.records, settings, context.name)
    mix = Mix.of(kinds, settings.refusal_share, context.seed)
    report = audit(exchange for record in context.records for exchange in exchanges(record, settings))
    for note in (*mix.notes(), report.note()):
        context.progress.note(note)
    for line in (*mix.warnings(settings.epochs), *report.warnings()):
        context.warn(line)
    context.metrics.update(mix=mix.figures(), audit=report.figures())
    context.finetune([*mix.records, *replayed])
