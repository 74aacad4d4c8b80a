"""The spend cap: what it says, when it stops a run, and how the run resumes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from posttrain.config.money import Amount, amount, price_of
from posttrain.context import StageContext
from posttrain.errors import BadInput, Interrupted, SpendCapReached
from posttrain.gate.spec import GateRequest
from tests.support.fakes import Script, only_run, run_recipe, write_project


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5 USD", 5, "USD"), ("5usd", 5, "USD"), ("USD 5", 5, "USD"), ("$1,000.50", 1000.5, "USD"), ("3 €", 3, "EUR"),
        ("2 hours", 2, "hours"), ("2h", 2, "hours"), ("90 minutes", 1.5, "hours"), ("90min", 1.5, "hours"),
        ("36 s", 0.01, "hours"), ("1 day", 24, "hours"),
    ],
)  # fmt: skip
def test_amounts_of_money_and_time(text: str, value: float, unit: str) -> None:
    found = amount(text)
    assert found is not None
    assert found.value == pytest.approx(value)
    assert found.unit == unit


@pytest.mark.parametrize("text", ["5", "USD", "0 USD", "-5 USD", "5 USD or so", "nan USD", "1e999 h", "5 cows", ""])
def test_what_is_no_amount(text: str) -> None:
    assert amount(text) is None


def test_prices_of_devices() -> None:
    assert price_of("NVIDIA H100 80GB HBM3", 8) == Amount(value=2.5, unit="USD")
    assert price_of(None, 4) == Amount(value=0.2, unit="USD")
    assert price_of("Some GPU", 4) is None


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("posttrain.run.spending.time", clock)
    return clock


@pytest.mark.parametrize("cap", ["1 hour", "1.80 EUR"])
def test_a_run_stops_at_its_cap_and_resumes_with_a_higher_one(working_folder: Path, cap: str, clock: Clock) -> None:
    write_project(working_folder)
    script = Script()

    def train(context: StageContext) -> None:
        clock.now += 3599
        until = time.monotonic() + 2
        while time.monotonic() < until:  # the watch looks twice a second
            assert not context.stop_requested()
            time.sleep(0.01)
        clock.now += 1
        until = time.monotonic() + 60
        while not context.stop_requested() and time.monotonic() < until:
            time.sleep(0.01)
        raise Interrupted("stopped after step 3")

    script.during_training = train
    words = [f"spend_cap='{cap}'", "price_per_hour='1.80 EUR'"]
    said = r"cap of .* is reached.*: stopped after step 3\. With a higher spend_cap"
    with pytest.raises(SpendCapReached, match=said):
        run_recipe(script, *words)
    assert json.loads((only_run() / "run.json").read_text())["state"] == "interrupted"
    with pytest.raises(BadInput, match="this run has taken"):
        run_recipe(script, *words)
    script.during_training = lambda context: None
    assert run_recipe(script, "spend_cap='2 hours'").state.state == "done"
    assert only_run()


def test_a_cap_holds_while_answers_are_scored(working_folder: Path, clock: Clock) -> None:
    write_project(working_folder)
    script = Script()

    def score(request: GateRequest) -> None:
        clock.now += 7200
        time.sleep(60)

    script.during_evaluation = score
    with pytest.raises(SpendCapReached):
        run_recipe(script, "spend_cap='2 hours'")
    assert script.judged == ["sft"]
