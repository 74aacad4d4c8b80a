"""The shipped recipes, and what each needs to be given."""

from __future__ import annotations

from posttrain.config.paths import shipped

RECIPES = sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


GIVEN = {
    "smollm2_sft_dpo": ["sft.data=a/b", "dpo.data=a/b", "gate_data.responses=a.json", "gate_data.preferences=a.json"],
    "smollm2_gsm8k": ["gate_data=a.jsonl"],
    "smollm2_cpt_replay": [
        "sft.data.0.path=a/b",
        "sft.data.1.path=a/b",
        "gate_data.texts=a.json",
        "gate_data.responses=a.json",
    ],
}
"""What a shipped recipe leaves to its user."""
