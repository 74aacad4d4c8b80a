"""The trail of an on-policy stage: every answer it was rewarded for, with its reward, and its greedy answers.

answers/step-00000012.jsonl    the answers of the 12th sampling, each on a line, those to one question together
answers/eval-00000010.jsonl    greedy answers to the questions set aside, after optimizer step 10
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.disk import naming
from posttrain.engine import processes
from posttrain.engine.evaluation import Difference
from posttrain.errors import BadInput, Problem
from posttrain.gate.statistics import mean_error
from posttrain.rewards.scorer import count_notes
from posttrain.sampling.policy import Asked, Rewarded


@dataclass(frozen=True)
class Trail:
    """The folder of a stage's answers; process 0 writes."""

    folder: Path
    k: int
    """Answers to each question of a sampling."""

    def write(
        self,
        sampling: int,
        rows: Sequence[Asked],
        groups: Sequence[Sequence[Rewarded]],
        advantages: Sequence[Sequence[float]],
    ) -> None:
        """Write the answers of a sampling, counted from 1, with their advantages."""
        lines = [
            {**_line(row, each), "advantage": advantage}
            for row, group, given in zip(rows, groups, advantages, strict=True)
            for each, advantage in zip(group, given, strict=True)
        ]
        if sampling == 1:
            self._forget("step-*.jsonl")
        self._write(self._path(sampling), lines)

    def write_greedy(
        self, step: int, rows: Sequence[Asked], answers: Sequence[Rewarded], rights: Sequence[bool | None]
    ) -> None:
        """Write the greedy answers to the questions set aside, after an optimizer step, and which are right."""
        if step == 0:
            self._forget("eval-*.jsonl")
        lines = [{**_line(row, each), "right": right} for row, each, right in zip(rows, answers, rights, strict=True)]
        self._write(self._greedy_path(step), lines)

    def right_share(self, step: int) -> float | None:
        """Return the share of right greedy answers after an optimizer step; None where no question has a right one."""
        path = self._greedy_path(step)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        known = [right for line in lines if (right := json.loads(line)["right"]) is not None]
        return fmean(known) if known else None

    def require_spread(self, last: int, most: int) -> None:
        """Raise BadInput where no question has had two rewards in the ``most`` samplings up to ``last``."""
        if last < most or any(self._differs(last - back) for back in range(most)):
            return
        reward = fmean(each["reward"] for each in self._read(last))
        what = f"in {most} steps no question had answers of different rewards (mean {reward:.3f})"
        fix = "Nothing is learnt so: raise k or temperature, ask other questions, or end earlier by max_steps"
        raise BadInput(Problem(where=str(self.folder), what=what, fix=fix))

    def figures(self, samplings: int) -> dict[str, Any]:
        """Return the counts of the answers of so many samplings, and the reward at either end, a tenth of them.

        ``reward_rose`` is true for a rise beyond noise; ``reward_error`` is its standard error, left out where either
        end has a single question.
        """
        kept = [self._read(sampling) for sampling in range(1, samplings + 1)]
        found = [each for answers in kept for each in answers]
        rewards = [fmean(each["reward"] for each in answers) for answers in kept]
        notes = count_notes(each.get("notes", {}) for each in found)
        end = max(1, samplings // 10)
        rise = _rise(kept[:end], kept[-end:])
        return {
            "sampled_answers": len(found),
            "sampled_tokens": sum(each["tokens"] for each in found),
            "never_ended": sum(not each["ended"] for each in found),
            "reward_first": fmean(rewards[:end]),
            "reward_last": fmean(rewards[-end:]),
            "reward_rose": rise.rises,
            **({"reward_error": rise.error} if math.isfinite(rise.error) else {}),
            **({"notes": notes} if notes else {}),
        }

    def _differs(self, sampling: int) -> bool:
        rewards = [each["reward"] for each in self._read(sampling)]
        return any(len(set(rewards[start : start + self.k])) > 1 for start in range(0, len(rewards), self.k))

    def _path(self, sampling: int) -> Path:
        return self.folder / f"step-{sampling:08d}.jsonl"

    def _greedy_path(self, step: int) -> Path:
        return self.folder / f"eval-{step:08d}.jsonl"

    def _read(self, sampling: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path(sampling).read_text(encoding="utf-8").splitlines()]

    def _forget(self, pattern: str) -> None:
        """Remove what an earlier training, of other settings, has left."""
        for path in self.folder.glob(pattern) if processes.rank() == 0 else ():
            path.unlink()

    def _write(self, path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        if processes.rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with naming(path):
            # half a character pair of a question has no bytes, but an escape
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _rise(before: Sequence[Sequence[Mapping[str, Any]]], after: Sequence[Sequence[Mapping[str, Any]]]) -> Difference:
    """Return the change of the mean reward from some samplings to others, whose questions are the independent draws."""
    means, square = [], 0.0
    for samplings in (before, after):
        found = [each for answers in samplings for each in answers]
        rewards = [each["reward"] for each in found]
        error = mean_error(rewards, [each["where"] for each in found])
        means.append(fmean(rewards))
        square += math.inf if error.groups == 1 else error.standard**2
    return Difference(means[1] - means[0], math.sqrt(square))


def _line(row: Asked, each: Rewarded) -> dict[str, Any]:
    return {
        "where": row.question.where, "question": row.question.prompt[-1]["content"], "answer": each.text,
        "ended": each.answer.ended, "tokens": len(each.answer.ids), "reward": each.reward, "rewards": dict(each.parts),
        **({"notes": dict(each.notes)} if each.notes else {}),
    }  # fmt: skip
