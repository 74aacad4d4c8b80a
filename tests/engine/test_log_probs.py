"""Log-probabilities of answers and their gradients, against float64 and transformers' own forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.engine import attention_kernels as kernels
from posttrain.engine.answers import AnswerBatch
from posttrain.engine.attention import install, packed_hidden, shared_hidden, shares_prompts
from posttrain.engine.attention_kernels import Documents
from posttrain.engine.log_probs import token_log_probs
from posttrain.engine.loss import OutputHead
from tests.support.architectures import tiny_gemma3, tiny_model
from tests.support.tiny import VOCABULARY, sft_config, tiny_llama

CPU = torch.device("cpu")
N, D, V = 23, 16, 50
Rows = list[tuple[list[int], list[list[int]]]]


def head(scale: float = 1.0, softcap: float | None = None, bias: bool = False) -> OutputHead:
    torch.manual_seed(0)
    return OutputHead(torch.nn.Linear(D, V, bias=bias), scale, softcap)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.3}, {"softcap": 2.0, "bias": True}])
def test_token_log_probs_and_gradients_equal_float64(trained: bool, chunk: int, settings: dict[str, Any]) -> None:
    found, exact = head(**settings), copy.deepcopy(head(**settings))
    exact.projection.double()
    for each in (found, exact):
        each.projection.requires_grad_(trained)
    hidden = torch.randn(N, D, requires_grad=True)
    precise = hidden.detach().double().requires_grad_()
    targets, upstream = torch.randint(V, (N,)), torch.randn(N)

    log_probs = token_log_probs(found, hidden, targets, chunk)
    (log_probs * upstream).sum().backward()
    logits = exact.projection(precise) * exact.scale
    if exact.softcap is not None:
        logits = torch.tanh(logits / exact.softcap) * exact.softcap
    wanted = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (wanted * upstream.double()).sum().backward()

    assert torch.allclose(log_probs.double(), wanted, rtol=1e-6, atol=1e-6)
    pairs = [(hidden.grad, precise.grad)]
    pairs += [
        (a.grad, b.grad)
        for a, b in zip(found.projection.parameters(), exact.projection.parameters(), strict=True)
        if trained
    ]
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that outlives the forward pass, and the largest of all."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor))])
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_no_more_logits_are_held_than_a_chunk_has(trained: bool) -> None:
    found = head()
    found.projection.requires_grad_(trained)
    hidden = torch.randn(400, D, requires_grad=True)
    with Largest() as seen:
        token_log_probs(found, hidden, torch.randint(V, (400,)), 8).sum().backward()
    assert seen.most <= max(400 * D, 8 * V)


def rows_of(*sizes: tuple[int, list[int]]) -> Rows:
    generator = torch.Generator().manual_seed(1)
    draw = lambda size: torch.randint(4, VOCABULARY, (size,), generator=generator).tolist()  # noqa: E731
    return [(draw(prompt), [draw(answer) for answer in answers]) for prompt, answers in sizes]


PAIRS = rows_of((9, [5, 2]), (1, [1, 7]), (14, [3, 3]), (4, [12, 1]))


def test_the_documents_of_a_family_are_laid_apart_as_drawn() -> None:
    documents = Documents.sharing([(3, (2, 1))], CPU)
    assert documents.lengths == (5, 4)
    row = torch.arange(6)[None, None, :, None].expand(1, 2, 6, 4)
    apart = documents.apart(row)
    assert apart[0, 1, :, 3].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    places = torch.arange(9)[None, :, None, None].expand(1, 9, 2, 4)
    assert documents.together(places)[0, :, 1, 3].tolist() == [0, 1, 2, 3, 4, 8]
    assert not Documents.sharing([(3, (2,)), (4, (1,))], CPU).order


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_answers_and_the_gradient_of_every_weight_equal_float64(shared: bool, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    exact = copy.deepcopy(model).double()
    install(model)
    weights = torch.randn(len(PAIRS), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    batch = AnswerBatch.of(PAIRS, CPU, shared=shared)
    found = batch.log_probs(model, sft_config(loss_chunk=5), "float32")
    (found * weights).sum().backward()

    wanted = torch.stack([torch.stack([alone(exact, prompt, each) for each in answers]) for prompt, answers in PAIRS])
    (wanted * weights).sum().backward()
    assert torch.allclose(found, wanted, rtol=1e-6)
    assert batch.tokens.tolist() == [[len(each) for each in answers] for _, answers in PAIRS]
    theirs = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        assert float((parameter.grad.double() - expected).norm() / expected.norm()) < 2e-6, name


def alone(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral", "qwen3_moe"])
def test_a_shared_prompt_changes_no_hidden_state(name: str) -> None:
    model = tiny_gemma3() if name == "gemma3" else tiny_model(name)  # windows of 8 tokens
    install(model)
    assert shares_prompts(model)
    with torch.no_grad():
        for prompt, answers in PAIRS:
            apart = torch.cat(
                [packed_hidden(model, torch.tensor([prompt + each]), [len(prompt + each)]) for each in answers]
            )
            family = torch.tensor([prompt + answers[0] + answers[1]])
            sizes = (len(prompt), [len(each) for each in answers])
            found = shared_hidden(model, family, [sizes])
            kept = torch.cat([apart[: len(prompt + answers[0])], apart[-len(answers[1]) :]])
            assert torch.allclose(found, kept, atol=1e-5)


@pytest.mark.parametrize("name", ["falcon", "gpt_oss", "mamba"])
def test_a_model_without_such_a_kernel_shares_nothing(name: str) -> None:
    model = tiny_model(name)
    install(model, packing=False)
    assert not shares_prompts(model)


def test_a_kernel_that_mixes_answers_up_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    install(model)
    assert shares_prompts(model)
    monkeypatch.setattr(
        kernels.Documents, "sharing", lambda families, device: Documents.of([p + sum(a) for p, a in families], device)
    )
    assert not shares_prompts(model)
