"""``posttrain report``: print the final table of a run, or of one gate about an adapter, and rewrite its reports."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain import report
from posttrain.errors import ArtifactDamaged, BadInput, Problem, reject, suggest

ROOT = Path("runs")
GATE = "gate.json"
"""Record of a gate about an existing adapter, in the folder of its evidence."""


def main(words: list[str]) -> int:
    """Report on the run or the gate of this directory or name, by default on the newest run.

    Raises BadInput for a run that does not exist or cannot be written; ArtifactDamaged, once the rest is reported, for
    a damaged one.
    """
    if len(words) > 1:
        reject(f"report {' '.join(words)}", "takes one run", "posttrain report RUN")
    path = _find(words[0]) if words else _newest()
    try:
        damage = _write(path)
    except OSError as error:
        raise BadInput(Problem(where=str(path), what=f"cannot write the reports: {error}")) from None
    if damage:
        raise ArtifactDamaged("\n".join(damage))
    return 0


def _write(path: Path) -> list[str]:
    """Print the table of a run or gate, and write its reports; return the damage found in it."""
    if not os.path.lexists(path / "run.json"):
        from posttrain.report.run import read_gate

        found = read_gate(path)
        report.show_report(found)
        report.write_gate(found)
        return []
    report.show(path)
    return report.write(path)


def _find(word: str) -> Path:
    for path in (Path(word), ROOT / word):
        if os.path.lexists(path / "run.json") or os.path.lexists(path / GATE):
            return path
    reject(word, "is not the directory of a run, nor of a gate", suggest(word, _names()))


def _newest() -> Path:
    states = sorted(ROOT.glob("*/run.json"), key=lambda path: path.lstat().st_mtime)
    if not states:
        reject(str(ROOT), "holds no run", "posttrain recipe=quickstart makes one")
    return states[-1].parent


def _names() -> list[str]:
    return [path.parent.name for path in ROOT.glob("*/run.json")]
