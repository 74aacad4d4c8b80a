"""Stages that learn from preferences, on top of TRL's trainers. Importing this imports neither torch nor TRL."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain import Stage, StageConfig, hookimpl
from posttrain_preference import config

POSTTRAIN_API = 1


@hookimpl
def register_stages() -> Sequence[Stage]:
    """The stages ``dpo``, ``kto``, ``orpo``, ``cpo`` and ``simpo``."""
    return [
        _stage("dpo", "direct preference optimisation and its kin, against the frozen SFT model", config.DPOSettings),
        _stage("kto", "answers judged good or bad, against the frozen SFT model", config.KTOSettings, "feedback"),
        _stage("orpo", "likelihood of the chosen answers and their odds over the rejected ones", config.ORPOSettings),
        _stage("cpo", "contrast of both answers, held by the chosen ones' likelihood", config.CPOSettings),
        _stage("simpo", "contrast of both answers per token, beyond a target margin", config.SimPOSettings),
    ]


def _stage(name: str, summary: str, settings: type[StageConfig], records: str = "preferences") -> Stage:
    return Stage(
        name=name,
        summary=f"{summary} (TRL)",
        config=settings,
        run=f"posttrain_preference.{name}:run",
        parent="sft",
        records=records,
    )
