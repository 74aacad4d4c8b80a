"""Training records of sampled answers: pairs, the best answer, or judged answers.

An answer that never ended becomes no record: training would teach it an end that the model did not write. Nor does one
that the chat template cannot hold, such as an empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from posttrain.config.on_policy import Keep, OnPolicy
from posttrain.data.records import Conversation, Feedback, Preference, Question, Record
from posttrain.errors import BadInput, reject
from posttrain.rewards.reward import Attempt
from posttrain.rewards.scorer import Scorer, count_notes
from posttrain.sampling.answers import Written
from posttrain.tokens.chat import ChatRenderer


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A sampled answer with its reward."""

    answer: Written
    parts: Mapping[str, float]
    """Score by each reward that could score it."""
    notes: Mapping[str, str]
    """Note of each reward that left one."""
    reward: float | None
    """Their weighted sum; None when a reward could not score it."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Records of sampled answers, and the figures behind them."""

    records: Sequence[Record]
    figures: Mapping[str, Any]

    def line(self) -> str:
        """Return the figures in one line."""
        found = self.figures
        cut = f", {found['never_ended']:,} never ended" if found["never_ended"] else ""
        unusable = f", {found['unusable']:,} cannot be trained on" if found["unusable"] else ""
        noted = "".join(f"; {count:,} {note}" for note, count in found.get("notes", {}).items())
        return (
            f"{found['answers']:,} answers to {found['questions']:,} questions, mean reward {found['reward']:.3f}"
            f"{cut}{unusable}{noted}; {found['records']:,} records kept, by {found['kept_questions']:,} questions"
        )


def score(questions: Sequence[Question], answers: Sequence[Sequence[Written]], scorer: Scorer) -> list[list[Scored]]:
    """Return every answer with its reward; see ``Scorer.rate`` for what it raises.

    Raises BadInput when no answer at all could be scored.
    """
    asked = zip(questions, answers, strict=True)
    attempts = [Attempt(question=each, text=one.text, ended=one.ended) for each, group in asked for one in group]
    rated = scorer.rate(attempts)
    if not any(each.reward is not None for each in rated):
        counts = count_notes(each.notes for each in rated)
        what = f"no answer could be scored: {'; '.join(f'{count:,} {note}' for note, count in counts.items())}"
        reject("reward", what, "Choose another reward, or mend what it needs")
    waiting = iter(rated)
    return [
        [
            Scored(answer=answer, parts=each.parts, notes=each.notes, reward=each.reward)
            for answer, each in zip(group, waiting, strict=False)
        ]
        for group in answers
    ]


def keep(
    questions: Sequence[Question], scored: Sequence[Sequence[Scored]], settings: OnPolicy, renderer: ChatRenderer
) -> Kept:
    """Return the records that ``settings.keep`` makes of scored answers."""
    make = KEEPING[settings.keep]
    usable = [
        [each for each in group if _is_usable(each) and _is_trainable(renderer, question, each.answer.text)]
        for question, group in zip(questions, scored, strict=True)
    ]
    made = [make(question, group, settings.least_reward) for question, group in zip(questions, usable, strict=True)]
    every = [each for group in scored for each in group]
    scored_ones = [each.reward for each in every if each.reward is not None]
    ended = sum(each.answer.ended for each in every)
    notes = count_notes(each.notes for each in every)
    records = [record for group in made for record in group]
    figures = {
        "questions": len(questions),
        "answers": len(every),
        "sampled_tokens": sum(each.answer.tokens for each in every),
        "never_ended": len(every) - ended,
        "unusable": ended - sum(map(len, usable)),
        "reward": fmean(scored_ones),
        "rewards": _means([each.parts for each in every]),
        "without_spread": sum(len({each.reward for each in group}) == 1 for group in scored),
        "records": len(records),
        "kept_questions": sum(map(bool, made)),
        **({"notes": notes, "unscored": len(every) - len(scored_ones)} if notes else {}),
    }
    return Kept(records=records, figures=figures)


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean score by each reward, over the answers that it could score."""
    names = dict.fromkeys(name for each in parts for name in each)
    return {name: fmean(each[name] for each in parts if name in each) for name in names}


def _is_usable(scored: Scored) -> bool:
    return scored.answer.ended and scored.reward is not None


def _is_trainable(renderer: ChatRenderer, question: Question, text: str) -> bool:
    turns = (*question.prompt, _said(text))
    try:
        renderer.conversation(Conversation(messages=turns, where=question.where), last_only=True)
    except BadInput:
        return False
    return bool(text.strip())


def _pairs(question: Question, group: Sequence[Scored], least: float) -> list[Record]:
    """Return the best and the worst answer as a preference, nothing where all are equal.

    Of several with one reward it is the likeliest: of the wrong ones, what the model says most has to be unlearnt.
    """
    if not group:
        return []
    best = max(group, key=_rank)
    worst = max(group, key=lambda each: (-_reward(each), each.answer.log_prob))
    if best.reward == worst.reward or best.answer.text.strip() == worst.answer.text.strip():
        return []
    return [
        Preference(
            prompt=question.prompt,
            chosen=(_said(best.answer.text),),
            rejected=(_said(worst.answer.text),),
            where=question.where,
        )
    ]


def _best(question: Question, group: Sequence[Scored], least: float) -> list[Record]:
    """Return the best answer as a conversation, where it is good; every turn before it is context."""
    best = max(group, key=_rank, default=None)
    if best is None or not _reward(best) > least:
        return []
    context = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in question.prompt]
    return [Conversation(messages=(*context, _said(best.answer.text)), where=question.where)]


def _labels(question: Question, group: Sequence[Scored], least: float) -> list[Record]:
    """Return each different answer with its label."""
    different = {each.answer.text.strip(): each for each in reversed(group)}
    return [
        Feedback(
            prompt=question.prompt,
            completion=(_said(each.answer.text),),
            label=_reward(each) > least,
            where=question.where,
        )
        for each in reversed(different.values())
    ]


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _rank(scored: Scored) -> tuple[float, float]:
    return _reward(scored), scored.answer.log_prob


def _reward(scored: Scored) -> float:
    assert scored.reward is not None  # answers without a reward have been left out
    return scored.reward


KEEPING: Mapping[Keep, Callable[[Question, Sequence[Scored], float], list[Record]]] = {
    Keep.pairs: _pairs,
    Keep.best: _best,
    Keep.labels: _labels,
}
"""The records of one question's usable answers, by the choice of records."""
