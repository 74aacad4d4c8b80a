from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from posttrain import artifact
from posttrain.artifact import publish_folder, require_artifact, verify_folder
from posttrain.digests import digest_of
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged, BadInput


def draft(folder: Path, name: str = "draft") -> Path:
    path = folder / name
    (path / "sub").mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(bytes(range(256)))
    (path / "sub" / "config.json").write_text("{}")
    return path


def test_published_artifact_verifies(tmp_path: Path) -> None:
    digest = publish_folder(draft(tmp_path), {"stage": "sft"}, tmp_path / "artifact")
    again = verify_folder(tmp_path / "artifact")
    assert again["digest"] == digest
    assert sorted(again["files"]) == ["sub/config.json", "weights.safetensors"]
    assert not (tmp_path / "draft").exists()


def test_digest_depends_on_content_and_lineage_alone(tmp_path: Path) -> None:
    one = publish_folder(draft(tmp_path, "a"), {"parent_digest": "x"}, tmp_path / "one")
    same = publish_folder(draft(tmp_path, "b"), {"parent_digest": "x"}, tmp_path / "two")
    other = publish_folder(draft(tmp_path, "c"), {"parent_digest": "y"}, tmp_path / "three")
    assert one == same != other


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << (position % 8)
    path.write_bytes(data)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    publish_folder(draft(tmp_path), {"stage": "sft"}, tmp_path / "artifact")
    published = tmp_path / "artifact"
    checked = 0
    for name in ("weights.safetensors", "manifest.json", "sub/config.json"):
        path = published / name
        for position in range(0, path.stat().st_size * 8, 5):
            flip(path, position)
            with pytest.raises(ArtifactDamaged, match=path.name):
                verify_folder(published)
            flip(path, position)
            checked += 1
    verify_folder(published)
    assert checked > 500


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "weights.safetensors").unlink(),
        lambda path: (path / "extra.json").write_text("{}"),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("[]"),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: (path / "weights.safetensors").write_bytes(bytes(range(255))),
        lambda path: (path / "model.pt").write_bytes(b""),
        lambda path: (path / "link.json").symlink_to("/etc/hosts"),
    ],
    ids=["missing", "extra", "no manifest", "list", "torn", "truncated", "pickle", "link"],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    publish_folder(draft(tmp_path), {"stage": "sft"}, tmp_path / "artifact")
    published = tmp_path / "artifact"
    damage(published)
    with pytest.raises(ArtifactDamaged, match=r"damaged|no manifest|unpickled|link"):
        verify_folder(published)


@pytest.mark.parametrize(
    ("named", "what", "fix"),
    [
        ("runs/one-1", "holds no artifact", "Available: {}/one-1/stages/dpo/artifact, {}/one-1/stages/sft/artifact"),
        ("runs/one-1/stages/sft", "holds no artifact", "Available: {}/one-1/stages/sft/artifact"),
        ("runs/one-1/stages/dpo/artefact", "there is no such", "Did you mean {}/one-1/stages/dpo/artifact? "),
        ("runs/one-2/stages/dpo/artifact", "there is no such", "Did you mean {}/one-1/stages/dpo/artifact? "),
        ("gone", "there is no such", "Available: {}/one-1/stages/dpo/artifact, "),
    ],
)
def test_what_holds_no_artifact_is_named_with_those_near_it(tmp_path: Path, named: str, what: str, fix: str) -> None:
    runs = tmp_path / "runs"
    for stage in ("sft", "dpo"):
        (runs / "one-1" / "stages" / stage / "artifact").mkdir(parents=True)
        (runs / "one-1" / "stages" / stage / "artifact" / "manifest.json").touch()
    with pytest.raises(BadInput, match=what) as caught:
        require_artifact(tmp_path / named)
    assert caught.value.problems[0].fix.startswith(fix.format(runs, runs))


def test_of_many_artifacts_the_nearest_alone_is_named(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"run-{number:02}" / "stages" / "sft" / "artifact").mkdir(parents=True)
        (tmp_path / f"run-{number:02}" / "stages" / "sft" / "artifact" / "manifest.json").touch()
    with pytest.raises(BadInput) as caught:
        require_artifact(tmp_path / "run-117" / "stages" / "sft" / "artifact")
    (problem,) = caught.value.problems
    assert problem.fix == f"Did you mean {tmp_path}/run-17/stages/sft/artifact? Available: 20 below {tmp_path}"


def test_pickles_are_never_published(tmp_path: Path) -> None:
    path = draft(tmp_path)
    (path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ArtifactDamaged, match="unpickled"):
        publish_folder(path, {}, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def fail_nth(monkeypatch: pytest.MonkeyPatch, nth: int) -> list[str]:
    """Let the nth write, sync or rename fail with a full disk; later ones work again. Returns the operations seen."""
    seen: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == nth:
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, operation)

    wrap(os, "fsync")
    wrap(Path, "rename")
    wrap(Path, "replace")
    wrap(artifact, "write_synced")
    return seen


def test_a_disk_that_fills_at_any_operation_loses_nothing(tmp_path: Path) -> None:
    earlier = publish_folder(draft(tmp_path, "first"), {"stage": "sft"}, tmp_path / "earlier")
    failures = 0
    for nth in range(1, 100):
        target = tmp_path / f"artifact{nth}"
        with pytest.MonkeyPatch.context() as patch:
            seen = fail_nth(patch, nth)
            try:
                publish_folder(draft(tmp_path, f"draft{nth}"), {"stage": "dpo"}, target)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failures += 1
        assert verify_folder(tmp_path / "earlier")["digest"] == earlier
        if target.exists():
            verify_folder(target)  # whole or not at all
        if len(seen) < nth:
            break
    assert failures >= 6
    assert verify_folder(target)


def test_replacing_a_text_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    replace_text(path, "old")
    for nth in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            fail_nth(patch, nth)
            with pytest.raises(OSError, match="No space"):
                replace_text(path, "new")
        assert path.read_text() in ("old", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
        replace_text(path, "old")


def test_several_may_replace_a_text_at_once(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    texts = [letter * 10_000 for letter in "abcdef"]

    def replace_often(text: str) -> None:
        for _ in range(20):
            replace_text(path, text)
            assert path.read_text() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(replace_often, texts))
    assert [p.name for p in tmp_path.iterdir()] == ["scores.jsonl"]


def test_digest_is_that_of_sorted_json() -> None:
    assert digest_of({"b": 1, "a": [1.5, None]}) == digest_of(json.loads('{"a": [1.5, null], "b": 1}'))
    with pytest.raises(ValueError, match="Out of range"):
        digest_of({"loss": float("nan")})
