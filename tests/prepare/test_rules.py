"""The quality rules: what each finds, what it leaves alone, and rows that try to break it."""

from __future__ import annotations

import pytest

from posttrain.config.preparation import RULES
from posttrain.data.records import Conversation, Text
from posttrain.prepare.rows import Row
from posttrain.prepare.rules import EVIDENCE, QUALITY

MANY = " ".join(f"w{at}" for at in range(60))


def found(answer: str, prompt: str = "Tell me about it, please.") -> set[str]:
    """Names of the rules with a finding about one answer."""
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    row = Row(Conversation(messages=turns, where="a"))
    return {name for name, rule in QUALITY.items() if rule.judge([row])[0] is not None}


def test_the_rules_are_those_of_the_settings() -> None:
    assert list(QUALITY) == list(RULES)


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
    rules = [{name for name, rule in QUALITY.items() if rule.judge([row])[0] is not None} for row in rows]
    assert rules == [set(), {"repetition"}, {"empty"}]


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
