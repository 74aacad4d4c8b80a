"""``posttrain init``: write a commented recipe for a file of chats, with a gate on those that are set aside."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.config.paths import user_recipes
from posttrain.config.schema import Format, Source
from posttrain.data.reading import read_with_rows, select_rows
from posttrain.data.records import Conversation, Preference, Record, Text
from posttrain.data.shapes import recognise
from posttrain.disk import replace_text
from posttrain.errors import BadInput, explain, reject, suggest
from posttrain.model.base import hub_note
from posttrain.model.trust import read_json
from posttrain.quoting import one_line

FLAGS = ("--model", "--pairs", "--questions", "--name")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Model of a recipe whose user names none: small enough for a laptop."""
COLUMNS = (("question", "answer"), ("input", "output"), ("instruction", "response"), ("query", "response"))
"""Keys of a question and its answer that no shape names, and that ``columns`` renames."""
LEAST_SPLIT = 40
"""Records from which some are set aside for the gate."""
MOST_SET_ASIDE = 200
TRAINED, SET_ASIDE = "train.jsonl", "test.jsonl"
CHARACTERS_PER_TOKEN = 3.5
WINDOWS = (256, 512, 1024, 2048, 4096)
ROWS_PER_STEP = 16
FEW = 1000
"""Records below which they are seen more often, with noise."""
LEAST_EVAL = 100


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A file of records, as it was found."""

    source: Source
    rows: list[dict[str, Any]]
    """Its rows, the keys renamed."""
    records: list[Record]

    @property
    def kind(self) -> str:
        """The shape of the records, in words."""
        kinds = {Conversation: "chats", Preference: "pairs", Text: "texts"}
        return kinds.get(type(self.records[0]), "records")

    @property
    def counted(self) -> str:
        """The number of records, in words."""
        one = len(self.records) == 1
        return f"{len(self.records):,} {self.kind.removesuffix('s') if one else self.kind}"

    @property
    def tokens(self) -> list[float]:
        """Tokens of each record, about."""
        return [len(_words(record)) / CHARACTERS_PER_TOKEN for record in self.records]


def main(words: list[str]) -> int:
    """Write the recipe and the files of its gate, and check the plan; print what to type next."""
    from posttrain.config.compose import compose
    from posttrain.host import plugins
    from posttrain.plan import make_plan

    file, given = _arguments(words)
    chats = look(file, "documents")
    pairs = look(given["--pairs"], "preferences") if "--pairs" in given else None
    if "--questions" in given:
        questions = [row for _, row in select_rows(Source(path=given["--questions"]))]
        if bad := [row for row in questions if "answer" not in row or not row.keys() & {"question", "messages"}]:
            example = '{"question": "What is 6 * 7?", "answer": 42}'
            reject(given["--questions"], f"a row has the keys {', '.join(bad[0])}", f"Write rows such as {example}")
    name = _free_name(given.get("--name") or _name_of(file))
    folder = user_recipes()
    text = recipe(name, chats, pairs, given, folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{name}.yaml", text)
    print(one_line(f"{_near(folder / f'{name}.yaml')}: {chats.counted}"))
    model = given.get("--model", MODEL)
    if (note := hub_note(model)) is not None:
        print(one_line(f"model {model} {note}"))
    host = plugins.load()
    try:
        make_plan(compose(host, [f"recipe={name}"]), host)
    except BadInput as error:
        print(one_line("The recipe is written; before it can run:"))
        return explain(error)
    print(one_line(f"posttrain plan recipe={name}     checks it and trains nothing"))
    print(one_line(f"posttrain recipe={name}          trains, scores and decides"))
    return 0


def _arguments(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the file and the values of the flags. Raises BadInput naming the first wrong word."""
    files, given, waiting = [], {}, iter(words)
    for word in waiting:
        flag, has_value, value = word.partition("=")
        if not word.startswith("-") and has_value and f"--{flag}" in FLAGS:
            reject(f"init {word}", "is no file", f"Did you mean --{flag} {value}?")
        elif not word.startswith("-"):
            files.append(word)
        elif flag not in FLAGS:
            reject(f"init {word}", f"{flag!r} is no flag of this command", suggest(flag, FLAGS))
        else:
            given[flag] = value if has_value else next(waiting, "")
            if not given[flag]:
                reject(f"init {flag}", "has no value", f"Write {flag} VALUE")
    if len(files) != 1:
        what = "names no file of chats" if not files else f"names {len(files)} files"
        reject("init", what, "posttrain init chats.jsonl [--model DIR] [--pairs FILE] [--questions FILE] [--name NAME]")
    return files[0], given


def look(path: str, shape: str) -> Looked:
    """Read a file as records of a shape. Raises BadInput with file and line of the first that is none."""
    source = Source(path=path)
    where, first = next(iter(select_rows(source)))
    keys = set(first)
    for prompt, completion in COLUMNS:
        if {prompt, completion} <= keys and shape == "documents" and not _is_known(first, where):
            source = replace(source, columns={"prompt": prompt, "completion": completion})
            break
    if "text" in keys and not _is_known(first, where):
        source = replace(source, format=Format.text)
    back = {old: new for new, old in source.columns.items()}
    found = list(read_with_rows(source, shape))
    rows = [{back.get(key, key): value for key, value in row.items()} for _, row in found]
    return Looked(source=source, rows=rows, records=[record for record, _ in found])


def _is_known(row: dict[str, Any], where: str) -> bool:
    try:
        recognise(row, where)
    except BadInput:
        return False
    return True


def recipe(name: str, chats: Looked, pairs: Looked | None, given: dict[str, str], folder: Path) -> str:
    """Return the text of the recipe; write the records of its gates into ``folder``."""
    lines = [f"# Written by posttrain init from {one_line(str(chats.source.path))}; posttrain show has it in full"]
    lines += ["", "# A folder, or a name on the hub", f"model: {_yaml(given.get('--model', MODEL))}", ""]
    data, gate = _chats(chats, given, folder)
    lines += [*data, ""]
    model = Path(given.get("--model", MODEL)).expanduser()
    own = [
        _setting("rank", 16, "of the adapter; variant: full trains every weight instead"),
        *_lengths(chats, _context(model)),
    ]
    lines += [*own[:1], *([] if pairs else own[1:]), "", *gate]
    if pairs is not None:
        lines += ["", "stages:", "  sft:", *(f"    {line}" for line in own[1:]), *_preferences(pairs, folder)]
    lines += ["", "# The run stops before this is spent, saves, and resumes with a higher one", "# spend_cap: 5 USD"]
    return "\n".join(lines) + "\n"


def _chats(chats: Looked, given: dict[str, str], folder: Path) -> tuple[list[str], list[str]]:
    """Return the lines about the data and about the gate of the first stage."""
    if questions := given.get("--questions"):
        gate = ["# Your questions: more of the answers must be right than the base's", "gate:", "  name: local"]
        return _data(chats), [*gate, f"  data: {_yaml(questions)}"]
    if chats.kind != "chats" or len(chats.records) < LEAST_SPLIT:
        few = f"{chats.counted} {'is' if len(chats.records) == 1 else 'are'} too few to set some aside"
        why = few if chats.kind == "chats" else "raw texts"
        note = f"# No gate ({why}): the adapter is promoted unseen. Questions of your own make one:"
        return _data(chats), [note, "# gate: {name: local, data: questions.jsonl}", "gate: none"]
    trained, aside = split(chats)
    paths = _write(folder, trained, aside)
    note = f"# {len(trained):,} of the {len(chats.rows):,} chats; the others ask, in the gate"
    data = [note, f"data: {_yaml(paths[0])}"]
    gate = [
        f"# The answers of the {len(aside):,} chats set aside must have become more likely than under the base.",
        "# Questions with right answers say more: gate: {name: local, data: questions.jsonl}",
        "gate:", "  name: perplexity", f"  data: {_yaml(paths[1])}",
    ]  # fmt: skip
    return data, gate


def _data(chats: Looked) -> list[str]:
    source = chats.source
    options = {"columns": source.columns} if source.columns else {}
    if source.format is Format.text:
        options["format"] = "text"  # type: ignore[assignment]
    if not options:
        return [f"data: {_yaml(source.path)}"]
    return ["data:", f"  path: {_yaml(source.path)}", *(f"  {key}: {_yaml(value)}" for key, value in options.items())]


def _preferences(pairs: Looked, folder: Path) -> Iterator[str]:
    """Yield the lines of the stage on pairs."""
    yield "  dpo:"
    if len(pairs.records) < LEAST_SPLIT:
        yield f"    data: {_yaml(pairs.source.path)}"
        yield f"    gate: none            # {len(pairs.records)} pairs are too few to set some aside"
        return
    trained, aside = split(pairs)
    paths = _write(folder, trained, aside, "pairs_")
    yield f"    data: {_yaml(paths[0])}"
    yield f"    gate:                 # the preferred answers of the {len(aside):,} pairs set aside must win more often"
    yield "      name: preferences"
    yield f"      tasks: {{preferences: {{data: {_yaml(paths[1])}}}}}"


def split(looked: Looked) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows to train on, and a tenth that is set aside; rows of one question stay on one side.

    The choice depends on the questions alone, so that the same file is split in the same way.
    """
    keys = [hashlib.sha256(_question(record).encode()).hexdigest() for record in looked.records]
    most = min(MOST_SET_ASIDE, max(len(keys) // 10, LEAST_SPLIT // 4))
    aside: set[str] = set()
    counts = {key: keys.count(key) for key in keys} if len(set(keys)) < len(keys) else dict.fromkeys(keys, 1)
    number = 0
    for key in sorted(counts):
        if number >= most:
            break
        if number + counts[key] <= most + most // 2:
            aside.add(key)
            number += counts[key]
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for key, row in zip(keys, looked.rows, strict=True):
        sides[key in aside].append(row)
    return sides


def _question(record: Record) -> str:
    turns = record.messages if isinstance(record, Conversation) else getattr(record, "prompt", ())
    found = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
    return " ".join(str(found).lower().split())


def _words(record: Record) -> str:
    if isinstance(record, Text):
        return record.text
    turns = record.messages if isinstance(record, Conversation) else (*record.prompt, *getattr(record, "chosen", ()))
    return " ".join(str(turn.get("content", "")) for turn in turns)


def _context(model: Path) -> int:
    """Return the tokens that a model in a folder was made for, and the largest window for one that does not say."""
    try:
        told = read_json(model / "config.json").get("max_position_embeddings")
    except BadInput:  # a name on the hub; of a damaged file, the plan tells
        told = None
    return told if isinstance(told, int) and told >= WINDOWS[0] else WINDOWS[-1]


def _lengths(chats: Looked, context: int) -> list[str]:
    """Return the lines of the settings that follow from the number of records and their lengths.

    A row is no longer than ``context``.
    """
    tokens = sorted(chats.tokens)
    longest = tokens[int(len(tokens) * 0.99)] * 1.3 + 32  # of a hundred one may be cut; the template adds some
    window = min(next((each for each in WINDOWS if each >= longest), WINDOWS[-1]), context)
    rows = max(1.0, sum(tokens) / window)
    batches = max(1, min(ROWS_PER_STEP, int(rows // 8)))
    epochs = 2 if len(tokens) > FEW else 3
    lines = [
        _setting("epochs", epochs, "passes over the data"),
        _setting("sequence_length", window, f"tokens of a row; the longest record has about {tokens[-1]:,.0f}"),
        _setting("gradient_accumulation", batches, f"rows of a step; an epoch has {round(rows / batches) or 1:,}"),
    ]
    if chats.kind == "chats" and len(tokens) >= LEAST_EVAL:
        lines.append(_setting("eval_share", 0.05, "of the records tell by their loss when training goes too far"))
    if chats.kind == "chats" and len(tokens) < FEW:
        lines.append(_setting("neftune_alpha", 5, "noise on the embeddings, against learning few records by heart"))
    return lines


def _setting(key: str, value: Any, why: str) -> str:
    return f"{f'{key}: {value}':<26}# {why}"


def _write(folder: Path, trained: list[dict[str, Any]], aside: list[dict[str, Any]], prefix: str = "") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}{name}" for name in (TRAINED, SET_ASIDE)]
    for path, rows in zip(paths, (trained, aside), strict=True):
        replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return [_near(path) for path in paths]


def _near(path: Path) -> str:
    """Return a path as it is written from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _name_of(file: str) -> str:
    stem = re.sub(r"\W+", "_", Path(file.rstrip("/")).name.split(".")[0]).strip("_").lower()
    return stem or "mine"


def _free_name(name: str) -> str:
    """Return the name, with a number behind it where a recipe has it already: nothing is written over."""
    if not re.fullmatch(r"[\w-]+", name):
        reject(f"init --name {name}", "is no name of a recipe", "Give letters, digits, - and _")
    folder, number, free = user_recipes(), 1, name
    while (folder / f"{free}.yaml").exists() or (folder / free).exists():
        number += 1
        free = f"{name}_{number}"
    return free


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
