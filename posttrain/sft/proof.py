"""The proof that the gradient is right: on the user's own model and documents, against plain float64.

The reference knows nothing of packing, accumulation, chunked loss or packed attention: every document alone through the
model's own forward pass, all of its logits, one cross-entropy, one division by the trained tokens. The loop's own code
must give the gradient of the reference in float64, up to the rounding of float32 itself. For every cut of the documents
into rows, micro-batches, chunks and ranks it must give the same gradient: these are compared in float64, where no
rounding hides a fault or looks like one.
"""

# B = rows (always 1), T = tokens of a document or row, D = width, V = vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.multiprocessing.spawn import ProcessException
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.cost.engines import missing_extra
from posttrain.engine.attention import causal_model, install, packed_hidden
from posttrain.engine.attention_kernels import ALONE, Choice
from posttrain.engine.batches import IGNORED
from posttrain.engine.gradient import add_gradient, trained_tokens
from posttrain.errors import BadInput, Problem
from posttrain.model.probe import set_attention
from posttrain.sft.config import SFTConfig
from posttrain.sft.ranks import gradients_of_ranks
from posttrain.tokens.chat import Rendered
from posttrain.tokens.packing import PackedRow, pack

LIMIT = 1e-6
"""Largest relative error between two computations of a gradient in float64.

They differ by 1e-15 on plain models, and by 1e-7 where layers compute in float32 of their own, such as softmax under a
mask. A fault is larger by orders of magnitude: one token of ten thousand counted wrongly is 1e-4.
"""
DRAWS = 2.0
"""Times the rounding of plain float32 that the loop in float32 may be away from float64.

Each is one draw of a rounding, so that neither has to be closer than the other (measured: 1.0 times on two layers, 0.04
times on SmolLM2-135M).
"""
ROUNDING = 1e-4
"""Largest relative error of float32 itself (measured: 1e-6 with 4 layers, 2e-5 with 30).

More is not float32 at all, as when a device multiplies in TensorFloat-32.
"""
DOCUMENTS = 8
"""Documents of the proof."""
LENGTH = 128
"""Longest document of the proof, in tokens: cut, it proves as much at a bounded cost."""
ROWS = 3
"""Rows of the packed documents, roughly: enough to accumulate over."""
SMALL_CHUNK = 7
"""Trained tokens of a chunk of the loss, small enough for many chunks and uneven."""
FLOAT32 = "float32 itself"
OWN = "the loop, as the recipe sets it"
ISOLATION = "a document when its neighbour changes"
RANKS = {
    "ddp": "two processes, half of the rows (ddp)",
    "fsdp": "two processes, slices of weights (fsdp)",
    "deepspeed": "two processes, slices (deepspeed)",
}
CHECKPOINTING = "gradient checkpointing"
ONE_MASK = "attention of a whole row under one mask"
RANKS_PARAMETERS = 150_000_000
"""Parameters of the largest model to be copied to two more processes."""

Gradient = dict[str, torch.Tensor]
"""By parameter name, in float64 on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison."""

    name: str
    against: str = "the loop"
    """The other side: the reference in float64, the loop as the recipe sets it, or the same document."""
    error: float | None = None
    """Relative error; None when the comparison was not run."""
    limit: float = LIMIT
    reason: str = ""
    """The reason when it was not run."""

    @property
    def failed(self) -> bool:
        """True when the error is above the limit, or NaN."""
        return self.error is not None and not self.error <= self.limit


def sample(documents: Sequence[Rendered], sequence_length: int, count: int = DOCUMENTS) -> list[Rendered]:
    """Return at most ``count`` documents spread over all, each cut to LENGTH tokens around its first trained one.

    Raises BadInput when no document has a trained token in its first ``sequence_length`` tokens.
    """
    cut = [Rendered(each.ids[:sequence_length], each.mask[:sequence_length], each.text) for each in documents]
    usable = [document for document in cut if any(document.mask[1:])]
    if not usable:
        raise BadInput(
            Problem(
                where="sft.data",
                what=f"no trained token in the first {sequence_length} tokens of {len(documents)} records",
                fix="Raise sft.sequence_length, or look at the records with posttrain tokens",
            )
        )
    step = max(1, len(usable) // count)
    return [_window(document) for document in usable[::step][:count]]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The comparisons for one model in float32. They leave it changed, unfit for anything else."""

    model: PreTrainedModel | PeftModel
    documents: Sequence[Rendered]
    config: SFTConfig
    attention: list[Choice] = field(default_factory=list, init=False)
    """The chosen kernel, once the loop has been run."""

    def checks(self, began: Callable[[str], object] = lambda name: None) -> Iterator[Check]:
        """Run every comparison, in order; call ``began`` with the name of each as it begins. Dropout is off."""
        # Dropout would draw other numbers on each way through the code. Checkpointing works in training mode alone, so
        # it has a comparison of its own.
        self.model.eval()
        wake_adapter(self.model)
        began(FLOAT32)
        with plain_experts(causal_model(self.model)):
            exact = plain_gradient(self.model.double(), self.documents)
        plain = plain_gradient(self.model.float(), self.documents)  # the same bits as before
        rounding = distance(plain, exact)
        yield Check(name=FLOAT32, against="float64", error=rounding, limit=ROUNDING)
        began(OWN)
        self.attention.append(install(self.model, self.config.packing))
        limit = DRAWS * max(LIMIT, min(rounding, ROUNDING))
        error = distance(self._loop(self._own_rows, self.config), exact)
        yield Check(name=OWN, against="float64", error=error, limit=limit)
        with plain_experts(causal_model(self.model)):
            yield from self._comparisons(began)

    def _comparisons(self, began: Callable[[str], object]) -> Iterator[Check]:
        """Compare every way through the loop's code with the loop as the recipe sets it, all in float64."""
        own: Gradient = {}
        self.model.double()
        for name, gradient in self._ways():
            began(name)
            own = own or self._loop(self._own_rows, self.config)
            yield Check(name=name, error=distance(gradient(), own))
        checks: dict[str, Callable[[Gradient], Check]] = {
            ISOLATION: self._isolation,
            **{name: partial(self._ranks, engine) for engine, name in RANKS.items()},
            CHECKPOINTING: self._checkpointing,  # leaves hooks behind, which no process can be given
            ONE_MASK: self._block_mask,  # gives the model another attention
        }
        for name, check in checks.items():
            began(name)
            yield check(own)

    @cached_property
    def rows(self) -> list[PackedRow]:
        """The documents packed into a few rows; at least two share one."""
        return list(pack(self.documents, self._row_length).rows)

    @cached_property
    def alone(self) -> list[PackedRow]:
        """Each document in a row of its own."""
        return list(pack(self.documents, self._row_length, packing=False).rows)

    @property
    def _row_length(self) -> int:
        lengths = sorted(len(document.ids) for document in self.documents)
        return max(lengths[0] + lengths[-1], -(-sum(lengths) // ROWS))

    def _ways(self) -> Iterator[tuple[str, Callable[[], Gradient]]]:
        """Yield the name of each way through the loop's own code, and a function to take the gradient by it."""
        whole = replace(self.config, per_device_batch_size=len(self.rows))
        single = replace(self.config, per_device_batch_size=1)
        tokens = trained_tokens(self.rows)
        yield "accumulation, one row at a time", lambda: self._loop(self.rows, single)
        yield "accumulation, all rows at once", lambda: self._loop(self.rows, whole)
        yield "one document per row", lambda: self._loop(self.alone, single)
        yield (
            f"loss in chunks of {SMALL_CHUNK} tokens",
            lambda: self._loop(self.rows, replace(whole, loss_chunk=SMALL_CHUNK)),
        )
        yield "loss in one chunk", lambda: self._loop(self.rows, replace(whole, loss_chunk=max(1, tokens)))

    @property
    def _own_rows(self) -> list[PackedRow]:
        return self.rows if self.config.packing else self.alone

    def _loop(self, rows: Sequence[PackedRow], config: SFTConfig) -> Gradient:
        """Return the gradient as the loop takes it in one optimizer step over ``rows``."""
        return gradient_of(self.model, lambda: add_gradient(self.model, rows, trained_tokens(rows), config, "float32"))

    def _checkpointing(self, own: Gradient) -> Check:
        if not causal_model(self.model).supports_gradient_checkpointing:
            return Check(name=CHECKPOINTING, reason="the model does not support it")
        with _recomputing(causal_model(self.model)):
            return Check(name=CHECKPOINTING, error=distance(self._loop(self.rows, self.config), own))

    def _ranks(self, engine: str, own: Gradient) -> Check:
        name = RANKS[engine]
        if missing_extra(engine):
            return Check(name=name, reason=f"{engine} is not installed")
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if parameters > RANKS_PARAMETERS:
            return Check(name=name, reason=f"{parameters:,} parameters are too many to copy twice")
        try:
            gradient = self._of_ranks[engine]
        except ProcessException as error:
            return Check(name=name, reason=f"a process failed: {str(error).strip().splitlines()[-1]}")
        except TimeoutError as error:
            return Check(name=name, reason=str(error))
        return Check(name=name, error=distance(gradient, own))

    @cached_property
    def _of_ranks(self) -> dict[str, Gradient]:
        return gradients_of_ranks(
            self.model, self._own_rows, self.config, [each for each in RANKS if not missing_extra(each)]
        )

    def _isolation(self, own: Gradient) -> Check:
        """Compare a row with one whose first document has other tokens: the others must compute the same."""
        name = ISOLATION
        row = next((row for row in self.rows if len(row.lengths) > 1), None)
        if row is None:
            return Check(name=name, reason="there is only one document")
        causal, first = causal_model(self.model), row.lengths[0]
        ids_BT = torch.from_numpy(row.input_ids)[None].long().to(causal.device)
        other_BT = ids_BT.clone()
        other_BT[:, :first] = (other_BT[:, :first] + 1) % causal.get_input_embeddings().weight.shape[0]
        with torch.no_grad():
            before_TD, after_TD = (packed_hidden(causal, ids, row.lengths)[first:] for ids in (ids_BT, other_BT))
        error = float((after_TD - before_TD).norm() / before_TD.norm())
        return Check(name=name, against="itself", error=error)

    def _block_mask(self, own: Gradient) -> Check:
        """Compare packed attention with transformers' own under one mask for the whole row."""
        name = ONE_MASK
        causal = causal_model(self.model)
        if self.attention[0].kernel == ALONE:
            return Check(name=name, reason="the model cannot be packed")
        window = getattr(causal.config.get_text_config(), "sliding_window", None)
        if window is not None and window < max(max(row.lengths) for row in self.rows):
            return Check(name=name, reason=f"the model attends to {window} tokens only")
        expected = self._loop(self.rows, replace(self.config, per_device_batch_size=1))
        set_attention(causal, "sdpa" if causal._supports_sdpa else "eager")
        trained = trained_tokens(self.rows)
        masked = masked_gradient(self.model, self.rows, trained)
        return Check(name=name, error=distance(masked, expected))


def plain_gradient(model: PreTrainedModel | PeftModel, documents: Sequence[Rendered]) -> Gradient:
    """Return the gradient of the mean loss over the trained tokens of ``documents``, each alone.

    In the number format of the model; layers with float32 of their own (norms, rotary positions) keep it.
    """
    trained = sum(sum(document.mask[1:]) for document in documents)

    def add() -> None:
        for document in documents:
            ids_T = torch.tensor(document.ids, device=model.device)
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
            (_plain_loss(logits_TV, ids_T, torch.tensor(document.mask, device=model.device)) / trained).backward()

    return gradient_of(model, add)


def masked_gradient(model: PreTrainedModel | PeftModel, rows: Sequence[PackedRow], trained: int) -> Gradient:
    """Return the gradient by transformers' own attention under a block-diagonal mask, all logits of a row at once."""

    def add() -> None:
        for row in rows:
            ids_T = torch.from_numpy(row.input_ids).long().to(model.device)
            logits_TV = model(
                input_ids=ids_T[None],
                position_ids=torch.from_numpy(row.position_ids()).long()[None].to(model.device),
                attention_mask=_block_diagonal(row).to(model.device, model.dtype),
                use_cache=False,
            ).logits[0]
            (_plain_loss(logits_TV, ids_T, torch.from_numpy(row.mask).to(model.device)) / trained).backward()

    return gradient_of(model, add)


def distance(actual: Gradient, expected: Gradient) -> float:
    """Return ||actual - expected|| / ||expected|| over all parameters together."""
    difference = sum(float((actual[name].double() - expected[name]).square().sum()) for name in expected)
    size = sum(float(expected[name].square().sum()) for name in expected)
    return float((difference / size) ** 0.5) if size else float("nan")


def _plain_loss(logits_TV: torch.Tensor, ids_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy: each position predicts the next token, if that is trained."""
    labels_T = torch.where(mask_T[1:], ids_T[1:], IGNORED)
    return F.cross_entropy(logits_TV[:-1], labels_T, reduction="sum", ignore_index=IGNORED)


def _block_diagonal(row: PackedRow) -> torch.Tensor:
    """Return the summand of a row's scores, [1, 1, T, T]: 0 within a document and backwards, else -infinity."""
    document_T = torch.cat([torch.full((length,), index) for index, length in enumerate(row.lengths)])
    visible_TT = (document_T[:, None] == document_T[None]).tril()
    return torch.zeros(visible_TT.shape).masked_fill(~visible_TT, float("-inf"))[None, None]


def gradient_of(model: torch.nn.Module, add: Callable[[], object]) -> Gradient:
    """Return the gradient added by ``add`` to the trained parameters of ``model``, and leave none behind."""
    model.zero_grad(set_to_none=True)
    add()
    gradient = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).double().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return gradient


@contextmanager
def plain_experts(causal: PreTrainedModel) -> Iterator[None]:
    """Let experts compute one by one, as float64 must: torch has no grouped product for it."""
    given = causal.get_experts_implementation()
    if not any(given.values()):
        yield
        return
    causal.set_experts_implementation("eager")
    try:
        yield
    finally:
        causal.set_experts_implementation(given)


@contextmanager
def _recomputing(causal: PreTrainedModel) -> Iterator[None]:
    """Let layers recompute their activations as in training, but without its dropout."""
    layers = [module for module in causal.modules() if isinstance(module, GradientCheckpointingLayer)]
    causal.activation_checkpointing_enable()
    for layer in layers:
        layer.training = True
    yield
    causal.eval()


def wake_adapter(model: torch.nn.Module) -> None:
    """Give a new adapter's B small values: at 0, their start, A has no gradient and could hide any fault."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and parameter.requires_grad:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _window(document: Rendered) -> Rendered:
    """Return at most LENGTH tokens, at most half of them before the first trained one."""
    start = max(0, document.mask.index(True, 1) - LENGTH // 2)
    end = start + LENGTH
    return Rendered(document.ids[start:end], document.mask[start:end], document.text)
