"""A model on packed rows: every document sees itself and nothing else, proven before training.

transformers' own isolation needs position ids that restart, no attention mask and no cache all at once, and leaks in
silence when one is missing. Here the kernel (attention_kernels.py) gets the bounds of the documents with each call.
"""

# B = rows (always 1), T = tokens of all documents, D = width, V = vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.engine import attention_kernels as kernels
from posttrain.engine.attention_kernels import Choice, Documents
from posttrain.engine.fused import fuse
from posttrain.engine.loss import OutputHead
from posttrain.errors import BadInput, Problem


def install(model: PreTrainedModel | PeftModel) -> Choice:
    """Make ``model`` use packed attention and fused layers, and return the chosen kernel.

    Two short documents, packed, must give each its logits from before. Raises BadInput when the architecture
    lets one packed document change another, or computes its logits in a way unknown to the loss.
    """
    causal = causal_model(model)
    _reject_chunks(causal)
    choice = kernels.choose(causal)
    documents = _probe_documents(causal)
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=ids_BT, use_cache=False).logits[0] for ids_BT in documents])
        causal.set_attn_implementation(choice.kernel.name)
        fuse(model)
        hidden = packed_hidden(causal, torch.cat(documents, 1), [ids_BT.shape[1] for ids_BT in documents])
        actual = OutputHead.of(causal).logits(hidden)
    model.train(training)
    _check_equal(actual, expected.float(), causal)
    return choice


def packed_hidden(causal: PreTrainedModel, ids_BT: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return last hidden states [T, D] of documents of ``lengths`` tokens, one after another in ``ids_BT`` [1, T]."""
    device = ids_BT.device
    documents = Documents.of(lengths, device)
    positions_BT = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    # transformers hands unknown arguments through every layer to the attention function; eager attention takes a mask
    where: dict[str, Any] = {"documents": documents}
    if causal.config._attn_implementation == kernels.MASKED:
        where = {"attention_mask": kernels.row_mask(causal, documents)}
    output = causal.get_decoder()(input_ids=ids_BT, position_ids=positions_BT, use_cache=False, **where)
    hidden_TD: torch.Tensor = output.last_hidden_state[0]
    return hidden_TD


def causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the language model itself, with an adapter's layers in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _reject_chunks(causal: PreTrainedModel) -> None:
    # these layers do not hand their chunk to the attention function, and the probe is too short to notice
    if getattr(causal.config.get_text_config(), "attention_chunk_size", None):
        raise BadInput(Problem(where="model.path", what="the model attends in chunks, and sft cannot train those"))


def _probe_documents(causal: PreTrainedModel) -> list[torch.Tensor]:
    vocabulary = causal.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, size), generator=generator).to(causal.device) for size in (13, 7)]


def _check_equal(actual_TV: torch.Tensor, expected_TV: torch.Tensor, causal: PreTrainedModel) -> None:
    # root mean square, relative to the spread: rounding is about 1e-6 in float32 and 1e-2 in bfloat16, a leak about 1
    error = (actual_TV - expected_TV).norm() / (expected_TV - expected_TV.mean()).norm()
    limit = 0.1 if causal.dtype == torch.bfloat16 else 1e-3
    if not error <= limit:
        raise BadInput(
            Problem(
                where="model.path",
                what=f"{type(causal).__name__} computes packed documents differently (by {error:.1g} of the spread)",
                fix="Use a decoder model that mixes tokens by attention alone",
            )
        )
