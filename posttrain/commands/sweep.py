"""A sweep: every combination of values runs, and with ``select=best`` the best of them is judged, once.

    members ─► runs on the half for choosing ─► the best one ─► its run on the half for judging ─► verdict, exit code

A member that is chosen by all documents of its gate passes by luck: of twenty that are no better than the base, one
does so more often than not. Either half has runs of its own, so the same command resumes wherever it was stopped, and
whatever was judged before keeps its verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from posttrain.config.compose import Composition, compose
from posttrain.config.launch import Launcher
from posttrain.config.schema import Half
from posttrain.errors import ArtifactDamaged, BadInput, GateFailed, GateUndecided, Problem, explain, nearest, reject
from posttrain.host.plugins import Host
from posttrain.launch.shape import in_slurm_job
from posttrain.plan import Plan, make_plan

if TYPE_CHECKING:
    from posttrain.gate.spec import Verdict
    from posttrain.run.directory import RunDirectory

SELECT = "select"
BEST = "best"
ENDINGS = (BadInput, GateFailed, GateUndecided, ArtifactDamaged)
"""Errors of one member that do not stop the others."""
RunPlan = Callable[[Plan, Host], tuple[int, "RunDirectory | None"]]
"""A run of a plan: its exit code, and its directory unless it was queued."""


def selection(words: Sequence[str], *, is_sweep: bool) -> tuple[list[str], bool]:
    """Return the words without ``select=best``, and True when it was among them.

    Raises BadInput for another value, or outside of a sweep.
    """
    keys = {word: word.partition("=")[0] for word in words}
    chosen = [word for word in words if keys[word] == SELECT]
    for word in words:
        if keys[word] != SELECT and nearest(keys[word], [SELECT], cutoff=0.8):
            reject(word, f"{keys[word]!r} is no key", f"Did you mean {SELECT}={BEST}?")
    for word in chosen:
        if word != f"{SELECT}={BEST}":
            reject(word, "is no way to select a member of a sweep", f"Give {SELECT}={BEST}")
        if not is_sweep:
            reject(word, "there is no sweep to select from", "Add --multirun and values: sft.lr=1e-4,2e-4")
    return [word for word in words if word not in chosen], bool(chosen)


def run_members(members: Sequence[Sequence[str]], host: Host, run_plan: RunPlan) -> int:
    """Run the members one after the other, and list the runs of their recipes.

    One that its gate fails does not stop the others. Return the exit code of the first that did not end with 0.
    """
    _check(members, host)
    said: set[str] = set()
    ran = [_run(words, host, run_plan, said) for words in members]
    _show(ran)
    return next((each.code for each in ran if each.code), 0)


def _check(members: Sequence[Sequence[str]], host: Host) -> None:
    """Raise BadInput with the problems of every member, each once: before the first of them trains for hours."""
    problems: dict[tuple[str, str], Problem] = {}
    for words in members:
        try:
            make_plan(compose(host, list(words)), host)
        except BadInput as error:
            for problem in error.problems:
                problems.setdefault((problem.where.partition("=")[0], problem.what), problem)
    if problems:
        raise BadInput(list(problems.values()))


def run_best(members: Sequence[Sequence[str]], host: Host, run_plan: RunPlan) -> int:
    """Run the members on the half for choosing, then the best one on the half for judging; list the runs.

    Return the exit code of the chosen one; without one, that of the first member that failed.
    """
    from posttrain.gate.halves import choose

    said: set[str] = set()
    if len(members) < 2:
        reject(f"{SELECT}={BEST}", "the sweep has one member", "Give values with commas between: sft.lr=1e-4,2e-4")
    _check(members, host)
    tried = [_run(words, host, run_plan, said, Half.choosing) for words in members]
    standing = [each for each in tried if each.verdict is not None]
    place = choose([each.verdict for each in standing if each.verdict is not None])
    if place is None:
        _show(tried)
        print(f"{SELECT}={BEST}: none of the {len(members)} members is left to be judged")
        return next((each.code for each in tried if each.code), GateFailed.exit_code)
    chosen = standing[place]
    print(f"{SELECT}={BEST}: {chosen.name} is the best of {len(members)} on one half; judged on the other, once")
    judged = _run(chosen.words, host, run_plan, said, Half.judging, len(members))
    _show([*tried, judged])
    return judged.code


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """One member after its run."""

    words: Sequence[str]
    code: int
    recipe: tuple[Path, str] | None = None
    """Folder of all runs, and the recipe's name."""
    name: str = ""
    """Name of the run's directory."""
    verdict: Verdict | None = None
    """Verdict about its last stage, when the run came to its end."""


def _run(
    words: Sequence[str], host: Host, run_plan: RunPlan, said: set[str], half: Half = Half.both, tried: int = 1
) -> _Ran:
    """Run one member, on a half of its gates' documents; print what stops it, once for all members."""
    recipe = None
    try:
        composition = compose(host, list(words))
        plan = make_plan(composition, host)
        if half is not Half.both:
            _require_choice(plan)
            plan = make_plan(_on_half(composition, plan, half, tried), host)
        recipe = plan.output_root, plan.recipe
        code, directory = run_plan(plan, host)
    except ENDINGS as error:
        if str(error) not in said:
            said.add(str(error))
            explain(error)
        return _Ran(words=words, code=error.exit_code, recipe=recipe)
    if directory is None:
        return _Ran(words=words, code=code, recipe=recipe)
    return _Ran(words=words, code=code, recipe=recipe, name=directory.path.name, verdict=_last_verdict(plan, directory))


def _on_half(composition: Composition, plan: Plan, half: Half, tried: int) -> Composition:
    """Return the composition with every gate of its plan on a half of its documents, as these words would set it."""
    settings = {"half": half.value} | ({"chosen_from": tried} if tried > 1 else {})
    added = {f"{step.name}.gate.{key}": value for step in plan.steps for key, value in settings.items()}
    for key, value in added.items():
        OmegaConf.update(composition.config, key, value)
    return replace(composition, words=(*composition.words, *(f"{key}={value}" for key, value in added.items())))


def _last_verdict(plan: Plan, directory: RunDirectory) -> Verdict:
    from posttrain.run.verdict import VERDICT, read_verdict

    return read_verdict(directory.stage(plan.steps[-1].name) / VERDICT).verdict


def _require_choice(plan: Plan) -> None:
    """Raise BadInput when a plan's last gate asks nothing to choose by, or its run is not waited for."""
    last = plan.steps[-1]
    if plan.launch.kind is Launcher.slurm and not in_slurm_job():
        fix = "Run the sweep inside of a Slurm job, or with launch=local"
        reject(f"{SELECT}={BEST}", "it waits for its runs, and launch=slurm queues them", fix)
    if not last.gate.enabled or not last.tasks:
        what = f"the gate of {last.name} asks nothing, so nothing can be chosen by it"
        reject(f"{SELECT}={BEST}", what, f"Give it tasks: gate@{last.name}.gate=NAME")


def _show(ran: Sequence[_Ran]) -> None:
    """Print the table of all runs of the members' recipes."""
    from posttrain.commands import runs  # reads reports, which a run that is rejected never needs

    for root, recipe in dict.fromkeys(each.recipe for each in ran if each.recipe is not None):
        runs.show(runs.rows(root, recipe))
