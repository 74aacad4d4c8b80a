"""The reward ``one_word``: half a point for an answer in one word, one for a right one."""

from collections.abc import Sequence

from posttrain import Question, Reward, hookimpl


def score(question: Question, text: str, ended: bool) -> float:
    """Return 0 for an answer that was cut: it has no last word."""
    if not ended or len(text.split()) != 1:
        return 0.0
    return 1.0 if text.strip() in question.answers else 0.5


@hookimpl
def register_rewards() -> Sequence[Reward]:
    """Return the reward."""
    return [
        Reward(name="one_word", summary="1 for the answer in one word, 0.5 for another word", version=1, score=score)
    ]
