"""``posttrain recipe=NAME``: run or resume a recipe, or with ``--multirun`` every member of a sweep."""

from __future__ import annotations

from pathlib import Path

from posttrain import environment
from posttrain.config.schema import Launcher
from posttrain.errors import ArtifactDamaged, BadInput, GateFailed, GateUndecided, explain
from posttrain.gate.procedure import WARNED
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.launch import slurm
from posttrain.launch.shape import in_slurm_job
from posttrain.plan import Plan, make_plan

MULTIRUN = ("--multirun", "-m")


def main(words: list[str]) -> int:
    """Compose, check, run and report on a recipe, or on every member of a sweep."""
    from posttrain.config.compose import compose, sweep

    host = plugins.load()
    if any(word in MULTIRUN for word in words):
        return _run_members(sweep(host, [word for word in words if word not in MULTIRUN]), host)
    return _run_plan(make_plan(compose(host, words), host), host)


def _run_members(members: list[list[str]], host: Host) -> int:
    """Run the members of a sweep one after the other, then list the runs of its recipes.

    One that its gate fails does not stop the others. Return the exit code of the first that did not end with 0.
    """
    from posttrain.config.compose import compose

    first, said = 0, set()
    ran: dict[tuple[Path, str], None] = {}
    for words in members:
        try:
            plan = make_plan(compose(host, words), host)
            ran[plan.output_root, plan.recipe] = None
            code = _run_plan(plan, host)
        except (BadInput, GateFailed, GateUndecided, ArtifactDamaged) as error:
            code = error.exit_code
            if str(error) not in said:  # what is wrong with every member is said once
                said.add(str(error))
                explain(error)
        first = first or code
    from posttrain.commands import runs  # reads reports, which a run that is rejected never needs

    for root, recipe in ran:
        runs.show(runs.rows(root, recipe))
    return first


def _run_plan(plan: Plan, host: Host) -> int:
    """Run a plan, and print its final table however it ends; with launch=slurm outside of a job, queue it as one.

    Return 0; after verdicts that a gate only warns about, the code of the worst of them.
    """
    if plan.launch.kind is Launcher.slurm and not in_slurm_job():
        print(slurm.submit(plan))
        return 0
    environment.prepare()
    from posttrain.pipeline import run
    from posttrain.run.display import Display

    state = run(plan, host, Display()).state
    if state.state != WARNED:
        return 0
    verdicts = [stage.verdict for stage in state.stages]
    return GateFailed.exit_code if "fail" in verdicts else GateUndecided.exit_code
