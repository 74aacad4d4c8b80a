"""Parity of a GGUF file: llama.cpp against transformers in float32, before the file is called done.

The same conversations go through both: their rendered texts and token ids, the log-probabilities of the first token of
each answer, and the greedy answers. llama.cpp runs in this process (xllamacpp), asked over its own HTTP interface.
"""

# T = tokens of a prompt, V = vocabulary

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.errors import reject, shown
from posttrain.model.llama import llama

LIMIT = 0.05
"""Largest difference of a log-probability that float16 weights and llama.cpp's float16 cache explain: 0.004
for a small trained model, 0.021 for SmolLM2-135M under random matrices. A lost scaling exceeds it in the tests."""
LENGTH = 24
"""Tokens of a greedy answer."""
SAMPLE = 5000
"""Tokens of the vocabulary in the texts whose ids are compared."""
TOP = 5
"""Log-probabilities compared of each first token."""
QUESTIONS = (
    "Hello!",
    "What is 17 + 25? And 1234567 - 89?",
    "Write one sentence about the sea.",
    "Name three colours,\n  one on each line:\n\n\n- ",
    "Übersetze: 'I don't know', \"we'll SEE\" — naïve café, 東京, привет, 🙂👍🏽.",
    "def f(x):\n\treturn x ** 2  # 100%\r\n",
)
CONVERSATIONS: Sequence[Sequence[Mapping[str, str]]] = (
    *([{"role": "user", "content": text}] for text in QUESTIONS),
    [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": QUESTIONS[2]},
        {"role": "user", "content": "And then?"},
    ],
)
"""Conversations that no stage has trained on."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The distance of a file from the weights that it was written from."""

    prompts: int
    """Conversations compared; the ids of all of them are equal."""
    first: int
    """First tokens of answers whose log-probabilities are compared."""
    log_prob: float
    """Largest difference of one of them; infinite for none."""
    greedy: int
    """Greedy answers that are equal, token by token, or differ first where two tokens are equally likely."""

    @property
    def agrees(self) -> bool:
        """True when rounding explains every difference."""
        return self.log_prob <= LIMIT and self.greedy == self.prompts


def compare(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase, adapter: Path | None = None) -> Parity:
    """Compare the file ``path``, with the file of an ``adapter`` if there is one, with ``model`` in float32.

    Raises BadInput at the first text or id of a prompt that is not the one of ``tokenizer``, and ArtifactDamaged when
    llama.cpp cannot read the file.
    """
    stops = set(_listed(model.generation_config.eos_token_id))
    with llama((path,) if adapter is None else (path, adapter)) as ask:
        prompts = [_same_prompt(ask, tokenizer, conversation) for conversation in CONVERSATIONS]
        begun = [tokenizer.bos_token_id] if begin_of(tokenizer) else []
        for text in vocabulary_texts(tokenizer):
            _same_ids(ask, tokenizer, text, [*begun, *tokenizer(text, add_special_tokens=False).input_ids])
        answers = [_answer(ask, ids) for ids in prompts]
    pairs = list(zip(prompts, answers, strict=True))
    far = [_first_token(model, ids, answer) for ids, answer in pairs]
    known = [each for each in far if each is not None]
    return Parity(
        prompts=len(prompts),
        first=len(known),
        log_prob=max(known, default=math.inf),
        greedy=sum(_same_answer(model, ids, answer, stops) for ids, answer in pairs),
    )


def _answer(ask: Any, ids: Sequence[int]) -> Mapping[str, Any]:
    body = {"prompt": ids, "n_predict": LENGTH, "temperature": 0, "n_probs": TOP, "return_tokens": True}
    answer: Mapping[str, Any] = ask("/completion", {**body, "cache_prompt": False})
    return answer


def _first_token(model: Any, ids: Sequence[int], answer: Mapping[str, Any]) -> float | None:
    """Return the largest difference of the first token's log-probabilities; None where llama.cpp reports none.

    It reports none for a token that is a part of a character.
    """
    reported = answer.get("completion_probabilities") or [{"id": None}]
    if reported[0]["id"] not in answer["tokens"][:1]:
        return None
    expected_V = _logits(model, ids)[-1].log_softmax(-1)
    return max(abs(float(each["logprob"]) - float(expected_V[each["id"]])) for each in reported[0]["top_logprobs"])


def vocabulary_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return texts of tokens from all over the vocabulary: conversations hardly meet its merges."""
    special = set(tokenizer.all_special_ids)
    ids = [each for each in range(len(tokenizer)) if each not in special]
    chosen = random.Random(0).sample(ids, min(len(ids), SAMPLE))
    return [tokenizer.decode(chosen[start : start + 100]) for start in range(0, len(chosen), 100)]


def begin_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that the tokenizer puts before every text, as text: llama.cpp adds it, and so renders none."""
    own = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if own is not None and tokenizer("a").input_ids[:1] == [own] else ""


def _same_prompt(ask: Any, tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the ids of a conversation. Raises BadInput when llama.cpp renders or splits it in another way."""
    messages = [dict(message) for message in conversation]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    found = ask("/apply-template", {"messages": messages})["prompt"]
    wanted = text.removeprefix(begin_of(tokenizer))
    if found != wanted:
        at = _first_difference(wanted, found)
        theirs, ours = (shown(each[at : at + 40]) for each in (found, wanted))
        what = f"at character {at} of a conversation, llama.cpp renders {theirs}, and training {ours}"
        reject("the chat template", what, "Use --to merged: llama.cpp reads this template in another way")
    return _same_ids(ask, tokenizer, wanted, list(tokenizer(text, add_special_tokens=False).input_ids))


def _same_ids(ask: Any, tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """Return the ids of a text. Raises BadInput at the first one that llama.cpp has otherwise."""
    theirs = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
    if theirs != ids:
        at = _first_difference(ids, theirs)
        found, wanted = (
            f"{each[at : at + 3]} ({shown(tokenizer.decode(each[at : at + 3]))})" for each in (theirs, ids)
        )
        what = f"the ids from {at} of {shown(text)} are {found} in llama.cpp, and {wanted} in training"
        reject("the tokenizer", what, "Give another pretokenizer=NAME, or use --to merged")
    return ids


def _first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_1TV: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits
    return logits_1TV[0].float().cpu()


def _same_answer(model: Any, ids: Sequence[int], answer: Mapping[str, Any], stops: set[int]) -> bool:
    """Tell whether a greedy answer is the model's, up to a choice between two equally likely tokens."""
    theirs = [*ids, *answer["tokens"]]
    best = _logits(model, theirs).argmax(-1).tolist()
    for place in range(len(ids), len(theirs)):
        if best[place - 1] != theirs[place]:
            choice = _logits(model, theirs[:place])[-1].log_softmax(-1)
            return float(choice[best[place - 1]] - choice[theirs[place]]) <= 2 * LIMIT
    if len(answer["tokens"]) == LENGTH or theirs[-1] in stops:
        return True
    return best[-1] in stops


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(value)]
