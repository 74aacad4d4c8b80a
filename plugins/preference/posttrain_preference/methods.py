"""The preference methods, a row for each: its stage is registered and run from this table alone.

A new method is a settings dataclass, a loss, the value it starts with, and a row.
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
    loss: str
    """Name of a class in the module ``objectives``, which imports torch and has to wait until the stage runs."""
    records: str = "preferences"
    """Shape of the records: ``preferences`` or ``feedback``."""


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="dpo",
            summary="direct preference optimisation and its kin, against the frozen SFT model",
            settings=config.DPOSettings,
            start=losses.start_of_dpo,
            loss="DPOLoss",
        ),
        Method(
            name="kto",
            summary="answers judged good or bad, against the frozen SFT model",
            settings=config.KTOSettings,
            start=losses.start_of_kto,
            loss="KTOLoss",
            records="feedback",
        ),
        Method(
            name="orpo",
            summary="likelihood of the chosen answers and their odds over the rejected ones",
            settings=config.ORPOSettings,
            start=losses.start_of_orpo,
            loss="ORPOLoss",
        ),
        Method(
            name="cpo",
            summary="contrast of both answers, held by the chosen ones' likelihood",
            settings=config.CPOSettings,
            start=losses.start_of_cpo,
            loss="CPOLoss",
        ),
        Method(
            name="simpo",
            summary="contrast of both answers per token, beyond a target margin",
            settings=config.SimPOSettings,
            start=losses.start_of_simpo,
            loss="SimPOLoss",
        ),
    )
}
"""Every method by the name of its stage."""
