"""Checks of a plan's base model before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.schema import Method
from posttrain.errors import Problem
from posttrain.hookspecs import hookimpl
from posttrain.model.reward_model import reward_model
from posttrain.rewards.reward import Reward

if TYPE_CHECKING:
    from posttrain.plan import Plan


@hookimpl
def register_rewards() -> Sequence[Reward]:
    """Return the reward that a model gives."""
    return [reward_model()]


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report a missing model directory or chat template, and a missing package of the method."""
    from posttrain.model.base import check_folder, check_variables
    from posttrain.model.quantisation import check_bitsandbytes

    found = [check_folder(plan.model)]
    found += [
        check_bitsandbytes(f"{step.name}.method")
        for step in plan.steps
        if getattr(step.config, "method", None) is Method.qlora
    ]
    problems = [problem for problem in found if problem is not None]
    template = plan.model.chat_template
    if template is not None and not Path(template).expanduser().is_file():
        problems.append(Problem(where="model.chat_template", what=f"there is no file {template}"))
    elif plan.start_from is None:
        problems += check_variables(plan.model)
    return problems + _token_problems(plan.model.added_tokens)


def _token_problems(tokens: Sequence[str]) -> list[Problem]:
    """Report empty added tokens, those with blanks at an end, and duplicates."""
    bad = [token for token in tokens if not token or token != token.strip() or list(tokens).count(token) > 1]
    return [
        Problem(where="model.added_tokens", what=f"{token!r} is empty, has blanks at an end, or occurs twice")
        for token in dict.fromkeys(bad)
    ]
