"""Requirements of every stage, as a class of tests for its author to inherit.

    class TestMine(StageConformance):
        kind = "mine"                                  # the stage, as its plugin registers it
        settings = {"lr": 1e-3, "checkpoint_steps": 1}

Every test runs the stage through the real pipeline, stacked on a tiny SFT artifact with a tokenizer of one token per
character. Kills are exceptions too deep for a stage to catch, and one SIGKILL; SIGTERM is the signal itself.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from posttrain.artifact import verify
from posttrain.errors import BadInput, Interrupted
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.testing.footprint import Footprint
from posttrain.testing.project import Project

if TYPE_CHECKING:
    import pytest

Files = dict[str, bytes]
BAD_RECORDS: Mapping[str, Sequence[Any]] = {
    "no records": [],
    "keys of no shape": [{"colour": "red"}],
    "no object": [3],
    "empty texts": [{"prompt": "", "completion": "", "chosen": "", "rejected": ""}],
}
"""Files of records that every stage rejects."""
KILLER = """\
import os, signal, sys
from posttrain.testing.conformance import AtStep
from posttrain.testing.project import Project
project = Project(folder={folder!r}, kind={kind!r}, settings={{}})
project.run({output!r}, also=[AtStep({step}, lambda: os.kill(os.getpid(), signal.SIGKILL))])
"""


class Killed(BaseException):
    """The death of the process, as far as a stage can tell."""


class AtStep:
    """A plugin that acts when a stage reports a certain step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action
        self.seen: list[int] = []

    @hookimpl
    def step_logged(self, step: int) -> None:
        """Note the step, and act at the chosen one; step 0 is a measurement, and no step of training."""
        if step:
            self.seen.append(step)
        if step == self.step:
            self.action()


class StageConformance:
    """Tests of one stage: inherit, name the stage, run pytest. The settings must give it four steps or more."""

    kind: ClassVar[str]
    """Name of the stage, as its plugin registers it."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the stage; those without a default are required here."""
    records: ClassVar[Sequence[Any] | None] = None
    """Training records as a file holds them; by default eight invented ones of the stage's shape."""
    rejected: ClassVar[Sequence[Sequence[Any]]] = ()
    """Files of records that this stage must reject, in addition to those that every stage must."""
    parent: ClassVar[Literal["lora", "full"]] = "lora"
    """True when the stage is stacked on an adapter or on full weights."""
    _made: ClassVar[dict[type, tuple[Project, Path]]] = {}

    # --- Before training ----------------------------------------------------------------------------------------------

    def test_the_plugin_is_loaded_and_its_recipe_composes(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        project, _ = self._clean(tmp_path_factory)
        host = plugins.load()
        failed = {info.name: info.reason for info in host.failures()}
        assert self.kind in host.stages, f"no plugin registers {self.kind!r}; failed plugins: {failed}"
        (step,) = project.plan(host).steps
        assert step.stage.name == self.kind
        for name, value in self.settings.items():
            if isinstance(value, Mapping):
                continue  # a nested setting may leave keys to their defaults
            assert _plain(getattr(step.config, name)) == value, f"{name} is not what the recipe says"

    def test_planning_imports_no_torch(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        project, _ = self._clean(tmp_path_factory)
        code = f"import sys\nfrom posttrain.cli import dispatch\ndispatch({['plan', *project.words()]!r})\n"
        code += "print(*{'torch', 'transformers', 'trl', 'peft'} & set(sys.modules), file=sys.stderr)"
        with project.recipes_found():
            result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert not result.stderr.split(), f"planning imported {result.stderr}: import it where the stage starts"
        assert self.kind in result.stdout

    def test_bad_records_are_rejected_before_training(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
    ) -> None:
        project, _ = self._clean(tmp_path_factory)
        own = {f"file {number} of rejected": records for number, records in enumerate(self.rejected, start=1)}
        for name, records in {**BAD_RECORDS, **own}.items():
            path = project.write_records(records, f"{name.replace(' ', '_')}.jsonl")
            steps, data = AtStep(0, int), f"{self.kind}.data='{path}'"
            project.plan(plugins.load(), data)  # the plan is sound: only the file's content is wrong
            try:
                project.run(tmp_path / path.stem, data, also=[steps])
            except BadInput:
                assert not steps.seen, f"{name}: {len(steps.seen)} steps were trained before the records were rejected"
                continue
            raise AssertionError(f"{name}: {list(records)[:2]} was trained on instead of raising BadInput")

    # --- The result ---------------------------------------------------------------------------------------------------

    def test_it_trains_and_its_artifact_verifies(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        _, run = self._clean(tmp_path_factory)
        artifact = verify(run / "stages" / self.kind / "artifact")
        assert artifact.manifest.lineage[-1] == self.kind
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if row["step"]]
        assert steps == list(range(1, len(steps) + 1)), f"steps are reported from 1, each once: {steps}"
        assert len(steps) >= 4, f"the settings make the stage take {len(steps)} steps; these tests need four or more"
        for row in rows:
            numbers = {name: value for name, value in row.items() if isinstance(value, float)}
            assert all(math.isfinite(value) for value in numbers.values()), f"not finite: {numbers}"

    def test_it_is_judged_and_the_verdict_recorded(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
    ) -> None:
        project, _ = self._clean(tmp_path_factory)
        run = project.run(tmp_path, *project.gate_overrides()).path
        verdict = json.loads((run / "stages" / self.kind / "verdict.json").read_text())
        assert (verdict["state"], verdict["gated"]) == ("pass", True)
        assert (run / "stages" / self.kind / "lifts.jsonl").read_text().count("\n") >= 1

    def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
    ) -> None:
        project, run = self._clean(tmp_path_factory)
        again, other = project.run(tmp_path / "a").path, project.run(tmp_path / "b", "seed=1").path
        assert self._artifact(again) == self._artifact(run), "the same seed gave other bytes"
        assert _weights(self._artifact(other)) != _weights(self._artifact(run)), "another seed gave the same bytes"

    # --- Interruptions ------------------------------------------------------------------------------------------------

    def test_killed_after_every_step_it_ends_with_the_same_bytes(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
    ) -> None:
        project, run = self._clean(tmp_path_factory)
        for step in range(1, _steps(run) + 1):
            self._interrupt(project, tmp_path, AtStep(step, _kill), Killed)
        assert self._artifact(project.run(tmp_path).path) == self._artifact(run), (
            "the resumed run ended with other bytes"
        )

    def test_killed_by_the_system_it_ends_with_the_same_bytes(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
    ) -> None:
        project, run = self._clean(tmp_path_factory)
        code = KILLER.format(folder=project.folder, kind=self.kind, output=tmp_path, step=_steps(run) // 2)
        code = code.replace("PosixPath(", "(__import__('pathlib').Path)(")
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert self._artifact(project.run(tmp_path).path) == self._artifact(run), (
            "the resumed run ended with other bytes"
        )

    def test_sigterm_after_any_step_saves_it_and_costs_nothing(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
    ) -> None:
        project, run = self._clean(tmp_path_factory)
        done = 0
        for step in range(1, _steps(run) - 1):
            if step <= done:
                continue  # the stage had taken one more step before it saw the signal
            stopping = AtStep(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            self._interrupt(project, tmp_path, stopping, Interrupted)
            assert stopping.seen[0] == done + 1, f"steps {list(range(stopping.seen[0], done + 1))} were trained again"
            done = stopping.seen[-1]
            assert done <= step + 1, f"after SIGTERM at step {step} it trained until step {done}"
        assert self._artifact(project.run(tmp_path).path) == self._artifact(run), (
            "the resumed run ended with other bytes"
        )

    # --- Manners ------------------------------------------------------------------------------------------------------

    def test_it_writes_nowhere_but_into_its_run(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project, _ = self._clean(tmp_path_factory)
        empty = tmp_path / "empty"
        empty.mkdir()
        monkeypatch.chdir(empty)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the loop keeps measured rates there
        before = {path: path.read_bytes() for path in project.folder.rglob("*") if path.is_file()}
        with Footprint(allowed=[tmp_path / "runs", tmp_path / "cache"]) as footprint:
            project.run(tmp_path / "runs")
        assert not footprint.written, f"written outside of the run: {sorted(footprint.written)}"
        assert not list(empty.iterdir()), "written into the working directory"
        assert {path: path.read_bytes() for path in project.folder.rglob("*") if path.is_file()} == before

    # --- Parts --------------------------------------------------------------------------------------------------------

    def _clean(self, factory: pytest.TempPathFactory) -> tuple[Project, Path]:
        """Return the project and an undisturbed run of it, made once per class."""
        if type(self) not in self._made:
            folder = factory.mktemp(self.kind)
            project = Project(
                folder=folder / "project", kind=self.kind, settings=self.settings, records=self.records,
                full=self.parent == "full",
            )  # fmt: skip
            project.folder.mkdir()
            self._made[type(self)] = project, project.write().run(folder / "clean").path
        return self._made[type(self)]

    def _artifact(self, run: Path) -> Files:
        folder = run / "stages" / self.kind / "artifact"
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def _interrupt(self, project: Project, output: Path, plugin: AtStep, expected: type[BaseException]) -> None:
        try:
            project.run(output, also=[plugin])
        except expected:
            return
        raise AssertionError(f"the stage trained to its end although it was stopped after step {plugin.step}")


def _kill() -> None:
    raise Killed


def _steps(run: Path) -> int:
    return sum(json.loads(line)["step"] > 0 for line in (run / "metrics.jsonl").read_text().splitlines())


def _weights(files: Files) -> Files:
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
