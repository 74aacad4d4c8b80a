"""Gates err as often as they promise: base against base, planted losses, several tasks; simulated and exact."""

from __future__ import annotations

import bisect
from dataclasses import replace

import numpy as np
import pytest
from gate_errors import SHIPPED, Task, share, share_promoted, shipped_guards, simulate
from scipy import stats

from posttrain.config.schema import MAX_DROP, Role
from posttrain.gate.statistics import tango_bounds

GATES = 10_000
ALLOWED = 0.06


@pytest.mark.parametrize("n", [50, 200, 1319])
@pytest.mark.parametrize("discordance", [0.0, 0.005, 0.02, 0.1, 0.2])
def test_a_base_against_itself_is_hardly_ever_promoted(n: int, discordance: float) -> None:
    """No answer differs; batches make a few differ; or a random adapter makes many."""
    found = share_promoted(simulate([Task(n=n, discordance=discordance)], GATES, seed=n))
    assert found <= ALLOWED
    assert (found == 0) if discordance == 0 else (found > 0 or n * discordance < 5)


def test_no_number_of_documents_and_no_discordance_promotes_too_often() -> None:
    """Not simulated: every possible count of wins and losses, with its exact chance."""
    most = 400
    passes = np.array([_chance_to_pass(count) for count in range(most + 1)])
    for n in (20, 30, 50, 75, 100, 200, 400):
        for discordance in np.linspace(0.005, 0.5, 100):
            assert stats.binom.pmf(range(n + 1), n, discordance) @ passes[: n + 1] <= ALLOWED


def _chance_to_pass(discordant: int) -> float:
    """Chance that a lift passes though a win is as likely as a loss, given how many answers differ."""

    def passes(wins: int) -> bool:
        return tango_bounds(wins, discordant - wins, 400, 0.95).low > 0

    # one more win never harms
    fewest = bisect.bisect_left(range(discordant + 1), True, key=passes)
    return float(stats.binom.sf(fewest - 1, discordant, 0.5))


@pytest.mark.parametrize("n", [200, 1319])
def test_several_lifts_claim_no_more_than_one(n: int) -> None:
    tasks = [Task(n=n, discordance=0.1) for _ in range(5)]
    found = simulate(tasks, GATES // 2)
    assert share(found, lambda outcome: outcome.claimed > 0) <= ALLOWED
    assert share_promoted(found) <= 0.001  # all of them have to pass


def test_a_true_lift_makes_no_false_ones() -> None:
    tasks = [*(Task(n=500, discordance=0.1) for _ in range(3)), Task(n=500, discordance=0.2, lift=0.15)]
    found = simulate(tasks, GATES // 2)
    assert share(found, lambda outcome: outcome.claimed > 0) > 0.99
    assert share(found, lambda outcome: outcome.claimed > 1) <= ALLOWED


def test_guards_do_not_help_a_base_against_itself() -> None:
    guards = [Task(n=1319, discordance=0.02, role=Role.guard, threshold=-0.1) for _ in range(3)]
    assert share_promoted(simulate([Task(n=1319, discordance=0.1), *guards], GATES, pool=0.02)) <= ALLOWED


@pytest.mark.parametrize("allowed", [0.0, 0.01, MAX_DROP])
def test_a_planted_loss_of_three_points_is_refused(allowed: float) -> None:
    """1,319 documents of which 10 % are discordant; refused is what does not promote, as failed or as undecided."""
    loss = Task(n=1319, discordance=0.1, lift=-0.03, role=Role.guard, threshold=-allowed)
    found = simulate([loss], GATES)
    assert 1 - share_promoted(found) >= 0.99
    failed = share(found, lambda outcome: outcome.state == "fail")
    assert failed >= {0.0: 0.95, 0.01: 0.7, MAX_DROP: 0.25}[allowed]


@pytest.mark.parametrize("name", SHIPPED)
def test_guards_that_ship_refuse_a_loss_of_three_points_and_pass_an_unchanged_model(name: str) -> None:
    guards, pool = shipped_guards(name)
    lost = [replace(guard, lift=-0.03 if guard.n == 1319 else 0.0) for guard in guards]
    assert [guard.lift for guard in lost].count(-0.03) == 1  # of gsm8k
    assert len(guards) == {"sft_default": 2, "dpo_default": 4}[name]
    assert 1 - share_promoted(simulate(lost, GATES, pool=pool)) >= 0.9
    assert share_promoted(simulate(guards, GATES, pool=pool)) >= 0.9


@pytest.mark.parametrize("sizes", [(500, 1319, 2000), (100, 100, 4000)])
def test_a_pool_that_lost_its_margin_hardly_ever_passes_and_an_unchanged_one_mostly(sizes: tuple[int, ...]) -> None:
    def pooled(lift: float) -> float:
        guards = [Task(n=n, discordance=0.1, lift=lift, role=Role.guard, threshold=-0.2) for n in sizes]
        return share_promoted(simulate(guards, GATES // 4, pool=0.02))

    assert pooled(-0.02) <= ALLOWED
    assert pooled(0.0) > (0.9 if min(sizes) > 400 else 0.3)


@pytest.mark.parametrize("tasks", [1, 3])
def test_sequential_gates_err_no_more_often(tasks: int) -> None:
    found = simulate([Task(n=541, discordance=0.1) for _ in range(tasks)], GATES // 2, count=5)
    assert share_promoted(found) <= ALLOWED
    assert share(found, lambda outcome: outcome.claimed > 0) <= ALLOWED
