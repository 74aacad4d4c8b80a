"""A folder with base, SFT artifact, records and recipe: enough to run one stage by the real pipeline."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import environment
from posttrain.host import plugins
from posttrain.testing.evaluator import FakeEvaluator

if TYPE_CHECKING:
    from posttrain.host.plugins import Host
    from posttrain.plan import Plan
    from posttrain.run.directory import RunDirectory

RECIPE = "conformance"
WORDS = ("red", "blue", "green", "clay", "ash", "elm", "ivy", "oak")
TASK = "task: some\ndataset_path: json\nmetric_list:\n  - {metric: acc, aggregation: mean}\n"


def example_records(shape: str) -> list[dict[str, Any]]:
    """Return eight invented records of a stage's shape, as a file holds them."""
    if shape == "preferences":
        return [{"prompt": f"a {word}", "chosen": f"the {word}", "rejected": f"no {word}"} for word in WORDS]
    if shape == "feedback":
        return [
            {"prompt": f"a {word}", "completion": word, "label": index % 2 == 0} for index, word in enumerate(WORDS)
        ]
    return [{"prompt": f"a {word}", "completion": f"the {word}"} for word in WORDS]


@dataclass(frozen=True, kw_only=True)
class Project:
    """One kind of stage in a recipe of its own, stacked on a tiny SFT artifact or, if it asks for it, on the base."""

    folder: Path
    kind: str
    settings: Mapping[str, Any]
    """Settings of the stage, without data and gate."""
    records: Sequence[Any] | None = None
    """Content of its file; None for ``example_records``."""
    full: bool = False
    """True when the SFT artifact holds full weights instead of an adapter."""

    def write(self) -> Project:
        """Write everything into the folder."""
        from posttrain.testing.tiny import write_base, write_sft

        environment.prepare()
        base = write_base(self.folder / "base")
        stage = plugins.load().stages[self.kind]
        if stage.parent != "base":
            write_sft(self.folder / "sft", base, full=self.full)
        (self.folder / "some.yaml").write_text(TASK, encoding="utf-8")
        self.write_records(example_records(stage.records) if self.records is None else self.records)
        recipes = self.folder / "recipes"
        recipes.mkdir()
        (recipes / f"{RECIPE}.yaml").write_text(self._recipe(stage.parent), encoding="utf-8")
        return self

    def write_records(self, records: Sequence[Any], name: str = "records.jsonl") -> Path:
        """Write a file of records beside the recipe."""
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    def words(self, *overrides: str) -> list[str]:
        """Return the words of a command line that run the recipe."""
        return [f"recipe={RECIPE}", *overrides]

    def plan(self, host: Host, *overrides: str) -> Plan:
        """Plan the recipe."""
        from posttrain.config.compose import compose
        from posttrain.plan import make_plan

        with self.recipes_found():
            return make_plan(compose(host, self.words(*overrides)), host)

    def run(self, output: Path, *overrides: str, also: Sequence[object] = ()) -> RunDirectory:
        """Run or resume the recipe below ``output``, with a fake gate and ``also`` among the installed plugins.

        Raises the pipeline's errors. Without a gate in ``overrides`` the stage is promoted unseen.
        """
        from rich.console import Console

        from posttrain.pipeline import run
        from posttrain.run.display import Display

        host = plugins.load()
        for room in ("scoring", "gate"):
            host.manager.unregister(name=f"{room}.plugin")
        for plugin in (FakeEvaluator(), *also):
            host.manager.register(plugin)
        plan = self.plan(host, f"output_root={output}", *overrides)
        return run(plan, host, Display(Console(file=io.StringIO(), width=200)))

    def gate_overrides(self) -> list[str]:
        """Return overrides that give the stage a gate with one task."""
        task = f"{{role: lift, metric: acc, task: '{self.folder / 'some.yaml'}'}}"
        return [f"{self.kind}.gate.enabled=true", f"+{self.kind}.gate.tasks.some={task}"]

    @contextmanager
    def recipes_found(self) -> Iterator[None]:
        """Make the recipe known inside the context, to this process and to those it starts."""
        before = os.environ.get("POSTTRAIN_RECIPES")
        os.environ["POSTTRAIN_RECIPES"] = str(self.folder / "recipes")
        try:
            yield
        finally:
            del os.environ["POSTTRAIN_RECIPES"]
            if before is not None:
                os.environ["POSTTRAIN_RECIPES"] = before

    def _recipe(self, parent: str) -> str:
        import yaml

        content: dict[str, Any] = {
            "defaults": [{f"/stage@{self.kind}": self.kind}, "_self_"],
            "model": {"path": str(self.folder / "base"), "dtype": "float32"},
            self.kind: {"data": str(self.folder / "records.jsonl"), "gate": {"enabled": False}, **self.settings},
        }
        if parent != "base":
            content["start_from"] = str(self.folder / "sft")
            content["start_from_unpromoted"] = True  # it was made for the test, and no gate judged it
        return yaml.safe_dump(content, sort_keys=False)
