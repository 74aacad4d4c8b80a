"""The stage ``rft``, by the suite that third parties use, and with SFT's loss on the parent."""

from __future__ import annotations

from posttrain.testing import StageConformance, example_records


class TestRFT(StageConformance):
    kind = "rft"
    settings = {
        "lr": 1e-2, "epochs": 1, "sequence_length": 64, "gradient_accumulation": 1, "gradient_checkpointing": False,
        "checkpoint_steps": 1, "packing": False,
    }  # fmt: skip
    records = example_records("conversations")
