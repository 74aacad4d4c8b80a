"""The requests of a task's documents to a model: built once, the same for every system.

Paired tests need equal questions. lm_eval would build its few-shot prompts anew for each system, from a sampler whose
state moves on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from posttrain.data.questions import META, PLACE
from posttrain.data.records import Conversation
from posttrain.digests import digest_of
from posttrain.errors import BadInput, Problem, reject
from posttrain.scoring.checks import blaming
from posttrain.scoring.fingerprint import code_behind, task_settings
from posttrain.scoring.harness.tasks import load_leaves, shared_filters
from posttrain.scoring.isolation import quiet
from posttrain.scoring.questions import PreparedTask, Question
from posttrain.tokens.chat import ChatRenderer, Rendered, answer_ends

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask


@dataclass
class AnswerRequest(Instance):
    """A request for the likelihood of an answer in a chat, tokenised as training does it.

    lm_eval would tokenise the text of both, and take the white space at the end of the prompt for a part of the answer.
    """

    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)


@dataclass
class ChatPrompt(Instance):
    """A request for a text after a prompt whose template writes every special token, as in training.

    lm_eval would put those of the tokenizer before it.
    """

    prompt_ids: list[int] = field(default_factory=list)


KINDS: Mapping[str, type[Instance]] = {"plain": Instance, "answer": AnswerRequest, "chat": ChatPrompt}
"""Kinds of requests by name."""


def prepare_task(name: str, task: GateTask, tokenizer: Any, seed: int) -> PreparedTask:
    """Load a task and build the requests of its documents, or of a seeded sample of ``task.limit`` of them.

    Raises BadInput when a task cannot be loaded or compared, or when a target is not text.
    """
    leaves = load_leaves(name, task)
    with quiet():
        with blaming(f"tasks.{name}", None):
            documents = [list(leaf.eval_docs) for leaf in leaves]
        chosen = sample_documents(sum(map(len, documents)), task.limit, seed)
        questions = build_questions(name, task, tokenizer, seed, leaves, documents, chosen)
    return replace(_prepared(name, task, leaves, questions), ends=[] if task.chat is False else answer_ends(tokenizer))


def prepare_first(
    name: str, task: GateTask, leaves: Sequence[Any], first: int, more: int, tokenizer: Any = None
) -> PreparedTask:
    """Build the requests of the ``more`` first documents of loaded tasks, without a tokenizer as plain texts.

    Only those of the ``first`` ones show examples; there must be enough of these for all.
    """
    questions, where = [], f"tasks.{name}"
    for leaf in leaves:
        with blaming(where, None):
            documents = list(islice(leaf.eval_docs, max(1, more // len(leaves))))
        chats = _Chats(tokenizer) if tokenizer is not None and _is_chat(task, leaf) else None
        shots = leaf.config.num_fewshot or 0
        if shots and not isinstance(leaf.doc_to_text(documents[0]), list):
            leaf.sampler.check(documents, shots)
        for doc_id, doc in enumerate(documents):
            if doc_id == max(1, first // len(leaves)):
                leaf.set_config("num_fewshot", 0)  # they would take most of the time
            questions.append(_question(where, leaf, doc_id, doc, chats))
    return _prepared(name, task, leaves, questions)


def _prepared(name: str, task: GateTask, leaves: Sequence[Any], questions: Sequence[Question]) -> PreparedTask:
    return PreparedTask(
        name=name,
        metric=task.metric,
        higher_is_better=bool(leaves[0].higher_is_better()[task.metric] or task.higher_is_better),
        leaves=leaves,
        filters=shared_filters(leaves),
        questions=questions,
        ends=[],
        settings=[*(task_settings(leaf.config) for leaf in leaves), code_behind(leaves, task.task or name)],
    )


def build_questions(
    name: str, task: GateTask, tokenizer: Any, seed: int, leaves: Sequence[Any], documents: Sequence[Sequence[Any]],
    chosen: Container[int],
) -> list[Question]:  # fmt: skip
    """Build the requests of the chosen documents of loaded tasks, counted over all of them.

    Raises BadInput with the document for whatever the task's functions raise.
    """
    questions: list[Question] = []
    start = 0
    for leaf, docs in zip(leaves, documents, strict=True):
        chats = _Chats(tokenizer) if _is_chat(task, leaf) else None
        # Seeded once per task: the sampler's state moves on with every prompt, and each prompt is built once.
        leaf.set_fewshot_seed(seed)
        questions += [
            _question(f"tasks.{name}", leaf, start + index, doc, chats)
            for index, doc in enumerate(docs)
            if start + index in chosen
        ]
        start += len(docs)
    return questions


def _is_chat(task: GateTask, leaf: Any) -> bool:
    return task.chat if task.chat is not None else bool(leaf.OUTPUT_TYPE == "generate_until")


def sample_documents(total: int, limit: int | None, seed: int) -> set[int]:
    """Return the numbers of the documents that a task asks: all, or a seeded sample of ``limit``."""
    everything = range(total)
    return set(everything if limit is None or limit >= total else random.Random(seed).sample(everything, limit))


class _Chats:
    """Prompts rendered by a chat template, and the answers that are scored after them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stand_in = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
        self._messages: dict[str, tuple[dict[str, Any], ...]] = {}

    def __call__(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render by lm_eval's own function, bound to a tokenizer instead of a loaded model."""
        text = self._render(messages, add_generation_prompt)
        # It leaves the system message out where a template rejects one.
        others = [message for message in messages if message["role"] != "system"]
        alike = len(others) < len(messages) and self._render(others, add_generation_prompt) == text
        self._messages[text] = tuple(others if alike else messages)
        return text

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return str(HFLM.apply_chat_template(self._stand_in, messages, add_generation_prompt))

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self._tokenizer)

    def prompt_ids(self, request: Any) -> list[int] | None:
        """Return the ids of a prompt where the tokenizer would add some of its own; else None."""
        ids: list[int] = self._tokenizer(request.args[0], add_special_tokens=False)["input_ids"]
        return ids if self._tokenizer(request.args[0])["input_ids"] != ids else None

    def answer(self, request: Any, where: str) -> Rendered:
        """Return a request's prompt and answer as training renders them. Raises BadInput when training could not."""
        prompt, continuation = request.args
        *earlier, last = self._messages[prompt]
        given = str(last["content"]) if last["role"] == "assistant" else ""
        messages = (*earlier, *(() if given else (last,)), {"role": "assistant", "content": given + continuation})
        return self._renderer.answer(Conversation(messages=messages, where=where), prompt)


def _question(where: str, leaf: Any, doc_id: int, doc: Any, chats: _Chats | None) -> Question:
    """Build the requests of a document. Raises BadInput with the document for whatever the task's functions raise."""
    with blaming(f"{where}, document {doc_id}"):
        return _build(where, leaf, doc_id, doc, chats)


def _build(where: str, leaf: Any, doc_id: int, doc: Any, chats: _Chats | None) -> Question:
    requests = leaf.construct_requests(
        doc=doc,
        ctx=_context(where, leaf, doc, chats),
        metadata=(leaf.config["task"], doc_id, leaf.config.repeats),
        apply_chat_template=chats is not None,
        chat_template=chats,
    )
    requests = requests if isinstance(requests, list) else [requests]
    _check_texts(leaf, doc_id, requests)
    question, target = leaf.doc_to_text(doc), leaf.doc_to_target(doc)
    target_text = str(leaf.doc_to_choice(doc)[target] if _is_choice(leaf, doc, target) else _as_given(doc, target))
    written: dict[str, str] = {}
    if chats is not None:
        requests = [_in_chat(request, chats, f"{where}, document {doc_id}", written) for request in requests]
    return Question(
        doc_id=doc_id,
        doc=_as_written(doc, written) if any(text != shown for text, shown in written.items()) else doc,
        leaf=leaf,
        requests=requests,
        document_hash=hash_document(doc),
        request_hash=digest_of([[request.request_type, *request.args, *_ids(request)] for request in requests]),
        target_hash=_hash(str(target)),
        target=target_text,
        words=digest_of([leaf.OUTPUT_TYPE, *_asked(leaf, doc, question, requests)]),
        wording=wording(question),
        place=str(doc.get(PLACE, "")) if isinstance(doc, Mapping) else "",
    )


def hash_document(doc: Any) -> str:
    """Return the SHA-256 of a document's content, by which it belongs to one of the halves."""
    return _hash(json.dumps(_without_notes(doc), sort_keys=True, default=str))


def _without_notes(doc: Any) -> Any:
    """Return a document without what nobody asks: two that differ in it alone are equal."""
    return {key: value for key, value in doc.items() if key not in (META, PLACE)} if isinstance(doc, Mapping) else doc


def _as_given(doc: Any, target: Any) -> Any:
    """Return the right answers of an own question as its file has them, in place of the JSON of their list."""
    if not isinstance(doc, Mapping) or not doc.keys() >= {"prompt", "answer", "match"} or target != doc["answer"]:
        return target
    return " or ".join(
        answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False) for answer in json.loads(target)
    )


def wording(question: Any) -> str:
    """Return a question as one text, of a conversation its turns; empty where the task words none."""
    if isinstance(question, list):
        return "\n\n".join(str(turn.get("content") or "") for turn in question if turn.get("role") != "system")
    return question.strip() if isinstance(question, str) else ""


def _asked(leaf: Any, doc: Any, question: Any, requests: Sequence[Any]) -> list[Any]:
    """Return what a document asks, as the task words it, without examples: the question, and what is to be judged."""
    question = question.strip() if isinstance(question, str) else question
    if leaf.OUTPUT_TYPE == "multiple_choice":
        return [question, sorted(map(str, leaf.doc_to_choice(doc)))]
    if question == "" or leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        return [request.args for request in requests]
    return [question, *(request.args[1] for request in requests if leaf.OUTPUT_TYPE == "loglikelihood")]


def _in_chat(request: Any, chats: _Chats, where: str, written: dict[str, str]) -> Any:
    """Return a request with the ids of its prompt and answer; note in ``written`` the answer as the template has it.

    Likelihoods without a prompt have no such ids.
    """
    kept = {each.name: getattr(request, each.name) for each in fields(request)}
    if request.request_type == "generate_until":
        ids = chats.prompt_ids(request)
        return request if ids is None else ChatPrompt(**kept, prompt_ids=ids)
    if request.request_type != "loglikelihood" or not request.args[0]:
        return request
    (prompt, answer), found = request.args, chats.answer(request, where)
    rendered, start = found.text[len(prompt) :], found.mask.index(True)
    for said in (answer, answer.lstrip()):  # with and without the task's delimiter
        shown = (said, said.strip(), rendered.strip())  # a template may trim it, or begin it in the prompt
        written[said] = next(text for text in shown if text in rendered)
    return AnswerRequest(**kept, prompt_ids=found.ids[:start], answer_ids=found.ids[start:])


def _as_written(value: Any, written: Mapping[str, str]) -> Any:
    """Return a document with its answers as the template writes them: a cost is divided by the length it stands for."""
    if isinstance(value, Mapping):
        return {key: _as_written(item, written) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(item, written) for item in value]
    return written.get(value, value) if isinstance(value, str) else value


def _ids(request: Any) -> list[list[int]]:
    if isinstance(request, AnswerRequest):
        return [request.prompt_ids, request.answer_ids]
    return [request.prompt_ids] if isinstance(request, ChatPrompt) else []


def request_values(request: Any) -> list[Any]:
    """Return a request as JSON values for ``read_request``. Raises BadInput when they would come back as others."""
    kind = next(name for name, kind in KINDS.items() if type(request) is kind)
    extra = {name: getattr(request, name) for name in ("prompt_ids", "answer_ids") if hasattr(request, name)}
    about = [request.task_name, request.doc_id, request.repeats]
    values = [kind, request.request_type, list(request.args), request.idx, about, extra]
    found = read_request(json.loads(json.dumps(values)))
    if found.args != request.args or any(getattr(found, name) != ids for name, ids in extra.items()):
        what = "its requests have values that JSON lacks, so that several processes cannot be given them"
        reject(f"tasks.{request.task_name}", what, "Use lists and texts in its file, or score it with launch=none")
    return values


def read_request(values: Sequence[Any]) -> Any:
    """Return the request, without its document."""
    kind, request_type, arguments, idx, about, extra = values
    return KINDS[kind](
        request_type=request_type, doc={}, arguments=tuple(arguments), idx=idx, metadata=tuple(about), **extra
    )


def _context(where: str, leaf: Any, doc: Any, chats: _Chats | None) -> Any:
    """Return the prompt of a document. A list of messages is rendered as it is; it takes no few-shot examples."""
    messages, shots = leaf.doc_to_text(doc), leaf.config.num_fewshot or 0
    if isinstance(messages, list):
        if shots:
            reject(
                f"{where}.num_fewshot", "the task asks in whole conversations, which take no examples", "Leave it out"
            )
        plain = "\n\n".join(str(message.get("content") or "") for message in messages) + "\n\n"
        return plain if chats is None else chats(messages)
    if shots:
        leaf.sampler.ask(doc)
    return leaf.fewshot_context(
        doc,
        num_fewshot=shots,
        system_instruction=None,
        apply_chat_template=chats is not None,
        fewshot_as_multiturn=chats is not None,
        chat_template=chats,
        gen_prefix=leaf.doc_to_prefix(doc),
    )


def _check_texts(leaf: Any, doc_id: int, requests: Sequence[Any]) -> None:
    # lm_eval evaluates a rendered target that looks like a list, and would fail in the middle of scoring.
    for request in requests:
        if request.request_type == "loglikelihood" and not all(isinstance(text, str) for text in request.args):
            what = f"the target of document {doc_id} is not text: {request.args[1]!r:.60}"
            fix = "Name a column in doc_to_target instead of rendering it"
            raise BadInput(Problem(where=str(leaf.task_name), what=what, fix=fix))


def _is_choice(leaf: Any, doc: Any, target: Any) -> bool:
    return isinstance(target, int) and leaf.config.doc_to_choice is not None and target < len(leaf.doc_to_choice(doc))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
