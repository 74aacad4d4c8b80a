"""Preferences on several processes: the numbers of one process, to rounding, and references computed once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from preference_support import several
from preference_support.contexts import content, weights, write_parent

from tests.support.training import together

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[3]
WORLDS = {2: ["dpo", "dpo_full", "kto"], 3: ["aot"]}
KEPT = "reference log-probabilities: kept from an earlier run"


@pytest.fixture(scope="module")
def sft_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parents, by kind."""
    folder = tmp_path_factory.mktemp("parents")
    for kind in {kind for kind, _ in several.CASES.values()}:
        write_parent(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def single(sft_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on one process."""
    folder = tmp_path_factory.mktemp("single")
    for name in several.CASES:
        several.train(sft_models, folder / name / "whole", name)
    return folder


@pytest.fixture(scope="module", params=list(WORLDS))
def launched(request: pytest.FixtureRequest, sft_models: Path, tmp_path_factory: Any) -> tuple[int, Path]:
    """The same on several processes."""
    world: int = request.param
    output = tmp_path_factory.mktemp(f"world{world}")
    places = [ROOT, ROOT / "plugins/preference", Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    together(
        world, "preference_support.several", str(sft_models), str(output), ",".join(WORLDS[world]),
        environment={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
    )  # fmt: skip
    return world, output


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    apart = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return math.sqrt(apart / sum(float(each.double().square().sum()) for each in expected.values()))


def test_what_is_trained_and_reported_is_what_one_process_trains(launched: tuple[int, Path], single: Path) -> None:
    world, output = launched
    for name in WORLDS[world]:
        expected = report(single / name / "whole")
        assert len(expected["steps"]) == 5
        for engine in several.ENGINES:
            whole = output / engine / name / "whole"
            assert distance(weights(whole / "output"), weights(single / name / "whole" / "output")) <= 1e-5
            found = report(whole)
            for key, figure in expected["metrics"].items():
                wanted = pytest.approx(figure, rel=1e-4) if isinstance(figure, float) else figure
                assert found["metrics"][key] == wanted, (engine, name, key)
            assert found["steps"].keys() == expected["steps"].keys()
            for step, figures in expected["steps"].items():
                assert found["steps"][step] == pytest.approx(figures, rel=1e-4, abs=1e-6), (engine, name, step)


def test_a_stopped_stage_goes_on_to_the_same_bytes_from_the_references_of_its_start(
    launched: tuple[int, Path],
) -> None:
    world, output = launched
    for name in set(WORLDS[world]) & set(several.RESUMED):
        for engine in several.ENGINES:
            whole, resumed = (output / engine / name / kind for kind in ("whole", "resumed"))
            assert content(resumed / "output") == content(whole / "output"), (engine, name)
            told = report(resumed)
            assert told["started"] == [4, 2]
            assert KEPT in told["notes"]
            assert KEPT not in report(whole)["notes"]
            assert told["metrics"] == report(whole)["metrics"]
            # one entry for one stage: whatever process began, and whichever went on
            assert len([each for each in (output / engine / name / "kept/references").iterdir() if each.is_dir()]) == 1


def test_references_are_those_of_one_process_under_the_same_name(launched: tuple[int, Path], single: Path) -> None:
    world, output = launched
    for name in WORLDS[world]:
        (expected,) = (single / name / "kept/references").iterdir()
        for engine in several.ENGINES:
            (found,) = (output / engine / name / "kept/references").iterdir()
            assert found.name == expected.name
            theirs = weights(expected)
            for tensor, each in weights(found).items():
                assert each.numpy() == pytest.approx(theirs[tensor].numpy(), rel=1e-6)
