"""Judged answers: how they are read, rendered, and put into batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain_preference.config import KTOSettings
from posttrain_preference.feedback import TokenAnswer, interleave, render_feedback, with_mismatches
from posttrain_preference.stage import run
from preference_support.contexts import MakeContext, feedback, progress
from preference_support.loops import before_steps

from posttrain import BadInput, Conversation, Feedback, Preference
from posttrain.config.schema import Format, Source
from posttrain.data.reading import read_source
from posttrain.engine.batches import RowOrder

ROW = {"prompt": "what", "completion": "the flag", "label": True}


def read(folder: Path, *rows: dict[str, Any], shape: str = "feedback", form: Format = Format.auto) -> list[Any]:
    path = folder / "feedback.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_source(Source(path=str(path), format=form), shape))


def answers(good: int, bad: int) -> list[TokenAnswer]:
    return [TokenAnswer([1], [index], index < good, "here") for index in range(good + bad)]


# --- Reading --------------------------------------------------------------------------------------------------------


def test_judged_answers_and_preferences_are_both_read(tmp_path: Path) -> None:
    chat = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    first, second, third = read(tmp_path, ROW, chat | {"label": False}, pair)
    assert isinstance(first, Feedback)
    assert (first.prompt[0]["content"], first.completion[0]["content"], first.label) == ("what", "the flag", True)
    assert isinstance(second, Feedback)
    assert second.label is False
    assert isinstance(third, Preference)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"label": None}, "label must be true or false, not None"),
        ({"label": 1}, "label must be true or false, not 1"),
        ({"label": "good"}, "label must be true or false, not 'good'"),
        ({"completion": ""}, "completion"),
        ({"completion": None}, "unknown shape"),
        ({"completion": [{"role": "user", "content": "b"}]}, "completion must end in one assistant turn"),
        (
            {
                "completion": [
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "b"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            "completion must end in one assistant turn after the shared prompt; it has assistant, user, assistant",
        ),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "turn 1 (assistant) begins the conversation"),
    ],
)
def test_what_cannot_be_judged_is_rejected_by_line(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    with pytest.raises(BadInput, match=r"feedback\.jsonl:2") as caught:
        read(tmp_path, ROW, ROW | change)
    assert what in str(caught.value)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_of_several_turns_is_rejected_in_preferences_too(tmp_path: Path, side: str) -> None:
    """The user's turns in it would be scored."""
    turns = [{"role": role, "content": role} for role in ("assistant", "user", "assistant")]
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} | {side: turns}
    with pytest.raises(BadInput, match=f"{side} must end in one assistant turn"):
        read(tmp_path, row, shape="preferences")


def test_conversations_are_no_feedback_and_feedback_is_no_preference(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(BadInput, match=r"the stage needs feedback\n.*prompt, completion, label; chosen, rejected"):
        read(tmp_path, chat)
    with pytest.raises(BadInput, match="the stage needs preferences"):
        read(tmp_path, ROW, shape="preferences")
    with pytest.raises(BadInput, match="the stage needs preferences"):
        read(tmp_path, ROW, shape="preferences", form=Format.feedback)


# --- Rendering ------------------------------------------------------------------------------------------------------


def test_a_judged_answer_has_the_ids_that_sft_trains(make_context: MakeContext) -> None:
    records = [feedback("what is the river", "the red heron", True), feedback("what is the flag", "a clay town", False)]
    context = make_context("lora", stage="kto", records=records)
    renderer = context.renderer()
    by_prompt = {tuple(row.prompt): row for row in render_feedback(context).rows}
    for record in records:
        chat = Conversation(messages=(*record.prompt, *record.completion), where="here")
        whole = renderer.conversation(chat)
        row = by_prompt[tuple(whole.ids[: whole.mask.index(True)])]
        assert list(row.completion) == [token for token, trained in zip(whole.ids, whole.mask, strict=True) if trained]
        assert list(row.completion).count(context.tokenizer().eos_token_id) == 1
        assert row.label == record.label


def test_a_preference_becomes_a_good_and_a_bad_answer(make_context: MakeContext) -> None:
    context = make_context("lora", stage="kto", records=[(["what is the flag"], "the red lace", "a clay")])
    (pair,) = [context.renderer().preference(record) for record in context.records]
    rows = render_feedback(context).rows
    assert {(row.label, tuple(row.completion)) for row in rows} == {
        (True, tuple(pair.chosen)),
        (False, tuple(pair.rejected)),
    }
    assert all(list(row.prompt) == pair.prompt for row in rows)


@pytest.mark.parametrize("label", [True, False])
def test_answers_that_were_all_judged_alike_are_rejected(make_context: MakeContext, label: bool) -> None:
    context = make_context(
        "lora", stage="kto", records=[feedback("what", word, label) for word in ("yes", "no", "red")]
    )
    with pytest.raises(BadInput, match=rf"kto\.data: all 3 answers were judged {'good' if label else 'bad'}"):
        run(context)


def test_answers_of_which_only_one_kind_is_short_enough_are_rejected(make_context: MakeContext) -> None:
    records = [feedback("what", "red " * 60, True), feedback("what", "no", False)]
    with pytest.raises(BadInput, match="all 1 answers were judged bad"):
        run(make_context("lora", stage="kto", records=records, sequence_length=40))


# --- Batches --------------------------------------------------------------------------------------------------------


@given(good=st.integers(1, 40), bad=st.integers(1, 40), seed=st.integers(0, 3), size=st.integers(2, 12))
def test_neighbours_hold_both_kinds_as_soon_as_the_rarer_is_frequent_enough(
    good: int, bad: int, seed: int, size: int
) -> None:
    rows = answers(good, bad)
    order = interleave(rows, seed)
    assert sorted(row.completion for row in order) == sorted(row.completion for row in rows)
    if min(good, bad) * size >= len(rows):
        around = [*order, *order]
        assert all({row.label for row in around[start : start + size]} == {True, False} for start in range(len(order)))


def test_the_order_is_shuffled_by_the_seed_alone() -> None:
    rows = answers(20, 20)
    assert interleave(rows, 1) == interleave(rows, 1) != interleave(rows, 2)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_no_batch_of_preferences_holds_one_kind_only(make_context: MakeContext, size: int) -> None:
    """Unpaired as they come, all chosen answers would precede all rejected ones."""
    context = make_context("lora", stage="kto", records=7, per_device_batch_size=size, gradient_accumulation=1)
    judged = render_feedback(context)
    order = RowOrder.from_config(context.config, len(judged.rows), seed=0, shuffled=False)
    batches = [[judged.rows[index].label for index in step] for step in order]
    assert [len(set(labels)) for labels in batches] == [2] * len(batches)
    assert {len(labels) for labels in batches} == {size}
    assert judged.figures() == {"answers": 14, "good": 7, "repeated": -14 % size, "dropped": 0}


@given(count=st.integers(2, 20), size=st.integers(2, 6))
def test_the_mismatched_answers_of_a_batch_are_its_own_with_other_prompts(count: int, size: int) -> None:
    rows = with_mismatches(answers(count, 0), size)
    for start in range(0, count, size):
        batch = rows[start : start + size]
        assert sorted(list(row.completion) for row in batch) == sorted(list(row.aside) for row in batch)
        assert len(batch) == 1 or all(row.completion != row.aside for row in batch)


def test_only_the_loss_with_a_kl_term_scores_mismatched_answers(make_context: MakeContext) -> None:
    for loss, wanted in (("kto", True), ("apo_zero_unpaired", False)):
        rows = render_feedback(make_context("lora", stage="kto", loss_type=loss)).rows
        assert [bool(row.aside) for row in rows] == [wanted] * 24


def test_the_rows_are_trained_in_their_order(make_context: MakeContext) -> None:
    seen: list[list[int]] = []
    before_steps(make_context("lora", stage="kto"), lambda training, engine: seen.extend(training.order))
    assert seen[:6] == [[4 * step + place for place in range(4)] for step in range(6)]
    assert seen[6:] == seen[:6]


def judged(make_context: MakeContext, good: int, bad: int, **settings: Any) -> list[str]:
    """What the user is told about so many answers."""
    words = ["the red", "a clay", "yes", "no", "the otter", "a town", "bread", "cheese", "lace", "the river"]
    records = [feedback("what is", words[index], index < good) for index in range(good + bad)]
    context = make_context("lora", stage="kto", records=records, **settings)
    render_feedback(context)
    return list(progress(context).notes)


def test_weights_are_advised_when_one_kind_outweighs_the_other(make_context: MakeContext) -> None:
    (note,) = judged(make_context, 2, 6, per_device_batch_size=4)
    assert "good answers: 2, bad ones: 6; set kto.desirable_weight between 3 and 4" in note
    assert "or undesirable_weight between 0.25 and 0.333" in note
    assert not judged(make_context, 2, 6, per_device_batch_size=4, desirable_weight=3.5)
    assert not judged(make_context, 2, 6, per_device_batch_size=4, undesirable_weight=0.3)
    assert not judged(make_context, 5, 5, per_device_batch_size=4)


def test_a_kind_too_rare_for_every_batch_is_told(make_context: MakeContext) -> None:
    (note,) = judged(make_context, 8, 2, per_device_batch_size=4, undesirable_weight=3.5)
    assert "some batches hold only good answers (good: 8, bad: 2): " in note
    assert "kto.per_device_batch_size to at least 5" in note
    assert not judged(make_context, 8, 2, per_device_batch_size=5, undesirable_weight=3.5)


# --- The loss -------------------------------------------------------------------------------------------------------


def test_weights_count(make_context: MakeContext) -> None:
    context = make_context("lora", stage="kto", records=6, desirable_weight=2.0, undesirable_weight=0.5, max_steps=1)
    run(context)
    assert progress(context).steps[1]["loss"] == pytest.approx((2.0 + 0.5) / 2 / 2, abs=1e-6)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_good_answers_gain_and_bad_ones_lose(make_context: MakeContext, loss: str) -> None:
    context = make_context("lora", stage="kto", loss_type=loss)
    run(context)
    steps = progress(context).steps
    assert steps[1]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert steps[1]["rewards_margin"] == pytest.approx(0, abs=1e-6)
    assert steps[12]["rewards_margin"] > 0.1
    assert steps[12]["loss"] < 0.48


def test_the_defaults_have_no_problems() -> None:
    assert list(KTOSettings(lr=5e-6).problems()) == []
