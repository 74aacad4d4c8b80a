"""The shipped recipes, and what each needs to be given."""

from __future__ import annotations

from posttrain.config.paths import shipped

RECIPES = sorted(path.stem for path in shipped("recipes").glob("*.yaml"))

MODELS_OF_THE_DAY = (
    "gemma3_1b", "gpt_oss_20b", "llama31_8b", "llama32_1b", "llama32_3b", "mistral_small_24b", "olmo2_7b", "phi4",
    "qwen3_30b_a3b", "qwen3_8b", "smollm3_3b",
)  # fmt: skip
"""Recipes of published models, each with a model file of its name."""
SIZED = ("sized_13b_qlora", "sized_70b_lora", "sized_70b_qlora", "sized_8b_full", "sized_8b_lora", "sized_8b_qlora")

GIVEN = {
    **{name: ["data=a/b"] for name in MODELS_OF_THE_DAY},
    "lima": ["sft.data=a/b"],
    "tulu3_8b": ["grpo.data=a/b"],
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
