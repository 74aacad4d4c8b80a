"""Promotions and rollbacks, which a running server follows while it answers."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from posttrain.artifact import Artifact
from posttrain.errors import ArtifactDamaged
from posttrain.ledger import Standing, move
from posttrain.serve import service as services
from posttrain.serve.ask import Ask, Ended, Event, Sampling
from posttrain.serve.catalogue import BasePlace, read_catalogue
from posttrain.serve.engine import Unloaded
from posttrain.serve.follower import Follower
from posttrain.serve.proof import greedy
from posttrain.serve.service import Limits, drop, open_service, take_in
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
    promotion = ("promote", "latest", two.digest[:12], runs, "--allow-unpromoted")
    swaps = [*[promotion, ("rollback", "latest", runs)] * 3, promotion]

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
        assert service.names.aliases["latest"] == two.digest
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


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    """Adapters, and full weights, in the stages of a run."""
    stages = tmp_path_factory.mktemp("many") / "runs" / "run" / "stages"
    base = write_base(stages.parents[2] / "base")
    made = []
    for seed, name in enumerate(("one", "two", "three", "four", "whole"), start=1):
        (stages / name).mkdir(parents=True)
        made.append(make_artifact(stages / name / "artifact", base, seed, full=name == "whole"))
    return made


def test_a_model_without_a_name_is_unloaded(many: list[Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "prove", lambda models, engine, digest: 1)  # it takes most of the time
    runs = many[0].path.parents[3]
    catalogue = read_catalogue([str(many[0].path)], BasePlace(), runs, unpromoted=True)
    service = open_service(catalogue, Limits())
    follower = Follower(service, catalogue, BasePlace(), unpromoted=True)
    try:
        for artifact in (*many[1:], many[1]):
            move(runs, "live", Standing(artifact=artifact.digest, path=str(artifact.path.relative_to(runs))))
            assert follower.look()
            assert post(service, **chat("live", "Hi")).json()["system_fingerprint"] == artifact.digest
            follower.tidy()
        held = set(service.models.loaded)
        gone = post(service, **chat(many[2].digest, "Hi"))
        assert post(service, **chat("base", "Hi")).status_code == 200
    finally:
        service.engine.stop()
    base = service.names.aliases["base"]
    assert held == {many[0].digest, base, many[4].digest, many[1].digest}  # a rollback brings the full weights back
    assert held == set(service.names.digests) == set(service.models.places)
    assert gone.status_code == 404
    assert "posttrain promote NAME DIGEST loads it again" in gone.json()["error"]["message"]


def test_fifty_swaps_leave_no_more_in_memory_than_five(many: list[Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "prove", lambda models, engine, digest: 1)
    catalogue = read_catalogue([str(each.path) for each in many], BasePlace(), unpromoted=True)
    service = open_service(replace(catalogue, artifacts=catalogue.artifacts[:1]), Limits())
    sizes = []
    try:
        for number in range(50):
            served = catalogue.artifacts[1 + number % 4]
            take_in(service.models, service.engine, served)
            assert drop(service.models, service.engine, served.digest)
            if number in (4, 49):
                gc.collect()
                held = (each for each in gc.get_objects() if type(each) in (torch.nn.Parameter, torch.Tensor))
                sizes.append(sum(each.nbytes for each in held))
    finally:
        service.engine.stop()
    assert sizes[0] == sizes[1]


def test_a_model_is_freed_after_the_last_answer_of_it(made: tuple[Path, Artifact, Artifact]) -> None:
    _, one, two = made
    catalogue = read_catalogue([str(one.path), str(two.path)], BasePlace(), unpromoted=True)
    service = open_service(catalogue, Limits())
    engine, loaded, ended = service.engine, service.models.loaded[two.digest], threading.Event()

    def take(event: Event) -> None:
        if isinstance(event, Ended):
            ended.set()

    asked = Ask(system=two.digest, prompt=[5, 6], sampling=Sampling(max_tokens=4), ends=frozenset(), send=take)

    def submitted() -> bool:
        engine.submit([asked])
        return engine.release(two.digest)  # before the answer can begin: this is the thread that makes it

    try:
        assert not engine.call(submitted)
        assert ended.wait(300)
        assert drop(service.models, engine, two.digest)
        with pytest.raises(Unloaded):
            greedy(engine, loaded, [5, 6])
        assert post(service, **chat(one.digest, "Hi")).status_code == 200
    finally:
        engine.stop()


def test_what_cannot_be_served_is_named_and_left_out(
    made: tuple[Path, Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, one, _ = made
    runs = tmp_path / "runs"
    shutil.copytree(root / "runs" / "run", runs / "run")
    stages = runs / "run" / "stages"
    with (stages / "two" / "artifact" / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    paths = [str(stages / name / "artifact") for name in ("one", "two")]
    catalogue = read_catalogue(paths, BasePlace(), unpromoted=True)
    assert [served.digest for served in catalogue.artifacts] == [one.digest]
    assert "adapter_model.safetensors" in catalogue.skipped[0]
    assert main("serve", paths[1], "--port", "0", "--allow-unpromoted") == 5
    assert main("serve", paths[0], "--port", "0") == 2  # nothing else is left, and nothing is damaged
    assert main("serve", *paths, "--port", "0") == 5
    assert "never judged" not in capsys.readouterr().out


def test_a_model_that_cannot_be_proven_is_left_out(
    made: tuple[Path, Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, one, two = made

    def prove(models: Any, engine: Any, digest: str) -> int:
        if digest == two.digest:
            raise ArtifactDamaged("two: the adapter changes nothing")
        return 1

    monkeypatch.setattr(services, "prove", prove)
    catalogue = read_catalogue([str(one.path), str(two.path)], BasePlace(), unpromoted=True)
    service = open_service(catalogue, Limits())
    try:
        assert service.catalogue.skipped == ("two: the adapter changes nothing",)
        assert two.digest not in service.models.loaded
        assert post(service, **chat("latest", "Hi")).json()["system_fingerprint"] == one.digest
    finally:
        service.engine.stop()
    alone = read_catalogue([str(two.path)], BasePlace(), unpromoted=True)
    with pytest.raises(ArtifactDamaged, match="changes nothing"):
        open_service(alone, Limits())


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
