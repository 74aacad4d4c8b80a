"""Names of artifacts: every move is a row of a chain, and the ledger's audit covers them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.ledger import Standing, lifts, move
from posttrain.ledger.audit import rebuild, verify
from posttrain.ledger.releases import ALIASES, histories, read
from tests.support.judgements import add

ROOT = Path("runs")


def promote(alias: str, artifact: str) -> None:
    move(ROOT, alias, Standing(artifact=artifact, path=f"run/stages/{artifact}/artifact"))


def now() -> dict[str, list[str]]:
    return {alias: [each.artifact for each in line] for alias, line in histories(read(ROOT)).items()}


def test_a_rollback_gives_back_what_was_before() -> None:
    add()
    for artifact in ("a", "b", "c"):
        promote("live", artifact)
    assert move(ROOT, "live", None).artifact == "b"
    promote("live", "d")
    assert move(ROOT, "live", None).artifact == "b"
    release = move(ROOT, "live", None)
    assert (release.artifact, release.path, release.replaced) == ("a", "run/stages/a/artifact", "b")
    assert now() == {"live": ["a"]}
    with pytest.raises(BadInput, match="none before it"):
        move(ROOT, "live", None)
    assert len(verify(ROOT)) == len(lifts(ROOT))
    assert [link.seq for link in read(ROOT)] == list(range(1, 8))


def test_latest_goes_back_to_lineage_and_an_unknown_name_nowhere() -> None:
    promote("latest", "a")
    assert move(ROOT, "latest", None).artifact == ""
    assert now() == {}
    with pytest.raises(BadInput, match="never promoted"):
        move(ROOT, "live", None)


@pytest.mark.parametrize("change", ["edit", "remove", "swap"])
def test_a_changed_row_is_found_in_the_copy_and_by_the_audit(change: str) -> None:
    promote("live", "a")
    promote("live", "b")
    rows = json.loads((ROOT / ALIASES).read_text())["rows"]
    if change == "edit":
        rows[0]["artifact"] = "x"
    elif change == "remove":
        rows = rows[1:]
    else:
        rows = rows[::-1]
    (ROOT / ALIASES).write_text(json.dumps({"rows": rows}))
    with pytest.raises(ArtifactDamaged, match="was changed after it was written"):
        read(ROOT)
    with pytest.raises(ArtifactDamaged, match="was changed"):
        verify(ROOT)


def test_a_row_changed_in_the_ledger_is_found_and_a_rebuild_takes_the_copy() -> None:
    add()
    promote("live", "a")
    with sqlite3.connect(ROOT / "ledger.sqlite") as connection:
        connection.execute("DELETE FROM releases")
    with pytest.raises(ArtifactDamaged, match="0 releases are not the 1"):
        verify(ROOT)
    rebuild(ROOT)
    verify(ROOT)
    promote("live", "b")
    verify(ROOT)


def test_a_file_that_is_no_copy_is_damaged() -> None:
    ROOT.mkdir()
    for text in ("", "[]", '{"rows": 1}', '{"rows": [{}]}', '{"rows": ["x"]}'):
        (ROOT / ALIASES).write_text(text)
        with pytest.raises(ArtifactDamaged):
            read(ROOT)
