"""The loaded models: weights once for all the artifacts on them, and the lane of each artifact.

Adapters of linear layers on one base share a lane and its batches. One that changes more (DoRA, embeddings, rows of
tokens, whole copies of layers) has a lane of its own on the same weights. Full weights, another base, or added tokens
are weights of their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.artifact import ModelSource
from posttrain.engine.arithmetic import choose_inference
from posttrain.errors import reject
from posttrain.model.loading import attach, load_model, load_tokenizer, number_format
from posttrain.model.trust import read_json
from posttrain.scoring.systems import twin
from posttrain.serve.catalogue import Served
from posttrain.serve.lane import Lane
from posttrain.serve.mixing import BASE, Mixer
from posttrain.serve.prompts import Prompter
from posttrain.tokens.chat import answer_ends

CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Names that configurations have for the longest text of a model."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that answers."""

    served: Served
    prompter: Prompter
    ends: frozenset[int]
    """Ids that end its answers: those that the gate's generation ends with."""
    context: int | None
    """Most tokens of prompt and answer; None when the model names no limit."""
    rows: int
    """Number of the ids that it has embeddings for."""


@dataclass(eq=False)
class Weights:
    """Weights in memory, and the lane in which their adapters are mixed."""

    plain: PreTrainedModel
    """The weights without any adapter."""
    lane: Lane


class Models:
    """Every loaded model."""

    def __init__(self) -> None:
        self.loaded: Mapping[str, Loaded] = {}
        """Each model by its digest."""
        self.places: dict[str, tuple[Lane, str]] = {}
        """Lane of each model by its digest, with the name of its adapter."""
        self._weights: dict[Hashable, Weights] = {}

    def add(self, served: Served) -> None:
        """Load a model, unless it is loaded. Call it where nothing is generated meanwhile.

        Raises BadInput for a model that cannot be loaded, ArtifactDamaged for an adapter that does not fit its base.
        """
        if served.digest in self.loaded:
            return
        source = served.source
        key = key_of(served)
        if source.adapter is not None:
            require_plain(source)
        if key not in self._weights:
            compute = choose_inference(served.dtype, source)
            plain: Any = load_model(replace(source, adapter=None), number_format(served.dtype, compute))
            self._weights[key] = Weights(plain, Lane(plain, mixed=True))
        weights = self._weights[key]
        self.places[served.digest] = _place(served, weights)
        self.loaded = {**self.loaded, served.digest: describe(served, weights.plain)}

    def remove(self, digest: str) -> None:
        """Free a model that nothing is asked of any more; weights go with the last model on them.

        Call it where nothing is generated meanwhile.
        """
        served = self.loaded[digest].served
        self.loaded = {known: loaded for known, loaded in self.loaded.items() if known != digest}
        self.places.pop(digest, None)
        key = key_of(served)
        if all(key_of(loaded.served) != key for loaded in self.loaded.values()):
            del self._weights[key]
            return
        weights = self._weights[key]
        held, name = weights.lane.model, digest[:16]
        if isinstance(held, PeftModel) and name in held.peft_config:
            if len(held.peft_config) == 1:
                weights.lane.carry(weights.plain)
            else:
                held.delete_adapter(name)
                weights.lane.carry(held)

    def alone(self, digest: str) -> Any:
        """Return the model as ``load_model`` would give it, on the weights that are in memory."""
        served = self.loaded[digest].served
        plain = self._weights[key_of(served)].plain
        if served.source.adapter is None:
            return plain
        return attach(twin(plain), served.source.adapter, served.source.rows).eval()


def key_of(served: Served) -> Hashable:
    """Return what models on the same weights in memory have in common."""
    return served.source.weights, served.source.rows, served.dtype


def require_plain(source: ModelSource) -> None:
    """Raise BadInput for an adapter that would change the weights under the others."""
    assert source.adapter is not None
    config = read_json(source.adapter / "adapter_config.json")
    start, bias = config.get("init_lora_weights"), config.get("bias", "none")
    if bias != "none" or not (isinstance(start, bool) or start in (None, "gaussian", "orthogonal")):
        what = f"it changes the weights under it (init_lora_weights={start}, bias={bias}), and others stand on them"
        reject(str(source.adapter), what, "Merge it (posttrain merge), and serve the merged weights")


def _place(served: Served, weights: Weights) -> tuple[Lane, str]:
    adapter = served.source.adapter
    if adapter is None:
        return weights.lane, BASE
    own = attach(twin(weights.plain), adapter, served.source.rows).eval()
    if not Mixer.fits(own):
        return Lane(own, mixed=False), BASE
    lane, name = weights.lane, served.digest[:16]
    under = twin(weights.plain) if lane.model is weights.plain else lane.model
    lane.carry(attach(under, adapter, served.source.rows, name).eval())
    return lane, name


def describe(served: Served, plain: Any) -> Loaded:
    """Return a model that answers, on these weights without an adapter."""
    tokenizer = load_tokenizer(served.source)
    own = plain.generation_config.eos_token_id
    owns = own if isinstance(own, list) else [own]
    ends = frozenset(end for end in (*owns, tokenizer.eos_token_id, *answer_ends(tokenizer)) if end is not None)
    config = plain.config.get_text_config()
    context = next((int(value) for name in CONTEXT if (value := getattr(config, name, None))), None)
    rows = plain.get_input_embeddings().weight.shape[0]
    return Loaded(served=served, prompter=Prompter(tokenizer), ends=ends, context=context, rows=rows)
