"""Simulated gates: how often they promote a worse model, fail a better one, and stop early.

    python benchmarks/gate_errors.py [--gates 10000]

Every simulated gate draws, for each of its tasks, the number of documents answered right by one of two systems alone;
``posttrain.gate.comparison.decide`` decides about them, as in a run. docs/gates.md holds the tables.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from omegaconf import OmegaConf

from posttrain.config.paths import shipped
from posttrain.config.schema import MAX_DROP, Role
from posttrain.gate.comparison import POOL, Comparison, decide
from posttrain.gate.evidence import Evidence, Mean, PairedAnswers, Pool
from posttrain.gate.sequential import make_looks, portion_size
from posttrain.gate.spec import VerdictState, worst
from posttrain.gate.statistics import Bounds

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a simulated gate, with the truth about the candidate."""

    n: int
    discordance: float
    """Share of the documents that only one system answers right."""
    lift: float = 0.0
    """True difference."""
    role: Role = Role.lift
    threshold: float = 0.0
    """The lower bound must exceed it."""

    @property
    def cells(self) -> list[float]:
        """Chances of a win, a loss and neither."""
        return [(self.discordance + self.lift) / 2, (self.discordance - self.lift) / 2, 1 - self.discordance]


SHIPPED = ("sft_default", "dpo_default")
"""Gates whose guards are simulated as they ship: gsm8k, with 1,319 documents, and others."""


def shipped_guards(name: str) -> tuple[list[Task], float]:
    """Return the guards of a shipped gate with their documents and ``max_drop``, and the drop allowed to their pool."""
    gate = OmegaConf.load(shipped("conf") / "gate" / f"{name}.yaml")
    guards = [
        Task(n=task.limit, discordance=0.1, role=Role.guard, threshold=-task.max_drop)
        for task in gate.tasks.values()
        if task.role == Role.guard.name
    ]
    return guards, gate.pooled_max_drop


@dataclass(frozen=True)
class Outcome:
    """The outcome of a simulated gate."""

    state: VerdictState
    claimed: int
    """Lifts that passed, each by itself."""
    used: float
    """Share of the documents that were scored."""


@functools.cache
def compute_bounds(answers: PairedAnswers, confidence: float) -> Bounds:
    """Return the bounds of counts, which recur and are computed once."""
    return answers.bounds(confidence)


class Remembered(PairedAnswers):
    """Paired answers whose bounds are computed once."""

    def bounds(self, confidence: float) -> Bounds:
        """Return the bounds, as PairedAnswers does."""
        return compute_bounds(PairedAnswers(self.wins, self.losses, self.n), confidence)


def simulate(
    tasks: Sequence[Task], gates: int, *, pool: float | None = None, count: int = 1, seed: int = 0
) -> list[Outcome]:
    """Simulate gates of the same tasks; ``pool`` is the drop allowed to all guards together, ``count`` the looks."""
    generator = np.random.default_rng(seed)
    drawn = [_counts(task, gates, count, generator) for task in tasks]
    return [_outcome(tasks, [counts[:, gate] for counts in drawn], pool, count) for gate in range(gates)]


def _counts(task: Task, gates: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw wins and losses at every look: ``(look, gate, 2)``."""
    ends = [portion_size(task.n, look) for look in make_looks(count)]
    blocks = [generator.multinomial(size, task.cells, size=gates)[:, :2] for size in np.diff([0, *ends])]
    return np.cumsum(blocks, axis=0)


def _outcome(tasks: Sequence[Task], counts: Sequence[np.ndarray], pool: float | None, count: int) -> Outcome:
    for look in make_looks(count):
        answers = [
            Remembered(int(found[look.number - 1, 0]), int(found[look.number - 1, 1]), portion_size(task.n, look))
            for task, found in zip(tasks, counts, strict=True)
        ]
        asked = list(_asked(tasks, answers, pool))
        decisions = decide(asked, CONFIDENCE, look)
        state = worst(decision.state for decision in decisions)
        if look.last or state != "undecided" or any(decision.hopeless for decision in decisions):
            break
    lifts = sum(
        decision.state == "pass" for each, decision in zip(asked, decisions, strict=True) if each.role is Role.lift
    )
    return Outcome(state, lifts, look.share)


def _asked(tasks: Sequence[Task], answers: Sequence[Evidence], pool: float | None) -> Iterator[Comparison]:
    for number, (task, evidence) in enumerate(zip(tasks, answers, strict=True)):
        yield comparison(f"task {number}", task.role, evidence, task.threshold)
    guards = [found for task, found in zip(tasks, answers, strict=True) if task.role is Role.guard]
    if pool is not None:
        yield comparison(POOL, Role.guard, Pool(guards), -pool)


def comparison(name: str, role: Role, evidence: Evidence, threshold: float) -> Comparison:
    """A question about simulated evidence."""
    return Comparison(
        name=name, metric="acc", filter="none", higher_is_better=True, questions="", role=role, against="base",
        evidence=evidence, threshold=threshold, means={}, fractions=True,
        documents=evidence.n,
    )  # fmt: skip


def share(outcomes: Sequence[Outcome], holds: Callable[[Outcome], bool]) -> float:
    """Return the share of the outcomes with a property, as text."""
    return float(np.mean([holds(outcome) for outcome in outcomes]))


def share_promoted(outcomes: Sequence[Outcome]) -> float:
    """Return the share of the gates that passed, as text."""
    return share(outcomes, lambda outcome: outcome.state == "pass")


def base_against_base(gates: int) -> Iterator[tuple[str, float]]:
    """Tabulate promotions of a base against itself: no answer differs, a few by batches, or many by chance."""
    for n in (50, 100, 200, 541, 1319, 2000):
        for discordance in (0.0, 0.005, 0.02, 0.1, 0.2):
            name = f"one lift, n = {n:,}, {discordance:.1%} discordant"
            yield name, share_promoted(simulate([Task(n=n, discordance=discordance)], gates))
    guards = [Task(n=1319, discordance=0.02, role=Role.guard, threshold=-0.05) for _ in range(2)]
    yield "a lift and two guards, n = 1,319", share_promoted(simulate([Task(n=1319, discordance=0.1), *guards], gates))


def several_lifts(gates: int) -> Iterator[tuple[str, float]]:
    """Tabulate claims of any lift where none is true, and where one of five is."""
    for n in (200, 1319):
        found = simulate([Task(n=n, discordance=0.1) for _ in range(5)], gates)
        yield f"five lifts, none true, n = {n:,}: any claimed", share(found, lambda outcome: outcome.claimed > 0)
        mixed = [Task(n=n, discordance=0.1) for _ in range(4)] + [Task(n=n, discordance=0.15, lift=0.1)]
        found = simulate(mixed, gates)
        yield f"five lifts, one true (+10), n = {n:,}: a false one claimed", share(found, lambda o: o.claimed > 1)


def losses(gates: int) -> Iterator[tuple[str, float, float, float]]:
    """Tabulate a planted loss of 3 points at n = 1,319 and 10 % discordance: failed, undecided, promoted."""
    loss = Task(n=1319, discordance=0.1, lift=-0.03)
    for allowed in (0.0, 0.01, 0.02):
        name = f"guard with max_drop = {allowed:g}{', the default' if allowed == MAX_DROP else ''}"
        yield name, *_states(simulate([replace(loss, role=Role.guard, threshold=-allowed)], gates))
    yield "lift", *_states(simulate([loss], gates))
    for name in SHIPPED:
        guards, pool = shipped_guards(name)
        kept = [replace(guard, lift=loss.lift if guard.n == loss.n else 0.0) for guard in guards]
        yield f"guards of {name}, of which gsm8k lost 3 points", *_states(simulate(kept, gates, pool=pool))
        yield f"guards of {name}, unchanged", *_states(simulate(guards, gates, pool=pool))


def _states(outcomes: Sequence[Outcome]) -> Iterator[float]:
    """Return the shares of the gates that failed, stayed undecided and passed."""
    for state in ("fail", "undecided", "pass"):
        yield float(np.mean([outcome.state == state for outcome in outcomes]))


def pooled(gates: int) -> Iterator[tuple[str, float]]:
    """Tabulate guards together: one that lost the whole margin, one that lost nothing, and guards alone."""
    sizes, margin = (500, 1319, 2000), 0.02
    for lift, what in ((-margin, "each lost 2 points"), (0.0, "unchanged")):
        alone = [Task(n=n, discordance=0.1, lift=lift, role=Role.guard, threshold=-margin) for n in sizes]
        wide = [Task(n=n, discordance=0.1, lift=lift, role=Role.guard, threshold=-0.1) for n in sizes]
        yield f"three guards, {what}: all pass alone", share_promoted(simulate(alone, gates))
        yield f"three guards, {what}: they pass in a pool", share_promoted(simulate(wide, gates, pool=margin))


def early(gates: int) -> Iterator[tuple[str, float, float, float]]:
    """Tabulate promotions with one look and with five, and the share of the documents that five looks use."""
    for lift in (-0.1, 0.0, 0.02, 0.05, 0.1):
        task = Task(n=1319, discordance=0.24, lift=lift)
        stopped = simulate([task], gates, count=5)
        used = float(np.mean([outcome.used for outcome in stopped]))
        yield f"{100 * lift:+g} points", share_promoted(simulate([task], gates)), share_promoted(stopped), used


DISTRIBUTIONS: Mapping[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda generator, size: generator.normal(size=size),
    "t, 3 degrees of freedom": lambda generator, size: generator.standard_t(3, size=size),
    "large gains are rare": lambda generator, size: generator.lognormal(size=size) - np.exp(0.5),
    "large losses are rare": lambda generator, size: np.exp(0.5) - generator.lognormal(size=size),
}


def means(gates: int) -> Iterator[tuple[str, float, float, float]]:
    """Tabulate false lifts of scores neither right nor wrong: by the rule used, by Student's t, by the bootstrap."""
    from scipy import stats

    for name, draw in DISTRIBUTIONS.items():
        for n in (20, 50, 200, 1000):
            values_GN = draw(np.random.default_rng(n), (gates, n))
            found = [Mean(values.tolist(), 1.0) for values in values_GN]
            decided = float(np.mean([each.bounds(CONFIDENCE).low > 0 for each in found]))
            student = float(np.mean(stats.ttest_1samp(values_GN, 0, axis=1).statistic > stats.t.ppf(0.95, n - 1)))
            drawn = [each.bootstrap(CONFIDENCE, 0) for each in found[: max(gates // 20, 1)]]
            yield f"{name}, n = {n:,}", decided, student, float(np.mean([b is not None and b.low > 0 for b in drawn]))


def clustered(gates: int) -> Iterator[tuple[str, float, float]]:
    """Tabulate false lifts where documents share sources: by bounds over sources, and by bounds unaware of them."""
    for sources, each in ((20, 10), (50, 10), (100, 5)):
        generator = np.random.default_rng(sources)
        clusters = [document // each for document in range(sources * each)]
        robust = naive = 0
        for _ in range(gates):
            # the chance of a win given a discordant answer belongs to the source
            tilt = np.repeat(generator.beta(0.5, 0.5, size=sources), each)
            discordant = generator.random(sources * each) < 0.2
            wins = discordant & (generator.random(sources * each) < tilt)
            values = np.where(discordant, np.where(wins, 1.0, -1.0), 0.0)
            robust += Mean(values.tolist(), 1.0, clusters).bounds(CONFIDENCE).low > 0
            counts = PairedAnswers(int((values > 0).sum()), int((values < 0).sum()), len(values))
            naive += compute_bounds(counts, CONFIDENCE).low > 0
        yield f"{sources} sources of {each} documents", robust / gates, naive / gates


TABLES: Mapping[str, tuple[Callable[[int], Iterator[tuple[str | float, ...]]], Sequence[str]]] = {
    "Base against base": (base_against_base, ("gate", "promoted")),
    "Several lifts": (several_lifts, ("gates", "share")),
    "A planted loss of 3 points, n = 1,319, 10 % discordant": (losses, ("gate", "failed", "undecided", "promoted")),
    "Guards": (pooled, ("gate", "passed")),
    "One look and five, n = 1,319, 24 % discordant": (early, ("true lift", "one look", "five looks", "documents used")),
    "Scores that are not right or wrong, no true lift": (means, ("differences", "decides", "Student's t", "bootstrap")),
    "Documents that share sources, no true lift": (clustered, ("documents", "over sources", "unaware of them")),
}


def main() -> None:
    """Print every table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", type=int, default=10_000)
    options = parser.parse_args()
    for title, (rows, columns) in TABLES.items():
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for name, *figures in rows(options.gates):
            print(f"| {name} | {' | '.join(f'{figure:.1%}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
