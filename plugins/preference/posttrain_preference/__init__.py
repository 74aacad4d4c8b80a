"""Stages that learn from preferences, on top of TRL's trainers. Importing this imports neither torch nor TRL."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain import Stage, hookimpl
from posttrain_preference import config

POSTTRAIN_API = 1


@hookimpl
def register_stages() -> Sequence[Stage]:
    """The stages ``dpo``, ``kto``, ``orpo``, ``cpo`` and ``simpo``."""
    return [
        Stage(
            name="dpo",
            summary="direct preference optimisation and its kin, against a frozen copy of the SFT model (TRL)",
            config=config.DPOSettings,
            run="posttrain_preference.dpo:run",
            parent="sft",
            records="preferences",
        ),
        Stage(
            name="kto",
            summary="answers judged good or bad one by one, against a frozen copy of the SFT model (TRL)",
            config=config.KTOSettings,
            run="posttrain_preference.kto:run",
            parent="sft",
            records="feedback",
        ),
        Stage(
            name="orpo",
            summary="likelihood of the chosen answers and their odds over the rejected ones (TRL)",
            config=config.ORPOSettings,
            run="posttrain_preference.orpo:run",
            parent="sft",
            records="preferences",
        ),
        Stage(
            name="cpo",
            summary="contrast of chosen and rejected answers, held by the chosen ones' likelihood (TRL)",
            config=config.CPOSettings,
            run="posttrain_preference.cpo:run",
            parent="sft",
            records="preferences",
        ),
        Stage(
            name="simpo",
            summary="contrast of log-probabilities per token, beyond a target margin (TRL)",
            config=config.SimPOSettings,
            run="posttrain_preference.cpo:run_simpo",
            parent="sft",
            records="preferences",
        ),
    ]
