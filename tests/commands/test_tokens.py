"""The output of ``posttrain tokens``: trained tokens, borders of documents, and the share of each source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from posttrain import cli
from posttrain.commands import tokens
from posttrain.commands.tokens import Page
from posttrain.data.records import Conversation
from posttrain.tokens.chat import ChatRenderer
from tests.support.tiny import tiny_tokenizer, write_base

RECIPE = """\
defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]
model: {path: base, dtype: float32}
sft: {data: [{path: one.jsonl}, {path: two.jsonl, columns: {prompt: q, completion: a}}], sequence_length: 64}
"""


@pytest.fixture
def project(working_folder: Path) -> Path:
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    write_base(working_folder / "base")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}] * 2
    (working_folder / "one.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (working_folder / "two.jsonl").write_text(json.dumps({"q": "1+1", "a": "2"}) + "\n")
    (working_folder / "raw.jsonl").write_text(json.dumps({"text": "abcdefghij" * 3}) + "\n")
    return working_folder


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tokens", "recipe=mine", *words])
    assert caught.value.code == 0
    return capsys.readouterr().out


def cells(text: str, first: str) -> list[str]:
    """The cells of the last line of the output that begins with ``first``."""
    return [line.split() for line in text.splitlines() if line.startswith(first)][-1]


def test_trained_tokens_are_marked_and_counted_per_source(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys)
    assert text.count("<|user|>hi<|end|><|assistant|>⟦hello<|end|>⟧") == 4  # the record, and its packed row
    assert "<|user|>1+1<|end|><|assistant|>⟦2<|end|>⟧" in text
    assert cells(text, "one.jsonl") == ["one.jsonl", "1", "1", "22", "73.3%", "12", "54.5%"]
    assert cells(text, "two.jsonl") == ["two.jsonl", "1", "1", "8", "26.7%", "2", "25.0%"]
    assert cells(text, "all") == ["all", "2", "2", "30", "100.0%", "14", "46.7%"]
    assert "1 rows of 64 slots, 46.9% filled" in text
    assert not (project / "runs").exists()


def test_a_packed_row_shows_where_documents_meet(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = output(capsys).partition("packed row 1 of 1")[2]
    assert "▌document 1 of 2: slots 0 to 21, positions 0 to 21\n<|user|>hi" in row
    assert "▌document 2 of 2: slots 22 to 29, positions 0 to 7\n<|user|>1+1" in row
    assert "▌34 of 64 slots empty" in row


def test_raw_text_is_split_drawn_to_its_share_and_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = "sft.data=[{path: raw.jsonl, format: text}, {path: one.jsonl, share: 0.6}]"
    text = output(capsys, sources, "sft.sequence_length=22", "sft.overlong=split")
    assert f"a⟦{'bcdefghij' + 'abcdefghij' * 2}<|end|>⟧" in text
    assert cells(text, "raw.jsonl") == ["raw.jsonl", "1", "1", "31", "41.3%", "29", "93.5%"]
    assert cells(text, "one.jsonl") == ["one.jsonl", "1", "2", "44", "58.7%", "24", "54.5%"]
    assert "1 of 3 records are longer than 22 tokens and split: 1 tokens begin a piece and are not trained" in text


def test_long_documents_of_a_row_are_shown_by_their_ends(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "one.jsonl").write_text(json.dumps({"prompt": "q", "completion": "x" * 100 + "end"}) + "\n")
    row = output(capsys, "sft.data=one.jsonl", "sft.sequence_length=128").partition("packed row")[2]
    assert f"<|user|>q<|end|><|assistant|>⟦{'x' * 26}⟧ … 48 tokens … ⟦{'x' * 26}end<|end|>⟧" in row


def test_too_long_records_are_rejected_on_request(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tokens", "recipe=mine", "sft.sequence_length=16", "sft.overlong=reject"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert "one.jsonl:1: has 22 tokens, a row takes 16" in captured.err
    assert "1 of 2 records are longer than 16 tokens" in captured.err
    assert "⟦hello<|end|>⟧" in captured.out


def test_the_first_thousand_records_are_read_unless_all_are_asked_for(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.commands.tokens.COUNTED", 3)
    (project / "two.jsonl").write_text((json.dumps({"q": "1+1", "a": "2"}) + "\n") * 5)
    some, every = output(capsys), output(capsys, "--all")
    assert cells(some, "two.jsonl")[1] == "3"
    assert "Only the first 3 records of each source were read; --all reads every one." in some
    assert cells(every, "two.jsonl")[1] == "5"
    assert "Only the first" not in every


@pytest.mark.parametrize(
    ("records", "settings", "left_out"),
    [(2, "weight: 2", False), (5, "weight: 0.5", True), (5, "limit: 3", False), (5, "limit: 4", True)],
)
def test_records_that_were_not_read_are_not_told_by_weights_and_limits(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    records: int,
    settings: str,
    left_out: bool,
) -> None:
    monkeypatch.setattr("posttrain.commands.tokens.COUNTED", 3)
    (project / "one.jsonl").write_text((json.dumps({"prompt": "1+1", "completion": "2"}) + "\n") * records)
    text = output(capsys, f"sft.data=[{{path: one.jsonl, {settings}}}]")
    assert ("Only the first 3 records" in text) is left_out


def test_turns_that_are_not_trained_are_not_marked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "sft.train_on=last").partition("packed row")[0]
    assert text.count("<|assistant|>hello<|end|>") == text.count("<|assistant|>⟦hello<|end|>⟧") == 1


@pytest.mark.parametrize(
    ("no_color", "marked"), [(False, "\x1b[1;32mhello<|end|>\x1b[0m"), (True, "\x1b[1m⟦hello<|end|>⟧\x1b[0m")]
)
def test_a_terminal_gets_colours_instead_of_brackets(no_color: bool, marked: str) -> None:
    tokenizer = tiny_tokenizer()
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    row = ChatRenderer(tokenizer).conversation(Conversation(messages=messages, where="here"))
    console = Console(force_terminal=True, color_system="standard", width=200, no_color=no_color)
    with console.capture() as capture:
        console.print(Page(console, tokenizer).marked(row.ids, row.mask))
    assert marked in capture.get()


def test_records_set_aside_for_the_eval_loss_are_not_shown_as_trained(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"prompt": f"q{number}", "completion": "a"}) for number in range(10)] * 2
    (project / "one.jsonl").write_text("\n".join(rows))
    text = output(capsys, "sft.data=one.jsonl", "sft.eval_share=0.3")
    assert cells(text, "one.jsonl")[:3] == ["one.jsonl", "14", "14"]
    assert "3 different records are set aside for the eval loss by eval_share" in text


def test_records_alike_are_set_aside_together_once_they_are_known(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SHOWN", 12)
    said = [f"one two three four five six seven eight nine ten eleven {number}" for number in range(8)]
    said += [" ".join(f"{chr(97 + number)}{place}" for place in range(12)) for number in range(4)]
    rows = [json.dumps({"prompt": f"q{number}", "completion": answer}) for number, answer in enumerate(said)]
    (project / "one.jsonl").write_text("\n".join(rows))
    words = ("sft.data=one.jsonl", "sft.eval_share=0.3", "sft.prepare.near={over: answer, threshold: 0.95}")

    def alike() -> int:
        shown = output(capsys, *words)
        assert "4 different records are set aside" in shown
        return shown.partition("packed row")[0].count("one two three")

    assert alike() < 8, "without a preparation nothing is known of them"
    with pytest.raises(SystemExit):
        cli.main(["data", "recipe=mine", *words])
    assert alike() == 8


def test_keys_that_nothing_reads_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "ho"}]
    (project / "one.jsonl").write_text(json.dumps({"messages": chat, "id": 7}) + "\n")
    text = output(capsys, "sft.data=one.jsonl")
    assert "warning: nothing reads these keys of the data: 'id' (1 records, first one.jsonl:1)" in text
    assert "warning: the chat template does not write 'name' of user turns (1 records, first one.jsonl:1)" in text


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_pairs_show_their_prompt_once_and_the_scored_tokens_of_both_answers(
    project: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    pairs = [
        {"prompt": "1+1", "chosen": "2", "rejected": "three"},
        {"prompt": "x" * 80, "chosen": "a", "rejected": "b"},
    ]
    (project / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    added = f"gate: none, /stage@after: {stage}, /gate@after.gate: none,"
    recipe = (project / "recipes" / "mine.yaml").read_text().replace("gate: none,", added)
    (project / "recipes" / "mine.yaml").write_text(recipe + "after: {data: pairs.jsonl, sequence_length: 64}\n")
    text = output(capsys).partition("after: ")[2]
    assert text.count("<|user|>1+1<|end|><|assistant|>") == 1
    assert "▌chosen\n⟦2<|end|>⟧\n▌rejected\n⟦three<|end|>⟧" in text
    assert "2 records: " in text
    assert "1 are longer than 64 tokens and dropped" in text


def test_judged_answers_show_their_label(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "judged.jsonl").write_text(json.dumps({"prompt": "1+1", "completion": "2", "label": True}) + "\n")
    recipe = (
        (project / "recipes" / "mine.yaml")
        .read_text()
        .replace("gate: none,", "gate: none, /stage@kto: kto, /gate@kto.gate: none,")
    )
    (project / "recipes" / "mine.yaml").write_text(recipe + "kto: {data: judged.jsonl}\n")
    assert "<|user|>1+1<|end|><|assistant|>\n▌good\n⟦2<|end|>⟧" in output(capsys)
