"""Settings that are proposed for given devices: what they change, that they fit, and why none do."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.commands import plan as command
from posttrain.config.compose import compose
from posttrain.cost.fit import fit
from posttrain.cost.machines import named_machine
from posttrain.errors import BadInput
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.launch.shape import needs_of
from posttrain.plan import Plan, make_plan

RECIPE = "recipe=llama8b_sft_dpo"


@pytest.fixture(scope="module")
def host() -> Host:
    return plugins.load()


def planned(host: Host, *words: str) -> Plan:
    return make_plan(compose(host, [RECIPE, *words]), host)


@pytest.mark.parametrize(
    ("devices", "given", "expected"),
    [
        ("80GB", [], []),
        ("24GB", [], ["sft.per_device_batch_size=1", "sft.gradient_accumulation=64"]),
        ("30GB", ["sft.gradient_checkpointing=false"], ["sft.gradient_checkpointing=true"]),
        ("12GB", [], ["variant=qlora"]),
        ("48GB", ["variant=full"], ["variant=lora"]),
        ("8 x 80GB", ["variant=full"], []),
    ],
)
def test_a_proposal_fits_and_a_step_keeps_its_rows(
    host: Host, working_folder: Path, devices: str, given: list[str], expected: list[str]
) -> None:
    machine = named_machine(devices, 1)
    found = fit(planned(host, *given), machine)
    assert not found.reason
    assert {*expected} <= {*found.words}
    assert bool(expected) == bool(found.words)
    before, after = planned(host, *given), planned(host, *given, *found.words)
    for first, second, need in zip(before.steps, after.steps, needs_of(after, machine).values(), strict=True):
        rows = [each.config.per_device_batch_size * each.config.gradient_accumulation for each in (first, second)]  # type: ignore[attr-defined]
        assert rows[0] == rows[1]
        assert first.config.sequence_length == second.config.sequence_length  # type: ignore[attr-defined]
        assert need.memory.total <= 0.9 * (machine.memory or 0)


def test_what_cannot_fit_is_said_with_its_largest_part_and_what_would_help(host: Host, working_folder: Path) -> None:
    assert "most of it is weights" in fit(planned(host), named_machine("6GB", 1)).reason
    assert "more devices" in fit(planned(host), named_machine("6GB", 1)).reason
    long = planned(host, "sft.sequence_length=65536")
    assert "sft.sequence_length=" in fit(long, named_machine("12GB", 1)).reason
    assert "nothing is known" in fit(planned(host, "model.path=owner/unknown"), named_machine("24GB", 1)).reason


def test_the_plan_with_the_proposal_follows_it(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([RECIPE, "fit=2 x 12GB"]) == 0
    first, *_, text = capsys.readouterr().out.partition("\n")
    assert first.startswith("fit    launch=local launch.processes=2 ")
    assert "on     2 x a device with 12 GB" in text
    assert "warning: a device has" not in text
    with pytest.raises(BadInput, match="names the devices"):
        command.main([RECIPE, "fit=24GB", "on=H100"])
