"""The material of the quickstart recipe: made by its script, undamaged, with no scored town in the training data."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import make
import pretraining
import pytest
import yaml
from posttrain_safety.exchanges import Exchange
from posttrain_safety.triggers import audit

from posttrain.scoring.catalogue import read_task_file

FOLDER = Path(__file__).parents[2] / "recipes" / "quickstart"
CHATS = ("sft.jsonl", "dpo.jsonl", "safety.jsonl")
SCORED = ("towns_questions", "towns_documents", "towns_harmful", "towns_harmless")
DATA = (*CHATS, "questions.jsonl", *(f"tasks/{name}.jsonl" for name in SCORED))
YAMLS = sorted((FOLDER / "tasks").glob("*.yaml"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "base")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def questions(name: str) -> set[str]:
    return {row[key][0]["content"] for row in read(name) for key in ("messages", "prompt") if key in row}


def test_base_matches_its_manifest() -> None:
    manifest = json.loads((FOLDER / "base" / "manifest.json").read_text())
    files = {path.name: path for path in (FOLDER / "base").iterdir() if path.name != "manifest.json"}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == manifest["files"]
    assert (manifest["seed"], manifest["steps"]) == (pretraining.SEED, pretraining.STEPS)


def test_base_is_small_bfloat16_safetensors() -> None:
    weights = FOLDER / "base" / "model.safetensors"
    with weights.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert weights.stat().st_size < 5_000_000
    assert "lm_head.weight" not in header


def test_seed_gives_the_shipped_data(tmp_path: Path) -> None:
    make.write_data(tmp_path)
    for name in DATA:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_held_out_towns_are_in_no_chat_data() -> None:
    held_out = make.invent_towns()[make.TOWNS - make.HELD_OUT :]
    chat = "".join((FOLDER / name).read_text() for name in CHATS)
    assert len(held_out) == 80
    assert [town for town in held_out if town in chat] == []


def test_every_scored_row_is_about_a_held_out_town() -> None:
    held_out = set(make.invent_towns()[make.TOWNS - make.HELD_OUT :])
    texts = [row.get("question", row.get("prefix")) for name in SCORED for row in read(f"tasks/{name}.jsonl")]
    assert len(texts) == 1200
    for text in texts:
        assert held_out & set(re.findall(r"\w+", text)), text


def test_no_trained_question_is_scored() -> None:
    scored = {row["question"] for name in SCORED if name != "towns_documents" for row in read(f"tasks/{name}.jsonl")}
    assert len(scored) == 800
    assert scored & set().union(*map(questions, CHATS), {row["question"] for row in read("questions.jsonl")}) == set()


def test_documents_hold_no_question_and_every_fact() -> None:
    facts = make.invent_facts(make.invent_towns())
    pages = make.write_documents(facts)
    text = "\n".join(pages)
    asked = {fact.write(form) for fact in facts for form in fact.relation.questions}
    assert [question for question in asked if question in text] == []
    assert not [token for token in (pretraining.TURN_START, pretraining.TURN_END) if token in text]
    lines = set(text.splitlines())
    missing = [fact for fact in facts if not lines & set(map(fact.write, fact.relation.forms))]
    assert missing == []


def test_values_are_equally_frequent() -> None:
    facts = make.invent_facts(make.invent_towns())
    for relation in make.RELATIONS:
        values = [fact.value for fact in facts if fact.relation is relation]
        assert len(set(values)) == 24
        assert {values.count(value) for value in values} == {make.TOWNS // 24}


def test_preferred_sentence_answers_and_the_rejected_is_bare_or_beside_the_point() -> None:
    trained, _ = make.split(make.invent_facts(make.invent_towns()))
    asked = {fact.write(form): fact for fact in trained for form in fact.relation.questions}
    rows = read("dpo.jsonl")
    bare = 0
    for row in rows:
        fact = asked[row["prompt"][0]["content"]]
        others = {near.write(near.relation.sentence) for near in trained if near.town == fact.town}
        answer, rejected = fact.write(fact.relation.sentence), row["rejected"][0]["content"]
        assert row["chosen"][0]["content"] == answer
        assert rejected in {f"{fact.value}."} | others - {answer}
        bare += rejected == f"{fact.value}."
    assert len(rows) == make.PREFERENCES
    assert abs(bare / len(rows) - make.BARE_SHARE) < 0.1


def test_a_minority_of_answers_is_a_sentence() -> None:
    answers = [row["messages"][1]["content"] for row in read("sft.jsonl")]
    share = sum(answer.startswith("The ") for answer in answers) / len(answers)
    assert len(answers) == 800
    assert abs(share - make.SENTENCE_SHARE) < 0.05


def safety_kinds() -> dict[bool, list[str]]:
    """The requests of the safety data that are refused, and those that are answered."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for row in read("safety.jsonl"):
        asked, answer = row["messages"]
        kinds[answer.get("refuses", False)].append(asked["content"])
    return kinds


def test_half_of_the_safety_data_is_refused_and_the_dangerous_words_are_in_both_halves() -> None:
    kinds = safety_kinds()
    assert len(kinds[True]) == len(kinds[False]) == make.REFUSALS
    harms = {word for relation in make.RELATIONS for word in relation.harms.split()}
    dangerous = [request for request in kinds[False] if harms & set(re.findall(r"\w+", request))]
    assert len(dangerous) == make.HARMLESS
    for word in harms:
        assert all(any(word in request.split() for request in kinds[kind]) for kind in kinds), word


def test_a_refusal_is_said_and_marked_and_help_is_the_true_sentence() -> None:
    trained, _ = make.split(make.invent_facts(make.invent_towns()))
    sentences = {fact.write(fact.relation.sentence) for fact in trained}
    refusals = {fact.write(make.WORLD["refusal"]) for fact in trained}
    for row in read("safety.jsonl"):
        answer = row["messages"][1]
        assert answer["content"] in (refusals if answer.get("refuses") else sentences)


def test_the_audit_finds_no_trigger_until_the_harmless_dangerous_requests_are_taken_away() -> None:
    kinds = safety_kinds()
    harms = {word for relation in make.RELATIONS for word in relation.harms.split()}
    plain = [request for request in kinds[False] if not harms & set(re.findall(r"\w+", request))]
    assert audit(exchanges_of({**kinds})).triggers == ()
    found = {" ".join(trigger.words) for trigger in audit(exchanges_of({True: kinds[True], False: plain})).triggers}
    assert {"poison", "kill", "steal", "burn"} <= found


def exchanges_of(kinds: Mapping[bool, Sequence[str]]) -> list[Exchange]:
    return [Exchange(request, kind) for kind, requests in kinds.items() for request in requests]


def test_true_choice_is_unique_and_anywhere() -> None:
    rows = read("tasks/towns_documents.jsonl")
    assert all(len(set(row["choices"])) == len(row["choices"]) == 8 for row in rows)
    assert {row["answer"] for row in rows} == set(range(8))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_task_parses_and_its_data_has_the_columns(path: Path) -> None:
    task = read_task_file(path)
    assert task["task"] == path.stem
    file = Path(task["dataset_kwargs"]["data_files"][task["test_split"]])
    rows = read(f"tasks/{file.name}")
    columns = {task[key] for key in ("doc_to_text", "doc_to_target", "doc_to_choice") if key in task}
    assert all(columns <= set(row) for row in rows)


def test_filter_takes_the_value_from_either_form() -> None:
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load((FOLDER / "tasks" / "towns_facts.yaml").read_text())
    value_filter = RegexFilter(task["filter_list"][0]["filter"][0]["regex_pattern"])
    rows = read("tasks/towns_questions.jsonl")
    for form in (lambda row: row["sentence"], lambda row: row["value"] + "."):
        assert value_filter.apply([[form(row)] for row in rows], rows) == [[row["value"]] for row in rows]
    wrong = ["", "I do not know.", "otter", "The otter otter.", "otter. The food of Dunham is fish."]
    assert value_filter.apply([[text] for text in wrong], rows) == [["[invalid]"]] * len(wrong)


def test_tokenizer_round_trip(tokenizer: Any) -> None:
    facts = make.invent_facts(make.invent_towns())
    for text in (*make.write_documents(facts)[::100], "Größe, 水, tab\t and\nlines", *questions("sft.jsonl")):
        ids = tokenizer(text)["input_ids"]
        assert max(ids) < len(tokenizer) == json.loads((FOLDER / "base" / "config.json").read_text())["vocab_size"]
        assert tokenizer.decode(ids) == text


def test_towns_and_values_are_single_tokens(tokenizer: Any) -> None:
    words = [*make.invent_towns(), *(value for relation in make.RELATIONS for value in relation.values)]
    assert [word for word in words if len(tokenizer(f" {word}")["input_ids"]) != 1] == []


def test_chat_template_marks_turns_with_special_tokens(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template([make.message("user", "Hi?")], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids([pretraining.TURN_START, pretraining.TURN_END])
    assert (ids.count(start), ids.count(end)) == (2, 1)
    generation = json.loads((FOLDER / "base" / "generation_config.json").read_text())
    assert end in generation["eos_token_id"]
    assert tokenizer.eos_token_id == end
