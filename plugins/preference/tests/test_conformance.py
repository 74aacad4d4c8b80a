"""Every stage of this plugin, by the suite that third parties use."""

from __future__ import annotations

from posttrain.testing import StageConformance

QUICK = {
    "lr": 1e-3,
    "epochs": 2,
    "per_device_batch_size": 2,
    "gradient_accumulation": 2,
    "checkpoint_steps": 1,
    "gradient_checkpointing": False,
}


class TestDPO(StageConformance):
    kind = "dpo"
    settings = QUICK


class TestKTO(StageConformance):
    kind = "kto"
    settings = QUICK


class TestORPO(StageConformance):
    kind = "orpo"
    settings = QUICK


class TestCPO(StageConformance):
    kind = "cpo"
    settings = QUICK


class TestSimPO(StageConformance):
    kind = "simpo"
    settings = QUICK
