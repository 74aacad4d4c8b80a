"""``posttrain report``: print the final table of a run and rewrite its reports."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain import report
from posttrain.errors import ArtifactDamaged, BadInput, Problem, reject, suggest

ROOT = Path("runs")


def main(words: list[str]) -> int:
    """Report on the run of this directory or name, by default on the newest.

    Raises BadInput for a run that does not exist or cannot be written; ArtifactDamaged, once the rest is reported, for
    a damaged one.
    """
    if len(words) > 1:
        reject(f"report {' '.join(words)}", "takes one run", "posttrain report RUN")
    path = _find(words[0]) if words else _newest()
    report.show(path)
    try:
        damage = report.write(path)
    except OSError as error:
        raise BadInput(Problem(where=str(path), what=f"cannot write the reports: {error}")) from None
    if damage:
        raise ArtifactDamaged("\n".join(damage))
    return 0


def _find(word: str) -> Path:
    for path in (Path(word), ROOT / word):
        if os.path.lexists(path / "run.json"):
            return path
    reject(word, "is not the directory of a run", suggest(word, _names()))


def _newest() -> Path:
    states = sorted(ROOT.glob("*/run.json"), key=lambda path: path.lstat().st_mtime)
    if not states:
        reject(str(ROOT), "holds no run", "posttrain recipe=quickstart makes one")
    return states[-1].parent


def _names() -> list[str]:
    return [path.parent.name for path in ROOT.glob("*/run.json")]
