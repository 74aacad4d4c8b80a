"""Variables of chat templates: pinned with the day of the run, part of every fingerprint, used by every rendering."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from posttrain import cli
from posttrain.artifact import Pins, verify
from posttrain.chat_template import variables_of
from posttrain.config.regression import BaseSettings
from posttrain.config.schema import ModelConfig
from posttrain.context import StageContext
from posttrain.data.records import Conversation
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.gate.spec import GateRequest
from posttrain.model.base import resolve_base
from posttrain.model.loading import load_tokenizer
from posttrain.regression.candidate import read_candidate
from posttrain.tokens.chat import ChatRenderer
from tests.support.fakes import Script, run_recipe, write_project
from tests.support.tiny import TEMPLATE, base_source, write_base

LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}{{ '<|system|>Today: ' + date_string + '<|end|>' }}"
)
THINKING = "{% if enable_thinking is defined and not enable_thinking %}<|system|>no thoughts<|end|>{% endif %}"
EFFORT = "{% macro header(m) %}<|system|>{{ reasoning_effort or 'medium' }}<|end|>{% endmacro %}{{ header(messages) }}"
CLOCKS = """
  {%- macro day(format) %}{{ strftime_now("%-d/" + format) }}{% endmacro %}
    {{- "<|system|>" + day("%m/%y of %j, 100%%d") + "<|end|>" }}"""
CHAT = Conversation(messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}), where="f:1")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    def show(day: str) -> None:
        monkeypatch.setattr("posttrain.artifact.today", lambda: day)

    show("2026-01-31")
    return show


def base(folder: Path, template: str) -> Path:
    if not folder.exists():
        write_base(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "read"),
    [
        (LLAMA, {"date", "date_string"}),
        (THINKING + TEMPLATE, {"enable_thinking"}),
        (EFFORT, {"reasoning_effort"}),
        ("{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", set()),
        ("{% for t in tools %}{% break %}{% endfor %}{{ strftime_now('%Y') }}", {"date"}),
        ("{% broken", set()),
        ("{{ 9 ** 387420489 }}{{ ('a' * 10 ** 10) | length }}{% set a = 'b' * 10 ** 10 %}{{ tone }}", {"tone"}),
        ("{% set ns = namespace(x=dict(a=1)) %}{% for i in range(2) %}{{ ns.x }}{% endfor %}", set()),
    ],
)
def test_the_variables_that_a_template_reads(template: str, read: set[str]) -> None:
    assert variables_of(template) == read


@pytest.mark.parametrize(
    ("template", "variables", "written"),
    [
        (LLAMA, {}, "Today: 31 Jan 2026"),
        (LLAMA, {"date": "2020-02-03"}, "Today: 03 Feb 2020"),
        (LLAMA, {"date_string": "never"}, "Today: never"),
        (THINKING, {"enable_thinking": False}, "no thoughts"),
        (EFFORT, {"reasoning_effort": "high"}, "high"),
        (CLOCKS, {"date": "2020-02-03"}, "3/02/20 of 034, 100%d"),
    ],
)
def test_every_rendering_has_the_same_values(
    tmp_path: Path, clock: Any, template: str, variables: dict[str, Any], written: str
) -> None:
    source = base_source(base(tmp_path / "base", template + TEMPLATE), template_variables=variables)
    tokenizer = load_tokenizer(source)
    prompt = f"<|system|>{written}<|end|><|user|>Hi<|end|><|assistant|>"
    copied: Any = copy.deepcopy(tokenizer)
    for mine in (tokenizer, copied):
        assert ChatRenderer(mine).conversation(CHAT).text == f"{prompt}Ho<|end|>"
        ask = functools.partial(HFLM.apply_chat_template, SimpleNamespace(tokenizer=mine, chat_template_args={}))
        assert ask([{"role": "user", "content": "Hi"}]) == prompt


def test_only_what_the_template_reads_enters_the_digest(tmp_path: Path, clock: Any) -> None:
    plain, dated = base(tmp_path / "plain", TEMPLATE), base(tmp_path / "dated", LLAMA + TEMPLATE)
    today = [base_source(folder) for folder in (plain, dated)]
    clock("2026-02-01")
    tomorrow = [base_source(folder) for folder in (plain, dated)]
    assert today[0] == tomorrow[0]
    assert today[0].template_variables == {}
    assert today[1].digest != tomorrow[1].digest
    assert base_source(dated, template_variables={"date": "2026-01-31"}).digest == today[1].digest
    words = base_source(dated, template_variables={"date_string": "never", "date": "2026-01-31"})
    assert words == base_source(dated, template_variables={"date_string": "never"}).with_variables(
        {"date": "2026-01-31", "date_string": "never"}
    )


@pytest.mark.parametrize(
    ("template", "variables", "complaint"),
    [
        (THINKING, {"enable_thinkng": False}, "does not read it\n    Did you mean enable_thinking"),
        (THINKING, {"date": "2026-01-31"}, "template_variables.date: the chat template does not read it"),
        (TEMPLATE, {"messages": []}, "messages: the chat template does not read it"),
        (LLAMA, {"strftime_now": "x"}, "strftime_now: the chat template does not read it"),
        (LLAMA, {"date": "yesterday"}, "'yesterday' is no day\n    Write it as 2026-01-31"),
        (LLAMA, {"date": "2026-02-30"}, "'2026-02-30' is no day"),
        (LLAMA, {"date": 20260131}, "20260131 is no day"),
        (EFFORT, {"reasoning_effort": {"a": 1}}, "is no text, number"),
    ],
)
def test_variables_that_cannot_be_used_are_rejected(
    tmp_path: Path, template: str, variables: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BadInput, match=r"model\.template_variables") as caught:
        base_source(base(tmp_path / "base", template + TEMPLATE), template_variables=variables)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("pinned", [{"chat_template": "x"}, {"messages": []}, {"date": "today"}, {"tokenize": True}])
def test_variables_of_a_changed_manifest_are_damage(tmp_path: Path, pinned: dict[str, Any]) -> None:
    folder = base(tmp_path / "base", LLAMA + TEMPLATE)
    pins = Pins(path=tmp_path, chat_template=LLAMA + TEMPLATE, template_variables=pinned)
    with pytest.raises(ArtifactDamaged, match=f"template_variables.{next(iter(pinned))}"):
        resolve_base(ModelConfig(path=str(folder)), pins)


class TestRuns:
    """Runs of scripted stages on a base whose template prints the day."""

    @pytest.fixture(autouse=True)
    def project(self, working_folder: Path, clock: Any) -> None:
        write_project(working_folder)
        (working_folder / "base" / "chat_template.jinja").write_text(LLAMA)

    def run(self, *words: str) -> tuple[Script, dict[str, dict[str, Any]], Path]:
        """Run; return the script, the variables of every source that a stage or gate saw, and the folder."""
        seen: dict[str, Any] = {}

        def note(what: StageContext | GateRequest) -> None:
            sources = what.systems.values() if isinstance(what, GateRequest) else [what.parent]
            name = what.stage if isinstance(what, GateRequest) else what.name
            seen.update({f"{name} {type(what).__name__}": source.template_variables for source in sources})

        script = Script()
        script.during_training = script.during_evaluation = note
        return script, seen, run_recipe(script, *words).path

    def test_another_day_resumes_the_run_with_its_day(self, clock: Any) -> None:
        script, seen, folder = self.run("stages=[sft]")
        assert seen == {"sft StageContext": {"date": "2026-01-31"}, "sft GateRequest": {"date": "2026-01-31"}}
        clock("2026-02-01")
        script, seen, again = self.run("stages=[sft]")
        assert (script.trained, script.judged, again) == ([], [], folder)
        (folder / "stages/sft/artifact").rename(folder / "stages/sft/lost")
        _, seen, again = self.run("stages=[sft]")
        assert seen["sft StageContext"] == {"date": "2026-01-31"}
        assert json.loads((again / "run.json").read_text())["date"] == "2026-01-31"
        made, lost = (verify(folder / "stages/sft" / name) for name in ("artifact", "lost"))
        assert made.digest == lost.digest

    def test_the_day_is_part_of_the_fingerprint_and_of_the_manifest(self, clock: Any) -> None:
        *_, first = self.run("stages=[sft]")
        clock("2026-02-01")
        *_, second = self.run("stages=[sft]", "output_root=other")
        *_, third = self.run("stages=[sft]", "output_root=third", "model.template_variables.date=2026-01-31")
        made = [verify(folder / "stages/sft/artifact").manifest for folder in (first, second, third)]
        days = [{"date": "2026-01-31"}, {"date": "2026-02-01"}, {"date": "2026-01-31"}]
        assert [manifest.template_variables for manifest in made] == days
        assert made[0].fingerprint == made[2].fingerprint != made[1].fingerprint

    def test_what_is_stacked_on_an_artifact_has_its_day(self, clock: Any) -> None:
        *_, folder = self.run("stages=[sft]")
        artifact = folder / "stages/sft/artifact"
        clock("2026-02-01")
        _, seen, _ = self.run("stages=[dpo]", f"start_from={artifact}", "output_root=other")
        assert set(map(str, seen.values())) == {"{'date': '2026-01-31'}"}
        with pytest.raises(BadInput, match=r"was trained with .*2026-01-31.*, not with date: 2026-02-01"):
            self.run("stages=[dpo]", f"start_from={artifact}", "model.template_variables.date=2026-02-01")

    def test_a_gate_asks_an_artifact_with_its_day_and_anything_else_with_todays(self, clock: Any) -> None:
        *_, folder = self.run("stages=[sft]")
        clock("2026-02-01")
        artifact = folder / "stages/sft/artifact"
        found = read_candidate(artifact, BaseSettings())
        assert found.base.template_variables == found.source.template_variables == {"date": "2026-01-31"}
        (artifact / "manifest.json").unlink()
        config = json.loads((artifact / "adapter_config.json").read_text())
        (artifact / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
        plain = read_candidate(artifact, BaseSettings())
        assert plain.base.template_variables == plain.source.template_variables == {"date": "2026-02-01"}
        other = read_candidate(artifact, BaseSettings(), day="2026-01-31")
        assert other.source.template_variables == {"date": "2026-01-31"}
        assert other.source.digest != plain.source.digest

    def test_a_variable_is_set_on_the_command_line_and_checked_by_the_plan(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(["plan", "recipe=mine", "model.template_variables.dat=2026-01-31"])
        assert caught.value.code == 2
        assert "template_variables.dat: the chat template does not read it" in capsys.readouterr().err
