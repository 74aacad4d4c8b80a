from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.artifact import MANIFEST
from posttrain.commands.show import full_form, origin_of
from posttrain.config.compose import compose
from posttrain.config.paths import shipped
from posttrain.errors import BadInput
from posttrain.host.plugins import Host
from posttrain.plan import Plan, make_plan

BASE = shipped("recipes") / "quickstart/base"
HEAD = f"model: {BASE}\ndata: a/b\n"


def write(folder: Path, text: str, name: str = "mine") -> None:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / f"{name}.yaml").write_text(text)


def plan(host: Host, *words: str) -> Plan:
    return make_plan(compose(host, ["recipe=mine", *words]), host)


def problems(host: Host, *words: str) -> str:
    with pytest.raises(BadInput) as caught:
        plan(host, *words)
    return str(caught.value)


def test_a_model_and_data_are_a_recipe(host: Host, tmp_path: Path) -> None:
    write(tmp_path, HEAD)
    (step,) = plan(host).steps
    assert (step.stage.name, step.sources[0].path, step.gate.enabled) == ("sft", "a/b", False)


def test_settings_of_the_only_stage_are_keys_of_the_recipe(host: Host, tmp_path: Path) -> None:
    write(tmp_path, HEAD + "method: sft\nrank: 8\nlr: 1e-3\nepochs: 3\nsequence_length: 256\nspend_cap: 5 USD\n")
    found = plan(host)
    config = found.steps[0].config
    assert (config.lora.r, config.lora.alpha, config.lr, config.epochs) == (8, 16, 1e-3, 3)  # type: ignore[attr-defined]
    assert config.sequence_length == 256  # type: ignore[attr-defined]
    assert str(found.spend_cap) == "5.00 USD"
    assert plan(host, "sft.lora.alpha=4").steps[0].config.lora.alpha == 4  # type: ignore[attr-defined]


FORMS = [
    "stages:\n  sft: {lr: 1e-3}\n  dpo: {data: c/d, beta: 0.3}\n",
    "stages:\n  - sft: {lr: 1e-3}\n  - dpo: {data: c/d, beta: 0.3}\n",
    "stages: [sft, dpo]\nsft: {lr: 1e-3}\ndpo: {data: c/d, beta: 0.3}\n",
    "sft: {lr: 1e-3}\ndpo: {data: c/d, beta: 0.3}\n",
]


@pytest.mark.parametrize("form", FORMS)
def test_stages_are_a_list_a_mapping_or_keys_of_the_recipe(host: Host, tmp_path: Path, form: str) -> None:
    write(tmp_path, HEAD + "rank: 4\n" + form)
    sft, dpo = plan(host).steps
    assert (sft.config.lr, sft.config.lora.r) == (1e-3, 4)  # type: ignore[attr-defined]
    assert (dpo.name, dpo.config.beta, dpo.sources[0].path) == ("dpo", 0.3, "c/d")  # type: ignore[attr-defined]


def test_a_stage_has_a_name_of_its_own_and_the_list_selects(host: Host, tmp_path: Path) -> None:
    write(tmp_path, HEAD + "stages: [sft, pref]\npref: {kind: dpo, data: c/d}\nkto: {data: e/f}\n")
    assert [(step.name, step.stage.name) for step in plan(host).steps] == [("sft", "sft"), ("pref", "dpo")]
    assert [step.name for step in plan(host, "stages=[sft,kto]").steps] == ["sft", "kto"]


def test_a_gate_by_name_with_its_file_inline_or_of_one_stage(host: Host, tmp_path: Path) -> None:
    Path("t.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    write(tmp_path, HEAD + "gate: {name: local, data: t.jsonl, confidence: 0.9}\n")
    (step,) = plan(host).steps
    assert (step.tasks["mine"].data, step.gate.confidence) == ("t.jsonl", 0.9)
    task = "{role: lift, task: own_questions, metric: right, data: t.jsonl}"
    write(tmp_path, HEAD + f"gate: {{tasks: {{mine: {task}}}}}\nstages: {{sft: , dpo: {{data: c/d, gate: none}}}}\n")
    sft, dpo = plan(host).steps
    assert list(sft.tasks) == ["mine"]
    assert not dpo.gate.enabled


def test_a_model_is_a_path_a_hub_name_or_a_model_file(host: Host, tmp_path: Path) -> None:
    for given, path in (("quickstart", str(BASE)), ("a/b", "a/b"), ("{path: a/b, dtype: float32}", "a/b")):
        write(tmp_path, f"model: {given}\ndata: a/b\n")
        assert plan(host).model.path == path
    write(tmp_path, "model: {name: llama3_8b, revision: abc}\ndata: [a/b, {path: c/d, share: 0.1}]\nvariant: full\n")
    found = plan(host)
    assert (found.model.path, found.model.revision) == ("meta-llama/Llama-3.1-8B", "abc")
    assert [source.path for source in found.steps[0].sources] == ["a/b", "c/d"]
    assert found.steps[0].config.lr == 1e-5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 1\n", "Did you mean lr?"),
        ("num_train_epochs: 1\n", "Did you mean epochs?"),
        ("max_seq_length: 1\n", "Did you mean sequence_length?"),
        ("epoch: 1\n", "Did you mean epochs?"),
        ("seeed: 1\n", "Did you mean seed?"),
        ("spendcap: 1\n", "Did you mean spend_cap?"),
        ("qqqq: 1\n", "Did you mean"),
        ("sft: {lrr: 1}\n", "sft.lrr: is no setting of this stage\n    Did you mean lr?"),
        ("gate: {confidance: 1}\n", "Did you mean confidence?"),
        ("model: {pth: a}\n", "Did you mean path?"),
        ("method: lora\n", "Write variant: lora"),
        ("method: dppo\n", "Did you mean dpo?"),
        ("gate: {name: none, data: x}\n", "no task of this gate asks for a file"),
        ("gate: 3\n", "must be the name of a gate"),
        ("lr: 1\nsft: {lr: 2}\n", "is given twice"),
        ("lr: 1\nstages: [sft, dpo]\n", "there are sft and dpo"),
        ("stages: {sft: {}, dpoo: {data: c/d}}\n", "Did you mean dpo?"),
        ("stages: [sft, sft]\n", "occurs twice"),
        ("stages: 3\n", "is no name of a stage"),
        ("stages: {hydra: {run: {dir: x}}}\n", "hydra"),
        ("gate: ../x\n", "leads out of the folders"),
        ("spend_cap: 5\n", "such as 5 USD"),
        ("spend_cap: 5 EUR\n", "price_per_hour='2.50 EUR'"),
        ("spend_cap: -5 USD\n", "is no amount"),
        ("price_per_hour: 2 hours\n", "is no amount of money"),
    ],
)
def test_each_problem_of_a_plain_recipe_says_how_to_mend_it(
    host: Host, tmp_path: Path, text: str, expected: str
) -> None:
    write(tmp_path, "\n".join(line for line in HEAD.splitlines() if line.split(":")[0] not in text) + "\n" + text)
    assert expected in problems(host)


def test_all_problems_are_reported_at_once_and_no_message_suggests_the_word_it_rejects(
    host: Host, tmp_path: Path
) -> None:
    write(tmp_path, HEAD + "lrr: 1\nepoch: 2\nsft: {dta: c/d}\ngate: {nme: x}\n")
    text = problems(host)
    assert text.count("Did you mean") == 4
    full = "defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]\nmodel: {path: a/b}\nsft: {data: a/b}\n"
    write(tmp_path, f"{full}dpo: {{data: c/d}}\n")
    text = problems(host)
    assert "Did you mean dpo" not in text
    assert "- /stage@dpo: dpo" in text


def test_a_word_that_a_plain_recipe_would_take_is_named_in_full(host: Host, tmp_path: Path) -> None:
    write(tmp_path, HEAD)
    for word, expected in (("epochs=1", "sft.epochs"), ("rank=4", "sft.lora.r"), ("gate=local", "gate@sft.gate=NAME")):
        assert f"Did you mean {expected}?" in problems(host, word)


def test_an_included_file_without_defaults_is_no_recipe_of_its_own(host: Host, tmp_path: Path) -> None:
    write(tmp_path, "seed: 7\n", "part")
    defaults = "[/recipe/part, /stage@sft: sft, /gate@sft.gate: none, _self_]"
    write(tmp_path, f"defaults: {defaults}\nmodel: {{path: a/b}}\nsft: {{data: a/b}}\n")
    assert plan(host).seed == 7


@pytest.mark.parametrize("form", [*FORMS, "rank: 2\ngate: {name: perplexity, data: t.jsonl}\nvariant: qlora\n"])
def test_the_full_form_composes_to_the_same_plan(host: Host, tmp_path: Path, form: str) -> None:
    Path("t.jsonl").write_text('{"messages": []}\n')
    write(tmp_path, HEAD + form)
    before = compose(host, ["recipe=mine", "seed=3"])
    write(tmp_path, "\n".join(full_form(before)), "full")
    after = compose(host, ["recipe=full"])
    assert make_plan(before, host).resolved == make_plan(after, host).resolved
    write(tmp_path, "\n".join(full_form(before, everything=True)), "full")
    assert make_plan(before, host).resolved == make_plan(compose(host, ["recipe=full"]), host).resolved


def test_every_value_names_the_place_it_comes_from(host: Host, tmp_path: Path) -> None:
    write(tmp_path, HEAD + "rank: 2\ngate: {name: perplexity, data: t.jsonl}\n")
    found = compose(host, ["recipe=mine", "sft.epochs=3"])
    origins = {
        "sft.lora.r": "recipes/mine.yaml: rank",
        "data.path": "recipes/mine.yaml: data",
        "sft.gate.tasks.responses.data": "recipes/mine.yaml: gate.data",
        "sft.gate.tasks.responses.role": "conf/gate/perplexity.yaml",
        "sft.epochs": "the command line, sft.epochs=3",
        "sft.packing": "default",
    }
    assert {path: origin_of(found, path) for path in origins} == origins


def test_data_on_which_no_stage_trains_is_rejected(host: Host, tmp_path: Path) -> None:
    write(tmp_path, f"model: {BASE}\ndata: [a/b, c/d]\n")
    assert [source.path for source in plan(host).steps[0].sources] == ["a/b", "c/d"]
    message = problems(host, "data=e/f")
    assert "data: no stage trains on it, as each has data of its own" in message
    assert "sft.data=FILE" in message
    write(tmp_path, HEAD)
    assert "Give data=FILE in place of sft.data=e/f" in problems(host, "sft.data=e/f")
    write(tmp_path, f"model: {BASE}\ndata: [a/b, c/d]\n")
    assert plan(host, "sft.data=e/f").steps[0].sources[0].path == "e/f"
    write(tmp_path, HEAD + "stages: [sft, dpo]\ndpo: {data: c/d}\n")
    (tmp_path / MANIFEST).touch()
    assert [step.name for step in plan(host, "stages=[dpo]", f"start_from={tmp_path}").steps] == ["dpo"]
