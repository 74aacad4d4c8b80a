"""Served answers are those of each artifact alone, token by token, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from posttrain.artifact import Artifact, ModelSource
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.serve.service import Service
from tests.support.serving import (
    QUESTIONS,
    ask,
    catalogue_of,
    chat,
    events,
    idle,
    make_artifact,
    make_artifacts,
    post,
    serving,
)  # fmt: skip
from tests.support.tiny import write_base


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return make_artifacts(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def service(artifacts: dict[str, Artifact]) -> Iterator[Service]:
    with serving(*artifacts.values(), rows=6) as found:
        yield found


def alone(source: ModelSource, texts: Sequence[str], tokens: int = 12) -> dict[str, list[int]]:
    """The greedy tokens of an artifact that is loaded by itself, as anyone would load it."""
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    found = {}
    for text in texts:
        prompt: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=3)
        answer = ids[0, prompt["input_ids"].shape[1] :].tolist()
        found[text] = answer[:-1] if answer[-1] == 3 else answer
    return found


def test_greedy_answers_in_a_crowd_are_those_of_each_artifact_alone(
    artifacts: dict[str, Artifact], service: Service
) -> None:
    served = catalogue_of(*artifacts.values()).artifacts
    sources = {name: each.source for name, each in zip(artifacts, served, strict=True)}
    sources["base"] = catalogue_of(artifacts["one"]).bases[0].source
    digests = {name: source.digest for name, source in sources.items()}
    wanted = {name: alone(source, QUESTIONS) for name, source in sources.items()}
    assert len({tuple(each[QUESTIONS[1]]) for each in wanted.values()}) == len(sources)  # or a mix-up would hide
    asked = [(name, text) for name in sources for text in QUESTIONS] * 2
    random.Random(0).shuffle(asked)

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        async def one(place: int, name: str, text: str) -> httpx.Response:
            await asyncio.sleep(0.01 * (place % 7))  # they join while others are being answered
            return await client.post("/v1/chat/completions", json=chat(digests[name], text))

        return await asyncio.gather(*(one(place, *pair) for place, pair in enumerate(asked)))

    for (name, text), response in zip(asked, ask(service, crowd), strict=True):
        answer = response.json()
        assert response.status_code == 200
        assert (answer["choices"][0]["token_ids"], answer["system_fingerprint"]) == (wanted[name][text], digests[name])
    assert idle(service)


def test_an_adapter_that_changes_more_than_linear_layers_is_served_beside_the_others(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    made = [
        make_artifact(tmp_path / f"a{seed}", base, seed, tokens=tokens) for seed, tokens in ((1, ()), (2, (40, 41)))
    ]
    with serving(*made) as service:
        assert not service.catalogue.skipped
        for each in catalogue_of(*made).artifacts:
            for text, wanted in alone(each.source, QUESTIONS).items():
                assert post(service, **chat(each.digest, text)).json()["choices"][0]["token_ids"] == wanted


def test_a_seed_draws_the_same_answer_alone_and_in_a_crowd(service: Service) -> None:
    body = chat("v1", "Hi", temperature=1.0, top_p=0.9, seed=7, n=3)
    first = [choice["token_ids"] for choice in post(service, **body).json()["choices"]]

    async def crowd(client: httpx.AsyncClient) -> httpx.Response:
        others = [client.post("/v1/chat/completions", json=chat("v2", text, temperature=1.5)) for text in QUESTIONS]
        found = await asyncio.gather(*others, client.post("/v1/chat/completions", json=body))
        return found[-1]

    assert [choice["token_ids"] for choice in ask(service, crowd).json()["choices"]] == first
    assert len({tuple(ids) for ids in first}) == 3
    other = post(service, **{**body, "seed": 99}).json()["choices"]
    assert [choice["token_ids"] for choice in other] != first


def test_a_tiny_share_of_probability_leaves_the_likeliest_token_alone(service: Service) -> None:
    greedy = post(service, **chat("v1", "Hi")).json()["choices"][0]["token_ids"]
    assert post(service, **chat("v1", "Hi", temperature=1.5, top_p=1e-9)).json()["choices"][0]["token_ids"] == greedy


@pytest.mark.parametrize("stop", [None, "e", ["zzz", "b"]])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_has_the_text_of_the_whole_answer(service: Service, stop: Any, n: int) -> None:
    body = chat("v2", "Tell me", temperature=1.0, seed=3, n=n, max_tokens=30, stop=stop)
    whole = post(service, **body).json()
    pieces = events(post(service, **body, stream=True, stream_options={"include_usage": True}).text)
    assert pieces[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [each["choices"][0] for each in pieces[:-1] if each["choices"][0]["index"] == choice["index"]]
        text = choice["message"]["content"]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in own) == text
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        assert not any(each in text for each in ([stop] if isinstance(stop, str) else stop or []))


def test_log_probabilities_are_those_of_the_artifact_alone(artifacts: dict[str, Artifact], service: Service) -> None:
    served = catalogue_of(artifacts["one"]).artifacts[0]
    answer = post(service, **chat(served.digest, "Hi", logprobs=True, top_logprobs=3, max_tokens=4)).json()
    choice = answer["choices"][0]
    model = load_model(served.source, "float32").double()
    ids = torch.tensor([answer["prompt_token_ids"] + choice["token_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].log_softmax(-1)[len(answer["prompt_token_ids"]) - 1 : -1]
    for place, entry in enumerate(choice["logprobs"]["content"]):
        assert entry["logprob"] == pytest.approx(float(expected[place, choice["token_ids"][place]]), abs=1e-4)
        best = expected[place].topk(3).values.tolist()
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(best, abs=1e-4)


def test_completions_continue_texts_and_ids(service: Service) -> None:
    both = post(service, "/v1/completions", model="v1", prompt=["ab", "c"], max_tokens=5, temperature=0).json()
    first = post(service, "/v1/completions", model="v1", prompt="ab", max_tokens=5, temperature=0, logprobs=2).json()
    tokenizer = service.models.loaded[service.names.aliases["v1"]].prompter.tokenizer
    ids = post(service, "/v1/completions", model="v1", prompt=tokenizer("ab")["input_ids"], max_tokens=5, temperature=0)
    assert both["choices"][0]["text"] == first["choices"][0]["text"] == ids.json()["choices"][0]["text"]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["usage"] == {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
    assert len(first["choices"][0]["logprobs"]["tokens"]) == 5


def test_an_answer_says_that_its_model_is_not_promoted(service: Service) -> None:
    response = post(service, **chat("v1", "Hi"))
    assert "never judged" in response.headers["x-posttrain-unpromoted"]
    assert response.headers["x-posttrain-digest"] == response.json()["system_fingerprint"]
    assert "x-posttrain-unpromoted" not in post(service, **chat("base", "Hi")).headers
