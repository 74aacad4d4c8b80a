"""``posttrain report``: print the final table of a run and rewrite its reports."""

from __future__ import annotations

from pathlib import Path

from posttrain import report
from posttrain.errors import BadInput, Problem, reject, suggest

ROOT = Path("runs")


def main(words: list[str]) -> int:
    """Report on the run of this directory or name, by default on the newest.

    Raises BadInput for a run that does not exist or cannot be written.
    """
    if len(words) > 1:
        reject(f"report {' '.join(words)}", "takes one run", "posttrain report RUN")
    path = _find(words[0]) if words else _newest()
    report.show(path)
    try:
        report.write(path)
    except OSError as error:
        raise BadInput(Problem(where=str(path), what=f"cannot write the reports: {error}")) from None
    return 0


def _find(word: str) -> Path:
    for path in (Path(word), ROOT / word):
        if (path / "run.json").exists():
            return path
    reject(word, "is not the directory of a run", suggest(word, _names()))


def _newest() -> Path:
    states = sorted(ROOT.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        reject(str(ROOT), "holds no run", "posttrain recipe=quickstart makes one")
    return states[-1].parent


def _names() -> list[str]:
    return [path.parent.name for path in ROOT.glob("*/run.json")]
