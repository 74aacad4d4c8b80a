"""The stage, by the suite that third parties use."""

from __future__ import annotations

from safety_support.records import REFUSAL

from posttrain.testing import StageConformance

QUICK = {
    "lr": 1e-2,
    "epochs": 1,
    "sequence_length": 64,
    "gradient_accumulation": 1,
    "gradient_checkpointing": False,
    "checkpoint_steps": 1,
    "packing": False,
}
REFUSALS = [{"prompt": f"harm {word}", "completion": REFUSAL} for word in ("red", "blue", "green")]
HELP = [{"prompt": f"a {word}", "completion": f"the {word}"} for word in ("red", "blue", "green", "clay", "ash")]
ALL = REFUSALS + HELP
ALONE = [REFUSALS, HELP]


class TestSafety(StageConformance):
    kind = "safety"
    settings = QUICK
    records = ALL
    rejected = ALONE
