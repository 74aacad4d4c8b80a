"""The name of a run's directory: it says what the command line set, and resuming never depends on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from posttrain.config.compose import compose
from posttrain.host import plugins
from posttrain.plan import make_plan
from posttrain.run.name import LONGEST_LABEL, label_of
from tests.support.command import main
from tests.support.fakes import GATES, Script, run_recipe, scripted_host, write_project


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> None:
    write_project(working_folder)


def names() -> list[str]:
    """Names of the runs, without their digests."""
    found = sorted(path.parent.name for path in Path("runs").glob("*/run.json"))
    assert all(re.fullmatch(r".*-[0-9a-f]{12}", name) for name in found)
    return [name[:-13] for name in found]


def label(*words: str) -> str:
    host = plugins.load()
    return label_of(make_plan(compose(host, ["recipe=mine", *GATES, *words]), host))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ""),
        (["seed=7", "sft.lr=1e-4"], "seed_7-lr_1e-4"),
        (["sft.lr=1e-4", "dpo.lr=2e-6"], "sft.lr_1e-4-dpo.lr_2e-6"),
        (["sft.lora.r=8", "variant=lora"], "r_8-variant_lora"),
        (["sft.data=./train.jsonl", "stages=[sft,dpo]"], "data_train.jsonl-stages_sft-dpo"),
        # what the digest does not cover: another value resumes the same run
        (["sft.gate.on_fail=warn", "+gate@sft.gate=none", "spend_cap='2 hours'", "output_root=else"], ""),
        (["sft.checkpoint_minutes=3", "engine=ddp", "launch=local", "launch.processes=2", "data_workers=2"], ""),
    ],
)
def test_the_label_has_what_the_command_line_sets(words: list[str], expected: str) -> None:
    assert label(*words) == expected


def test_a_label_is_short_and_means_nothing_to_a_shell_or_another_command() -> None:
    Path("a long folder's name $(with) all sorts").mkdir()
    folder = Path("a long folder's name $(with) all sorts/träin=1,2;file of a very long name.jsonl")
    folder.write_bytes(Path("train.jsonl").read_bytes())
    data = f'sft.data="{folder}"'
    assert label(data) == "data_tr-in-1-2-file-of-a"
    found = label(data, "seed=3", "sft.lora.dropout=0.123456", "dpo.beta=0.123456", "dpo.lr=0.123456")
    assert found == "seed_3-dropout_0.123456-beta_0.123456-lr_0.123456"  # of too many, those of short texts
    assert len(found) <= LONGEST_LABEL


def test_members_of_a_sweep_are_named_by_what_it_varies_and_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    host = scripted_host(script)
    monkeypatch.setattr("posttrain.host.plugins.load", lambda: host)
    assert main("-m", "recipe=mine", "sft.lr=1e-5,2e-5", "dpo.lr=1e-6", *GATES) == 0
    first = names()
    assert first == ["mine-sft.lr_1e-05-dpo.lr_1e-6", "mine-sft.lr_2e-05-dpo.lr_1e-6"]
    assert main("-m", "recipe=mine", "sft.lr=1e-5,2e-5", "dpo.lr=1e-6", *GATES) == 0
    assert names() == first
    assert len(script.trained) == 4


def test_the_same_settings_resume_a_run_whatever_its_name_says() -> None:
    script = Script()
    run = run_recipe(script, "seed=7")
    assert names() == ["mine-seed_7"]
    run_recipe(script, "++seed=7", "sft.checkpoint_minutes=3")
    recipe = Path("recipes/mine.yaml")
    recipe.write_text(recipe.read_text() + "seed: 7\n")
    run_recipe(script)
    assert names() == ["mine-seed_7"]
    plain = run.path.rename(Path("runs") / f"mine-{run.path.name[-12:]}")  # a run of the recipe itself
    run_recipe(script, "seed=7")
    assert [path.parent for path in Path("runs").glob("*/run.json")] == [plain]
    assert script.trained == ["sft", "dpo"]


def test_another_recipe_of_the_same_settings_has_a_run_of_its_own() -> None:
    script = Script()
    Path("recipes/mine-seed_0.yaml").write_bytes(Path("recipes/mine.yaml").read_bytes())
    run_recipe(script, "recipe=mine-seed_0")
    run_recipe(script)
    assert names() == ["mine", "mine-seed_0"]
    assert script.trained == ["sft", "dpo"]  # its artifacts are linked
