"""Documents that begin alike share their beginning in a batch, and the gradient stays that of each one alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from posttrain.config.schema import LoraSettings
from posttrain.engine.attention import install
from posttrain.engine.batches import ALIKE, IGNORED, Batch
from posttrain.engine.engine import Single
from posttrain.engine.gradient import MaskedCrossEntropy, StepBatches, add_shares
from posttrain.model.loading import new_adapter
from posttrain.tokens.packing import PackedRow
from tests.support.architectures import tiny_gemma3, tiny_model
from tests.support.tiny import VOCABULARY, documents_of, packed_row, sft_config, tiny_llama

CPU = torch.device("cpu")


def document(beginning: int, rest: int, seed: int, whole: bool = False) -> tuple[Any, Any]:
    """Tokens that begin as all others with this ``beginning`` do; trained are those after it, or all but the first."""
    start = np.random.default_rng(beginning).integers(4, VOCABULARY - 28, beginning)
    end = np.random.default_rng([beginning, seed]).integers(4, VOCABULARY - 28, rest)
    mask = np.arange(beginning + rest) >= (1 if whole else beginning)
    return np.concatenate([start, end]).astype(np.int32), mask


# two families whose documents take turns, documents alike to the last token, one like no other
MIXED = [
    packed_row([document(20, 5, 0), document(17, 4, 0, whole=True), document(20, 1, 1), document(6, 9, 0)]),
    packed_row([document(17, 3, 1, whole=True), document(20, 9, 2), document(20, 9, 2)]),
]


def test_a_batch_holds_a_beginning_once_and_predicts_the_same() -> None:
    plain, batch = (Batch.of(MIXED, CPU, shared) for shared in (False, True))
    assert not plain.families
    assert plain.ids.shape[1] == sum(len(row.input_ids) for row in MIXED)
    assert sorted((beginning, sorted(rests)) for beginning, rests in batch.families) == [
        (0, [15]),
        (17, [3, 4]),
        (20, [1, 5, 9, 9]),
    ]
    assert batch.ids.shape[1] == sum(batch.lengths) == plain.ids.shape[1] - 17 - 3 * 20
    assert torch.equal(batch.targets, plain.targets)
    assert torch.equal(batch.ids[0, batch.trained], plain.ids[0, plain.trained])


@pytest.mark.parametrize(
    "rows",
    [
        [packed_row([document(ALIKE - 1, 9, 0), document(ALIKE - 1, 9, 1)])],
        [packed_row([document(20, 5, 0)])],
        [packed_row([document(ALIKE, 400, 0), document(ALIKE, 400, 1)])],
    ],
    ids=["short beginning", "one document", "little of the batch"],
)
def test_what_saves_little_stays_as_it_is(rows: list[PackedRow]) -> None:
    plain, batch = (Batch.of(rows, CPU, shared) for shared in (False, True))
    assert not batch.families
    assert torch.equal(batch.ids, plain.ids)
    assert torch.equal(batch.trained, plain.trained)


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # the second sees 8 tokens back
def test_the_gradient_is_that_of_each_document_alone_in_float64(name: str) -> None:
    model = (tiny_llama() if name == "llama" else tiny_gemma3()).double()
    reference = copy.deepcopy(model)
    install(model)
    objective = MaskedCrossEntropy(sft_config(per_device_batch_size=2), "float32")
    engine = Single(model, objective.config)
    objective.begin(engine)
    step = StepBatches.of(objective, [MIXED], objective.totals(MIXED), CPU)
    assert step.dealt[0][3].families
    loss = objective.figures(add_shares(engine, objective, step), step.totals)["loss"]

    expected = torch.zeros((), dtype=torch.float64)
    for one in (each for row in MIXED for each in documents_of(row)):
        logits = reference(input_ids=torch.from_numpy(one.input_ids)[None].long(), use_cache=False).logits[0]
        targets = torch.from_numpy(one.targets(IGNORED)).long()
        expected = expected + F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    expected = expected / step.totals["trained_tokens"]
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    wanted = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        if (theirs := wanted[key].grad) is not None:
            assert float((parameter.grad - theirs).norm() / theirs.norm()) < 1e-6, key


def test_documents_share_what_their_operations_are_counted_for() -> None:
    config = sft_config(per_device_batch_size=2)
    objective = MaskedCrossEntropy(config, "float32")
    (apart,) = objective.work(MIXED)
    objective.shared = True
    (together,) = objective.work(MIXED)
    tokens = [sum(prompt + sum(rests) for prompt, rests in each.families) for each in (apart, together)]
    assert tokens == [sum(len(row.input_ids) for row in MIXED), Batch.of(MIXED, CPU, True).ids.shape[1]]
    assert apart.scored == together.scored


@pytest.mark.parametrize(
    ("noise", "dropout", "kernel", "shared"),
    [(None, 0.0, True, True), (5.0, 0.0, True, False), (None, 0.1, True, False), (None, 0.0, False, False)],
    ids=["plain", "neftune", "dropout", "no kernel for it"],
)
def test_what_is_drawn_or_masked_for_each_document_is_not_shared(
    noise: float | None, dropout: float, kernel: bool, shared: bool
) -> None:
    causal = tiny_llama() if kernel else tiny_model("gpt_oss")
    model = new_adapter(causal, LoraSettings(r=4, alpha=8, dropout=dropout, target_modules=["q_proj"]), 0)
    install(model)
    objective = MaskedCrossEntropy(sft_config(neftune_alpha=noise), "float32")
    objective.begin(Single(model, objective.config))
    assert objective.shared is shared
