"""Settings of a plugin that is no stage: checked, listed, completed, and part of what artifacts depend on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.artifact import Manifest, verify
from posttrain.config.compose import compose
from posttrain.errors import BadInput
from posttrain.host import plugins
from posttrain.plan import Plan, make_plan
from tests.support.command import complete
from tests.support.fakes import GATES, Script, run_recipe, write_project
from tests.support.installed import command, install, listed

FILTER = """\
from dataclasses import dataclass
from posttrain import Settings, hookimpl, number

@dataclass(kw_only=True)
class Words:
    word: str = "{word}"
    \"\"\"Records with this word are left out.\"\"\"
    most: int = number(3, least=0)
    \"\"\"How many words are allowed.\"\"\"

    def problems(self):
        return [("word", "is empty")] if not self.word else []

class Filter:
    def __init__(self, words):
        self.words = words

    @hookimpl(wrapper=True)
    def load_records(self, step):
        records = yield
        return [record for record in records if self.words.word not in repr(record)]

@hookimpl
def register_settings():
    return [Settings(name="words", summary="leave out records", config=Words, shapes_data={shapes})]

@hookimpl
def run_started(plan, directory):
    return Filter(plan.settings["words"])
"""


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> None:
    write_project(working_folder)


def bring(folder: Path, monkeypatch: pytest.MonkeyPatch, shapes: bool = True, word: str = "nothing") -> None:
    text = FILTER.format(shapes=shapes, word=word)
    install(folder / "site", monkeypatch, "filter", {f"filter_{abs(hash((str(folder), shapes, word)))}.py": text})


def planned(*words: str) -> Plan:
    host = plugins.load()
    return make_plan(compose(host, ["recipe=mine", *GATES, *words]), host)


def manifest(*words: str) -> Manifest:
    return verify(run_recipe(Script(), *words).path / "stages/sft/artifact").manifest


def test_they_are_typed_and_all_that_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(tmp_path, monkeypatch)
    plan = planned("words.word=spam")
    assert vars(plan.settings["words"]) == {"word": "spam", "most": 3}
    assert plan.resolved["words"] == {"word": "spam", "most": 3}
    wrong = ["words.wrod=spam", "words.most=many", "sft.max_step=3"]
    with pytest.raises(BadInput) as caught:
        planned(*wrong)
    assert [problem.where for problem in caught.value.problems] == wrong
    assert "Did you mean words.word?" in str(caught.value)
    assert "posttrain list words shows its settings" in str(caught.value)
    with pytest.raises(BadInput, match=r"words\.most: must be at least 0, not -1\nwords\.word: is empty"):
        planned("words.most=-1", "words.word=''")
    (tmp_path / "recipes" / "mine.yaml").open("a").write("word: {most: 2}\n")
    with pytest.raises(BadInput, match="Did you mean words"):
        planned()


def test_a_missing_one_is_asked_for_and_a_typo_ends_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(tmp_path, monkeypatch, word="???")
    with pytest.raises(BadInput, match=r"words\.word: has no value\n    Give words\.word=VALUE"):
        planned()
    result = command("plan", "recipe=mine", *GATES, "words.wrod=spam")
    assert result.returncode == 2
    assert "Did you mean words.word?" in result.stderr


def test_they_are_listed_with_their_help_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(tmp_path, monkeypatch)
    rows = json.loads(command("list", "settings", "--json").stdout)["settings"]
    summary = {"name": "words", "summary": "leave out records", "key": "words", "plugin": "filter (filter-plugin 1.0)"}
    assert summary in rows
    shown = command("list", "words").stdout
    assert "words.word: str = nothing\n      Records with this word are left out." in shown
    assert complete("posttrain recipe=mine words.w") == ["words.word="]


def test_those_that_shape_data_name_the_run_and_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = manifest()
    bring(tmp_path, monkeypatch)
    found = [manifest("words.word=spam"), manifest("words.word=eggs"), manifest("words.word=spam")]
    assert len(list(tmp_path.glob("runs/*/run.json"))) == 3
    assert [each.plugin_settings["words"]["word"] for each in found if each.plugin_settings] == ["spam", "eggs", "spam"]
    assert len({each.fingerprint for each in (before, *found)}) == 3
    assert found[0].plugins == ("filter (filter-plugin 1.0)",)
    assert before.plugin_settings is None


def test_another_word_trains_again_on_other_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(tmp_path, monkeypatch)
    rows = [{"prompt": prompt, "completion": "b"} for prompt in ("prompt_a", "prompt_b")]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    seen: list[int] = []
    for word in ("nothing", "nothing", "prompt_a"):
        script = Script()
        script.during_training = lambda context: seen.append(len(context.records))
        run_recipe(script, f"words.word={word}", "stages=[sft]")
    assert seen == [2, 1]


def test_those_that_do_not_shape_data_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FILTER.format(shapes=False, word="nothing").partition("@hookimpl\ndef run_started")[0]
    before = manifest()
    install(tmp_path / "site", monkeypatch, "filter", {f"filter_{abs(hash(str(tmp_path)))}.py": text})
    assert manifest("words.word=spam") == before
    assert len(list(tmp_path.glob("runs/*/run.json"))) == 1


SETTINGS = """\
from dataclasses import dataclass
from posttrain import Settings, Stage, StageConfig, hookimpl

@dataclass
class Found:
    steps: {steps}

class Bare:
    pass

@hookimpl
def register_settings():
    return [{settings}]
"""


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("Settings(name='seed', summary='', config=Found)", "every recipe has a key of this name"),
        ("Settings(name='sft', summary='', config=Found)", "'sft' is already registered by posttrain"),
        ("*2 * [Settings(name='mine', summary='', config=Found)]", "it registers 'mine' twice"),
        ("Settings(name='null', summary='', config=Found)", "'null' cannot be the name of settings"),
        ("Settings(name='mine', summary='', config=Bare)", "the config of settings 'mine' must be a dataclass"),
        ("Settings(name='mine', summary='', config=Found, group='gate')", "must be tracker, not 'gate'"),
        ("'mine'", "register_settings must return Settings objects, not str"),
        ("3", "register_settings must return Settings objects, not int"),
    ],
)
def test_settings_that_cannot_be_used_leave_their_plugin_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, says: str
) -> None:
    text = SETTINGS.format(steps="int = 3", settings=settings)
    install(tmp_path / "site", monkeypatch, "bad", {f"bad_own_{abs(hash(str(tmp_path)))}.py": text})
    assert says in plugins.load().plugins["bad"].reason


@pytest.mark.parametrize(
    ("steps", "says"), [("int", "TypeError: "), ("set[int] = None", "Unexpected type"), ("int = 'three'", "Integer")]
)
def test_settings_that_nothing_can_be_made_of_break_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str, says: str
) -> None:
    text = SETTINGS.format(steps=steps, settings="Settings(name='mine', summary='', config=Found)")
    install(tmp_path / "site", monkeypatch, "bad", {f"bad_own_{abs(hash(str(tmp_path)))}.py": text})
    host = plugins.load()
    make_plan(compose(host, ["recipe=mine", *GATES]), host)
    assert says in host.plugins["bad"].reason
    assert "mine" not in host.settings
    assert listed()["trackers"]["state"] == "loaded"
