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


class Sibling(StageConformance):
    """A stage that shares DPO's checkpoints: one of them killed by the system, which takes a process, is enough."""

    settings = QUICK
    test_killed_by_the_system_it_ends_with_the_same_bytes = None


class TestKTO(Sibling):
    kind = "kto"


class TestORPO(Sibling):
    kind = "orpo"


class TestCPO(Sibling):
    kind = "cpo"


class TestSimPO(Sibling):
    kind = "simpo"
