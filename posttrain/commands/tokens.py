"""``posttrain tokens``: the training text as the model sees it, trained tokens marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from rich.console import Console
from rich.text import Text

from posttrain import environment, plugins
from posttrain.config.compose import compose
from posttrain.data.chat import ChatRenderer, Rendered
from posttrain.data.packing import pack
from posttrain.data.reading import read_source
from posttrain.data.records import Conversation
from posttrain.model.base import resolve_base
from posttrain.plan import Plan, Step, make_plan
from posttrain.sft.config import SFTConfig, TrainOn

SHOWN = 3
"""Records per source that are printed in full."""
COUNTED = 1000
"""Records per source whose tokens are counted."""
TRAINED = "bold green"


def tokens_command(words: list[str]) -> int:
    """Print the first records of the SFT stage's sources and the share of their tokens that is trained.

    On a terminal trained tokens are green; elsewhere they stand between ⟦ and ⟧.
    """
    host = plugins.load()
    plan = make_plan(compose(host, words), host)
    environment.prepare()
    console = Console(soft_wrap=True, highlight=False)
    renderer, tokenizer = _renderer(plan)
    for step in plan.steps:
        if step.stage.records == "conversations":
            _print_step(step, renderer, tokenizer, console)
    return 0


def _renderer(plan: Plan) -> tuple[ChatRenderer, object]:
    from posttrain.model.loading import load_tokenizer

    tokenizer = load_tokenizer(resolve_base(plan.model))
    return ChatRenderer(tokenizer), tokenizer


def _print_step(step: Step, renderer: ChatRenderer, tokenizer: object, console: Console) -> None:
    rendered: list[Rendered] = []
    last_only = step.config.train_on is TrainOn.last  # type: ignore[attr-defined]
    for source in step.sources:
        found = [
            renderer.conversation(record, last_only=last_only)
            for record in islice(read_source(source, step.stage.records), COUNTED)
            if isinstance(record, Conversation)
        ]
        console.rule(f"{step.name}: {source.path}", align="left")
        for row in found[:SHOWN]:
            console.print(coloured(row, tokenizer, console.is_terminal), end="\n\n")
        console.print(f"{len(found)} records read, {_share(found)}")
        rendered += found
    config: SFTConfig = step.config  # type: ignore[assignment]
    counts = pack(rendered, config.sequence_length, packing=config.packing, overlong=config.overlong).counts
    for note in counts.notes():
        console.print(f"{step.name}: {note}")
    console.print(f"{step.name}: {counts.rows:,} rows of {counts.sequence_length:,} slots, {counts.fill:.1%} filled")


def coloured(row: Rendered, tokenizer: object, terminal: bool) -> Text:
    """The row's text with its trained tokens marked; decoded from the ids, so that it shows what is trained."""
    text = Text()
    for trained, ids in _runs(row):
        piece = tokenizer.decode(ids)  # type: ignore[attr-defined]
        if trained and not terminal:
            piece = f"⟦{piece}⟧"
        text.append(piece, style=TRAINED if trained else "dim")
    return text


def _runs(row: Rendered) -> list[tuple[bool, list[int]]]:
    """Neighbouring tokens that are trained, or are not."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(row.ids, row.mask, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return runs


def _share(rows: Sequence[Rendered]) -> str:
    total, trained = sum(len(row.ids) for row in rows), sum(sum(row.mask) for row in rows)
    return f"{total:,} tokens, {trained:,} trained ({trained / max(total, 1):.1%})"
