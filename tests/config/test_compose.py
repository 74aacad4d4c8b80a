from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.compose import compose
from posttrain.config.paths import shipped
from posttrain.errors import BadInput, PluginFailed, nearest
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.plan import Plan, make_plan
from tests.support.recipes import GIVEN, RECIPES


def plan(host: Host, *overrides: str) -> Plan:
    return make_plan(compose(host, overrides), host)


def problems(host: Host, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        plan(host, *overrides)
    return str(caught.value)


def recipe(folder: Path, text: str, name: str = "mine") -> None:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_composes(host: Host, name: str, variant: str) -> None:
    for file in ("a.json", "a.jsonl"):
        Path(file).write_text("[]")
    result = plan(host, f"recipe={name}", f"variant={variant}", *GIVEN.get(name, []))
    assert result.steps[0].stage.name == "sft"
    assert result.steps[0].config.method.value == variant  # type: ignore[attr-defined]


def test_nothing_is_misspelt_in_a_defaults_list() -> None:
    """Hydra ignores a misspelt keyword of a defaults list without a word."""
    for path in shipped("recipes").glob("*.yaml"):
        for line in path.read_text().split("  - _self_")[0].splitlines():
            if line.startswith("  - "):
                assert line.startswith(("  - /", "  - override /")), f"{path.name}: {line}"


def test_settings_come_from_variant_recipe_and_command_line(host: Host) -> None:
    assert plan(host, "recipe=llama8b_sft_dpo").steps[0].config.lr == 2e-4  # type: ignore[attr-defined]
    assert plan(host, "recipe=llama8b_sft_dpo", "variant=full").steps[0].config.lr == 1e-5  # type: ignore[attr-defined]
    assert plan(host, "recipe=llama8b_sft_dpo", "sft.lr=3e-4").steps[0].config.lr == 3e-4  # type: ignore[attr-defined]


def test_stages_are_selected_added_removed_and_swapped(host: Host) -> None:
    def names(*overrides: str) -> list[str]:
        return [step.name for step in plan(host, "recipe=quickstart", *overrides).steps]

    assert names() == ["sft", "dpo", "safety"]
    assert names("stages=[sft]") == ["sft"]
    assert names("~stage@dpo") == ["sft", "safety"]
    assert names("~stage@safety") == ["sft", "dpo"]
    assert names("stages=[sft,safety,dpo]") == ["sft", "safety", "dpo"]
    added = ["+stage@dpo2=dpo", "dpo2.data=a/b", "+gate@dpo2.gate=none"]
    assert names(*added) == ["sft", "dpo", "safety", "dpo2"]
    assert names(*added, "stages=[sft,dpo2,dpo]") == ["sft", "dpo2", "dpo"]


def test_gates_and_models_of_ones_own_are_found_in_the_folders_that_are_named(host: Host, tmp_path: Path) -> None:
    first, second = tmp_path / "it's one", tmp_path / "two, [2]"
    for folder, group, text in ((first, "gate", "enabled: false\n"), (second, "model", "path: some/model\n")):
        (folder / group).mkdir(parents=True)
        (folder / group / "mine.yaml").write_text(text)
    chosen = ["gate@sft.gate=mine", "model=mine", "--config-dir", str(first), f"-cd={second}"]
    found = plan(host, "recipe=quickstart", *chosen)
    assert not found.steps[0].gate.enabled
    assert found.model.path == "some/model"
    assert found.words == ("recipe=quickstart", *chosen)


def test_every_problem_is_reported_at_once(host: Host) -> None:
    text = problems(host, "recipe=quickstart", "sft.lrr=1", "dpo.lr=abc", "seeed=3", "model=quick", "sft.epochs=x")
    for expected in (
        "Did you mean sft.lr?",
        "dpo.lr=abc",
        "Did you mean seed?",
        "Did you mean quickstart?",
        "sft.epochs=x",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["recipe=quickstrat"], "Did you mean quickstart?"),
        ([], "Add recipe=NAME"),
        (["recipe=quickstart", "stages=[dpo,sft]"], "SFT is mandatory and first"),
        (["recipe=quickstart", "stages=[dpo]"], "SFT is mandatory and first"),
        (["recipe=quickstart", "stages=[]"], "SFT is mandatory and first"),
        (["recipe=quickstart", "stages=sft"], "must be a list"),
        (["recipe=quickstart", "stages=[sft,dop]"], "Did you mean dpo?"),
        (["recipe=quickstart", "stages=[sft,dpo,dpo]"], "occurs twice"),
        (["recipe=quickstart", "start_from=x"], "the pipeline runs SFT itself"),
        (["recipe=quickstart", "+stage@second=sft", "second.data=a/b", "+gate@second.gate=none"], "SFT a second time"),
        (["recipe=quickstart", "gate@sft.gate=quickstrt"], "Did you mean quickstart?"),
        (["recipe=quickstart", "gate@sft.gate=mine"], "read from DIR/gate/NAME.yaml with --config-dir DIR"),
        (["recipe=quickstart", "--jsn"], "--jsn: is no flag of this command"),
        (["recipe=quickstart", "nonsense"], "nonsense: is not key=value"),
        (["recipe=quickstart", "--config-dir", "nowhere"], "there is no directory nowhere"),
        (["recipe=quickstart", "--config-dir"], "--config-dir: names no directory"),
        (["recipe=mine"], "Your own recipes are read from ./recipes/NAME.yaml"),
        (["recipe=quickstart", "+stage@x=dppo"], "Did you mean dpo?"),
        (["recipe=smollm2_sft_dpo"], "data.path: has no value"),
        (["recipe=quickstart", "eval_data=a.jsonl"], "Did you mean sft.eval_data?"),
        (["recipe=quickstart", "sft.lr=[1]"], "sft.lr"),
        (["recipe=quickstart", "sft.lr=abc"], "sft.lr=abc: 'abc' is not a number"),
        (["recipe=quickstart", "model.dtype=float16"], "unless the loss is scaled"),
        (["recipe=quickstart", "sft.epochs=x"], "sft.epochs=x: 'x' is not an integer"),
        (["recipe=quickstart", "sft.packing=maybe"], "sft.packing=maybe: 'maybe' is neither true nor false"),
        (["recipe=quickstart", "sft.lr=null"], "sft.lr=null: sft.lr cannot be null"),
        (["recipe=quickstart", "sft.method=loora"], "sft.method=loora: 'loora' is not one of full, lora, qlora"),
        (["recipe=quickstart", "sft.gate.tasks.x.role=lift"], "add a +: +sft.gate.tasks.x.role=lift"),
        (["recipe=quickstart", "sft.epochs=-1"], "sft.epochs"),
        (["recipe=quickstart", "seed=-1"], "seed"),
        (["recipe=quickstart", "sft.gate.confidence=2"], "between 0.5 and 1"),
        (["recipe=quickstart", "sft.gate.against=[bse]"], "must name base, parent or both"),
        (["recipe=quickstart", "sft.data={pth: x}"], "Did you mean path?"),
        (["recipe=quickstart", "sft.data={path: x.jsonl, weight: 0}"], "must be above 0"),
        (["recipe=quickstart", "sft.data={path: x.jsonl, weight: inf}"], "must be above 0 and finite"),
        (["recipe=quickstart", "sft.data=[]"], "names no source"),
        (["recipe=quickstart", "sft.data=no/such/file.jsonl"], "no such file"),
        (["recipe=quickstart", "model.path=./nowhere"], "nowhere"),
        (["recipe=quickstart", "sft.lr=1 2"], "sft.lr"),
        (["recipe=quickstart", "sft.lr"], "sft.lr"),
        (["recipe=quickstart", "+sft.lr=1"], "Leave out the +"),
        (["recipe=quickstart", "sft.lr=1e-4,2e-4"], "--multirun"),
    ],
)  # fmt: skip
def test_each_problem_says_how_to_mend_it(host: Host, overrides: list[str], expected: str) -> None:
    assert expected in problems(host, *overrides)


def test_a_user_recipe_is_found_and_shadows(host: Host, tmp_path: Path) -> None:
    recipe(
        tmp_path, "defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]\nmodel: {path: a/b}\nsft: {data: c/d}\n"
    )
    assert plan(host, "recipe=mine").model.path == "a/b"
    recipe(tmp_path, HEAD.replace("a/b", "x/y") + "sft: {data: c/d}\n", "quickstart")
    assert plan(host, "recipe=quickstart").model.path == "x/y"


HEAD = "defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]\nmodel: {path: a/b}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + "sft: {data: c/d, lrr: 1, epoch: 2}\n", "Did you mean sft.lr?"),
        (HEAD + "sft: {data: c/d, lrr: 1, epoch: 2}\n", "Did you mean sft.epochs?"),
        (HEAD + "sft: {data: c/d, lr: fast}\n", "sft.lr"),
        (HEAD + "sft: {data: c/d}\nsftt: {lr: 1}\n", "'sftt' is neither a setting nor a stage"),
        (HEAD + "sft: {data: c/d}\nhydra: {run: {dir: x}}\n", "a recipe is data"),
        (HEAD + "sft: {data: {_target_: os.system}}\n", "a recipe is data"),
        (HEAD + "sft: {data: '${oc.env:HOME}'}\n", "cannot use the resolver 'oc.env'"),
        (HEAD + "sft: {data: '${nowhere}'}\n", "nowhere"),
        ("[1, 2]\n", "must be a mapping"),
        ("a: b: c\n", "recipe"),
    ],
)
def test_problems_inside_a_recipe(host: Host, tmp_path: Path, text: str, expected: str) -> None:
    recipe(tmp_path, text)
    assert expected in problems(host, "recipe=mine")


def test_a_recipe_that_needs_a_failed_plugin_says_so(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import EntryPoint, entry_points

    names = ("mine", "theirs")
    failing = [EntryPoint(name=name, value="no_such_module", group=plugins.GROUP) for name in names]
    broken = plugins.load([*entry_points(group=plugins.GROUP), *failing])
    for words in (("recipe=quickstart", "+stage@mine=mine"), ("recipe=mine",)):
        with pytest.raises(PluginFailed, match=r"no \w+ is named 'mine': plugin mine .* failed to load: Mod") as caught:
            problems(broken, *words)
        assert "theirs" not in str(caught.value)
    text = problems(broken, "recipe=quickstart", "+stage@other=other")
    assert "note: plugin mine (no_such_module) failed to load" in text
    recipe(tmp_path, "defaults: [{/stage@sft: sft}, {/stage@last: other}]")
    with pytest.raises(PluginFailed, match=r"no stage is named 'other': .*\n.*plugin mine .*\n.*plugin theirs"):
        problems(broken, "recipe=mine")
    monkeypatch.setenv("POSTTRAIN_BLOCK_PLUGINS", "preference")
    text = problems(plugins.load(), "recipe=mine")
    assert "no stage named 'other'" in text
    assert "note: plugin preference (posttrain" in text
    assert "is blocked: POSTTRAIN_BLOCK_PLUGINS names it" in text


def test_gate_problems_are_reported(host: Host) -> None:
    task = "+sft.gate.tasks.extra={role: lift, metric: nonsense, task: '${shipped:quickstart/tasks/towns_facts.yaml}'}"
    assert "has no metric nonsense" in problems(host, "recipe=quickstart", task)
    assert "Did you mean max_drop?" in problems(
        host, "recipe=quickstart", "+sft.gate.tasks.extra={role: guard, metric: acc, maxdrop: 1}"
    )


@settings(max_examples=40, deadline=None)
@given(word=st.text("abcdefghij=.+~-[]{},'\"$:@/ ", min_size=1, max_size=20))
def test_no_override_makes_composing_fail_otherwise_than_with_problems(host: Host, word: str) -> None:
    try:
        plan(host, "recipe=quickstart", word)
    except BadInput as error:
        assert error.problems


def test_documents_of_a_task_may_come_from_a_file(host: Host, tmp_path: Path) -> None:
    task = "task: '${shipped:quickstart/tasks/towns_facts.yaml}', role: guard, metric: exact_match"
    text = problems(host, "recipe=quickstart", f"+sft.gate.tasks.extra={{{task}, data: nowhere.jsonl}}")
    assert "there is no file nowhere.jsonl" in text


def test_nearest_name() -> None:
    assert nearest("quickstrat", ["quickstart", "blank"]) == "quickstart"
    assert nearest("zzz", ["quickstart"]) is None


def test_sources_are_given_on_the_command_line_in_every_form(host: Host, working_folder: Path) -> None:
    for name in ("train.jsonl", "a.jsonl", "b.jsonl"):
        Path(name).write_text("[]")
    recipe(working_folder, "defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]\nsft: {data: train.jsonl}\n")
    forms = [
        (["sft.data=a.jsonl"], ["a.jsonl"]),
        (["sft.data.path=a.jsonl"], ["a.jsonl"]),
        (["sft.data=[a.jsonl,{path: b.jsonl}]"], ["a.jsonl", "b.jsonl"]),
        (["sft.data.path=*.jsonl", "sft.data.limit=3", "sft.data.columns.prompt=q"], ["*.jsonl"]),
    ]
    for words, paths in forms:
        (step,) = plan(host, "recipe=mine", "model.path=m", *words).steps
        assert [source.path for source in step.sources] == paths
    assert (step.sources[0].limit, step.sources[0].columns) == (3, {"prompt": "q"})
    (step,) = plan(host, "recipe=mine", "model.path=m", "sft.eval_data.path=b.jsonl").steps
    assert [source.path for source in step.eval_sources] == ["b.jsonl"]
    text = problems(host, "recipe=mine", "model.path=m", "sft.data.path=a.jsonl", "sft.data.limti=3")
    several = problems(host, "recipe=mine", "model.path=m", "data=[a.jsonl,b.jsonl]")
    assert (
        "the data of a recipe is one source\n    Give several sources to a stage: sft.data=[a.jsonl,b.jsonl]" in several
    )
    assert "sft.data.limti: unknown key 'limti'\n    Did you mean limit?" in text
    assert "sft.data.path: has no value" in problems(host, "recipe=mine", "model.path=m", "sft.data.limit=3")
    recipe(working_folder, "defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]\nsft: {data: {path: a.jsonl}}\n")
    braces = problems(host, "recipe=mine", "model.path=m", "sft.data={limit: 3}", "sft.lora={rr: 3}")
    assert "the recipe's sft.data has no limit, and a value in braces adds none" in braces
    assert "Give it by itself: sft.data.limit=VALUE" in braces
    assert "sft.lora={rr: 3}: unknown key 'sft.lora.rr'\n    Did you mean sft.lora.r?" in braces


def test_schemas_are_made_once_for_each_set_of_stages(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    compose(host, ["recipe=quickstart"])
    store, stored = ConfigStore.store, []
    monkeypatch.setattr(ConfigStore, "store", lambda self, **node: (stored.append(node["name"]), store(self, **node)))
    compose(host, ["recipe=quickstart", "sft.lr=1e-3"])
    assert not stored
    other = plugins.load()
    del other.stages["dpo"]
    compose(other, ["recipe=smollm2_gsm8k"])
    assert "schema" in stored
    assert plan(host, "recipe=quickstart", "dpo.beta=0.3").steps[1].config.beta == 0.3  # type: ignore[attr-defined]
    assert stored.count("schema") == 2


@pytest.mark.parametrize(
    "key",
    [
        "output_root",
        "start_from",
        "model.path",
        "model.chat_template",
        "sft.data",
        "sft.eval_data",
        "gate_data",
        "dpo.data.path",
    ],
)
def test_an_empty_path_is_named_and_no_folder_is_taken_for_it(host: Host, key: str) -> None:
    for word in (f"{key}=", f"{key}=' '"):
        assert f"{key}: is empty\n    Give {key}=PATH, or leave it out" in problems(host, "recipe=quickstart", word)


@pytest.mark.parametrize(
    "key", ["model.revision", "sft.prepare.semantic.model", "launch.partition", "sft.gate.tasks.facts.metric"]
)
def test_an_empty_name_is_named(host: Host, key: str) -> None:
    for word in (f"++{key}=", f"++{key}=' '"):
        assert f"{key}: is empty\n    Give {key}=VALUE, or leave it out" in problems(host, "recipe=quickstart", word)
