"""``posttrain recipe=NAME``: run or continue a recipe; with ``--multirun`` through Hydra's launchers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain import environment
from posttrain.errors import ArtifactDamaged, BadInput, GateRefused, GateUndecided, explain
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.plan import Plan, make_plan

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run_command(words: Sequence[str]) -> int:
    """Compose, check, run, report."""
    from posttrain.config.compose import compose

    host = plugins.load()
    run_plan(make_plan(compose(host, words), host), host)
    return 0


def run_plan(plan: Plan, host: Host) -> None:
    """Carry out a plan; its final table is printed however it ends."""
    environment.prepare()
    from posttrain.pipeline import run
    from posttrain.run.display import Display

    host.patience.seconds = plan.plugin_timeout
    run(plan, host, Display())


def hydra_command(words: list[str], primary: str = "config") -> int:
    """Anything that takes a flag of Hydra's: sweeps, launchers, ``--cfg``, ``--info``, completion.

    The members of a sweep run one after the other; a member that a gate refuses does not stop the others. The exit code
    is that of the first member that did not end with 0. ``primary`` is the file below conf/ whose keys are completed.
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
        )
        try:
            run_plan(make_plan(found, host), host)
        except (BadInput, GateRefused, GateUndecided, ArtifactDamaged) as error:
            codes.append(explain(error))

    sources.register(host)
    sys.argv = ["posttrain", *words]
    try:
        hydra.main(config_path=str(shipped("conf")), config_name=primary, version_base="1.3")(member)()
    except HydraException as error:
        raise BadInput(fault(error, words, host).problem) from None
    return next(iter(codes), 0)
