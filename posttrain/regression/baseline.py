"""The baseline file: scores of an adapter, committed with the code, for the next adapter to keep up with.

It is small JSON with one line per document, so that its changes can be reviewed::

    {"format": 2, "gate": "quickstart", "sha256": "...", "adapter": "adapters/v1", "digest": "...",
     "asked": {"base": "...", "chat_template": "...", "tokenizer": "...", "dtype": "float32", "versions": ...},
     "tasks": {"facts": {"metric": "acc", "filter": "none", "higher_is_better": true, "settings": "...",
                         "base": 0.1, "score": 0.9,
                         "documents": [[0, "5a7c...", 0.0, 1.0, "Paris", "Rome"], ...]}}}

A document holds its number, a hash of document, requests and target, the base's score and the adapter's, and the
beginning of either answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from posttrain.digests import canonical, digest_of
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged, BadInput, Problem
from posttrain.gate.spec import DocumentScore, Scorecard
from posttrain.saved import as_kind, plain, read_json

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask

FORMAT = 2
DECIDING = ("torch", "transformers", "peft", "lm_eval")
"""Libraries whose releases change scores. A patch release of theirs is noted, as any other version is."""
MOST_CHARACTERS = 160
"""Characters kept of an answer, for people who read the comment; scores need none."""
MOST_ANSWERS = 2000
"""Documents of a task with answers kept: half a megabyte."""
UPDATE = "--update-baseline makes it anew from the given adapter"
HASH = 16
"""Hexadecimal digits of a document's hash."""


Document = tuple[int, str, float, float, str, str]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Content of a baseline file."""

    gate: str
    adapter: str
    """The adapter, as the command line named it."""
    digest: str
    """Content digest of the adapter."""
    asked: Mapping[str, Any]
    """Conditions of all scores: base, template, tokenizer, number format, device, versions."""
    tasks: Mapping[str, Entry]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Scores of one task."""

    metric: str
    filter: str | None
    higher_is_better: bool
    settings: str
    """SHA-256 over how the task asks and scores."""
    base: float
    """Mean score of the base."""
    score: float
    """Mean score of the adapter."""
    documents: Sequence[Document]
    """Number, hash, the base's score and the adapter's, the beginning of the base's answer and of the adapter's."""


def make_baseline(
    gate: str, adapter: str, asked: Mapping[str, Any], tasks: Mapping[str, GateTask], scorecard: Scorecard
) -> Baseline:
    """Make a baseline from the scores of the systems ``base`` and ``candidate``."""
    chosen = {name: _by_document(name, task, scorecard) for name, task in tasks.items()}
    digest = next(row.digest for row in scorecard.rows if row.system == "candidate")
    entries = {name: _entry(name, tasks[name], rows, scorecard) for name, rows in chosen.items()}
    return Baseline(gate=gate, adapter=adapter, digest=digest, asked=asked, tasks=entries)


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline in one step: keys in order, a line per document."""
    record = {"format": FORMAT, **plain(baseline)}
    record["sha256"] = digest_of(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, _lines(record) + "\n")


def read_baseline(path: Path) -> Baseline:
    """Read a baseline file.

    Raises BadInput when there is none or its format is another one, ArtifactDamaged when it is no baseline or was
    changed after it was written.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        raise BadInput(missing_baseline(path)) from None
    except ArtifactDamaged as error:
        raise ArtifactDamaged(f"{error}; {UPDATE}") from None


def _read(path: Path) -> Baseline:
    record = as_kind(dict, read_json(path), str(path))
    version, claimed = record.pop("format", None), record.pop("sha256", None)
    if type(version) is int and version != FORMAT:
        raise BadInput(Problem(where=str(path), what=f"has format {version}, not {FORMAT}", fix=UPDATE))
    if version is None or claimed is None:
        raise ArtifactDamaged(f"{path} is no baseline")
    if digest_of({"format": version, **record}) != claimed:
        raise ArtifactDamaged(f"{path} was changed after it was written")
    baseline = as_kind(Baseline, record, str(path))
    for name, entry in baseline.tasks.items():
        if what := _contradiction(entry):
            raise ArtifactDamaged(f"{path} is damaged: {name}: {what}")
    return baseline


def missing_baseline(path: Path) -> list[Problem]:
    """Return the problem of a baseline file that does not exist; nothing for one that does."""
    fix = "--update-baseline writes it from an adapter that passes against its base"
    return [] if os.path.lexists(path) else [Problem(where=str(path), what="no such baseline", fix=fix)]


def _contradiction(entry: Entry) -> str | None:
    """Return the contradiction between the documents of a task and the rest of it; None without one."""
    ids = [document[0] for document in entry.documents]
    if len(ids) != len(set(ids)):
        return "a document has two scores"
    of_base, of_adapter = [document[2] for document in entry.documents], [document[3] for document in entry.documents]
    for name, scores, stated in (("base", of_base, entry.base), ("score", of_adapter, entry.score)):
        if (found := _mean(scores)) != stated:
            return f"{name} is {stated}, but its documents have the mean {found}"
    return None


def _mean(scores: Sequence[float]) -> float:
    return round(fmean(scores), 6) if scores else 0.0


def require_same_asked(path: Path, baseline: Baseline, asked: Mapping[str, Any]) -> list[str]:
    """Return the differences from the baseline's conditions that change no score, such as a patch release.

    Raises BadInput with every condition that differs and could change one.
    """
    problems, noted = [], []
    for key in sorted(baseline.asked.keys() | asked.keys()):
        then, now = baseline.asked.get(key), asked.get(key)
        if then == now:
            continue
        if key == "versions" and (changed := _harmless(then, now)):
            noted.append(f"{path.name}: {changed}: such changes are taken to change no score")
            continue
        what = _deciding(then, now) if key == "versions" else ""
        what = what or f"another {key.replace('_', ' ')}: {_shown(then)} then, {_shown(now)} now"
        problems.append(Problem(where=str(path), what=what, fix=f"The scores cannot be compared; {UPDATE}"))
    if problems:
        raise BadInput(problems)
    return noted


def _harmless(then: Any, now: Any) -> str | None:
    """Return the changes of versions that change no score, as text; None when a library's minor version differs."""
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return None
    if _deciding(then, now):
        return None
    return _both(then, now, [name for name in sorted({**then, **now}) if then.get(name) != now.get(name)])


def _deciding(then: Any, now: Any) -> str:
    """Return the libraries whose minor version differs, with both versions; empty for none."""
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return ""
    return _both(then, now, [name for name in DECIDING if _minor(then.get(name)) != _minor(now.get(name))])


def _both(then: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {then.get(name, 'absent')} then, {now.get(name, 'absent')} now" for name in names)


def _minor(version: object) -> str:
    """Return a version as far as its second number."""
    return ".".join(str(version).partition("+")[0].split(".")[:2])


def add_baseline(
    path: Path, baseline: Baseline, tasks: Mapping[str, GateTask], scorecard: Scorecard, base: str
) -> Scorecard:
    """Add the file's scores to the candidate's: those of the base, and the baseline's own.

    ``base`` is the digest of the base. Raises BadInput when the baseline answered other documents or other prompts.
    """
    rows = list(scorecard.rows)
    problems = []
    for name, task in tasks.items():
        candidate = _system(name, task, scorecard, "candidate")
        entry = baseline.tasks.get(name)
        if what := _difference(entry, name, task, candidate, scorecard):
            problems.append(Problem(where=f"{path}: {name}", what=what, fix=f"The task changed; {UPDATE}"))
        elif entry is not None:
            for doc_id, _, base_score, score, base_answer, answer in entry.documents:
                like = candidate[doc_id]
                rows.append(_row(like, "base", task.metric, base_score, base, base_answer))
                rows.append(_row(like, "baseline", task.metric, score, baseline.digest, answer))
    if problems:
        raise BadInput(problems)
    return replace(scorecard, rows=tuple(rows))


def _difference(
    entry: Entry | None,
    name: str,
    task: GateTask,
    candidate: Mapping[int, DocumentScore],
    scorecard: Scorecard,
) -> str | None:
    """Return the first difference between a task of the baseline and the candidate's; None without one."""
    if entry is None:
        return "the baseline has no scores of this task"
    for key, value in _entry_head(name, task, candidate, scorecard).items():
        then = getattr(entry, key)
        if then != value:
            return f"another {key}: {_shown(then)} then, {_shown(value)} now"
    hashes = {doc_id: hashed for doc_id, hashed, *_ in entry.documents}
    asked = {doc_id: _hash(row) for doc_id, row in candidate.items()}
    differing = [doc_id for doc_id in sorted(hashes.keys() | asked.keys()) if hashes.get(doc_id) != asked.get(doc_id)]
    if differing:
        return f"{len(differing)} of its documents are other ones or are asked in other words, such as {differing[0]}"
    return None


def _by_document(name: str, task: GateTask, scorecard: Scorecard) -> dict[int, tuple[DocumentScore, DocumentScore]]:
    base, candidate = (_system(name, task, scorecard, system) for system in ("base", "candidate"))
    return {doc_id: (base[doc_id], row) for doc_id, row in sorted(candidate.items())}


def _system(name: str, task: GateTask, scorecard: Scorecard, system: str) -> dict[int, DocumentScore]:
    return {
        row.doc_id: row
        for row in scorecard.rows
        if row.system == system and row.task == name and task.filter in (None, row.filter)
    }


def _entry(
    name: str, task: GateTask, rows: Mapping[int, tuple[DocumentScore, DocumentScore]], scorecard: Scorecard
) -> Entry:
    documents = [_document(task, place, base, row) for place, (base, row) in enumerate(rows.values())]
    return Entry(
        **_entry_head(name, task, {doc_id: row for doc_id, (_, row) in rows.items()}, scorecard),
        base=_mean([document[2] for document in documents]),
        score=_mean([document[3] for document in documents]),
        documents=documents,
    )


def _document(task: GateTask, place: int, base: DocumentScore, row: DocumentScore) -> Document:
    of_base, of_adapter = (_kept(each.response) if place < MOST_ANSWERS else "" for each in (base, row))
    scores = float(base.metrics[task.metric]), float(row.metrics[task.metric])
    return row.doc_id, _hash(row), *scores, of_base, of_adapter


def _entry_head(name: str, task: GateTask, rows: Mapping[int, DocumentScore], scorecard: Scorecard) -> dict[str, Any]:
    return {
        "metric": task.metric,
        "filter": next((row.filter for row in rows.values()), task.filter),
        "higher_is_better": scorecard.higher_is_better[name],
        "settings": scorecard.settings[name],
    }


def _hash(row: DocumentScore) -> str:
    return digest_of([row.document_hash, row.request_hash, row.target_hash])[:HASH]


def _kept(answer: str) -> str:
    """Return the beginning of an answer, as the file keeps it."""
    text = answer.encode("utf-8", "replace").decode("utf-8")  # a model may have written half a surrogate pair
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def _row(like: DocumentScore, system: str, metric: str, score: float, digest: str, answer: str) -> DocumentScore:
    return replace(like, system=system, digest=digest, metrics={metric: float(score)}, response=answer)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else canonical(value)
    return text[:HASH] if len(text) == 64 else text


def _lines(record: Mapping[str, Any]) -> str:
    """Return JSON with a line per document and an indented line per other value."""
    documents: dict[str, Sequence[Any]] = {}
    outline = json.loads(canonical(record))
    for name, entry in outline["tasks"].items():
        documents[name] = entry["documents"]
        entry["documents"] = f"\0{name}"
    text = json.dumps(outline, indent=1, sort_keys=True, ensure_ascii=False)
    for name, rows in documents.items():
        listed = ",\n".join(f"    {canonical(row)}" for row in rows)
        text = text.replace(json.dumps(f"\0{name}", ensure_ascii=False), f"[\n{listed}\n   ]", 1)
    return text
