"""Records that a stage's parent makes: questions are read before any training, and answered when the stage starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.artifact import ModelSource
from posttrain.config.on_policy import UNKEPT
from posttrain.config.schema import GateTask, Source
from posttrain.data.files import read_rows
from posttrain.data.reading import read_source
from posttrain.data.records import Origin, Question, Record
from posttrain.errors import BadInput, Problem
from posttrain.launch.answers import sampling_group
from posttrain.rewards.scorer import MOST_PROBLEMS, Scorer, choose
from posttrain.sampling.answers import Asking, ask
from posttrain.sampling.keeping import keep, score
from posttrain.scoring.catalogue import data_files, is_path, read_task_file
from posttrain.tokens.chat import ChatRenderer

if TYPE_CHECKING:
    from posttrain.run.display import TrainingProgress
    from posttrain.run.job import Job


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The questions of one source, before they are answered."""

    source: Source
    origin: Origin
    questions: Sequence[Question]
    scorer: Scorer


def read_asked(job: Job) -> list[Asked]:
    """Return the questions of the stage's on-policy sources.

    Raises BadInput for unusable questions, and for those that a gate of the run asks as well.
    """
    found = []
    for number, source in enumerate(job.step.sources):
        if (settings := source.on_policy) is None:
            continue
        read = read_source(replace(source, on_policy=None), "questions", job.step.cache)
        questions = [each for each in read if isinstance(each, Question)]
        scorer = _chosen(job, settings.reward)
        check_questions(job, questions, scorer)
        origin = Origin(number=number, path=source.path)
        found.append(Asked(source=source, origin=origin, questions=questions, scorer=scorer))
    return found


def scorer_of(job: Job) -> Scorer | None:
    """Return the rewards of a stage that samples answers; None for any other."""
    given = job.step.config.rewarding()
    return None if given is None else _chosen(job, given)


def _chosen(job: Job, given: Any) -> Scorer:
    return choose(given, job.host.rewards, job.host.reward_owners, job.plan.output_root / "cache")


def check_asked(job: Job, records: Sequence[Any], evaluated: Sequence[Any]) -> None:
    """Raise BadInput for records that are questions which the stage's rewards cannot use, or a gate asks as well.

    Questions ``evaluated`` must not be among those that are trained.
    """
    scorer = scorer_of(job)
    if scorer is None:
        return
    trained, measured = ([each for each in given if isinstance(each, Question)] for given in (records, evaluated))
    check_questions(job, trained, scorer)
    problems = [*scorer.problems(measured), *_also_trained(trained, measured)]
    if problems:
        raise BadInput(problems[:MOST_PROBLEMS])


def check_questions(job: Job, questions: Sequence[Question], scorer: Scorer) -> None:
    """Raise BadInput for questions that a reward cannot use, or that a gate of the run asks as well."""
    problems = [*scorer.problems(questions)[:MOST_PROBLEMS], *islice(_asked_by_gates(job, questions), 1)]
    if problems:
        raise BadInput(problems)


def _also_trained(trained: Sequence[Question], measured: Sequence[Question]) -> Iterator[Problem]:
    """Yield a problem for each question of eval_data that is trained as well."""
    own = {_turns(question): question for question in trained}
    for question in measured:
        if (found := own.get(_turns(question))) is not None:
            what = f"it is set aside by eval_data, and trained as {found.where}"
            yield Problem(where=question.where, what=what, fix="Leave it out of one of the two")


def _turns(question: Question) -> tuple[tuple[str, str], ...]:
    """Return what makes two questions the same: their turns, letter case and spaces aside."""
    return tuple((str(turn["role"]), _plain(str(turn["content"]))) for turn in question.prompt)


def sample_records(
    job: Job, parent: ModelSource, asked: Sequence[Asked], progress: TrainingProgress
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Return the records that ``parent`` makes of its answers, and the figures of each source.

    Raises BadInput when no answer can be kept, Interrupted when a stop is requested: at the end of a block while
    answers are written, at once while they are scored.
    """
    from posttrain.model.loading import load_tokenizer

    records: list[Record] = []
    figures = []
    for each in asked:
        settings = each.source.on_policy
        assert settings is not None
        asking = Asking.of(
            settings, f"{job.name}.data.on_policy.backend", source=parent, base=job.base,
            dtype=job.plan.model.dtype.value, kept=job.plan.output_root / "cache", part=progress.part,
            stop_requested=job.interrupts.requested,
            processes=sampling_group(job.plan.launch, job.folder, progress.note),
        )  # fmt: skip
        progress.note(f"on policy: {parent.name} answers {len(each.questions):,} questions, {settings.k} times each")
        with job.interrupts.deferred():  # a block is finished and kept
            answers = ask(each.questions, asking)
        scored = score(each.questions, answers, each.scorer)
        kept = keep(each.questions, scored, settings, ChatRenderer(load_tokenizer(parent)))
        progress.note(f"on policy: {kept.line()}")
        if not kept.records:
            what = f"no answer of {parent.name} can be kept as {settings.keep.value}: {kept.line()}"
            raise BadInput(Problem(where=f"{job.name}.data.on_policy", what=what, fix=UNKEPT))
        records += [replace(record, origin=each.origin) for record in kept.records]
        figures.append({"source": each.source.path, "parent": parent.digest, **kept.figures})
    return records, figures


def _asked_by_gates(job: Job, questions: Sequence[Question]) -> Iterator[Problem]:
    """Yield a problem for each question in a file of any gate of the run: its score would be of memory, not skill."""
    own = {_plain(question.prompt[-1]["content"]): question for question in questions}
    for step in job.plan.steps:
        for name, task in step.tasks.items():
            for path in _files(name, task):
                for where, row in read_rows(path):
                    for text in _texts(row):
                        if (found := own.get(_plain(text))) is not None:
                            what = f"the gate of {step.name} asks the same in {name} ({where})"
                            fix = "Leave it out of one of the two: a gate has to ask what was never rewarded"
                            yield Problem(where=found.where, what=what, fix=fix)


def _files(name: str, task: GateTask) -> list[Path]:
    """Return the local files of a task's documents; none for those of a hub."""
    if task.data:
        return [Path(task.data).expanduser()]
    reference = task.task or name
    if not is_path(reference):
        return []
    return [path for path in data_files(read_task_file(Path(reference))) if path.is_file()]


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
