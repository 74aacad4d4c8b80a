"""Advice about preferences: each rule names what departs, with its figure, and is silent otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from posttrain_preference.advice import ADVICE, Known
from posttrain_preference.methods import METHODS
from posttrain_preference.pairs import TokenPair
from posttrain_preference.rows import TokenRows
from posttrain_preference.stage import run
from preference_support.contexts import MakeContext

USUAL = Known(adapter=True, rows=2000, lengths=(100.0, 95.0), longer=0.52)


def told(stage: str = "dpo", known: Known = USUAL, **settings: Any) -> list[str]:
    return ADVICE.departures(METHODS[stage].settings(kind=stage, data="x.jsonl", **{"lr": 1e-5, **settings}), known)


@pytest.mark.parametrize("stage", METHODS)
def test_the_defaults_on_usual_data_depart_from_nothing(stage: str) -> None:
    assert told(stage) == []
    assert told(stage, replace(USUAL, adapter=False), lr=1e-6) == []


@pytest.mark.parametrize(
    ("known", "settings", "expected"),
    [
        ({}, {"lr": 1e-3}, "lr: 0.001 for an adapter; usual is 5e-7 to 5e-5"),
        ({"adapter": False}, {"lr": 1e-5}, "lr: 1e-05 for all weights; usual is"),
        ({}, {"beta": 2.0}, "beta: 2; usual is 0.01 to 0.5"),
        ({}, {"epochs": 6, "eval_share": 0.05}, "epochs: 6; usual is 1 to 3"),
        ({}, {"epochs": 2}, "eval_share: no eval records in 2 epochs"),
        ({"rows": 96}, {}, "gradient_accumulation: 3 optimizer steps for 96 rows"),
        ({}, {"max_steps": 5}, "gradient_accumulation: 5 optimizer steps for 2,000 rows"),
        ({}, {"gradient_accumulation": 1}, "gradient_accumulation: an optimizer step sees 4 rows"),
        ({"dropped": 100}, {}, "sequence_length: 100 rows (4.8%) are longer and dropped"),
        ({"repeated": 40}, {}, "data: 40 rows (2.0%) are the same as an earlier one"),
        ({"contradicted": 1}, {}, "data: 1 rows judge the other way round"),
        ({"overlap": 3}, {}, "eval_data: 3 eval rows are trained as well"),
        (
            {"lengths": (180.0, 90.0), "longer": 0.84},
            {},
            "data: chosen answers have 180 tokens on average against 90, and are longer in 84% of the pairs",
        ),
    ],
)
def test_a_departure_is_named_with_its_figure(known: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    (line,) = told(known=replace(USUAL, **known), **settings)
    assert line.startswith(expected)
    assert ", because " in line


def test_length_counts_for_sums_of_log_probabilities_alone() -> None:
    longer = replace(USUAL, lengths=(180.0, 90.0), longer=0.84)
    assert len(told("cpo", longer)) == 1
    assert told("cpo", longer, loss_type="ipo") == told("simpo", longer) == told("orpo", longer) == []
    assert told(known=longer, loss_type=["sigmoid_norm", "sft"]) == []
    assert told(known=replace(longer, rows=4), gradient_accumulation=2, epochs=25, eval_share=0.1)[1:] == []


def test_facts_are_those_of_the_rows() -> None:
    def pair(chosen: list[int], rejected: list[int]) -> TokenPair:
        return TokenPair([1], chosen, rejected, "x:1")

    rows = [pair([2, 3], [4]), pair([2, 3], [4]), pair([4], [2, 3]), pair([5, 6, 7], [4])]
    found = Known.of(TokenRows(noun="pairs", rows=rows, eval_rows=[rows[0], pair([9], [8])], dropped=1), adapter=True)
    assert found == Known(
        adapter=True, rows=4, dropped=1, repeated=1, contradicted=1, overlap=1, longer=0.75, lengths=(2.0, 1.25)
    )


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_stage_warns_before_it_trains(make_context: MakeContext, stage: str) -> None:
    context = make_context(stage=stage, records=4, lr=1e-2, max_steps=1, epochs=1)
    run(context)
    warned = context.metrics["warnings"]
    assert [line.split(":")[0] for line in warned] == ["lr", "gradient_accumulation", "gradient_accumulation"]


def test_the_readme_has_every_rule() -> None:
    assert ADVICE.table() in (Path(__file__).parents[1] / "README.md").read_text()
