"""The preference methods, a row for each: its stage is registered and run from this table alone.

A new method is a settings dataclass, the loss it starts with, and a row. Its trainer is one of those in ``trainer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from posttrain_preference import config, losses


@dataclass(frozen=True, kw_only=True)
class Method:
    """A preference method."""

    name: str
    """Name of the stage."""
    summary: str
    """One line for ``posttrain list``."""
    settings: type[config.PreferenceSettings]
    start: losses.Start
    """Loss that training has to start with."""
    trainer: str
    """Name of a class in the module ``trainer``, which imports TRL and has to wait until the stage runs."""
    records: str = "preferences"
    """Shape of the records: ``preferences`` or ``feedback``."""
    referenced: bool = False
    """True when the loss compares the policy with a frozen copy of its start."""


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="dpo",
            summary="direct preference optimisation and its kin, against the frozen SFT model",
            settings=config.DPOSettings,
            start=losses.start_of_dpo,
            trainer="PairTrainer",
            referenced=True,
        ),
        Method(
            name="kto",
            summary="answers judged good or bad, against the frozen SFT model",
            settings=config.KTOSettings,
            start=losses.start_of_kto,
            trainer="JudgedTrainer",
            records="feedback",
            referenced=True,
        ),
        Method(
            name="orpo",
            summary="likelihood of the chosen answers and their odds over the rejected ones",
            settings=config.ORPOSettings,
            start=losses.start_of_orpo,
            trainer="OddsTrainer",
        ),
        Method(
            name="cpo",
            summary="contrast of both answers, held by the chosen ones' likelihood",
            settings=config.CPOSettings,
            start=losses.start_of_cpo,
            trainer="ContrastTrainer",
        ),
        Method(
            name="simpo",
            summary="contrast of both answers per token, beyond a target margin",
            settings=config.SimPOSettings,
            start=losses.start_of_simpo,
            trainer="ContrastTrainer",
        ),
    )
}
"""Every method by the name of its stage."""
