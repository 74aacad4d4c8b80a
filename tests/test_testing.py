"""The conformance suite: the product's own stage passes it, and stages that misbehave do not."""

from __future__ import annotations

from posttrain.testing import StageConformance


class TestSFT(StageConformance):
    kind = "sft"
    settings = {
        "method": "lora", "lr": 1e-2, "sequence_length": 32, "gradient_accumulation": 2, "epochs": 2,
        "checkpoint_steps": 1, "lora": {"r": 4, "alpha": 8},
    }  # fmt: skip
