from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tiny_tokenizer, write_base

from posttrain import cli
from posttrain.commands.tokens import coloured
from posttrain.data.chat import ChatRenderer
from posttrain.data.records import Conversation

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
    return working_folder


def test_trained_tokens_are_marked_and_counted_per_source(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tokens", "recipe=mine"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.count("<|user|>hi<|end|><|assistant|>⟦hello<|end|>⟧") == 2
    assert "<|user|>1+1<|end|><|assistant|>⟦2<|end|>⟧" in text
    assert "1 records read, 22 tokens, 12 trained (54.5%)" in text
    assert "1 records read, 8 tokens, 2 trained (25.0%)" in text
    assert "1 rows of 64 slots" in text
    assert not (project / "runs").exists()


def test_turns_that_are_not_trained_are_not_marked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tokens", "recipe=mine", "sft.train_on=last"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.count("<|assistant|>hello<|end|>") == text.count("<|assistant|>⟦hello<|end|>⟧") == 1


def test_a_terminal_gets_colours_instead_of_brackets() -> None:
    tokenizer = tiny_tokenizer()
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    row = ChatRenderer(tokenizer).conversation(Conversation(messages=messages, where="here"))
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(coloured(row, tokenizer, terminal=True))
    assert "\x1b[1;32mhello<|end|>\x1b[0m" in capture.get()
