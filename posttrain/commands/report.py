"""``posttrain report``: make the reports of a run again and print its final table."""

from __future__ import annotations

from pathlib import Path

from posttrain import report
from posttrain.errors import BadInput, Problem, suggest

ROOT = Path("runs")


def report_command(words: list[str]) -> int:
    """Report on the run given by directory or by name; on the newest run when none is given.

    Raises BadInput when there is no such run, or its directory cannot be written.
    """
    if len(words) > 1:
        raise BadInput(Problem(where=" ".join(words), what="one run at a time", fix="posttrain report RUN"))
    path = _find(words[0]) if words else _newest()
    report.show(path)
    try:
        report.write(path)
    except OSError as error:
        raise BadInput(Problem(where=str(path), what=f"the reports cannot be written: {error}")) from None
    return 0


def _find(word: str) -> Path:
    for path in (Path(word), ROOT / word):
        if (path / "run.json").exists():
            return path
    raise BadInput(Problem(where=word, what="is not the directory of a run", fix=suggest(word, _names())))


def _newest() -> Path:
    states = sorted(ROOT.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise BadInput(Problem(where=str(ROOT), what="holds no run", fix="posttrain recipe=quickstart makes one"))
    return states[-1].parent


def _names() -> list[str]:
    return [path.parent.name for path in ROOT.glob("*/run.json")]
