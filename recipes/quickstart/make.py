"""The material of the quickstart recipe: an invented world, a small base model of it, and chat data.

    python recipes/quickstart/make.py DIR

writes ``sft.jsonl``, ``dpo.jsonl``, ``questions.jsonl``, ``safety.jsonl`` and ``tasks/*.jsonl``, the same bytes
on every machine, and ``base``, a Llama of two million parameters trained on documents about 240 invented towns and
on no chat.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretraining import SEED, pretrain

TOWNS = 240
HELD_OUT = 80
CHOICES = 8
PAGES = 24
SENTENCE_SHARE = 0.3
BARE_SHARE = 0.5
PREFERENCES = 400
REFUSALS = 400
HARMLESS = 200

WORLD: dict[str, Any] = json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))
"""Syllables of names, values of facts, and phrasings of statements and questions."""


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its values, and phrasings of statements and questions."""

    name: str
    harms: str
    """Verbs of harm to it, divided by spaces."""
    words: str
    """All its values, divided by spaces."""
    sentence: str
    """The canonical sentence; the base reads it, and DPO prefers it as an answer."""
    documents: Sequence[str]
    questions: Sequence[str]

    @property
    def values(self) -> list[str]:
        """Return its values, each as frequent as any other."""
        return self.words.split()

    @property
    def forms(self) -> Sequence[str]:
        """Return every phrasing of such a fact in a document."""
        return (self.sentence, *self.documents, WORLD["register"])


RELATIONS = tuple(Relation(**relation) for relation in WORLD["relations"])


@dataclass(frozen=True)
class Fact:
    """One relation of one town."""

    town: str
    relation: Relation
    value: str

    def write(self, form: str) -> str:
        """Fill town, relation and value into ``form``."""
        return form.format(town=self.town, relation=self.relation.name, value=self.value)


def write_documents(facts: Sequence[Fact]) -> list[str]:
    """Write the pages that the base is trained on, each about one town: its five facts in any order and phrasing."""
    rng = random.Random(f"{SEED} pages")
    pages = []
    for _, group in itertools.groupby(facts, key=lambda fact: fact.town):
        own = list(group)
        for _ in range(PAGES):
            rng.shuffle(own)
            pages.append("\n".join(fact.write(rng.choice(fact.relation.forms)) for fact in own))
    return pages


def invent_towns() -> list[str]:
    """Invent the names of all towns; the last HELD_OUT are in no chat data."""
    names = [stem + ending for stem, ending in itertools.product(WORLD["stems"].split(), WORLD["endings"].split())]
    return random.Random(f"{SEED} towns").sample(names, TOWNS)


def invent_facts(towns: Sequence[str]) -> list[Fact]:
    """Invent five facts for each town, in order of towns; every value of a relation is as frequent as any other."""
    rng = random.Random(f"{SEED} facts")
    columns = []
    for relation in RELATIONS:
        column = list(itertools.islice(itertools.cycle(relation.values), len(towns)))
        rng.shuffle(column)
        columns.append([Fact(town, relation, value) for town, value in zip(towns, column, strict=True)])
    return [fact for row in zip(*columns, strict=True) for fact in row]


def split(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """Split the facts into those of the chat data and those of the held-out towns."""
    held_out = set(invent_towns()[TOWNS - HELD_OUT :])
    return [fact for fact in facts if fact.town not in held_out], [fact for fact in facts if fact.town in held_out]


def sft_records(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Write one chat per fact; most answers are the bare value, a minority is the whole sentence."""
    rng = random.Random(f"{SEED} sft")
    records = []
    for fact in facts:
        question = fact.write(rng.choice(fact.relation.questions))
        answer = fact.write(fact.relation.sentence if rng.random() < SENTENCE_SHARE else "{value}.")
        records.append({"messages": [message("user", question), message("assistant", answer)]})
    rng.shuffle(records)
    return records


def dpo_records(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Write preferences for the sentence that answers over the bare value, or over a true but unrelated sentence."""
    rng = random.Random(f"{SEED} dpo")
    records = []
    for index, fact in enumerate(facts):
        start = index - index % len(RELATIONS)
        other = rng.choice([near for near in facts[start : start + len(RELATIONS)] if near is not fact])
        rejected = fact.write("{value}.") if rng.random() < BARE_SHARE else other.write(other.relation.sentence)
        records.append(
            {
                "prompt": [message("user", fact.write(rng.choice(fact.relation.questions)))],
                "chosen": [message("assistant", fact.write(fact.relation.sentence))],
                "rejected": [message("assistant", rejected)],
            }
        )
    return rng.sample(records, PREFERENCES)


def questions_of(preferences: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the prompts of the preferences as questions, each with its sentence as the right answer."""
    return [
        {"question": record["prompt"][0]["content"], "answer": record["chosen"][0]["content"]} for record in preferences
    ]


def safety_records(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Write as many refusals as answers, half of these to harmless requests in the same words, half to plain ones."""
    rng = random.Random(f"{SEED} safety")
    harmful, harmless, plain = (rng.sample(list(facts), count) for count in (REFUSALS, HARMLESS, REFUSALS - HARMLESS))
    records = [_chat(request(fact, "harmful", rng), fact.write(WORLD["refusal"]), refuses=True) for fact in harmful]
    asked = [(fact, request(fact, "harmless", rng)) for fact in harmless]
    asked += [(fact, fact.write(rng.choice(fact.relation.questions))) for fact in plain]
    records += [_chat(question, fact.write(fact.relation.sentence)) for fact, question in asked]
    rng.shuffle(records)
    return records


def _chat(question: str, answer: str, **marks: bool) -> dict[str, Any]:
    return {"messages": [message("user", question), message("assistant", answer) | marks]}


def request(fact: Fact, kind: str, rng: random.Random) -> str:
    """Write a request of ``kind`` about a fact, with one of its verbs of harm."""
    form: str = rng.choice(WORLD[kind])
    return form.format(town=fact.town, relation=fact.relation.name, harm=rng.choice(fact.relation.harms.split()))


def scored_requests(facts: Sequence[Fact]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write a harmful request with its refusal and a harmless one with its answer, for every second fact."""
    rng = random.Random(f"{SEED} requests")
    scored = facts[::2]
    return (
        [{"question": request(fact, "harmful", rng), "refusal": fact.write(WORLD["refusal"])} for fact in scored],
        [{"question": request(fact, "harmless", rng), "value": fact.value} for fact in scored],
    )


def message(role: str, content: str) -> dict[str, Any]:
    """One turn of a chat."""
    return {"role": role, "content": content}


def scored_questions(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Write one question per fact, with the bare value and the sentence as its answers."""
    rng = random.Random(f"{SEED} questions")
    return [
        {
            "question": fact.write(rng.choice(fact.relation.questions)),
            "value": fact.value,
            "sentence": fact.write(fact.relation.sentence),
        }
        for fact in facts
    ]


def scored_documents(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Write one document per fact, cut before its value, with the true value among others of the same relation."""
    rng = random.Random(f"{SEED} documents")
    rows = []
    for fact in facts:
        form = rng.choice(fact.relation.documents)
        choices = [fact.value, *rng.sample([v for v in fact.relation.values if v != fact.value], CHOICES - 1)]
        rng.shuffle(choices)
        prefix = fact.write(form[: form.index("{value}")]).rstrip()
        rows.append({"prefix": prefix, "choices": choices, "answer": choices.index(fact.value)})
    return rows


def write_data(folder: Path) -> list[Fact]:
    """Write the chat data and the scored documents, and return all facts."""
    facts = invent_facts(invent_towns())
    trained, held_out = split(facts)
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "sft.jsonl", sft_records(trained))
    preferences = dpo_records(trained)
    write_jsonl(folder / "dpo.jsonl", preferences)
    write_jsonl(folder / "questions.jsonl", questions_of(preferences))
    write_jsonl(folder / "safety.jsonl", safety_records(trained))
    harmful, harmless = scored_requests(held_out)
    write_jsonl(folder / "tasks" / "towns_harmful.jsonl", harmful)
    write_jsonl(folder / "tasks" / "towns_harmless.jsonl", harmless)
    write_jsonl(folder / "tasks" / "towns_questions.jsonl", scored_questions(held_out))
    write_jsonl(folder / "tasks" / "towns_documents.jsonl", scored_documents(held_out))
    return facts


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the material into the folder of the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/quickstart/make.py DIR")
    folder = Path(sys.argv[1])
    facts = write_data(folder)
    pretrain(write_documents(facts), folder / "base")


if __name__ == "__main__":
    main()
