"""``posttrain sample``: training records made of an artifact's own answers, with where they come from beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from posttrain import environment
from posttrain.artifact import Artifact, ModelSource, require_artifact, verify
from posttrain.commands.arguments import Arguments, parse
from posttrain.config.on_policy import UNKEPT, OnPolicy, SamplingBackend
from posttrain.config.schema import ModelConfig, Source
from posttrain.config.typed import conform
from posttrain.data.reading import data_digest, read_source
from posttrain.data.records import Conversation, Feedback, Preference, Question, Record
from posttrain.digests import digest_of
from posttrain.disk import replace_text
from posttrain.errors import BadInput, Problem, reject
from posttrain.host import consent, plugins
from posttrain.model.base import resolve_base
from posttrain.rewards.scorer import MOST_PROBLEMS, Scorer, choose

USAGE = (
    "posttrain sample ARTIFACT QUESTIONS OUTPUT.jsonl [k=8] [temperature=0.7] [reward=right] [keep=pairs|best|labels]"
    " [backend=transformers|vllm]"
)
SETTINGS = ("k", "temperature", "max_tokens", "reward", "keep", "least_reward", "seed", "backend")
PLACES = ("output_root", "model.path", "model.revision")
VLLM = "--vllm-command"
PROVENANCE = ".provenance"
"""Ending of the file beside the records that says where they come from; not one of data."""


def main(words: list[str]) -> int:
    """Sample answers of an artifact to questions, score them, and write the records made of them."""
    given = parse("sample", words, (*SETTINGS, *PLACES), flags=(consent.FLAG,), options=(VLLM,))
    if len(given.plain) != 3:
        reject(" ".join(["sample", *words]), "needs an artifact, questions and an output", USAGE)
    asked, output = given.plain[1], Path(given.plain[2])
    settings, command = _settings(given, asked), given.options.get(VLLM)
    if command is not None and settings.backend is not SamplingBackend.vllm:
        reject(VLLM, "names a vLLM that nothing asks", "Set backend=vllm as well")
    folder = require_artifact(Path(given.plain[0]))
    _require_new(output)
    root = Path(given.settings.get("output_root", "runs"))
    host = plugins.load()
    try:
        scorer = choose(settings.reward, host.rewards, host.reward_owners, root / "cache")
    except ValueError as error:
        reject("reward", str(error))
    identities = scorer.identities()
    questions = [each for each in read_source(Source(path=asked), "questions") if isinstance(each, Question)]
    if problems := scorer.problems(questions):
        raise BadInput(problems[:MOST_PROBLEMS])
    artifact = verify(folder)
    base = resolve_base(_base(artifact, given), artifact.pins)
    environment.prepare()
    kept = _sample(artifact, base, questions, settings, scorer, root, command)
    print(f"sampled    {kept.line()}")
    if not kept.records:
        what = f"no answer of {artifact.named} can be kept as {settings.keep.value}; nothing is written"
        reject(str(output), what, UNKEPT)
    _require_new(output)  # another command may have written it meanwhile
    output.parent.mkdir(parents=True, exist_ok=True)
    provenance = {
        "artifact": artifact.digest,
        "lineage": artifact.manifest.lineage,
        "base": artifact.manifest.base.name,
        "questions": data_digest([Source(path=asked)]),
        "settings": settings.identity(),
        "rewards": list(identities.values()),
        "records": digest_of([_row(record) for record in kept.records]),
        "figures": dict(kept.figures),
    }
    replace_text(output.with_name(output.name + PROVENANCE), json.dumps(provenance, indent=2) + "\n")
    # last: a command that was killed in between writes both again
    replace_text(output, "".join(json.dumps(_row(record), ensure_ascii=False) + "\n" for record in kept.records))
    print(f"written    {output} and {output.name}{PROVENANCE}")
    return 0


def _require_new(output: Path) -> None:
    if output.suffix != ".jsonl" or output.exists():
        reject(str(output), "exists already" if output.exists() else "is no .jsonl file", "Give a new file.jsonl")


def _settings(given: Arguments, asked: str) -> OnPolicy:
    words = [f"{key}={value}" for key, value in given.settings.items() if key in SETTINGS]
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    problems: list[Problem] = []
    settings = conform(OnPolicy, {**values, "questions": asked}, "sample", problems)
    if settings is not None:
        problems += [Problem(where=key, what=what) for key, what in settings.problems()]
    if problems:
        raise BadInput(problems)
    typed: OnPolicy = settings
    return typed


def _base(artifact: Artifact, given: Arguments) -> ModelConfig:
    """Return the base under the artifact, from where it was in training unless a setting names another place."""
    path = given.settings.get("model.path", artifact.manifest.base.name)
    return ModelConfig(path=path, revision=given.settings.get("model.revision"))


def _sample(
    artifact: Artifact,
    base: ModelSource,
    questions: list[Question],
    settings: OnPolicy,
    scorer: Scorer,
    root: Path,
    command: str | None,
) -> Any:
    from posttrain.model.loading import load_tokenizer
    from posttrain.run.start import find_standing
    from posttrain.sampling.answers import Asking, ask
    from posttrain.sampling.keeping import keep, score
    from posttrain.tokens.chat import ChatRenderer

    if (doubt := find_standing(artifact, root).doubt) is not None:
        print(f"warning    {artifact.named} {doubt}")
    source = replace(artifact.source(base), name=artifact.manifest.stage)
    asking = Asking.of(
        settings, "backend", command, source=source, base=base, dtype=artifact.manifest.dtype, kept=root / "cache",
        part=lambda done, total, what: print(f"sampled    {done:,} of {total:,} {what}s", flush=True),
        stop_requested=lambda: False,
    )  # fmt: skip
    scored = score(questions, ask(questions, asking), scorer)
    return keep(questions, scored, settings, ChatRenderer(load_tokenizer(source)))


def _row(record: Record) -> dict[str, Any]:
    """Return a record as a file of training data holds it."""
    if isinstance(record, Preference):
        return {"prompt": list(record.prompt), "chosen": list(record.chosen), "rejected": list(record.rejected)}
    if isinstance(record, Feedback):
        return {"prompt": list(record.prompt), "completion": list(record.completion), "label": record.label}
    if not isinstance(record, Conversation):
        raise TypeError(f"{type(record).__name__} is no record of a sampled answer")
    return {"messages": list(record.messages)}
