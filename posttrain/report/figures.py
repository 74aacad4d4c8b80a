"""Figures of a stage as text: its data, and its cost in time, steps and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.report.run import RunReport, StageReport
from posttrain.report.scores import clock

DERIVED = ("epoch_tokens", "epoch_trained_tokens", "tokens", "trained_tokens")
"""Metrics of the manifest shown as lengths, shares and costs instead."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One line of the table of costs; an unknown figure is an empty text."""

    stage: str
    time: str
    steps: str
    tokens: str
    tokens_per_second: str


def costs(report: RunReport) -> list[Cost]:
    """Return time, steps and tokens of every stage, and of all stages when there are several."""
    lines = [_cost(stage) for stage in report.stages]
    seconds = [stage.entry.seconds for stage in report.stages if stage.entry.seconds is not None]
    tokens = [stage.entry.tokens for stage in report.stages if stage.entry.tokens is not None]
    total = Cost(stage="all", time=clock(sum(seconds)), steps="", tokens=f"{sum(tokens):,}", tokens_per_second="")
    return [*lines, total] if len(lines) > 1 and seconds else lines


def _cost(stage: StageReport) -> Cost:
    steps = stage.metrics.get("loss", [])
    rates = stage.metrics.get("tokens_per_second", [])
    return Cost(
        stage=stage.name,
        time=clock(stage.entry.seconds),
        steps=f"{steps[-1][0]:,}" if steps else "",
        tokens=f"{stage.entry.tokens:,}" if stage.entry.tokens is not None else "",
        tokens_per_second=f"{rates[-1][1]:,.0f}" if rates else "",
    )


def trained_share(stage: StageReport) -> float | None:
    """Return the share of the tokens that enter the loss; None when the manifest lacks the counts."""
    tokens, trained = (_number(stage.figures, key) for key in ("epoch_tokens", "epoch_trained_tokens"))
    return trained / tokens if tokens and trained is not None else None


def data_figures(stage: StageReport) -> list[tuple[str, str]]:
    """Return the figures of the stage's data by name: first lengths, then the manifest's other figures."""
    figures = stage.figures
    shown = [
        (key.replace("_", " "), _text(value))
        for key, value in figures.items()
        if key not in DERIVED and isinstance(value, int | float | str)
    ]
    return [*_lengths(stage), *shown, *_reach(figures.get("reach"))]


def _reach(kinds: Any) -> list[tuple[str, str]]:
    """Return the matrices that training reached, a line for each kind, with the share of the weights of all kinds."""
    keys = ("matrices", "weights", "trained_matrices", "trained_weights", "four_bit_weights")
    known = [kind for kind in kinds if all(isinstance(kind.get(key), int) for key in keys)] if _is_table(kinds) else []
    total = sum(kind["weights"] for kind in known)
    lines = []
    for kind in known:
        shares = [f"{kind['trained_weights'] / total:.1%} of all weights"] if total else []
        shares += [f"{kind['four_bit_weights'] / kind['weights']:.0%} in 4 bits"] if kind["four_bit_weights"] else []
        counts = f"{kind['trained_matrices']:,} of {kind['matrices']:,}"
        lines.append((f"trained {kind.get('kind')}", ", ".join([counts, *shares])))
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _lengths(stage: StageReport) -> list[tuple[str, str]]:
    figures, config = stage.figures, stage.manifest.get("config")
    tokens, records, rows = (_number(figures, key) for key in ("epoch_tokens", "records", "rows"))
    longest = _number(config, "sequence_length") if isinstance(config, dict) else None
    lines = []
    if tokens is not None:
        lines.append(("tokens per epoch", _text(tokens)))
    if tokens is not None and records:
        lines.append(("mean length of a record", f"{tokens / records:,.1f} tokens"))
    if tokens is not None and rows and longest:
        lines.append(("fill of the rows", f"{tokens / (rows * longest):.1%} of {longest:,.0f} tokens"))
    return lines


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return value if isinstance(value, int | float) else None


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
