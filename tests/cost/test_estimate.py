"""Tokens, steps, time and machines of a plan, against counts by hand and the figures that others published."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.commands.estimate import machine_line
from posttrain.config.schema import Method, Source
from posttrain.cost import machines
from posttrain.cost.architecture import Architecture, find_architecture
from posttrain.cost.estimate import Estimate, Pace, Volume, duration, estimate, lines, measured_speed
from posttrain.cost.machines import named_machine, this_machine
from posttrain.cost.memory import Training
from posttrain.data.sizes import read_sizes
from posttrain.errors import BadInput

LORA = Training(method=Method.lora, rank=8, tokens=4096, checkpointing=True, loss_chunk=1024, compute_bytes=2)
PACE = Pace(rows=8, sequence_length=1000, epochs=2, max_steps=None, packed=True)
VOLUME = Volume(records=1000, families=[(100, ()), (300, ())], scored=200, within=0.1)


def llama() -> Architecture:
    found = find_architecture("meta-llama/Llama-3.1-8B")
    assert found is not None
    return found


def planned(pace: Pace = PACE, volume: Volume = VOLUME, training: Training = LORA, on: str = "H100") -> Estimate:
    return estimate(llama(), training, pace, volume, named_machine(on, 1))


def test_steps_are_the_packed_rows_over_those_of_a_step() -> None:
    found = planned()
    # 1,000 records of 200 tokens are 207 rows of 1,000 slots at 97 %, so 26 steps of 8 an epoch
    assert found.steps.likely == 52
    assert found.tokens.likely == 400_000
    assert found.tokens.low < 400_000 < found.tokens.high
    assert planned(replace(PACE, packed=False)).steps.likely == 250


def test_max_steps_ends_within_an_epoch_and_takes_its_share_of_the_data() -> None:
    found = planned(replace(PACE, max_steps=13))
    assert (found.steps.low, found.steps.high) == (13, 13)
    assert found.tokens.likely == pytest.approx(13 * 8 * 970)
    assert planned(replace(PACE, max_steps=500)).steps.likely == 52


def test_time_follows_tokens_devices_and_what_is_computed() -> None:
    seconds = planned().seconds
    assert seconds is not None
    assert seconds.low < seconds.likely < seconds.high

    def likely(found: Estimate) -> float:
        assert found.seconds is not None
        return found.seconds.likely

    assert likely(planned(on="4 x H100")) == pytest.approx(seconds.likely / 4)
    assert likely(planned(training=replace(LORA, checkpointing=False))) < seconds.likely
    assert likely(planned(training=replace(LORA, method=Method.full))) > seconds.likely
    assert likely(planned(on="L4")) > 5 * seconds.likely
    assert likely(planned(replace(PACE, referenced=True))) > 1.2 * seconds.likely
    asked = replace(PACE, packed=False, answers=8, answer_tokens=256)
    assert likely(planned(asked)) > 8 * likely(planned(replace(PACE, packed=False)))


def test_a_device_without_figures_has_no_time() -> None:
    found = planned(on="24GB")
    assert found.seconds is None
    assert [*lines(found, 1, 2.0, "USD")] == ["47 to 57 steps, 400 thousand tokens"]


def test_steps_that_were_taken_stand_above_the_table() -> None:
    speed = measured_speed(llama(), LORA, PACE, VOLUME, tokens=1000, seconds=4.0)
    found = estimate(llama(), LORA, PACE, VOLUME, named_machine("24GB", 1), speed)
    assert found.seconds is not None
    assert found.seconds.likely == pytest.approx(400_000 / 1000 * 4.0)
    assert found.source == "as two steps here took"


def test_a_speed_that_nobody_measured_has_wider_bounds() -> None:
    machine = named_machine("H100", 1)
    found, measured = (
        estimate(llama(), LORA, PACE, VOLUME, each).seconds for each in (machine, replace(machine, measured=True))
    )
    assert found is not None
    assert measured is not None
    assert found.likely == measured.likely
    assert found.low < 0.85 * measured.low
    assert found.high > 1.2 * measured.high


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2_400 * 86_400, "2,400 days"), (99.4 * 86_400, "99 days"), (5_400, "90 minutes"), (7.84, "7.8 seconds")],
)
def test_a_time_has_two_digits_and_no_exponent(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_cost_is_the_price_of_all_devices() -> None:
    found = planned(on="8 x H100")
    assert found.seconds is not None
    text = [*lines(found, 8, 2.5, "USD")][1]
    assert f"{found.seconds.likely * 8 * 2.5 / 3600:,.2f} USD" in text
    assert "not measured" in text


@pytest.mark.parametrize(
    ("word", "count", "memory", "known"),
    [
        ("H100", 1, 80e9, True),
        ("8 x H100", 8, 80e9, True),
        ("2xRTX4090", 2, 24e9, True),
        ("NVIDIA A100-SXM4-80GB", 1, 80e9, True),
        ("24GB", 1, 24e9, False),
        ("8 x 80 GB", 8, 80e9, False),
        ("24GiB", 1, 24 * 2**30, False),
    ],
)
def test_a_machine_is_named_by_device_or_memory(word: str, count: int, memory: float, known: bool) -> None:
    found = named_machine(word, 1)
    assert (found.count, found.memory, found.rates is not None) == (count, memory, known)


@pytest.mark.parametrize("word", ["H1000000", "0 x H100", "abacus", "GB", "-3GB", ""])
def test_a_machine_without_figures_is_rejected(word: str) -> None:
    with pytest.raises(BadInput, match=r"names no GPU with figures and no memory\n.*24GB"):
        named_machine(word, 1)


def test_a_plan_on_a_mac_says_that_metal_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(machines, "_cpu_name", lambda: "Apple M2")
    assert machine_line(this_machine(1, 1)).startswith("Apple M2 by Metal, in float32, ")
    monkeypatch.setenv("POSTTRAIN_DEVICE", "cpu")
    assert machine_line(this_machine(1, 1)).startswith("Apple M2, ")


def test_this_machine_has_a_name_and_memory() -> None:
    found = this_machine(2, 2)
    assert found.name
    assert found.count == 2


def test_sizes_are_read_from_the_first_rows(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [{"prompt": "a" * 10, "completion": "b" * 30}] * 250
    file.write_text("\n".join(map(json.dumps, rows)))
    found = read_sizes([Source(path=str(file))], "conversations")
    assert found is not None
    assert (found.records, len(found.sample)) == (250, 100)
    assert (found.sample[0].shared, found.sample[0].trained, found.sample[0].turns) == (40, 30, 2)
    file.write_text("\n".join([json.dumps({"prompt": "p", "chosen": "abc", "rejected": "de"})] * 3))
    pairs = read_sizes([Source(path=str(file))], "preferences")
    assert pairs is not None
    assert pairs.sample[0].answers == (3, 2)
    assert read_sizes([Source(path="owner/elsewhere")], "conversations") is None
    file.write_text("{")
    assert read_sizes([Source(path=str(file))], "conversations") is None
