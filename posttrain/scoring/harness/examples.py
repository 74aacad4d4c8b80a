"""Few-shot examples of a prompt: drawn as lm_eval draws them, and never the document that is asked.

lm_eval leaves the document out only where ``fewshot_split`` names the test split. Where a task has no other split,
where its splits share documents, or where its own samples repeat them, it shows a document its own answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lm_eval.api.samplers import FirstNSampler

from posttrain.digests import digest_of
from posttrain.errors import reject


@dataclass(frozen=True)
class _Words:
    """Question and answers of a document, in small letters, with single blanks."""

    question: str
    answers: tuple[str, ...]

    def give_away(self, asked: _Words) -> bool:
        """Return True when these words hold the answer to the question of ``asked``."""
        if self.question != asked.question:
            return False
        if not asked.question:
            return bool(set(self.answers) & set(asked.answers))
        # Either may explain the answer at length.
        return any(one in other or other in one for one in self.answers for other in asked.answers)


class OtherExamples:
    """The sampler of a task's examples, without the document that is asked.

    Examples are lm_eval's own while the document is not among them. Those that are left out are replaced from a random
    state of their own, so that the prompts of other documents stay as they are.
    """

    def __init__(self, leaf: Any, where: str) -> None:
        self._leaf, self._sampler, self._where = leaf, leaf.sampler, where
        self._seed: int | None = None
        self._seen: dict[int, _Words] = {}
        self._asked: Any = None
        self._asked_words: _Words | None = None

    def set_rnd(self, rnd: int | None) -> OtherExamples:
        """Seed the draws."""
        self._seed = rnd
        self._sampler.set_rnd(rnd)
        return self

    def ask(self, doc: Any) -> None:
        """Draw for this document from now on."""
        self._asked, self._asked_words = doc, None

    def check(self, documents: Iterable[Any], n: int) -> None:
        """Raise BadInput for the first document without ``n`` examples beside it."""
        for doc in documents:
            self.ask(doc)
            if (found := len(list(islice(self._others(), n)))) < n:
                what = f"asks for {n} examples, but the task has only {found} beside the document {str(doc)[:60]!r}"
                reject(f"{self._where}.num_fewshot", what, "Lower it, or give the task a split of examples")

    def sample(self, n: int, eval_doc: Any = None, **options: Any) -> list[Any]:
        """Return ``n`` examples. Raises BadInput when there are too few beside the document."""
        self.check([self._asked], n)
        enough = len(self._sampler.fewshot_docs()) > n or eval_doc is None
        drawn = self._sampler.sample(n, eval_doc=eval_doc, **options) if enough else []
        kept = [example for example in drawn if not self._is_asked(example)]
        return [*kept, *self._draw(n - len(kept), kept)]

    def _draw(self, n: int, kept: Sequence[Any]) -> list[Any]:
        """Return ``n`` more examples, each at a place of its own in the pool."""
        taken = {id(example) for example in kept}
        others = (example for example in self._others() if id(example) not in taken)
        if not n or isinstance(self._sampler, FirstNSampler):
            return list(islice(others, n))
        return random.Random(digest_of([self._seed, str(self._asked)])).sample(list(others), n)

    def _others(self) -> Iterator[Any]:
        return (example for example in self._sampler.fewshot_docs() if not self._is_asked(example))

    def _is_asked(self, example: Any) -> bool:
        if example == self._asked:
            return True
        settings = getattr(self._leaf, "fewshot_cfg", self._leaf.config)
        if id(example) not in self._seen:
            self._seen[id(example)] = _words(self._leaf, example, settings)
        self._asked_words = self._asked_words or _words(self._leaf, self._asked, self._leaf.config)
        return self._seen[id(example)].give_away(self._asked_words)


def _words(leaf: Any, doc: Any, settings: Any) -> _Words:
    """Return what a document asks and answers by these settings: those of examples may differ from the task's."""
    question = leaf.doc_to_text(doc, settings.doc_to_text)
    choices = leaf.doc_to_choice(doc, settings.doc_to_choice) if settings.doc_to_choice else []
    target = leaf.doc_to_target(doc, settings.doc_to_target)
    answers = [
        choices[answer] if isinstance(answer, int) and answer < len(choices) else answer
        for answer in (target if isinstance(target, list) else [target])
    ]
    if isinstance(question, int) or not _plain(question):  # an integer is the place of the right text of the choices
        question = "\n".join(sorted(map(_plain, choices)))
    return _Words(question=_plain(question), answers=tuple(map(_plain, answers)))


def _plain(text: Any) -> str:
    return " ".join(str(text).casefold().split())
