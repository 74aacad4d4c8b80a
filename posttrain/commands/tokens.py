"""``posttrain tokens``: the training text as the model reads it, trained tokens marked, packed documents apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from posttrain import environment
from posttrain.config.compose import compose
from posttrain.config.schema import Source
from posttrain.console import DataConsole, styled
from posttrain.data import records
from posttrain.data.mixing import describe_bad, describe_unread, read_sources
from posttrain.engine.config import FineTuneConfig, LoopConfig
from posttrain.host import plugins
from posttrain.model.base import resolve_base
from posttrain.plan import Plan, Step, make_plan
from posttrain.run.prepared import known_preparation, remaining
from posttrain.sft.examples import Rendering, mix_rows, split_eval
from posttrain.tokens.chat import ChatRenderer
from posttrain.tokens.packing import PackedRow, Packing
from posttrain.tokens.shares import SourceShare

ALL = "--all"
SHOWN = 3
"""Records per source that are printed in full."""
COUNTED = 1000
"""Records per source that are read without ``--all``."""
EDGE = 30
"""Tokens at either end of a document that a packed row shows."""
TRAINED = "bold green"
BORDER = "cyan"


def main(words: list[str]) -> int:
    """Print the first records of each source, one packed row, and the trained tokens of each source and in all.

    Trained tokens are green on a terminal, and between ⟦ and ⟧ elsewhere or without colours.
    """
    host = plugins.load()
    plan = make_plan(compose(host, [word for word in words if word != ALL]), host)
    environment.prepare()
    page = Page(DataConsole(soft_wrap=True), _tokenizer(plan))
    for line in plan.shadows:
        page.console.print(styled(line))
    for step in plan.steps:
        count = None if ALL in words else COUNTED
        if not any(source.on_policy is None for source in step.sources) or step.stage.records == "questions":
            page.console.print(styled(f"{step.name}: its parent writes the answers when the stage starts"))
        elif isinstance(step.config, FineTuneConfig):
            done = known_preparation(plan, host, step) if step.config.eval_share else None
            page.show(step, step.config, count, {} if done is None else done.clusters())
        elif isinstance(step.config, LoopConfig):
            page.show_answers(step, step.config, count)
        if step.sources:
            page.console.print(styled(f"{step.name}: {remaining(plan, host, step)}"))
    return 0


def _tokenizer(plan: Plan) -> Any:
    from posttrain.model.loading import load_tokenizer

    return load_tokenizer(resolve_base(plan.model))


@dataclass(frozen=True)
class Page:
    """The output of the command, on one console with one tokenizer."""

    console: DataConsole
    tokenizer: Any

    def show(self, step: Step, config: FineTuneConfig, count: int | None, clusters: Mapping[str, int]) -> None:
        """Print a stage, from at most ``count`` records of each source; those of a cluster stay on one side."""
        sources = [_limited(source, count) for source in step.sources]
        read = read_sources(sources, step.stage.records, step.seed, step.cache, config.max_bad_share)
        found = [record for record in read if isinstance(record, records.Document)]
        table = Rendering(self.tokenizer, config.train_on, proven=False).table(found)
        trained, held = split_eval(table.all(), config.eval_share, step.seed, clusters)
        numbers = trained.column("origin")
        for number, origin in enumerate(table.origins):
            group = trained.take(numbers == number)[:SHOWN]
            if group:
                self._rule(f"{step.name}: {origin.path}")
            for document in group:
                self.console.print(self.marked(document.ids, document.mask), end="\n\n")
        mixed = mix_rows(trained, config, step.seed)
        self._show_row(step.name, mixed.packing)
        self._show_shares(step.name, mixed.shares)
        counts = mixed.packing.counts
        self.console.print(f"{counts.rows:,} rows of {counts.sequence_length:,} slots, {counts.fill:.1%} filled")
        for note in counts.notes():
            self.console.print(note)
        if held:
            self.console.print(f"{len(held):,} different records are set aside for the eval loss by eval_share")
        for line in (
            *describe_bad(read),
            *describe_unread(found),
            *ChatRenderer(self.tokenizer).describe_unread(found),
        ):
            self.console.print(styled(f"warning: {line}"))
        if count is not None and any(_has_more(step.sources, share, count) for share in mixed.shares):
            self.console.print(f"Only the first {count:,} records of each source were read; {ALL} reads every one.")

    def show_answers(self, step: Step, config: LoopConfig, count: int | None) -> None:
        """Print a stage on preferences or judged answers: each prompt once, and the scored tokens of its answers."""
        renderer = ChatRenderer(self.tokenizer)
        sources = [_limited(source, count) for source in step.sources]
        read = read_sources(sources, step.stage.records, step.seed, step.cache, config.max_bad_share)
        found = [_answers(renderer, record) for record in read]
        self._rule(f"{step.name}: {', '.join(source.path for source in step.sources)}")
        for prompt, answers in found[:SHOWN]:
            self.console.print(self.marked(prompt, [False] * len(prompt)))
            for name, ids in answers.items():
                self.console.print(f"▌{name}", style=BORDER)
                self.console.print(self.marked(ids, [True] * len(ids)))
            self.console.print()
        prompts = sum(len(prompt) for prompt, _ in found)
        scored = sum(len(ids) for _, answers in found for ids in answers.values())
        self.console.print(
            f"{len(found):,} records: {prompts:,} tokens of prompts, {scored:,} scored tokens of answers"
        )
        longest = [len(prompt) + max(map(len, answers.values())) for prompt, answers in found]
        if over := sum(length > config.sequence_length for length in longest):
            self.console.print(f"{over:,} are longer than {config.sequence_length:,} tokens and dropped")
        if count is not None and len(read) >= count:
            self.console.print(f"Only the first {count:,} records of each source were read; {ALL} reads every one.")

    def marked(self, ids: Sequence[int], mask: Sequence[bool]) -> Text:
        """Return the text of tokens with the trained ones marked, decoded from the ids that are trained."""
        text = Text()
        bare = not self.console.is_terminal or self.console.no_color
        for trained, run in groupby(zip(mask, ids, strict=True), key=itemgetter(0)):
            piece = self.tokenizer.decode([token for _, token in run])
            text.append(f"⟦{piece}⟧" if trained and bare else piece, style=TRAINED if trained else "dim")
        return text

    def _show_row(self, name: str, packing: Packing) -> None:
        """Print one packed row by document: the first with three documents, or with the most."""
        number, row = max(enumerate(packing.rows), key=lambda numbered: min(len(numbered[1].lengths), 3))
        self._rule(f"{name}: packed row {number + 1:,} of {len(packing.rows):,}")
        for index, (start, end) in enumerate(pairwise(row.cu_seqlens().tolist()), start=1):
            slots = f"slots {start:,} to {end - 1:,}, positions 0 to {end - start - 1:,}"
            self.console.print(f"▌document {index} of {len(row.lengths)}: {slots}", style=BORDER)
            self.console.print(self._edges(row, start, end))
        empty = packing.counts.sequence_length - len(row.input_ids)
        self.console.print(f"▌{empty:,} of {packing.counts.sequence_length:,} slots empty", style=BORDER, end="\n\n")

    def _edges(self, row: PackedRow, start: int, end: int) -> Text:
        """Return the tokens of a document, the first and last ones of a long document."""

        def part(first: int, last: int) -> Text:
            return self.marked(row.input_ids[first:last].tolist(), row.mask[first:last].tolist())

        if end - start <= 3 * EDGE:
            return part(start, end)
        between = Text(f" … {end - start - 2 * EDGE:,} tokens … ", style=BORDER)
        return Text.assemble(part(start, start + EDGE), between, part(end - EDGE, end))

    def _show_shares(self, name: str, shares: Sequence[SourceShare]) -> None:
        self._rule(f"{name}: what is trained")
        table = Table(box=None, pad_edge=False, header_style="")
        table.add_column("source", overflow="fold")
        for title in ("records", "taken", "tokens", "of the mix", "trained", "of its tokens"):
            table.add_column(title, justify="right")
        for cells in _lines(shares):
            table.add_row(*map(styled, cells))
        self.console.print(table, soft_wrap=False, end="\n\n")

    def _rule(self, title: str) -> None:
        self.console.rule(styled(title), align="left")


def _answers(renderer: ChatRenderer, record: records.Record) -> tuple[list[int], dict[str, list[int]]]:
    """Return the prompt of a record, and the scored tokens of its answers by name."""
    if isinstance(record, records.Preference):
        pair = renderer.preference(record)
        return pair.prompt, {"chosen": pair.chosen, "rejected": pair.rejected}
    if not isinstance(record, records.Feedback):
        raise TypeError(f"{type(record).__name__} has no answers to score")
    chat = records.Conversation(messages=(*record.prompt, *record.completion), where=record.where, tools=record.tools)
    rendered = renderer.conversation(chat, last_only=True)
    scored = [token for token, trained in zip(rendered.ids, rendered.mask, strict=True) if trained]
    return rendered.ids[: rendered.mask.index(True)], {"good" if record.label else "bad": scored}


def _limited(source: Source, count: int | None) -> Source:
    limits = [limit for limit in (source.limit, count) if limit is not None]
    return replace(source, limit=min(limits, default=None))


def _has_more(sources: Sequence[Source], share: SourceShare, count: int) -> bool:
    """Tell if the recipe may take more than the first ``count`` records of a source."""
    source = sources[share.origin.number]
    return share.records >= round(count * source.weight) and (source.limit is None or source.limit > count)


def _lines(shares: Sequence[SourceShare]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each source, and of all together when there are several."""
    for share in shares:
        yield _cells(
            Path(share.origin.path).name,
            share.records,
            share.taken,
            share.tokens,
            share.share,
            share.trained,
        )
    if len(shares) > 1:
        records, taken, tokens, trained = (
            sum(getattr(share, key) for share in shares) for key in ("records", "taken", "tokens", "trained")
        )
        yield _cells("all", records, taken, tokens, 1.0, trained)


def _cells(name: str, records: int, taken: int, tokens: int, share: float, trained: int) -> tuple[str, ...]:
    rate = trained / max(tokens, 1)
    return name, f"{records:,}", f"{taken:,}", f"{tokens:,}", f"{share:.1%}", f"{trained:,}", f"{rate:.1%}"
