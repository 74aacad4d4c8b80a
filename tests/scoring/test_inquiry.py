"""The questions of a gate shared by several processes: the answers of one, to the bit, and nothing asked twice.

The shares are asked here one after the other; tests/launch/test_gate.py has real processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from posttrain.artifact import ModelSource
from posttrain.config.schema import GateConfig, GateTask, Role, Sequential
from posttrain.errors import ArtifactDamaged, BadInput, Interrupted
from posttrain.gate.sequential import Look
from posttrain.gate.spec import GateProgress, GateRequest, Scorecard
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.scoring.cache import Blocks
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.harness.requests import request_values
from posttrain.scoring.inquiry import Inquiry, Part, Tally, ask_share
from posttrain.scoring.systems import Loading
from tests.support.adapters import Log, base_source_with, write_adapters
from tests.support.quizzes import gate_task, save_adapter, write_quizzes
from tests.support.tiny import base_source

TASKS = ("generate2", "choose2", "likelihood0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quizzes(tmp_path_factory.mktemp("inquiry"))


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("looks"))


@dataclass
class Reports:
    """The progress of one process; ends it after so many blocks."""

    tally: Tally
    rank: int
    left: list[int]

    def answered(self, part: int, documents: int, tokens: int = 0) -> None:
        if not tokens:
            self.left[0] -= 1
        self.tally.answered(self.rank, part, documents, tokens)

    def cut(self, part: int, prompts: int) -> None:
        self.tally.cut(part, prompts)

    def looked(self, look: int) -> None:
        pass


@dataclass
class InTurn:
    """Processes that work one after the other, look by look, up to a number of blocks."""

    world: int
    blocks: int = 10**9
    inquiries: list[Inquiry] = field(default_factory=list)

    def __call__(
        self,
        inquiry: Inquiry,
        requests: Iterable[tuple[Any, Sequence[Any]]],
        folder: Path,
        progress: GateProgress,
        is_settled: Callable[[int], bool],
    ) -> None:
        self.inquiries.append(inquiry)
        values = {place: json.loads(json.dumps(found)) for place, found in requests}
        tally, left, loading = (
            Tally(inquiry, progress.advance),
            [self.blocks],
            Loading(load_model, load_tokenizer, "cpu"),
        )
        for look in sorted({part.look for part in inquiry.parts}):
            for rank in range(self.world):
                place, reports = (rank, self.world), Reports(tally, rank, left)
                share = {at: values[at] for at in inquiry.places(*place)}
                now = replace(inquiry, parts=tuple(self._at(part, look) for part in inquiry.parts))
                ask_share(now, share, place, loading, reports, lambda: left[0] <= 0)
            if is_settled(look):
                break
        for line in tally.notes():
            progress.note(line)

    def _at(self, part: Part, look: int) -> Part:
        return part if part.look == look else replace(part, blocks=())


def systems(folder: Path) -> dict[str, ModelSource]:
    base = base_source(folder / "base")
    adapters = {"candidate": "candidate", "parent": "parent"}
    return {"base": base} | {
        name: replace(base, name=name, adapter=folder / path, digest=f"digest of {path}")
        for name, path in adapters.items()
    }


def request(folder: Path, cache: Path, names: Sequence[str] = TASKS, **given: Any) -> GateRequest:
    tasks = {name: gate_task(folder, name, limit=12) for name in names}
    made: Mapping[str, Any] = {"systems": systems(folder), "tasks": tasks, "gate": GateConfig(batch_size=5, seed=7)}
    return GateRequest(
        stage="sft", dtype="float32", cache=cache, scorecard=cache.with_name(f"{cache.name}.jsonl"), **{**made, **given}
    )


def never_load(source: ModelSource, dtype: str) -> Any:
    raise AssertionError(f"{source.name} was loaded")


def scored(request: GateRequest, model: Any = load_model) -> tuple[Scorecard, Log]:
    log = Log()
    return evaluate(request, log, Loading(model, load_tokenizer, "cpu")), log


def kept(cache: Path) -> dict[str, Any]:
    """Every answer by key."""
    keys = {path.name.partition(".")[0] for path in cache.glob("*.answers")}
    return {key: dict(sorted(Blocks(cache / f"{key}.answers", key, 5).read().items())) for key in keys}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The requests of each call to a model."""
    calls: list[list[Any]] = []
    for kind in ("generate_until", "loglikelihood"):
        original = getattr(HFLM, kind)

        def answered(self: Any, requests: Any, disable_tqdm: bool = False, original: Any = original) -> Any:
            calls.append([request.args for request in requests])
            return original(self, requests, disable_tqdm=disable_tqdm)

        monkeypatch.setattr(HFLM, kind, answered)
    return calls


def test_answers_are_those_of_one_process_to_the_bit(folder: Path, tmp_path: Path) -> None:
    whole, alone = scored(request(folder, tmp_path / "whole"))
    assert len(whole.rows) == 3 * 12 * 4  # systems, documents, filters of the three tasks
    for world in (2, 3):
        card, log = scored(request(folder, tmp_path / str(world), launch=InTurn(world)), never_load)
        assert card == whole
        assert kept(tmp_path / str(world)) == kept(tmp_path / "whole")
        assert [step for step in log.steps if step[2] == 12] == [step for step in alone.steps if step[2] == 12]
        done = [(system, task) for system, task, _, _ in log.steps]
        assert done == sorted(done, key=list(dict.fromkeys(done)).index)
    assert len(list((tmp_path / "3").glob("*.answers"))) == 9 * 3


def test_what_several_began_one_goes_on_with_and_the_reverse(
    folder: Path, tmp_path: Path, asked: list[list[Any]]
) -> None:
    whole, _ = scored(request(folder, tmp_path / "whole"))
    blocks, asked[:] = sorted(asked), []
    cache = tmp_path / "cache"
    for world in (2, 3):
        with pytest.raises(Interrupted, match="every answer so far is kept"):
            scored(request(folder, cache, launch=InTurn(world, blocks=7)), never_load)
    assert len(asked) == 14
    last = InTurn(2, blocks=5)
    with pytest.raises(Interrupted):
        scored(request(folder, cache, launch=last), never_load)
    assert last.inquiries[0].blocks == 3 * 3 * 3 - 14
    card, _ = scored(request(folder, cache))
    assert card == whole
    assert sorted(asked) == blocks
    again, _ = scored(request(folder, cache, launch=InTurn(2)), never_load)
    assert again == whole
    assert len(asked) == len(blocks)


def test_tasks_with_equal_requests_are_asked_once(folder: Path, tmp_path: Path) -> None:
    task, launch = gate_task(folder, "generate0", limit=12), InTurn(2)
    tasks = {"one": task, "two": replace(task, filter="whole", role=Role.guard)}
    card, _ = scored(request(folder, tmp_path / "cache", tasks=tasks, launch=launch), never_load)
    assert [part.task for part in launch.inquiries[0].parts] == ["one"] * 3
    assert len(card.rows) == 2 * 2 * 3 * 12


def test_looks_end_when_the_gate_is_settled(looks: Path, tmp_path: Path, asked: list[list[Any]]) -> None:
    base = base_source(looks / "base")
    given = {
        "systems": {"base": base, "candidate": base_source_with(base, looks / "good")},
        "tasks": {"quiz": GateTask(task=str(looks / "quiz.yaml"), role=Role.lift, metric="acc")},
        "gate": GateConfig(batch_size=4, sequential=Sequential.obrien_fleming),
    }
    whole, log = scored(request(looks, tmp_path / "whole", **given))
    calls, asked[:] = len(asked), []
    assert whole.look == Look(2, 5)
    for world in (2, 3):
        launch = InTurn(world)
        card, told = scored(request(looks, tmp_path / str(world), **given, launch=launch), never_load)
        assert (card, told.notes) == (whole, log.notes)
        assert {part.look for part in launch.inquiries[0].parts} == {1, 2, 3, 4, 5}
        assert len(asked) == calls
        asked.clear()
    settled = InTurn(2)
    again, _ = scored(request(looks, tmp_path / "whole", **given, launch=settled), never_load)
    assert (again, settled.inquiries) == (whole, [])


@pytest.mark.parametrize("name", ["generate0", "likelihood0"])
def test_an_adapter_of_nan_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    save_adapter(tmp_path / "nan", seed=0, fill=float("nan"))
    broken = replace(systems(folder)["base"], name="nan", adapter=tmp_path / "nan", digest="nan")
    with pytest.raises(ArtifactDamaged, match=f"candidate, {name}: the model's output is not finite"):
        scored(request(folder, tmp_path / "cache", [name], systems={"candidate": broken}, launch=InTurn(2)), never_load)


def test_cut_prompts_are_counted_over_all(tmp_path: Path) -> None:
    short = write_quizzes(tmp_path, max_position_embeddings=48)
    given = {"systems": {"candidate": base_source(short / "base")}}
    whole, alone = scored(request(short, tmp_path / "whole", ["generate2"], **given))
    assert len(alone.notes) == 1
    card, log = scored(request(short, tmp_path / "two", ["generate2"], **given, launch=InTurn(2)), never_load)
    assert (card, log.notes) == (whole, alone.notes)


def test_requests_that_json_would_change_are_rejected() -> None:
    made = Instance("generate_until", {}, ("a", {"until": ("b",)}), 0, ("mine", 0, 1))
    with pytest.raises(BadInput, match="its requests have values that JSON lacks") as caught:
        request_values(made)
    assert caught.value.problems[0].where == "tasks.mine"


def test_shares_are_even_over_all_parts(tmp_path: Path) -> None:
    parts = tuple(
        Part(look=1, system="candidate", task=str(count), key="", ends=(), blocks=tuple(range(count)), total=count)
        for count in (1, 1, 5, 2, 1)
    )
    inquiry = Inquiry(systems={}, dtype="", device="", seed=0, size=1, cache=tmp_path, parts=parts)
    for world in (1, 2, 3, 7):
        shares = [inquiry.share(rank, world) for rank in range(world)]
        sizes = [sum(len(blocks) for _, blocks in share) for share in shares]
        assert sum(sizes) == inquiry.blocks == 10
        assert max(sizes) - min(sizes) <= 1
        for number, part in enumerate(parts):
            assert sorted(block for share in shares for block in share[number][1]) == list(part.blocks)
