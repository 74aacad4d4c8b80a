"""``posttrain recipe=NAME``: run or resume a recipe, or with ``--multirun`` every member of a sweep."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from posttrain import environment
from posttrain.errors import ArtifactDamaged, BadInput, GateFailed, GateUndecided, explain
from posttrain.gate.procedure import WARNED
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.plan import Plan, make_plan

if TYPE_CHECKING:
    from omegaconf import DictConfig


HYDRA_FLAGS = ("--multirun", "-m", "--config-dir", "-cd", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc",
               "--experimental-rerun", "--package", "-p", "--resolve", "--hydra-help")  # fmt: skip
WITH_VALUE = ("--config-dir", "-cd", "--cfg", "-c", "--package", "-p")


def main(words: list[str]) -> int:
    """Compose, check, run and report on a recipe."""
    if any(word.split("=")[0] in HYDRA_FLAGS for word in words):
        return run_hydra(_flags_first(words))
    from posttrain.config.compose import compose

    host = plugins.load()
    return _run_plan(make_plan(compose(host, words), host), host)


def _run_plan(plan: Plan, host: Host) -> int:
    """Run a plan, and print its final table however it ends.

    Return 0; after verdicts that a gate only warns about, the code of the worst of them.
    """
    environment.prepare()
    from posttrain.pipeline import run
    from posttrain.run.display import Display

    state = run(plan, host, Display()).state
    if state.state != WARNED:
        return 0
    verdicts = [stage.verdict for stage in state.stages]
    return GateFailed.exit_code if "fail" in verdicts else GateUndecided.exit_code


def _flags_first(words: list[str]) -> list[str]:
    """Put flags before overrides: users write them in any order, and Hydra rejects an override after a flag."""
    flags, overrides = [], []
    waiting = iter(words)
    for word in waiting:
        if word.startswith("-"):
            flags.append(word)
            if word in WITH_VALUE:
                flags += [value for value in [next(waiting, None)] if value is not None]
        else:
            overrides.append(word)
    return flags + overrides


def run_hydra(words: list[str], primary: str = "config") -> int:
    """Run Hydra for words with its flags: sweeps, launchers, ``--cfg``, ``--info``, completion.

    The members of a sweep run one after the other, and one that its gate fails does not stop the others. Return the
    exit code of the first member that did not end with 0. ``primary`` is the file below conf/ whose keys are completed.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    from posttrain.config import sources
    from posttrain.config.compose import Composition, removed_stages
    from posttrain.config.explain import fault
    from posttrain.config.paths import shipped

    os.environ["HYDRA_FULL_ERROR"] = "1"
    host = plugins.load()
    codes: list[int] = []

    def member(config: DictConfig) -> None:
        own = HydraConfig.get()
        overrides = list(own.overrides.task)
        folders = [source.path for source in own.runtime.config_sources if source.provider == "command-line"]
        found = Composition(
            recipe=own.runtime.choices["recipe"],
            config=config,
            words=(*(word for folder in folders for word in ("--config-dir", folder)), *overrides),
            removed=removed_stages(overrides),
            tracker=own.runtime.choices["tracker"],
        )
        try:
            codes.append(_run_plan(make_plan(found, host), host))
        except (BadInput, GateFailed, GateUndecided, ArtifactDamaged) as error:
            codes.append(explain(error))

    sources.register(host)
    sys.argv = ["posttrain", *words]
    try:
        hydra.main(config_path=str(shipped("conf")), config_name=primary, version_base="1.3")(member)()
    except HydraException as error:
        raise BadInput(fault(error, words, host).problem) from None
    return next((code for code in codes if code), 0)
