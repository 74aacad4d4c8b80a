"""What stands in training data and templates: rejected by file, line, field and reason, or read as it is meant."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli
from posttrain.data import files
from posttrain.data import texts as readers
from posttrain.data.rows import Found
from posttrain.tokens import texts
from tests.support.tiny import TEMPLATE, write_base

RECIPE = """\
defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]
model: {path: base, dtype: float32}
sft: {data: train.jsonl, lr: 1e-2, sequence_length: 64, gradient_accumulation: 1, max_steps: 1}
"""
DATA = Path("train.jsonl")
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
LINE = json.dumps(CHAT).encode()
SHOWN = "<|user|>hi<|end|><|assistant|>⟦hello<|end|>⟧"

Spoil = Callable[[], object]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, and one with an embedding less than its tokenizer will have tokens."""
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "base")
    write_base(folder / "small", vocab_size=104)
    return folder


@pytest.fixture(autouse=True)
def project(working_folder: Path, bases: Path) -> Path:
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    shutil.copytree(bases, working_folder, dirs_exist_ok=True)
    DATA.write_bytes(LINE + b"\n")
    return working_folder


# --- What spoils a file -----------------------------------------------------------------------------------------------


def raw(data: bytes) -> Spoil:
    return lambda: DATA.write_bytes(data)


def rows(*records: object) -> Spoil:
    return raw("".join(json.dumps(record) + "\n" for record in records).encode())


def said(*turns: tuple[Any, Any], **keys: Any) -> Spoil:
    """A sound record, and behind it one of these turns."""
    return rows(CHAT, {"messages": [{"role": role, "content": content} for role, content in turns], **keys})


def instead(make: Callable[[], object]) -> Spoil:
    def spoil() -> None:
        DATA.unlink()
        make()

    return spoil


def long_line() -> None:
    with DATA.open("ab") as file:
        file.truncate(len(LINE) + 1 + readers.LONGEST_LINE + 1)  # sparse


def packed_zeros() -> None:
    with gzip.open("train.jsonl.gz", "wb") as file:
        file.write(bytes(10_000_000))


def renamed_zeros() -> None:
    packed_zeros()
    os.replace("train.jsonl.gz", DATA)


# --- What spoils a template or a tokenizer ----------------------------------------------------------------------------

CALLING = (
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = TEMPLATE.replace(
    "message['content']",
    "message['content'][:1] if message.role == 'assistant' and not loop.last else message['content']",
)
NO_SYSTEM = TEMPLATE.replace("in messages %}", "in messages if message.role != 'system' %}")
UNMARKED_END = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message.role == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}",
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOTTOMLESS = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"


def template(text: str, spoil: Spoil = lambda: None) -> Spoil:
    return lambda: (Path("base/chat_template.jinja").write_text(text), spoil())


def tokenizer(folder: str = "base", **settings: Any) -> None:
    """Change the tokenizer's settings; None removes one."""
    path = Path(folder) / "tokenizer_config.json"
    changed = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def unknown_stop() -> None:
    tokenizer("small", eos_token="<|stop|>")
    Path("small/chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", "<|stop|>"))


def calling(calls: Any, **result: Any) -> Spoil:
    called = {"role": "assistant", "content": "so", "tool_calls": calls}
    asked, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "done"}
    record = {"messages": [asked, called, {"role": "tool", "content": "5", **result}, answer]}
    return template(CALLING, rows(record))


def call(arguments: Any, **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}, **keys}


# --- The catalogue ----------------------------------------------------------------------------------------------------

BYTES: dict[str, tuple[Spoil, str]] = {
    "empty": (raw(b""), "train.jsonl: holds no records"),
    "whitespace only": (raw(b" \n\t\n"), "train.jsonl: holds no records"),
    "UTF-16": (raw(LINE.decode().encode("utf-16")), "train.jsonl:1: is not UTF-8: byte 0xff"),
    "CR line ends": (raw(LINE + b"\r" + LINE), "train.jsonl:1: is not valid JSON: Extra data"),
    "NUL in a string": (
        raw(LINE + b'\n{"prompt": "\0"}'),
        "train.jsonl:2: is not valid JSON: Invalid control character",
    ),
    "NUL at the end": (raw(LINE + b"\n" + bytes(64)), "train.jsonl:2: is not valid JSON"),
    "invalid UTF-8": (raw(LINE + b'\n{"prompt": "\xe9"}'), "train.jsonl:2: is not UTF-8: byte 0xe9"),
    "lone surrogate": (
        raw(LINE.replace(b"hello", b"\\ud800")),
        "train.jsonl:1: turn 2 of messages (assistant): content",
    ),
    "truncated line": (raw(LINE + b"\n" + LINE[:-4]), "train.jsonl:2: is not valid JSON: Unterminated string"),
    "array": (raw(b"[" + LINE + b"]"), "train.jsonl:1: a record must be an object, not an array"),
    "array over lines": (raw(b"[\n" + LINE + b"\n]"), "an array belongs in a .json file"),
    "trailing comma": (raw(LINE[:-1] + b",}"), "train.jsonl:1: is not valid JSON"),
    "duplicate keys": (
        raw(b'{"prompt": "a", "prompt": "b"}'),
        "train.jsonl:1: is not valid JSON: the key 'prompt' occurs",
    ),
    "NaN": (raw(LINE[:-1] + b', "n": NaN}'), "train.jsonl:1: is not valid JSON: NaN is not a JSON value"),
    "Infinity": (raw(LINE[:-1] + b', "n": -Infinity}'), "train.jsonl:1: is not valid JSON: -Infinity is not"),
    "1e400": (raw(LINE[:-1] + b', "n": 1e400}'), "train.jsonl:1: is not valid JSON: the number 1e400 is too large"),
    "10^5000": (
        raw(LINE[:-1] + b', "n": 1' + b"0" * 5000 + b"}"),
        "train.jsonl:1: is not valid JSON: Exceeds the limit",
    ),
    "10^400 as content": (said(("user", "a"), ("assistant", 10**400)), "train.jsonl:2: turn 2 of messages (assistant)"),
    "arrays in arrays": (raw(b"[" * 10**5 + b"]" * 10**5), "train.jsonl:1: is not valid JSON: nested too deeply"),
    "objects in objects": (raw(b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "train.jsonl:1: is not valid JSON: nested too"),
    "endless line": (long_line, "train.jsonl:2: the line is longer than 67,108,864 bytes"),
    "gzip bomb": (instead(packed_zeros), "train.jsonl: no such file or directory\n    Did you mean train.jsonl.gz?"),
    "gzip bomb by another name": (renamed_zeros, "train.jsonl:1: is not UTF-8: byte 0x8b"),
    "FIFO": (instead(lambda: os.mkfifo(DATA)), "train.jsonl: is not a regular file"),
    "symlink loop": (instead(lambda: DATA.symlink_to(DATA)), "train.jsonl: is a broken link"),
    "empty directory": (instead(DATA.mkdir), "train.jsonl: the directory holds no file of .json"),
}
TURN = "train.jsonl:2: turn 2 of messages (assistant): "
CHATS: dict[str, tuple[Spoil, str]] = {
    "messages missing": (rows(CHAT, {"id": 1}), "train.jsonl:2: unknown shape of record; its keys: id"),
    "messages null": (
        rows(CHAT, {"messages": None}),
        "train.jsonl:2: unknown shape of record; its keys: messages (null)",
    ),
    "messages a string": (rows({"messages": "hi"}), "train.jsonl:1: messages must be a list of messages, not 'hi'"),
    "messages empty": (rows({"messages": []}), "train.jsonl:1: messages must be a list of messages, not []"),
    "a message a string": (rows({"messages": ["hi"]}), "train.jsonl:1: turn 1 of messages must be an object"),
    "role unknown": (
        said(("usr", "a"), ("assistant", "b")),
        "turn 1 of messages: role 'usr' is unknown\n    Did you mean user",
    ),
    "role in capitals": (said(("User", "a"), ("assistant", "b")), "role 'User' is unknown\n    Did you mean user?"),
    "role human": (said(("human", "a"), ("gpt", "b")), "role 'human' is unknown\n    Did you mean user?"),
    "role null": (said((None, "a"), ("assistant", "b")), "train.jsonl:2: turn 1 of messages has no role"),
    "system in the middle": (
        said(("user", "a"), ("system", "b"), ("assistant", "c")),
        "train.jsonl:2: turn 2 (system) follows",
    ),
    "system twice": (
        said(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")),
        "turn 2 (system) follows system",
    ),
    "assistant first": (said(("assistant", "a"), ("user", "b")), "train.jsonl:2: turn 1 (assistant) begins"),
    "no assistant": (said(("user", "a")), "train.jsonl:2: the conversation has no assistant turn"),
    "content null": (said(("user", "a"), ("assistant", None)), f"{TURN}content must be a string, not null"),
    "content empty": (said(("user", "a"), ("assistant", "")), f"{TURN}content is empty"),
    "content spaces": (said(("user", "a"), ("assistant", " \n")), f"{TURN}content is empty"),
    "content a number": (said(("user", "a"), ("assistant", 3)), f"{TURN}content must be a string, not 3"),
    "content a list": (said(("user", "a"), ("assistant", ["b"])), f"{TURN}content must be a string, not ['b']"),
    "a literal end of turn": (
        said(("user", "a<|end|>"), ("assistant", "b")),
        "turn 1 (user) holds the special token '<|end|>'",
    ),
    "arguments that are no JSON": (calling([call('{"a": ')]), "call 1: arguments must be an object, not '{\"a\": '"),
    "a call without a name": (calling([{"function": {}}]), "turn 2 of messages (assistant): call 1 names no function"),
    "a result for nobody": (
        said(("user", "a"), ("tool", "5"), ("assistant", "b")),
        "train.jsonl:2: turn 2 (tool) follows user",
    ),
    "a result of another call": (
        calling([call({}, id="one")], tool_call_id="two"),
        "train.jsonl:1: turn 3 (tool) answers the call 'two'",
    ),
    "an id for two calls": (
        calling([call({}, id="one")] * 2),
        "turn 2 of messages (assistant): two calls have the id 'one'",
    ),
    "answers judged bad": (rows(CHAT, {**CHAT, "label": False}), "train.jsonl:2: label is false"),
}
RENDERED = "train.jsonl:1: the chat template"
TEMPLATES: dict[str, tuple[Spoil, str]] = {
    "no template": (lambda: Path("base/chat_template.jinja").unlink(), "the tokenizer of base has no chat template"),
    "not Jinja": (template("{% for %}"), f"{RENDERED} cannot render the conversation: Expected an expression"),
    "raising": (template("{{ raise_exception('not me') }}"), f"{RENDERED} cannot render the conversation: not me"),
    "dividing by zero": (template("{{ 1 / 0 }}"), f"{RENDERED} cannot render the conversation: division by zero"),
    "dropping the system turn": (
        template(NO_SYSTEM, rows({"messages": [{"role": "system", "content": "s"}, *CHAT["messages"]]})),
        f"{RENDERED} leaves out or rewrites turn 1 (system)",
    ),
    "two BOS": (
        template("<|system|><|system|>" + TEMPLATE, lambda: tokenizer(bos_token="<|system|>")),
        f"{RENDERED} begins with",
    ),
    "no end of turn": (
        template(TEMPLATE.replace("<|end|>", "")),
        "the mask for turn 2 cannot be proven: no stop token",
    ),
    "no prefixes": (
        template(FORGETFUL, said(("user", "a"), ("assistant", "bcd"), ("user", "e"), ("assistant", "fgh"))),
        "train.jsonl:2: the mask for turn 2 cannot be proven: the template writes it differently once other turns",
    ),
    "long loop": (
        template("{% for i in range(10 ** 9) %}{% endfor %}"),
        f"{RENDERED} cannot render the conversation: Range too big",
    ),
    "endless recursion": (template(BOTTOMLESS), f"{RENDERED} cannot render the conversation: maximum recursion depth"),
    "much output": (template(TEMPLATE + "{{ 'x' * 2000000 }}"), f"{RENDERED} writes 2,000,042 characters for it"),
    "more output than memory": (
        template("{{ 'x' * 10 ** 15 }}"),
        f"{RENDERED} cannot render the conversation: Memory",
    ),
    "no end-of-sequence token": (lambda: tokenizer(eos_token=None), "the tokenizer has no end-of-sequence token"),
}
REJECTED = {**BYTES, **CHATS, **TEMPLATES}


@pytest.mark.parametrize("case", REJECTED)
def test_it_is_rejected_with_its_place_and_reason(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, message = REJECTED[case]
    spoil()
    check_rejected(capfd, message)


def test_a_template_that_never_ends_is_rejected(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the one case that uses the time up: the others would meet so short a limit on a busy machine
    monkeypatch.setattr(texts, "SECONDS", 0.2)
    template(ENDLESS)()
    check_rejected(capfd, f"{RENDERED} takes longer than 0.2 s")


def check_rejected(capfd: pytest.CaptureFixture[str], message: str) -> None:
    assert run("recipe=mine") == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not list(Path("runs").rglob("artifact"))


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (packed_zeros, ["sft.data=train.jsonl.gz"], "train.jsonl.gz:1: is not valid JSON"),
        (unknown_stop, ["model.path=small"], "the tokenizer gives token 104, but the model has only 104 embeddings"),
        (lambda: None, ["sft.sequence_length=5"], "no trained token in 1 records\n    The longest has 11 tokens"),
        (lambda: None, ["sft.sequence_length=1"], "sft.sequence_length: must be at least 2"),
        (lambda: None, ["sft.sequence_length=0"], "sft.sequence_length: must be at least 2"),
        (lambda: None, ["sft.sequence_length=9", "sft.overlong=reject"], "train.jsonl:1: has 11 tokens, a row takes 9"),
    ],
)
def test_it_is_rejected_with_settings(
    spoil: Spoil, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil()
    assert run("recipe=mine", *words) == 2
    assert message in capfd.readouterr().err
    assert not list(Path("runs").rglob("artifact"))


ALLOWED: dict[str, tuple[Spoil, str]] = {
    "byte order mark": (raw(b"\xef\xbb\xbf" + LINE), SHOWN),
    "CRLF line ends": (raw(LINE + b"\r\n\r\n" + LINE + b"\r\n"), f"{SHOWN}\n\n{SHOWN}"),
    "no final newline": (raw(LINE + b"\n" + LINE), f"{SHOWN}\n\n{SHOWN}"),
    "10^400 beside the chat": (raw(LINE[:-1] + b', "n": 1' + b"0" * 400 + b"}"), SHOWN),
    "ids twice": (rows({**CHAT, "id": 1}, {**CHAT, "id": 1}), f"{SHOWN}\n\n{SHOWN}"),
    "mixed schemas": (
        rows(CHAT, {"prompt": "1+1", "completion": "2"}),
        f"{SHOWN}\n\n<|user|>1+1<|end|><|assistant|>⟦2<|end|>⟧",
    ),
    "user last": (
        rows({"messages": [*CHAT["messages"], {"role": "user", "content": "bye"}]}),
        f"{SHOWN}<|user|>bye<|end|>",
    ),
    "one role in a row": (
        said(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")),
        "<|user|>a<|end|><|user|>b<|end|><|assistant|>⟦c<|end|>⟧<|assistant|>⟦d<|end|>⟧",
    ),
    "arguments as text": (calling([call('{"a": 1}')]), '⟦so[add {"a": 1}]<|end|>⟧<|user|>5<|end|>'),
    "arguments as an object": (calling([call({"a": 1})]), '⟦so[add {"a": 1}]<|end|>⟧<|user|>5<|end|>'),
    "a result with its id": (calling([call({}, id="one")], tool_call_id="one"), "⟦so[add {}]<|end|>⟧<|user|>5<|end|>"),
    "the end of turn unmarked": (template(UNMARKED_END), SHOWN),
    "pad is eos": (lambda: tokenizer(pad_token="<|end|>"), SHOWN),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_it_is_read_as_it_is_meant(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, shown = ALLOWED[case]
    spoil()
    assert run("tokens", "recipe=mine") == 0
    assert shown in capfd.readouterr().out


def test_one_trained_token_is_enough(capfd: pytest.CaptureFixture[str]) -> None:
    rows({"prompt": "a", "completion": "bcd"})()
    assert run("recipe=mine", "sft.sequence_length=5") == 0
    assert "1 of 1 records are longer than 5 tokens and cut there" in " ".join(capfd.readouterr().err.split())
    (manifest,) = Path("runs").rglob("sft/artifact/manifest.json")
    assert json.loads(manifest.read_text())["metrics"]["epoch_trained_tokens"] == 1


def test_rows_that_cannot_be_read_stop_the_run_or_are_left_out_as_the_source_says(
    capfd: pytest.CaptureFixture[str],
) -> None:
    raw(LINE + b"\n" + LINE[:-4] + b"\n" + LINE + b'\n{"text": "a"}\n')()
    assert run("recipe=mine") == 2
    said = capfd.readouterr().err
    assert "train.jsonl:2: is not valid JSON" in said
    assert "train.jsonl:4: unknown shape of record" in said
    assert "2 of 4 rows cannot be read (1 by JSON, 1 by shape); max_bad_share is 0" in said
    assert not list(Path("runs").rglob("artifact"))
    assert run("recipe=mine", "sft.data.path=train.jsonl", "sft.data.max_bad_share=0.5") == 0
    left_out = "train.jsonl: 2 of 4 rows cannot be read (1 by JSON, 1 by shape) and are left out, first train.jsonl:2"
    assert left_out in " ".join(capfd.readouterr().err.split())
    (manifest,) = Path("runs").rglob("sft/artifact/manifest.json")
    assert json.loads(manifest.read_text())["metrics"]["warnings"][0] == left_out


def test_data_that_change_while_they_are_read_are_rejected(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = files.read_found

    def change(path: Path, place: str) -> Iterator[Found]:
        yield from read(path, place)
        with path.open("ab") as file:
            file.write(LINE + b"\n")

    monkeypatch.setattr("posttrain.data.reading.read_found", change)
    assert run("recipe=mine") == 2
    assert "sft.data: the data changed while it was read" in capfd.readouterr().err
    assert not list(Path("runs").rglob("artifact"))


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    return int(caught.value.code or 0)
