"""Proof, before a model is served, that its users will meet the model that was judged.

1. The ids of probe conversations, as the server makes them, are those that training has before the answer.
2. The server's greedy tokens are those of the artifact loaded alone in this process.
3. An adapter changes something: its tokens or logits are not those of its base.
4. A request with a chat template of its own is rejected (``requests``; the same check for every model).
"""

# T = tokens, V = vocabulary

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from posttrain.errors import ArtifactDamaged
from posttrain.model.probe import difference
from posttrain.model.reloading import RELOADED_LIMITS
from posttrain.scoring.isolation import plain_generation
from posttrain.serve.ask import Ask, Ended, Event, Generator, Sampling, Token
from posttrain.serve.engine import QueueFull
from posttrain.serve.models import Loaded, Models

TOKENS = 16
"""Greedy tokens that are compared for each probe."""
PAUSE = 0.02
"""Seconds between two tries to join a full queue."""
CLOSE = 10
"""Times the limit of a logit's error, within which two tokens are as likely as each other."""
ANSWER = "This is called a lamp."
PROBES: Sequence[Sequence[Mapping[str, str]]] = (
    ({"role": "user", "content": "What is this called?"},),
    ({"role": "system", "content": "Answer in a word."}, {"role": "user", "content": "Name a river."}),
    (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello, what can I do?"},
        {"role": "user", "content": "Count: 1, 2,\n3 …"},
    ),
)


def prove(models: Models, engine: Generator, digest: str) -> int:
    """Prove a loaded model; return the number of probes. Raises ArtifactDamaged with what differs."""
    loaded = models.loaded[digest]
    prompts = list(prompts_of(loaded))
    if not prompts:
        raise ArtifactDamaged(f"{loaded.served.name}: its chat template takes none of the probe conversations")
    alone = models.alone(digest)
    changed = loaded.served.source.adapter is None
    with plain_generation(alone, loaded.ends):
        for prompt in prompts:
            compare(loaded, alone, prompt, greedy(engine, loaded, prompt))
            changed = changed or _differs(models, engine, loaded, alone, prompt)
    if not changed:
        raise ArtifactDamaged(f"{loaded.served.name}: the adapter changes nothing: its logits are those of its base")
    return len(prompts)


def greedy(engine: Generator, loaded: Loaded, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    """Return the tokens of a greedy answer by the server's own way; call it where nothing waits on this thread."""
    found: list[Event] = []
    done = threading.Event()

    def take(event: Event) -> None:
        found.append(event)
        if isinstance(event, Ended):
            done.set()

    ask = Ask(
        system=loaded.served.digest, prompt=prompt, sampling=Sampling(max_tokens=tokens), ends=loaded.ends, send=take
    )  # fmt: skip
    while True:
        try:
            engine.submit([ask])
            break
        except QueueFull:  # of a server that is busy while it takes in an artifact
            time.sleep(PAUSE)
    done.wait()
    last = found[-1]
    if isinstance(last, Ended) and last.fault:
        raise ArtifactDamaged(f"{loaded.served.name} cannot be served: {last.fault}")
    return [event.id for event in found if isinstance(event, Token)]


def generated(alone: Any, loaded: Loaded, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    """Return the greedy tokens of a model alone, by ``generate`` of transformers."""
    ids_1T = torch.tensor([prompt], device=alone.device)
    with torch.inference_mode():
        found_T = alone.generate(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=tokens, do_sample=False,
            pad_token_id=loaded.prompter.tokenizer.pad_token_id,
        )[0, len(prompt) :]  # fmt: skip
    ids: list[int] = found_T.tolist()
    return ids[:-1] if ids and ids[-1] in loaded.ends else ids


def prompts_of(loaded: Loaded) -> Iterator[list[int]]:
    """Yield the ids of the probes. Raises ArtifactDamaged when they are not those of training."""
    for messages in taken(loaded):
        own, trained = loaded.prompter.chat(messages), loaded.prompter.trained(messages, ANSWER)
        if own != trained and trained is not None:
            pairs = zip(own, trained, strict=False)
            place = next((n for n, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(own), len(trained)))
            raise ArtifactDamaged(
                f"{loaded.served.name}: the template's ids are not those of training: {own} here, {trained} there, "
                f"from place {place}"
            )
        yield own


def taken(loaded: Loaded) -> list[Sequence[Mapping[str, str]]]:
    """Return the probe conversations that training would take: some templates know no system turn."""
    return [messages for messages in PROBES if loaded.prompter.trained(messages, ANSWER) is not None]


def compare(loaded: Loaded, alone: Any, prompt: list[int], served: list[int]) -> None:
    """Raise ArtifactDamaged unless these greedy tokens are those of the model alone."""
    limit = RELOADED_LIMITS.get(loaded.served.dtype, max(RELOADED_LIMITS.values()))
    expected = generated(alone, loaded, prompt)
    if served == expected:
        return
    # Two sums in another order may round apart where two tokens are as likely as each other.
    place = next((n for n, pair in enumerate(zip(served, expected, strict=False)) if pair[0] != pair[1]), None)
    if place is not None:
        logits_V = _logits(alone, prompt + expected[:place])[-1]
        gap = float(logits_V[expected[place]] - logits_V[served[place]])
        if gap <= CLOSE * limit * float(logits_V.std()):
            return
    raise ArtifactDamaged(
        f"{loaded.served.name}: the served model is not the artifact: greedy tokens {served}, alone {expected}"
    )


def _differs(models: Models, engine: Generator, loaded: Loaded, alone: Any, prompt: list[int]) -> bool:
    base = models.loaded[loaded.served.base.digest]
    if greedy(engine, base, prompt) != greedy(engine, loaded, prompt):
        return True
    own_TV, bases_TV = _logits(alone, prompt), _logits(models.alone(base.served.digest), prompt)
    return difference(own_TV, bases_TV) > 0


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0]
    return logits_TV.float().cpu()
