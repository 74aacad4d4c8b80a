"""A model on packed rows: every document sees itself and nothing else, proven before training.

transformers' own isolation needs position ids that restart, no attention mask and no cache all at once, and leaks in
silence when one is missing. Here the kernel (attention_kernels.py) gets the bounds of the documents with each call.
A model that no kernel can isolate, such as a recurrent one, is trained with ``packing=false``: each document goes
through it alone.
"""

# B = rows (always 1), T = tokens of all documents, D = width, V = vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.engine import attention_kernels as kernels
from posttrain.engine.ahead import on_device
from posttrain.engine.attention_kernels import Choice, Documents, Family, Kernel
from posttrain.engine.fused import fuse
from posttrain.engine.loss import OutputHead
from posttrain.errors import FOREIGN, brief, reject
from posttrain.model.probe import set_attention
from posttrain.model.targets import text_decoder

KERNEL = "posttrain_kernel"
"""Attribute of a model: the name of its installed kernel. The configuration may name another, see ``set_attention``."""
PROBED = (13, 7)
"""Tokens of the documents that prove a kernel."""


def install(model: PreTrainedModel | PeftModel, packing: bool = True) -> Choice:
    """Make ``model`` use the first kernel that isolates packed documents, and fused layers; return the choice.

    Two short documents, packed, must give each its logits from before. Without ``packing`` a model that no kernel fits
    computes each document alone; that must give its logits, too, and no token may see a later one. Kernels are chosen
    by the arithmetic: where a training computes under autocast, call it there, too. Raises BadInput, naming the
    architecture, when the model cannot be run, packed, or read by the loss.
    """
    causal = causal_model(model)
    own, training = causal.config._attn_implementation, model.training
    model.eval()
    try:
        with torch.no_grad():
            documents, expected_TV = _plain_logits(model)
            fuse(model)
            passed: list[str] = []
            for kernel in kernels.KERNELS:
                obstacle = kernel.obstacle(causal) or _fault(causal, kernel, documents, expected_TV)
                if not obstacle:
                    return Choice(kernel=kernel, passed_over=tuple(passed))
                passed.append(f"{kernel.summary} ({obstacle})")
            if packing:
                _reject_packing(causal, obstacle)
            set_attention(causal, own)
            _separate(causal, documents, expected_TV)
    finally:
        model.train(training)
    return Choice(kernel=kernels.ALONE, passed_over=tuple(passed))


def rehearse(
    model: PreTrainedModel | PeftModel,
    accumulate: Callable[[Callable[[], tuple[torch.Tensor, dict[str, torch.Tensor]]], bool], object],
) -> None:
    """Take a gradient through ``model`` on the documents of the proof, and drop it; random numbers stay as they were.

    ``accumulate`` takes the gradient of a loss, as an engine does. Raises BadInput, naming the architecture, when its
    code cannot be trained.
    """
    causal = causal_model(model)

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden_TD = packed_hidden(causal, torch.cat(_documents(causal), 1), PROBED)
        return hidden_TD.float().square().mean(), {}

    try:
        with torch.random.fork_rng():
            accumulate(loss, True)
    except FOREIGN as error:
        what = f"{type(causal).__name__} cannot be trained with these settings: {brief(error)}"
        reject("model.path", what, "Try gradient_checkpointing=false, another lora.target_modules, or another model")
    finally:
        model.zero_grad(set_to_none=True)


def packed_hidden(causal: PreTrainedModel, ids_BT: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return last hidden states [T, D] of documents of ``lengths`` tokens, one after another in ``ids_BT`` [1, T]."""
    kernel = getattr(causal, KERNEL, causal.config._attn_implementation)
    if kernel == kernels.ALONE.name:
        return torch.cat([_hidden(causal, input_ids=part) for part in ids_BT.split(list(lengths), 1)])
    device = ids_BT.device
    documents = Documents.of(lengths, device)
    positions_BT = on_device(torch.cat([torch.arange(length) for length in lengths])[None], device)
    return _packed(causal, kernel, ids_BT, positions_BT, documents)


def shared_hidden(causal: PreTrainedModel, ids_BT: torch.Tensor, families: Sequence[Family]) -> torch.Tensor:
    """Return last hidden states [T, D] of ``families``, each a prompt and the answers to it, in ``ids_BT`` [1, T].

    Every answer sees the prompt and itself. The model has to be one of which ``shares_prompts`` is true.
    """
    kernel = getattr(causal, KERNEL, causal.config._attn_implementation)
    places = [
        torch.arange(start, start + length)
        for prompt, answers in families
        for start, length in ((0, prompt), *((prompt, answer) for answer in answers))
    ]
    positions_BT = on_device(torch.cat(places)[None], ids_BT.device)
    return _packed(causal, kernel, ids_BT, positions_BT, Documents.sharing(families, ids_BT.device))


@torch.no_grad()
def shares_prompts(model: PreTrainedModel | PeftModel) -> bool:
    """Return true when answers to one prompt can be computed with the prompt held once, proven on two of them."""
    causal = causal_model(model)
    name, training = getattr(causal, KERNEL, ""), model.training
    if not any(kernel.shares for kernel in kernels.KERNELS if kernel.name == name):
        return False
    (prompt_BT, first_BT), second_BT = _documents(causal), _documents(causal)[1].flip(1)
    prompt, answer = PROBED
    model.eval()
    try:
        pairs_BT = torch.cat([prompt_BT, first_BT, prompt_BT, second_BT], 1)
        apart_TD = packed_hidden(causal, pairs_BT, [prompt + answer] * 2)
        family_TD = shared_hidden(causal, torch.cat([prompt_BT, first_BT, second_BT], 1), [(prompt, (answer, answer))])
    except FOREIGN:
        return False
    finally:
        model.train(training)
    expected_TD = torch.cat([apart_TD[: prompt + answer], apart_TD[2 * prompt + answer :]])
    return _is_rounding(_relative(family_TD.float(), expected_TD.float()), causal)


def _packed(
    causal: PreTrainedModel, kernel: str, ids_BT: torch.Tensor, positions_BT: torch.Tensor, documents: Documents
) -> torch.Tensor:
    # transformers hands unknown arguments through every layer to the attention function; eager attention takes a mask
    where: dict[str, Any] = {"documents": documents}
    if kernel == kernels.MASKED:
        where = {"attention_mask": kernels.row_mask(causal, documents)}
    return _hidden(causal, input_ids=ids_BT, position_ids=positions_BT, **where)


def causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the language model itself, with an adapter's layers in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _hidden(causal: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    hidden_TD: torch.Tensor = text_decoder(causal)(**inputs, use_cache=False).last_hidden_state[0]
    return hidden_TD


def _documents(causal: PreTrainedModel) -> list[torch.Tensor]:
    """Return the documents of the proof, each [1, T]."""
    vocabulary = causal.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, size), generator=generator).to(causal.device) for size in PROBED]


def _plain_logits(model: PreTrainedModel | PeftModel) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the documents of the proof, each [1, T], and their logits [T, V] by the model's own forward pass."""
    causal = causal_model(model)
    ids = _documents(causal)
    try:
        return ids, torch.cat([model(input_ids=ids_BT, use_cache=False).logits[0] for ids_BT in ids]).float()
    except FOREIGN as error:
        what = f"{type(causal).__name__} cannot be run on text alone: {brief(error)}"
        reject("model.path", what, "Use a decoder model for text")


def _fault(causal: PreTrainedModel, kernel: Kernel, documents: list[torch.Tensor], expected_TV: torch.Tensor) -> str:
    """Give ``causal`` the kernel; return what is wrong with its packed documents, or an empty text."""
    # these layers do not hand their chunk to the attention function, and the probe is too short to notice
    if getattr(causal.config.get_text_config(), "attention_chunk_size", None):
        return "the model attends in chunks"
    if not set_attention(causal, kernel.name) and kernel.name != kernels.MASKED:
        return "the model has an attention of its own"
    setattr(causal, KERNEL, kernel.name)
    try:
        error = _difference(causal, documents, expected_TV)
    except FOREIGN as failure:
        return f"it fails on packed documents: {brief(failure)}"
    return "" if _is_rounding(error, causal) else f"it computes packed documents differently, by {error:.1g}"


def _separate(causal: PreTrainedModel, documents: list[torch.Tensor], expected_TV: torch.Tensor) -> None:
    """Let ``causal`` compute each document alone; raise BadInput when that is not what its forward pass computes."""
    setattr(causal, KERNEL, kernels.ALONE.name)
    name = type(causal).__name__
    changed_BT = documents[0].clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % causal.get_input_embeddings().weight.shape[0]
    try:
        error = _difference(causal, documents, expected_TV)
        first_TD, other_TD = (packed_hidden(causal, ids, [PROBED[0]])[:-1] for ids in (documents[0], changed_BT))
    except FOREIGN as failure:
        reject("model.path", f"sft cannot train {name}: {brief(failure)}", "Use a decoder model for text")
    if not _is_rounding(error, causal):
        what = f"{name} makes its logits from hidden states in a way unknown to sft (they differ by {error:.1g})"
        reject("model.path", what, "Use a decoder model whose logits are one product with its hidden states")
    if not _is_rounding(_relative(other_TD.float(), first_TD.float()), causal):
        reject("model.path", f"{name} sees the tokens that it predicts", "Use a decoder model")


def _difference(causal: PreTrainedModel, documents: list[torch.Tensor], expected_TV: torch.Tensor) -> float:
    hidden_TD = packed_hidden(causal, torch.cat(documents, 1), PROBED)
    return _relative(OutputHead.of(causal).logits(hidden_TD), expected_TV)


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to the spread of ``expected``."""
    return float((actual - expected).norm() / (expected - expected.mean()).norm())


def _is_rounding(error: float, causal: PreTrainedModel) -> bool:
    # rounding is about 1e-6 in float32 and 1e-2 in bfloat16, a leak about 1
    return error <= (0.1 if kernels.arithmetic_of(causal) == torch.bfloat16 else 1e-3)


def _reject_packing(causal: PreTrainedModel, obstacle: str) -> None:
    why = "it keeps a state from token to token" if getattr(causal, "_is_stateful", False) else obstacle
    what = f"{type(causal).__name__} cannot be packed: {why}"
    reject("packing", what, "Set packing=false for the stage: each document then goes through the model alone")
