"""The weights that an adapter reaches: resolved for peft, and counted.

``all-linear`` is every linear map of the language model but the output projection: linear layers, and since
transformers 5 also experts and routers, which are bare parameters there. peft adapts bare parameters by
``target_parameters``. It renames the targets of some mixtures of experts, and would leave out their dense layers: these
are adapted as parameters, too. Modules that text never enters, such as a vision tower, are no targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.config.schema import LoraSettings
from posttrain.errors import BadInput, Problem, reject, suggest

LAYERS = (torch.nn.Linear, Conv1D)
WHERE = "lora.target_modules"
LINEAR, EXPERTS, ROUTERS = "linear layers", "experts", "routers"
EMBEDDINGS, OTHER, OUTSIDE = "embeddings", "other matrices", "outside the language model"
MAPS = (LINEAR, EXPERTS, ROUTERS)
"""What all-linear means."""
ROUTED = re.compile(r"\bexperts\b")
"""In the name of a routed expert's weight; a shared expert is a dense layer."""


@dataclass(frozen=True)
class Targets:
    """The targets of an adapter, as peft takes them."""

    modules: str | list[str]
    parameters: list[str]
    """Bare parameters, by their full names."""
    transposed: bool
    """True when every layer stores its weight as [inputs, outputs], as GPT-2 does."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The matrices of one kind in a model, and those that training reaches."""

    kind: str
    matrices: int = 0
    """Every expert of a fused parameter is one."""
    weights: int = 0
    trained_matrices: int = 0
    """Matrices under an adapter, or trained themselves."""
    trained_weights: int = 0
    """Weights of these, without the adapter's own."""
    four_bit_weights: int = 0

    def plus(self, weight: torch.Tensor, trained: bool) -> Reach:
        """Return the count with one parameter more."""
        state: Any = getattr(weight, "quant_state", None)
        size = weight.numel() if state is None else state.shape.numel()
        matrices = weight.shape[0] if self.kind == EXPERTS and weight.ndim == 3 else 1
        return replace(
            self,
            matrices=self.matrices + matrices,
            weights=self.weights + size,
            trained_matrices=self.trained_matrices + matrices * trained,
            trained_weights=self.trained_weights + size * trained,
            four_bit_weights=self.four_bit_weights + (0 if state is None else size),
        )


@dataclass(frozen=True)
class Anatomy:
    """The language model within a model, and the kinds of its weights."""

    causal: PreTrainedModel
    prefixes: tuple[str, ...]
    """Names of the modules that text passes: the decoder and the output projection."""
    towers: tuple[str, ...]
    """Names of the models for pictures or sound within the decoder."""

    @classmethod
    def of(cls, causal: PreTrainedModel) -> Anatomy:
        """Return the anatomy of a model, with or without adapters."""
        decoder = text_decoder(causal)
        parts = (decoder, causal.get_output_embeddings())
        inside = [name for name, each in causal.named_modules() if each in parts]
        towers = [
            name
            for name, each in causal.named_modules()
            if isinstance(each, PreTrainedModel) and each.config not in (causal.config, causal.config.get_text_config())
        ]
        return cls(causal, *(tuple(f"{name}." if name else "" for name in names) for names in (inside, towers)))

    def linear_layers(self) -> dict[str, torch.nn.Module]:
        """Return every linear layer but the output projection, by name."""
        head = self.causal.get_output_embeddings()
        modules = self.causal.named_modules()
        return {name: each for name, each in modules if isinstance(each, LAYERS) and each is not head}

    def bare_maps(self) -> list[str]:
        """Return the names of the experts and routers that are bare parameters."""
        dimensions = {EXPERTS: 3, ROUTERS: 2}
        return [
            name
            for name, weight in self.causal.named_parameters()
            if weight.ndim == dimensions.get(self.kind(name, weight)) and not self._is_layer(self._owner(name))
        ]

    def is_inside(self, name: str) -> bool:
        """Return true when text passes the module or weight ``name``."""
        return f"{name}.".startswith(self.prefixes) and not f"{name}.".startswith(self.towers)

    def kind(self, name: str, weight: torch.Tensor) -> str:
        """Return the kind of a weight."""
        owner = self._owner(name)
        ends = (self.causal.get_input_embeddings(), self.causal.get_output_embeddings())
        if not self.is_inside(name):
            return OUTSIDE
        if isinstance(owner, torch.nn.Embedding) or any(weight is getattr(end, "weight", None) for end in ends):
            return EMBEDDINGS
        if ROUTED.search(name) or "Experts" in type(owner).__name__:
            return EXPERTS
        if "Router" in type(owner).__name__:
            return ROUTERS
        return LINEAR if isinstance(owner, LAYERS) else OTHER

    def takes_adapter(self, name: str) -> bool:
        """Return true unless peft gives the layer ``name`` of this architecture no adapter of a layer."""
        if name in self.own_forwards:
            return False
        try:  # fused kernels of Mamba read some weights past the adapter
            _check_lora_target_modules_mamba(LoraConfig(), self.causal, name.rpartition(".")[2])
        except ValueError:
            return False
        return True

    @cached_property
    def own_forwards(self) -> set[str]:
        """Names of linear layers with another result than a product: the routers of Llama 4 and Phi."""
        modules = self.causal.named_modules()
        return {name for name, each in modules if isinstance(each, LAYERS) and not self._is_layer(each)}

    def rewritten(self, modules: str | Sequence[str]) -> tuple[str | set[str], set[str]]:
        """Return the target modules and parameters that peft makes of ``modules``."""
        config = LoraConfig(target_modules=modules if isinstance(modules, str) else list(modules))
        try:
            convert_peft_config_for_transformers(config, self.causal, None)
        except ValueError as error:
            reject(WHERE, str(error), "Name all of them, or all-linear")
        left = config.target_modules
        return left if isinstance(left, str) else set(left or ()), set(config.target_parameters or ())

    def _is_layer(self, module: torch.nn.Module) -> bool:
        return isinstance(module, LAYERS) and "Router" not in type(module).__name__

    def _owner(self, name: str) -> torch.nn.Module:
        owner: torch.nn.Module = self.causal.get_submodule(name.rpartition(".")[0])
        return owner


def text_decoder(causal: PreTrainedModel) -> torch.nn.Module:
    """Return the part of ``causal`` that turns tokens into hidden states."""
    decoder: torch.nn.Module = causal.get_decoder()
    if decoder not in (causal, causal.get_output_embeddings()):
        return decoder
    # get_decoder goes by names: ModernBERT's output projection is called ``decoder``, and Llama 4's decoder is not
    return next((part for part in causal.children() if isinstance(part, PreTrainedModel)), decoder)


def resolve_targets(model: PreTrainedModel, lora: LoraSettings) -> Targets:
    """Return the targets of ``lora`` in ``model``.

    Raises BadInput when a named target does not exist or takes no adapter, or a setting fits no bare parameter.
    """
    anatomy = Anatomy.of(model)
    linear, bare = anatomy.linear_layers(), anatomy.bare_maps()
    if isinstance(lora.target_modules, str):
        wanted = [name for name in linear if anatomy.is_inside(name) and anatomy.takes_adapter(name)]
        modules: str | list[str] = lora.target_modules if len(wanted) == len(linear) else wanted
        parameters = bare
    else:
        given = list(lora.target_modules)
        renamed = [target for target in given if target not in anatomy.rewritten(given)[0]]
        _check_names(anatomy, given, linear, [*bare, *renamed])
        wanted = [n for n in linear if _matches(given, n) and anatomy.is_inside(n) and n not in anatomy.own_forwards]
        parameters = [name for name in bare if _matches(given, name, name.removesuffix(".weight"))]
        modules = _own_modules(given, renamed, [name for name in linear if anatomy.takes_adapter(name)], wanted)
    left, renamed_parameters = anatomy.rewritten(modules)
    parameters = [name for name in parameters if not _matches(renamed_parameters, name)]
    for name in wanted:
        reached = _matches(left, name) or _matches(renamed_parameters, f"{name}.weight")
        if (
            not reached and type(linear[name]) is torch.nn.Linear
        ):  # a quantised weight is no matrix that peft could add to
            parameters.append(f"{name}.weight")
    if parameters or renamed_parameters:
        _check_bare(model, lora)
    transposed = bool(wanted) and all(isinstance(linear[name], Conv1D) for name in wanted)
    return Targets(modules, sorted(parameters), transposed)


def measure_reach(model: PreTrainedModel | PeftModel) -> list[Reach]:
    """Return what training reaches in ``model``, by kind of its matrices; norms and biases are not counted."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    anatomy = Anatomy.of(causal)
    adapted = {
        id(getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight")))
        for layer in causal.modules()
        if isinstance(layer, LoraLayer) and layer.lora_A
    }
    found: dict[str, Reach] = {}
    for name, weight in causal.named_parameters():
        # experts keep their biases in one matrix
        if weight.ndim >= 2 and not name.endswith("bias") and ".lora_" not in name and ".trainable_tokens_" not in name:
            kind = anatomy.kind(name, weight)
            trained = id(weight) in adapted or weight.requires_grad
            found[kind] = found.get(kind, Reach(kind=kind)).plus(weight, trained)
    return [found[kind] for kind in sorted(found)]


def reach_note(reach: Sequence[Reach]) -> str:
    """Return in one line what training reaches, and what is held in 4 bits."""
    parts = [f"{each.kind} {each.trained_matrices:,} of {each.matrices:,}" for each in reach]
    weights = sum(each.weights for each in reach)
    trained, four_bit = (sum(getattr(each, name) for each in reach) for name in ("trained_weights", "four_bit_weights"))
    held = f"; 4 bits hold {four_bit / weights:.1%} of the weights" if four_bit else ""
    return f"matrices: {', '.join(parts)}; {trained / weights:.1%} of the weights{held}"


def reach_faults(reach: Sequence[Reach], targets: Any) -> list[str]:
    """Return where training reaches less than the settings suggest: maps that all-linear leaves, and 4 bits."""
    found = []
    maps = [each for each in reach if each.kind in MAPS]
    left = [each for each in maps if each.trained_matrices < each.matrices]
    if isinstance(targets, str) and left:
        listed = ", ".join(
            f"{each.matrices - each.trained_matrices:,} of {each.matrices:,} {each.kind}" for each in left
        )
        share = sum(each.trained_weights for each in maps) / sum(each.weights for each in maps)
        found.append(f"{targets} reaches {share:.1%} of the weights of linear maps: peft adapts not {listed}")
    four_bit = sum(each.four_bit_weights for each in reach)
    whole = [each for each in reach if each.kind in (*MAPS, OTHER) and each.four_bit_weights < each.weights]
    if four_bit and whole:
        total = sum(each.weights for each in reach)
        listed = ", ".join(f"{each.kind} ({(each.weights - each.four_bit_weights) / total:.1%})" for each in whole)
        what = f"4 bits hold {four_bit / total:.1%} of the weights: {listed} keep 16 or more"
        found.append(f"{what}, because bitsandbytes quantises linear layers alone")
    return found


def _own_modules(given: list[str], renamed: list[str], linear: Iterable[str], wanted: list[str]) -> list[str]:
    """Return the names among ``given`` that peft may read: it would take some for layers that were not meant."""
    if any(_matches(given, name) and name not in wanted for name in linear):  # outside the language model
        own = list(wanted)
    else:
        own = [target for target in given if any(_matches([target], name) for name in linear)]
    # a dotted name is that of a dense layer, and peft would rename it to the experts of every layer
    own = [target for target in own if target not in renamed or "." not in target]
    return [*own, *(target for target in renamed if "." not in target and target not in own)]


def _check_names(anatomy: Anatomy, given: Sequence[str], linear: Iterable[str], others: Sequence[str]) -> None:
    """Raise BadInput unless each target is the name, or its end, of a layer that takes an adapter."""
    head: Any = anatomy.causal.get_output_embeddings()
    heads = [name for name, module in anatomy.causal.named_modules() if module is head]
    others = [*others, *(name.removesuffix(".weight") for name in others)]
    options = {name.rpartition(".")[2] for name in [*linear, *others] if anatomy.takes_adapter(name)}
    problems = []
    for target in given:
        fits = [name for name in linear if _matches([target], name)]
        if _matches([target], *heads):
            what = f"{target} is the output projection, which takes no adapter"
        elif not fits and not _matches([target], *others):
            what = f"no linear layer of the model is called {target}"
        elif not anatomy.takes_adapter(target) and not _matches([target], *others):
            what = f"{target} of {type(anatomy.causal).__name__} takes no adapter: Mamba's kernels would read past it"
        elif fits and not any(anatomy.is_inside(name) for name in fits):
            what = f"{target} is outside the language model, and text never enters it"
        else:
            continue
        problems.append(Problem(where=WHERE, what=what, fix=suggest(target, options)))
    if problems:
        raise BadInput(problems)


def _check_bare(model: PreTrainedModel, lora: LoraSettings) -> None:
    """Raise BadInput for settings that peft has for layers only."""
    setting = "dropout" if lora.dropout else "dora" if lora.dora else None
    if setting is not None:
        what = f"the experts of {type(model).__name__} are bare parameters, and peft gives those no {setting}"
        reject(f"lora.{setting}", what, f"Leave it out, or name other layers in {WHERE}")


def _matches(targets: str | Iterable[str], *names: str) -> bool:
    """Return True when one of ``names`` is a target, or ends in one; a text is all-linear, and every name matches."""
    if isinstance(targets, str):
        return True
    return any(name == target or name.endswith(f".{target}") for target in targets for name in names)
