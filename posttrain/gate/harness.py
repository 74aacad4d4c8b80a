"""The one importer of lm_eval: loads its tasks, builds their requests once, and scores what a system answers.

A task of a gate is one lm-eval task, or the tasks of a group pooled. lm_eval's own ``evaluate`` is not used: it would
build few-shot prompts anew for each system, score NaN as a wrong answer, and print.
"""

# B = requests in a batch, T = tokens, V = vocabulary

from __future__ import annotations

import functools
import hashlib
import json
import math
import numbers
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from lm_eval.api.metrics import mean
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from posttrain.artifact import digest_of
from posttrain.errors import ArtifactDamaged, BadInput, PosttrainError, Problem
from posttrain.gate.catalogue import documents_from, is_path, read_task_file, registered, tasks_folder
from posttrain.gate.checks import check_filter, unknown_metric, unsupported_aggregation
from posttrain.gate.fingerprint import settings_of
from posttrain.gate.isolation import quiet, tied_already
from posttrain.gate.questions import PreparedTask, Question
from posttrain.gate.spec import DocumentScore

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask


def preflight(tasks: Mapping[str, GateTask]) -> None:
    """Load every task as scoring will; raises BadInput with all that stands in the way, and trains nothing."""
    problems: list[Problem] = []
    for name, task in tasks.items():
        try:
            load_leaves(name, task)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)


def load_leaves(name: str, task: GateTask) -> list[Any]:
    """The lm-eval tasks behind a task of a gate; raises BadInput when one cannot be loaded or compared."""
    reference = task.task or name
    try:
        with quiet():
            leaves = _load(reference, task.data)
    except PosttrainError:
        raise
    except Exception as error:
        raise BadInput(_unloadable(name, reference, error)) from error
    for leaf in leaves:
        if problems := list(_objections(f"tasks.{name}", task, leaf)):
            raise BadInput(problems)
    if not _shared_filters(leaves):
        raise BadInput(Problem(where=f"tasks.{name}", what=f"the tasks of {reference} share no filter"))
    if task.num_fewshot is not None:
        for leaf in leaves:
            leaf.set_config("num_fewshot", task.num_fewshot)
    return leaves


def _load(reference: str, data: str | None) -> list[Any]:
    if is_path(reference):
        return _load_file(Path(reference), data)
    if data is not None:
        return _load_file(registered()[reference], data)
    return _load_registered(reference)


def _load_file(path: Path, data: str | None) -> list[Any]:
    """The task of a YAML file, with data files relative to that file, or with the documents in the file ``data``."""
    path = path.expanduser().resolve()
    settings = read_task_file(path)
    override: dict[str, Any] = {"include": str(path)}
    if data is not None:
        override |= documents_from(settings, Path(data).expanduser().resolve())
    elif arguments := settings.get("dataset_kwargs"):
        override["dataset_kwargs"] = arguments
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / path.name
        wrapper.write_text(yaml.safe_dump(override), encoding="utf-8")
        return list(TaskManager(include_defaults=False).load(str(wrapper))["tasks"].values())


def _load_registered(name: str) -> list[Any]:
    """A registered task, or the tasks of a group, without indexing the thousands of others where that can be helped."""
    family = tasks_folder() / registered()[name].relative_to(tasks_folder()).parts[0]
    manager = TaskManager(include_defaults=False, include_path=str(family))
    if not _is_complete(name, manager.task_index):
        manager = TaskManager()
    return list(manager.load(name)["tasks"].values())


def _is_complete(name: str, index: Mapping[str, Any]) -> bool:
    """Whether the index holds ``name`` and all that it is made of."""
    return name in index and _has_members(index[name].cfg or {}, index)


def _has_members(settings: Mapping[str, Any], index: Mapping[str, Any]) -> bool:
    """Whether the index holds what a group lists: names, names with overrides, groups and tasks defined in place."""
    members = settings.get("task")
    for member in members if isinstance(members, list) else []:
        name = member if isinstance(member, str) else member.get("task", member.get("group"))
        if isinstance(name, list):
            if not _has_members(member, index):
                return False
        elif not _is_complete(name, index) and not (isinstance(member, dict) and "dataset_path" in member):
            return False
    return True


def _unloadable(name: str, reference: str, error: Exception) -> Problem:
    cause = str(error).strip().splitlines()
    return Problem(
        where=f"tasks.{name}",
        what=f"lm-eval cannot load {reference}: {type(error).__name__}: {cause[0] if cause else 'no message'}",
        fix="Its data must be on this machine or reachable, and its file a valid lm-eval task.",
    )


def _objections(where: str, task: GateTask, leaf: Any) -> Iterator[Problem]:
    """Why a loaded task cannot be scored or compared."""
    if getattr(leaf, "UNSAFE_CODE", False):
        yield Problem(where=where, what=f"{leaf.task_name} runs code that the model writes", fix="Choose another task.")
    if getattr(leaf, "MULTIMODAL", False):
        yield Problem(where=where, what=f"{leaf.task_name} is not a task of text alone", fix="Choose another task.")
    aggregation = leaf.aggregation()
    if task.metric not in aggregation:
        yield unknown_metric(where, aggregation, task)
    elif aggregation[task.metric] is not mean:
        yield unsupported_aggregation(where, task)
    yield from check_filter(where, _filters(leaf), task)


def _filters(leaf: Any) -> list[str]:
    return [ensemble.name for ensemble in leaf._filters]


def _shared_filters(leaves: Sequence[Any]) -> list[str]:
    return [name for name in _filters(leaves[0]) if all(name in _filters(leaf) for leaf in leaves)]


def prepare(name: str, task: GateTask, tokenizer: Any, seed: int) -> PreparedTask:
    """Load a task and build the requests of its documents, or of a seeded sample of ``task.limit`` of them."""
    leaves = load_leaves(name, task)
    with quiet():
        documents = [list(leaf.eval_docs) for leaf in leaves]
        questions = _questions(task, tokenizer, seed, leaves, documents)
    return PreparedTask(
        name=name,
        metric=task.metric,
        higher_is_better=bool(leaves[0].higher_is_better()[task.metric]),
        leaves=leaves,
        filters=_shared_filters(leaves),
        questions=questions,
        settings=[settings_of(leaf.config) for leaf in leaves],
    )


def _questions(
    task: GateTask, tokenizer: Any, seed: int, leaves: Sequence[Any], documents: Sequence[Sequence[Any]]
) -> list[Question]:
    chosen = _sample(sum(map(len, documents)), task.limit, seed)
    questions: list[Question] = []
    start = 0
    for leaf, docs in zip(leaves, documents, strict=True):
        chat = task.chat if task.chat is not None else leaf.OUTPUT_TYPE == "generate_until"
        renderer = _renderer(tokenizer) if chat else None
        # Once per task, and requests are built once: lm_eval's few-shot sampler goes on from where it stopped.
        leaf.set_fewshot_seed(seed)
        questions += [
            _question(leaf, start + index, doc, renderer) for index, doc in enumerate(docs) if start + index in chosen
        ]
        start += len(docs)
    return questions


def _sample(total: int, limit: int | None, seed: int) -> set[int]:
    everything = range(total)
    return set(everything if limit is None or limit >= total else random.Random(seed).sample(everything, limit))


def _renderer(tokenizer: Any) -> Callable[..., str]:
    """lm_eval's way to apply a chat template, without a model."""
    stand_in = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    return functools.partial(HFLM.apply_chat_template, stand_in)


def _question(leaf: Any, doc_id: int, doc: Any, renderer: Callable[..., str] | None) -> Question:
    chat = renderer is not None
    context = leaf.fewshot_context(
        doc,
        num_fewshot=leaf.config.num_fewshot or 0,
        system_instruction=None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=renderer,
        gen_prefix=leaf.doc_to_prefix(doc),
    )
    requests = leaf.construct_requests(
        doc=doc,
        ctx=context,
        metadata=(leaf.config["task"], doc_id, leaf.config.repeats),
        apply_chat_template=chat,
        chat_template=renderer,
    )
    requests = requests if isinstance(requests, list) else [requests]
    _check_texts(leaf, doc_id, requests)
    target = leaf.doc_to_target(doc)
    return Question(
        doc_id=doc_id,
        doc=doc,
        leaf=leaf,
        requests=requests,
        document_hash=_hash(json.dumps(doc, sort_keys=True, default=str)),
        request_hash=digest_of([[request.request_type, *request.args] for request in requests]),
        target_hash=_hash(str(target)),
        target=str(leaf.doc_to_choice(doc)[target] if _is_choice(leaf, doc, target) else target),
    )


def _check_texts(leaf: Any, doc_id: int, requests: Sequence[Any]) -> None:
    # lm_eval evaluates a rendered target that looks like a list, and would fail over it in the middle of scoring
    for request in requests:
        if request.request_type == "loglikelihood" and not all(isinstance(text, str) for text in request.args):
            what = f"document {doc_id} has a target that is no text: {request.args[1]!r:.60}"
            fix = "Name a column in doc_to_target instead of rendering it"
            raise BadInput(Problem(where=str(leaf.task_name), what=what, fix=fix))


def _is_choice(leaf: Any, doc: Any, target: Any) -> bool:
    return isinstance(target, int) and leaf.config.doc_to_choice is not None and target < len(leaf.doc_to_choice(doc))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Responder(HFLM):
    """A loaded model that answers lm-eval's requests: silent, and watchful of what is not finite or does not fit."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        with tied_already(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.cut = 0
        """How many prompts were longer than the model's context and lost their beginning."""
        self._unsound = torch.zeros((), dtype=torch.bool, device=self.device)
        self._answers: dict[str, Any] = {}

    def respond(self, requests: Sequence[Any], where: str) -> None:
        """Answer requests in place. Raises ArtifactDamaged naming ``where`` when an output is not finite."""
        for kind in dict.fromkeys(request.request_type for request in requests):
            asked = [request for request in requests if request.request_type == kind]
            repeated = [request for request in asked for _ in range(request.repeats or 1)]
            for request in asked:
                request.resps, request.filtered_resps = [], {}
            for request, given in zip(repeated, self._answered(kind, repeated), strict=True):
                request.resps.append(given)
                likelihood = given[0] if isinstance(given, tuple) else given
                self._unsound |= not isinstance(likelihood, str) and not math.isfinite(likelihood)
        if self._unsound:
            raise ArtifactDamaged(f"{where}: the model's output is not finite; its weights hold NaN or infinity")

    def _answered(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """The answers to requests of one kind; a text that another task had written is not written again."""
        # repeats are asked because they may differ
        if kind != "generate_until" or any((request.repeats or 1) > 1 for request in requests):
            return list(getattr(self, kind)(list(requests), disable_tqdm=True))
        keys = [digest_of([kind, *request.args]) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers}
        if new:
            answers = getattr(self, kind)(list(new.values()), disable_tqdm=True)
            self._answers |= dict(zip(new, answers, strict=True))
        return [self._answers[key] for key in keys]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As HFLM, after checking that there is room for what the task wants generated."""
        for request in requests:
            room = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if room >= self.max_length:
                what = f"the task may generate {room} tokens, but the model's context holds {self.max_length}"
                fix = "Set generation_kwargs.max_gen_toks in the task's file."
                raise BadInput(Problem(where=str(request.task_name), what=what, fix=fix))
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def tok_batch_encode(self, strings: list[str], left_truncate_len: int | None = None, **options: Any) -> Any:
        """As HFLM, counting the prompts that are cut."""
        ids_BT, mask_BT = super().tok_batch_encode(strings, **options)
        if left_truncate_len is None:
            return ids_BT, mask_BT
        self.cut += int((mask_BT.sum(dim=1) > left_truncate_len).sum())
        return ids_BT[:, -left_truncate_len:], mask_BT[:, -left_truncate_len:]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
        self.cut += sum(len(context) + len(choice) > self.max_length + 1 for _, context, choice in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        return super()._model_generate(context, max_length, stop, logits_processor=[self._watch], **options)

    def _watch(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        # Noted on the device and looked at after the block: reading it at every token would stall the device.
        self._unsound |= ~torch.isfinite(logits_BV.amax(dim=-1)).all()
        return logits_BV


def answer(
    task: PreparedTask, responder: Responder, system: str, digest: str, report: Callable[[int, int], None]
) -> list[DocumentScore]:
    """Put every question to a system and score it, one row per filter and document.

    ``report(done, total)`` is called after each block of documents. Raises ArtifactDamaged when a log-likelihood, a
    logit or a score is not finite.
    """
    block = 4 * int(
        responder.batch_size
    )  # lm_eval sorts by length within a block, so that batches carry little padding
    for start in range(0, len(task.questions), block):
        questions = task.questions[start : start + block]
        responder.respond(
            [request for question in questions for request in question.requests], f"{system}, {task.name}"
        )
        report(start + len(questions), len(task.questions))
    for leaf in task.leaves:
        if requests := [item for question in task.questions if question.leaf is leaf for item in question.requests]:
            for ensemble in leaf._filters:
                ensemble.apply(requests)
    return [_score(task, question, name, system, digest) for name in task.filters for question in task.questions]


def _score(task: PreparedTask, question: Question, name: str, system: str, digest: str) -> DocumentScore:
    results = question.leaf.process_results(
        question.doc, [request.filtered_resps[name] for request in question.requests]
    )
    aggregation = question.leaf.aggregation()
    metrics = {
        metric: float(value)
        for metric, value in results.items()
        if aggregation.get(metric) is mean and isinstance(value, (numbers.Real, np.bool_))
    }
    where = f"{system}, {task.name}, document {question.doc_id}"
    if task.metric not in metrics:
        raise BadInput(Problem(where=where, what=f"the task gives it no number as {task.metric}"))
    if unsound := [metric for metric, value in metrics.items() if not math.isfinite(value)]:
        raise ArtifactDamaged(f"{where}: {', '.join(unsound)} is not a finite number")
    return DocumentScore(
        system=system,
        digest=digest,
        task=task.name,
        filter=name,
        doc_id=question.doc_id,
        document_hash=question.document_hash,
        request_hash=question.request_hash,
        target_hash=question.target_hash,
        metrics=metrics,
        response=_response(question),
        target=question.target,
    )


def _response(question: Question) -> str:
    """What the model wrote, the choice it preferred, or the log-likelihood it gave."""
    first = question.requests[0].resps[0]
    if isinstance(first, str):
        return first
    if question.leaf.OUTPUT_TYPE == "multiple_choice":
        choices = question.leaf.doc_to_choice(question.doc)
        likelihoods = [request.resps[0][0] for request in question.requests[: len(choices)]]
        return str(choices[int(np.argmax(likelihoods))])
    return f"log-likelihood {first[0] if isinstance(first, tuple) else first:.4f}"
