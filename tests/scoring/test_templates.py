"""Jinja of tasks: the text of lm_eval's own environment, in a sandbox with limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
from jinja2 import BaseLoader, Environment, StrictUndefined

from posttrain.config.schema import GateTask, Role
from posttrain.errors import BadInput
from posttrain.scoring.harness import templates
from posttrain.scoring.harness.templates import Sandbox

DOCUMENT: dict[str, Any] = {
    "question": "What? ", "choices": ["a", "b"], "answer": "x #### 1,234", "n": 3,
    "nested": {"text": ["q"], "label": [1]},
}  # fmt: skip
ORDINARY = [
    "{{question}}\n",
    "{{answer.split('####')[-1].strip().replace(',', '')}}",
    "{{question|trim|upper}}{{choices|join(', ')}}{{''.join(choices)}}",
    "{% for c in choices %}{{loop.index}}. {{c}}\n{% endfor %}",
    "{{ n * 2 + 1 }} {{ '%05d' % n }} {{ '{:>5}'.format(n) }} {{ question ~ n ~ choices ~ '<b>'|e }}",
    "{{choices.index('b')}}{{nested.text}}{{nested['label'][0]}}",
    "{{answer|regex_replace('#+', '!')}}{{choices|tojson}}{{nested|tojson(indent=2)}}",
    "{% set ns = namespace(x=[]) %}{% for c in choices %}{% set _ = ns.x.append(c) %}{% endfor %}{{ns.x}}",
    "{% macro m(a) %}<{{a}}>{% endmacro %}{{m(n)}}{% set x %}a{{n}}{% endset %}{{x}}",
    "{{ question | center(20) }}|{{ '%s-%s'|format(n, n) }}{{ [1, 2] + [3] }}{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}",
    "{{choices|map('upper')|join('-')}}{{ (question, n) }}{{ ['a', 1, none, true, 1.5] }}{{ range(3)|list }}",
]
ESCAPING = [
    "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format(question) }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': question}) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('touch PWNED') }}",
    "{{ question.format.__globals__ }}",
    "{% import 'os' as os %}",
    "{% include 'x' %}",
]
GROWN = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    "{{{{ {end} }}}}"
)
LARGE = [
    "{{ 'a' * 10 ** 9 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'|center(10 ** 10) }}",
    "{{ ['a']|map('center', 10 ** 10)|list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ['a' * 1000000] * 1000000 }}",
    "{{ (['a' * 1000000] * 100000)|join }}",
    "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "{{ 1.5|round(10 ** 9, 'ceil') }}",
    "{{ [1]|slice(10 ** 10)|list }}",
    GROWN.format(start="'a'", step="ns.x ~ ns.x", end="ns.x"),
    GROWN.format(start="'a'", step="ns.x + ns.x", end="ns.x"),
    GROWN.format(start="'a'", step="ns.x.join([ns.x, ns.x])", end="ns.x"),
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x %}{{ns.x}}{{ns.x}}{% endset %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
]
SLOW = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ ('a' * 40 ~ '!')|regex_replace('(a+)+$', '') }}",
    GROWN.format(start="[1]", step="[ns.x, ns.x]", end="ns.x"),
    GROWN.format(start="[1]", step="[ns.x, ns.x]", end="ns.x|tojson"),
    "{{ lipsum(n=10 ** 7) }}",
]


@pytest.fixture(scope="module")
def plain() -> Environment:
    """Return lm_eval's environment as lm_eval makes it."""
    found = Environment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)  # type: ignore[arg-type]
    found.filters["regex_replace"] = lm_eval.utils.regex_replace
    return found


@pytest.mark.parametrize("template", ORDINARY)
def test_ordinary_templates_write_the_same_text(template: str, plain: Environment) -> None:
    assert lm_eval.utils.apply_template(template, DOCUMENT) == plain.from_string(template).render(**DOCUMENT)


def test_the_sandbox_knows_every_filter_test_and_global_of_lm_eval(plain: Environment) -> None:
    sandbox = lm_eval.utils.env
    assert isinstance(sandbox, Sandbox)
    assert sandbox.filters.keys() == plain.filters.keys()
    assert sandbox.tests.keys() == plain.tests.keys()
    assert sandbox.globals.keys() == plain.globals.keys()
    assert sandbox.keep_trailing_newline
    assert sandbox.undefined is StrictUndefined


@pytest.mark.parametrize("template", [*ESCAPING, *LARGE, "{{ absent }}", "{{ a b }}", "{{" + "(" * 3000, "{{ 1 / 0 }}"])
def test_what_escapes_writes_too_much_or_is_wrong_is_rejected(template: str, working_folder: Path) -> None:
    with pytest.raises(BadInput, match=r"(?s)^template .*\n    Mend the template in the task's file$"):
        lm_eval.utils.apply_template(template, DOCUMENT)
    assert not (working_folder / "PWNED").exists()


@pytest.mark.parametrize("template", SLOW, ids=["loops", "regex", "nested", "json", "lipsum"])
def test_what_takes_too_long_is_rejected(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    with pytest.raises(BadInput, match="takes longer than"):
        lm_eval.utils.apply_template(template, DOCUMENT)


@pytest.mark.parametrize(
    "field", ["doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix", "fewshot_config"]
)
def test_every_template_of_a_task_is_sandboxed(field: str, working_folder: Path) -> None:
    """The task is asked of lm_eval as scoring asks it: loaded, then a prompt with an example made of it."""
    from posttrain.scoring.harness.requests import prepare_task
    from tests.support.tiny import tiny_tokenizer

    attack = "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}"
    lines = [f'{{"q": "{number} + 1?", "a": "2", "c": ["2", "3"]}}\n' for number in range(4)]
    Path("q.jsonl").write_text("".join(lines))
    settings = {"doc_to_text": "'{{q}}'", "doc_to_target": "'0'", "doc_to_choice": "c", "num_fewshot": "1"}
    settings |= {field: f'{{doc_to_text: "{attack}"}}' if field == "fewshot_config" else f'"{attack}"'}
    Path("t.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: q.jsonl, train: q.jsonl}}\ntest_split: test\n"
        "fewshot_split: train\noutput_type: multiple_choice\nmetric_list: [{metric: acc, aggregation: mean, "
        "higher_is_better: true}]\n" + "".join(f"{key}: {value}\n" for key, value in settings.items())
    )
    with pytest.raises(BadInput, match="unsafe"):
        prepare_task("t", GateTask(role=Role.lift, metric="acc", task="t.yaml"), tiny_tokenizer(), 0)
    assert not Path("PWNED").exists()


def test_a_hostile_template_does_not_fill_the_memory() -> None:
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "import tests.scoring.test_templates as t\nfrom posttrain.errors import BadInput\nimport lm_eval.utils\n"
        "for template in t.LARGE:\n"
        "    try:\n        lm_eval.utils.apply_template(template, t.DOCUMENT)\n"
        "    except BadInput as error:\n        assert 'memory' not in str(error), error\n"
        "    else:\n        raise AssertionError(template)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\nassert peak < 1500, peak\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=600)
