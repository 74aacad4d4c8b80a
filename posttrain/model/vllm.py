"""Parts of an adapter that vLLM applies, and those that it does not; vLLM itself is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.model.trust import read_json

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM sets memory aside for."""
KEEPING = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations, other than peft's own, that leave the base's weights as they are."""


def missing_parts(source: ModelSource) -> list[str]:
    """Name the parts of an adapter that vLLM rejects, or would leave out in silence."""
    assert source.adapter is not None
    config = read_json(source.adapter / "adapter_config.json")
    initialisation = config.get("init_lora_weights", True)
    lacking = {
        "another form than LoRA": config.get("peft_type", "LORA") != "LORA",
        "quantised weights": source.quantization is not None,
        "added tokens": bool(source.added_tokens or source.rows or config.get("trainable_token_indices")),
        "DoRA": bool(config.get("use_dora")),
        "whole copies of layers": bool(config.get("modules_to_save")),
        "trained biases": config.get("bias", "none") != "none" or bool(config.get("lora_bias")),
        "repeated layers": bool(config.get("layer_replication")),
        # peft takes such an adapter's start out of the base's weights when it loads the two
        f"{initialisation} initialisation": isinstance(initialisation, str) and initialisation not in KEEPING,
    }
    return [what for what, given in lacking.items() if given]


def rank_of(source: ModelSource) -> int:
    """Return the largest rank of an adapter's layers."""
    assert source.adapter is not None
    config = read_json(source.adapter / "adapter_config.json")
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def room_for(ranks: list[int]) -> int:
    """Return the least room of vLLM that holds adapters of these ranks, or its largest."""
    return next((room for room in RANKS if room >= max(ranks, default=1)), RANKS[-1])
