"""Sampled answers: drawn from the model's own distribution, each by its own seed, whatever is asked beside it."""

# T = tokens, V = vocabulary

from __future__ import annotations

import pytest
import torch

from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.sampling.sampler import Answer, Drawing, answer_seed, sample
from posttrain.testing import tiny_llama

DRAWING = Drawing(k=3, temperature=0.7, max_tokens=12, seed=5)
PROMPTS = [[1, 9, 12, 3, 2], [1, 40, 3, 2], [1, 7, 8, 9, 10, 11, 12, 3, 2]]
END = 3


def tiny() -> torch.nn.Module:
    model = tiny_llama(initializer_range=0.3)
    model.train()
    return model


def test_tokens_are_drawn_by_their_seed_from_the_distribution_of_a_plain_pass_in_float64() -> None:
    model = tiny()
    found = sample(model, PROMPTS, DRAWING, [END])
    exact = tiny_llama(initializer_range=0.3).double().eval()
    for prompt, group in zip(PROMPTS, found, strict=True):
        for number, answer in enumerate(group):
            generator = torch.Generator().manual_seed(answer_seed(DRAWING.seed, prompt, number))
            noise = torch.rand(DRAWING.max_tokens, generator=generator, dtype=torch.float64).tolist()
            with torch.no_grad():
                logits_TV = exact(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
            log_probs_TV = (logits_TV / DRAWING.temperature).log_softmax(-1)
            for place, token in enumerate(answer.ids):
                ladder = log_probs_TV[place].exp().cumsum(0)
                assert int((ladder <= noise[place] * ladder[-1]).sum()) == token
                assert answer.log_probs[place] == pytest.approx(float(log_probs_TV[place, token]), abs=1e-4)
            entropy = float(-(log_probs_TV.exp() * log_probs_TV).sum(-1).mean())
            assert answer.entropy == pytest.approx(entropy, abs=1e-4)
            assert answer.ended == (answer.ids[-1] == END)
            assert END not in answer.ids[:-1]
            assert answer.ended or len(answer.ids) == DRAWING.max_tokens


def test_at_temperature_zero_each_token_is_the_likeliest() -> None:
    greedy = Drawing(k=1, temperature=0, max_tokens=12, seed=0)
    found = sample(tiny(), PROMPTS, greedy, [END])
    exact = tiny_llama(initializer_range=0.3).double().eval()
    for prompt, (answer,) in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits_TV = exact(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        assert list(answer.ids) == logits_TV.argmax(-1).tolist()
        expected_T = logits_TV.log_softmax(-1).amax(-1).tolist()
        assert answer.log_probs == pytest.approx(expected_T, abs=1e-4)


def tokens(groups: list[list[Answer]]) -> list[list[tuple[int, ...]]]:
    return [[answer.ids for answer in group] for group in groups]


def test_answers_do_not_depend_on_what_is_asked_beside_them_nor_on_how_many() -> None:
    model = tiny()
    together = tokens(sample(model, PROMPTS, DRAWING, [END]))
    assert [tokens(sample(model, [prompt], DRAWING, [END]))[0] for prompt in PROMPTS] == together
    more = Drawing(k=5, temperature=0.7, max_tokens=12, seed=5)
    assert [group[:3] for group in tokens(sample(model, PROMPTS[::-1], more, [END]))][::-1] == together
    assert len({ids for group in together for ids in group}) > len(PROMPTS)


def test_the_model_keeps_its_mode_and_the_shared_random_numbers_their_state() -> None:
    model = tiny()
    model.get_submodule("model.layers.0").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = torch.get_rng_state()
    sample(model, PROMPTS, DRAWING, [END])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_that_are_not_finite_are_named() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(ArtifactDamaged, match="not finite"):
        sample(model, PROMPTS, DRAWING, [END])


def test_a_prompt_without_room_for_an_answer_is_rejected() -> None:
    with pytest.raises(BadInput, match="a prompt of 9 tokens and an answer of 600 exceed the context of 512"):
        sample(tiny(), PROMPTS, Drawing(k=1, temperature=1.0, max_tokens=600, seed=0), [END])
