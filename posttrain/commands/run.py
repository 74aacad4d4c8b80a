"""``posttrain recipe=NAME``: run or resume a recipe, or with ``--multirun`` every member of a sweep."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from posttrain import environment
from posttrain.config.launch import Launcher
from posttrain.errors import GateFailed, GateUndecided
from posttrain.gate.procedure import WARNED
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.launch import slurm
from posttrain.launch.shape import in_slurm_job
from posttrain.plan import Plan, make_plan

if TYPE_CHECKING:
    from posttrain.run.directory import RunDirectory

MULTIRUN = ("--multirun", "-m")
VERBOSE = ("--verbose", "-v")


def main(words: list[str]) -> int:
    """Compose, check, run and report on a recipe, or on every member of a sweep."""
    from posttrain.commands.sweep import run_best, run_members, selection
    from posttrain.config.compose import compose, sweep

    host = plugins.load()
    is_sweep = any(word in MULTIRUN for word in words)
    others, best = selection([word for word in words if word not in (*MULTIRUN, *VERBOSE)], is_sweep=is_sweep)
    run_plan = partial(_run_plan, verbose=any(word in VERBOSE for word in words))
    if is_sweep:
        return (run_best if best else run_members)(sweep(host, others), host, run_plan)
    code, _ = run_plan(make_plan(compose(host, others), host), host)
    return code


def _run_plan(plan: Plan, host: Host, *, verbose: bool) -> tuple[int, RunDirectory | None]:
    """Run a plan, and print its final table however it ends; with launch=slurm outside of a job, queue it as one.

    Return 0, or after verdicts that a gate only warns about the code of the worst of them; and the run's directory.
    """
    if plan.launch.kind is Launcher.slurm and not in_slurm_job():
        print(slurm.submit(plan))
        return 0, None
    environment.prepare()
    with environment.importing():
        from posttrain.pipeline import run
        from posttrain.run.display import Display

    directory = run(plan, host, Display(verbose=verbose))
    if directory.state.state != WARNED:
        return 0, directory
    verdicts = [stage.verdict for stage in directory.state.stages]
    return GateFailed.exit_code if "fail" in verdicts else GateUndecided.exit_code, directory
