"""Promotions and rollbacks, which a running server follows while it answers."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from posttrain.artifact import Artifact
from posttrain.serve.catalogue import BasePlace, read_catalogue
from posttrain.serve.follower import Follower
from posttrain.serve.service import Limits, open_service
from tests.support.command import main
from tests.support.serving import ask, chat, make_artifact, post
from tests.support.tiny import write_base


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact, Artifact]:
    root = tmp_path_factory.mktemp("root")
    base = write_base(root / "base")
    folders = [root / "runs" / "run" / "stages" / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
    one, two = (make_artifact(folder / "artifact", base, seed) for seed, folder in enumerate(folders, start=1))
    return root, one, two


def test_a_running_server_follows_without_a_dropped_or_mixed_answer(made: tuple[Path, Artifact, Artifact]) -> None:
    root, one, two = made
    runs = f"output_root={root / 'runs'}"
    catalogue = read_catalogue([str(one.path)], BasePlace(), root / "runs", unpromoted=True)
    service = open_service(catalogue, Limits(rows=4))
    told: list[tuple[str, Any]] = []
    service.log = lambda event, fields: told.append((event, fields))
    follower = Follower(service, catalogue, BasePlace(), unpromoted=True)
    follower.look()
    wanted: dict[str, list[int]] = {}
    swaps = [("promote", "latest", two.digest[:12], runs, "--allow-unpromoted"), ("rollback", "latest", runs)] * 3

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        answers = []
        for swap in swaps:
            body = chat("latest", "What is this called?", max_tokens=20)
            answers += [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(4)]
            await asyncio.sleep(0.01)
            assert await asyncio.to_thread(main, *swap) == 0
            assert await asyncio.to_thread(follower.look)
        return await asyncio.gather(*answers)

    try:
        found = ask(service, crowd)
        for artifact in (one, two):
            answer = post(service, **chat(artifact.digest, "What is this called?", max_tokens=20)).json()
            wanted[artifact.digest] = answer["choices"][0]["token_ids"]
        assert service.names.aliases["latest"] == one.digest
    finally:
        service.engine.stop()
    assert {response.status_code for response in found} == {200}
    served = [(body["system_fingerprint"], body["choices"][0]["token_ids"]) for body in map(httpx.Response.json, found)]
    assert {digest for digest, _ in served} == {one.digest, two.digest}
    assert wanted[one.digest] != wanted[two.digest]
    assert all(ids == wanted[digest] for digest, ids in served)
    assert main("ledger", "verify", runs) == 0
    assert not [fields for _, fields in told if "fault" in fields]


def test_a_damaged_artifact_is_not_followed_and_the_old_one_goes_on(
    made: tuple[Path, Artifact, Artifact], tmp_path: Path
) -> None:
    root, one, two = made
    runs = tmp_path / "runs"
    shutil.copytree(root / "runs" / "run", runs / "run")
    damaged = runs / "run" / "stages" / "two" / "artifact"
    assert main("promote", "live", two.digest, f"output_root={runs}", "--allow-unpromoted") == 0
    with (damaged / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    catalogue = read_catalogue([str(runs / "run" / "stages" / "one" / "artifact")], BasePlace(), unpromoted=True)
    service = open_service(catalogue, Limits())
    told: list[tuple[str, Any]] = []
    service.log = lambda event, fields: told.append((event, fields))
    try:
        Follower(service, catalogue, BasePlace(), unpromoted=True).look()
        assert "damaged" in str(told)
        assert "live" not in service.names.aliases
        assert post(service, **chat("latest", "Hi")).json()["system_fingerprint"] == one.digest
    finally:
        service.engine.stop()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["promote", "live"], "needs a name and a digest"), (["promote", "base", "x" * 8], "own names"),
        (["promote", "v2", "x" * 8], "own names"), (["promote", "live", "0" * 12], "is no artifact"),
        (["promote", "live", "0"], "fewer than 8"), (["rollback", "live"], "never promoted"),
        (["rollback"], "needs a name"),
    ],
)  # fmt: skip
def test_bad_words(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*words) == 2
    assert told in capsys.readouterr().err


def test_an_unpromoted_artifact_needs_the_flag(
    made: tuple[Path, Artifact, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    root, one, _ = made
    assert main("promote", "live", one.digest, f"output_root={root / 'runs'}") == 2
    assert "never judged" in capsys.readouterr().err
