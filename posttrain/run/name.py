"""The name of a run's directory: its recipe, the settings that its command line gave, and the digest that tells it.

The digest alone tells one run from another, so a command resumes the run of its digest under whatever label that has.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import WITHOUT_EFFECT, Half
from posttrain.digests import digest_of
from posttrain.run.directory import read_state
from posttrain.run.job import step_identity

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.artifact import ModelSource
    from posttrain.plan import Plan

LONGEST_LABEL = 60
LONGEST_VALUE = 20
BY_CONTENT = ("data", "eval_data", "replay")
"""Settings among WITHOUT_EFFECT by which records are chosen, which have an effect."""
NO_PART = (
    "recipe", "output_root", "plugin_timeout", "data_workers", "engine", "launch", "spend_cap", "price_per_hour",
    "tracker", "gate_data", "start_from_unpromoted", "gate",
    *(key for key in WITHOUT_EFFECT if key not in BY_CONTENT),
)  # fmt: skip
"""Parts of the keys that have no part in the digest: another value resumes the same run."""


def directory_of(plan: Plan, parent: ModelSource, data_digests: Mapping[str, str]) -> Path:
    """Return the directory of a plan's run: the one that its digest has below the output root, or a new one.

    Raises ArtifactDamaged when the run.json there cannot be read.
    """
    digest = run_digest(plan, parent, data_digests)
    named = plan.output_root / "-".join(part for part in (plan.recipe, label_of(plan), digest) if part)
    found = sorted(plan.output_root.glob(f"{glob.escape(plan.recipe)}-*{digest}"))
    begun = [path for path in found if path != named and os.path.lexists(path / "run.json")]
    if named in found:
        return named
    return next((path for path in begun if read_state(path).recipe == plan.recipe), named)


def run_digest(plan: Plan, parent: ModelSource, data_digests: Mapping[str, str]) -> str:
    """Return the digest of a run: equal for the same recipe on the same model and data, so runs resume."""
    content: list[Any] = [
        parent.digest,
        [(step.name, step_identity(step, plan), data_digests[step.name]) for step in plan.steps],
    ]
    # A run that is only to be chosen from must not replace the verdicts of one that is judged.
    halves = [step.gate.half.value for step in plan.steps]
    content += [] if set(halves) == {Half.both.value} else [halves]
    return digest_of(content)[:12]


def label_of(plan: Plan) -> str:
    """Return the settings of a plan's command line that its digest covers, as in ``lr_0.0001-seed_1``.

    Keys are as short as they are unique, the characters such that neither a file system, a shell nor the words of
    another command give them a meaning. Of many settings, those with the shortest texts are named.
    """
    given = dict(_given(plan))
    pairs = {key: _pair(_shortest(key, given), value) for key, value in given.items()}
    named: list[str] = []
    for key in sorted(pairs, key=lambda key: len(pairs[key])):
        if len("-".join(pairs[each] for each in (*named, key))) <= LONGEST_LABEL:
            named.append(key)
    return "-".join(text for key, text in pairs.items() if key in named)


def _given(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield keys and values of the command line, but for those that have no part in the digest."""
    for word in plan.words:
        key, is_setting, value = word.lstrip("+").partition("=")
        parts = re.split(r"[.@/]", key)
        is_apart = parts[0] in plan.settings and parts[0] not in plan.shaping
        if is_setting and not key.startswith(("-", "~")) and not is_apart and not set(parts) & set(NO_PART):
            yield key, value


def _shortest(key: str, keys: Mapping[str, str]) -> str:
    """Return the last dotted parts of a key, as many as tell it from the others."""
    parts = key.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
    return next((end for end in ends if not any(f".{each}".endswith(f".{end}") for each in keys if each != key)), key)


def _pair(key: str, value: str) -> str:
    found = _safe(value.rstrip("/").rpartition("/")[2])[:LONGEST_VALUE].rstrip("-.")
    return f"{_safe(key)}_{found}".rstrip("_")


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text.strip("'\"[]{} ")).rstrip("-.")
