"""The settings of a recipe: schema, default and help in one.

Only the standard library is imported: listing and help stay instant. A stage's own settings inherit from StageConfig.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from typing import Any

from posttrain.config.on_policy import OnPolicy
from posttrain.config.preparation import PrepareConfig
from posttrain.config.ranges import number, out_of_range

ROOT = (
    "seed", "output_root", "stages", "start_from", "start_from_unpromoted", "model", "data", "gate_data", "tracker",
    "variant", "plugin_timeout", "data_workers", "engine", "launch", "spend_cap", "price_per_hour",
)  # fmt: skip
"""Keys at the top level of every recipe, other than its stages and the settings of plugins."""
MISSING: Any = "???"
"""Default of a setting that the recipe must give."""
MAX_DROP = 0.02
"""Loss that a guard allows when its task names none."""
MAX_DROP_IN_POOL = 0.1
"""The same for a guard in a pool, which has a stricter limit of its own: this one is for catastrophes."""
MOST_LOOKS = 20
FROM_VARIANT = "from_variant"
"""Name of the resolver that ``from_variant`` writes into a default."""


def from_recipe(key: str) -> Any:
    """Return the default of a setting that takes its value from another key of the recipe, such as ``seed``."""
    return "${" + key + "}"


def from_variant(*, adapter: float, full: float) -> Any:
    """Return a default that follows ``variant``: ``full`` when every weight is trained, ``adapter`` otherwise.

    ``variant.KIND.SETTING`` replaces it for all stages of a kind, on the command line and in a variant file.
    """
    return f"${{{FROM_VARIANT}:${{variant.method}},{adapter},{full}}}"


def variant_rates(default: object) -> tuple[float, float] | None:
    """Return ``adapter`` and ``full`` of a default made by ``from_variant``; None for any other."""
    found = re.match(rf"\${{{FROM_VARIANT}:.*,(.*),(.*)}}$", default) if isinstance(default, str) else None
    return None if found is None else (float(found[1]), float(found[2]))


class Method(Enum):
    """The trained weights: all of them, or an adapter on a base in full or in 4 bits."""

    full = "full"
    lora = "lora"
    qlora = "qlora"


class Dtype(Enum):
    """Number format of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Format(Enum):
    """Shape of the records in a source; ``auto`` recognises all but ``text`` from the keys of each record."""

    auto = "auto"
    messages = "messages"
    prompt_completion = "prompt_completion"
    alpaca = "alpaca"
    sharegpt = "sharegpt"
    preference = "preference"
    feedback = "feedback"
    text = "text"


class Overlong(Enum):
    """The treatment of a record that is longer than a row."""

    truncate = "truncate"
    split = "split"
    reject = "reject"


class Role(Enum):
    """The demand of a gate on a task."""

    lift = "lift"
    guard = "guard"
    limit = "limit"


class Sequential(Enum):
    """The rule by which a gate may decide before all documents are scored."""

    none = "none"
    obrien_fleming = "obrien_fleming"


class Half(Enum):
    """The documents that a gate asks: both halves, or the one to choose on, or the one to judge on."""

    both = "both"
    choosing = "choosing"
    judging = "judging"


class EngineName(Enum):
    """The division of training among processes: ``auto`` takes what fits."""

    auto = "auto"
    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    deepspeed = "deepspeed"


class Backend(Enum):
    """The library that runs the models of a gate."""

    hf = "hf"
    vllm = "vllm"
    llama = "llama"


class OnFail(Enum):
    """The consequence of a verdict other than a pass."""

    stop = "stop"
    rollback = "rollback"
    warn = "warn"


@dataclass(kw_only=True)
class ModelConfig:
    """The base model."""

    path: str = MISSING
    """Directory or hub name of the base model."""
    revision: str | None = None
    """Commit of the hub repository; a branch name is resolved to its commit."""
    chat_template: str | None = None
    """Jinja file in place of the tokenizer's chat template; needed for a tokenizer without one."""
    template_variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking; ``date`` is the day it prints, by default the run's."""
    added_tokens: list[str] = field(default_factory=list)
    """Special tokens to add to the base and train, such as those of a new chat template."""
    dtype: Dtype = Dtype.bfloat16
    """Number format of weights and activations, in training and evaluation."""


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters (arXiv:2106.09685) with rank-stabilised scaling (arXiv:2312.03732)."""

    r: int = number(32, least=1)
    """Rank."""
    alpha: int = number(64, least=1)
    """Scale; the update is multiplied by alpha / sqrt(r) with rslora, alpha / r without."""
    dropout: float = number(0.0, least=0, below=1)
    """Dropout on the adapter's input."""
    rslora: bool = True
    """Scale by 1 / sqrt(r): the best learning rate then does not depend on the rank."""
    dora: bool = False
    """Length of every row of a weight trained apart from its direction (arXiv:2402.09353): slower, for low ranks."""
    target_modules: Any = "all-linear"
    """all-linear (every linear map of the language model but the output projection; experts and routers, too) or a list
    of names of layers and experts, or their ends."""


@dataclass(kw_only=True)
class Source:
    """One source of records."""

    path: str = MISSING
    """JSON, JSONL, Parquet, CSV, TSV or text file, a directory of them, a pattern such as ``data/**/*.jsonl.gz``, a URL
    such as ``s3://bucket/train.jsonl``, or a hub name."""
    format: Format = Format.auto
    """Shape of the records; text trains every token of the key ``text``, or of .txt files, each one document."""
    columns: dict[str, str] = field(default_factory=dict)
    """Keys to rename before the shape is read: {prompt: question, completion: answers.0.text}."""
    split: str = "train"
    """Split of a hub dataset."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Commit of a hub dataset."""
    limit: int | None = None
    """Number of records to read, from the first."""
    weight: float = 1.0
    """Times that an epoch sees each record: 0.5 takes a seeded half, 2 takes each twice."""
    max_bad_share: float = 0.0
    """Share of rows that may be left out because they cannot be read; more of them stop the run before it trains."""
    on_policy: OnPolicy | None = None
    """Records that the stage's parent samples; its ``questions`` take the place of ``path``."""
    share: float | None = None
    """Share of the mix's tokens: 0.15 draws records, repeatedly if need be; sources without a share are the rest."""


@dataclass(kw_only=True)
class GateTask:
    """The demand of a gate on one lm-eval task."""

    role: Role = MISSING
    """lift: must improve. guard: must not get worse. limit: must be better than a threshold of its own."""
    metric: str = MISSING
    """Metric of the task to compare."""
    filter: str | None = None
    """Filter of the task; needed for a task with several."""
    higher_is_better: bool | None = None
    """True when more is better, for a task that names no direction; must not contradict a task that does."""
    task: str | None = None
    """Registered lm-eval name or path of a YAML file; by default the key of this entry."""
    data: str | None = None
    """JSON, JSONL or Parquet file of documents, in place of the task's own data set."""
    min_lift: float = 0.0
    """Bound of a lift: the lower bound of the paired difference must exceed it."""
    max_drop: float | None = None
    """Loss allowed to a guard: the lower bound of the paired difference must exceed -max_drop. 0.02, or 0.1 pooled."""
    threshold: float | None = None
    """Bound of a limit: the bound of the candidate's own score must be better."""
    cluster: str | None = None
    """Field that names a document's source, when several share one: bounds then hold over sources."""
    slices: list[str] = field(default_factory=list)
    """Fields of the documents to compare by value, such as their topic; a group is compared by its tasks."""
    limit: int | None = None
    """Documents to score, as a seeded sample; all when absent."""
    num_fewshot: int | None = None
    """Examples in the prompt; by default the task's own number."""
    run_code: bool = False
    """Permission to run programs of the model on this machine; in a recipe, the user has to give it as well."""
    chat: bool | None = None
    """Prompts in the chat template; by default true for tasks that generate, false for log-likelihoods."""

    def problems(self) -> Sequence[tuple[str, str]]:
        """Return the settings that contradict each other or are out of range, each with what is wrong."""
        used = {Role.lift: "min_lift", Role.guard: "max_drop", Role.limit: "threshold"}
        given = {"min_lift": self.min_lift or None, "max_drop": self.max_drop, "threshold": self.threshold}
        # max_drop is never idle: against a baseline, posttrain gate takes every task for a guard
        idle = [key for key, value in given.items() if value is not None and key not in ("max_drop", used[self.role])]
        found = [(key, f"a {self.role.value} has no {key}") for key in idle]
        if self.role is Role.limit and self.threshold is None:
            found.append(("threshold", "a limit needs a threshold"))
        for key, value in given.items():
            if value is not None and not isfinite(value):
                found.append((key, f"{value} is not finite"))
            elif value is not None and value < 0 and key == "max_drop":
                found.append((key, f"{value} is negative"))
        return found


@dataclass(kw_only=True)
class GateConfig:
    """The gate of one stage."""

    enabled: bool = True
    """False promotes unseen, as the verdict and the report state."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """Tasks by name: role, metric and more, see docs/gates.md."""
    against: list[str] = field(default_factory=lambda: ["base", "parent"])
    """Systems to compare the candidate with: base, parent or both."""
    pooled_max_drop: float | None = None
    """Loss allowed to all guards with scores from 0 to 1 together, at equal weight; see max_drop."""
    confidence: float = 0.95
    """One-sided confidence of the bounds."""
    sequential: Sequential = Sequential.none
    """none, or obrien_fleming: looks at the scores several times and stops once they decide; see docs/gates.md."""
    looks: int = 5
    """Looks of a sequential gate."""
    on_fail: OnFail = OnFail.stop
    """stop, rollback (the next stage starts from the parent) or warn (it starts from the candidate)."""
    on_undecided: OnFail = OnFail.stop
    """The same for an undecided verdict."""
    backend: Backend = Backend.hf
    """hf (transformers) or vllm (GPUs) for every system, as their scores differ; llama for a candidate FILE.gguf."""
    batch_size: int = 16
    """Requests scored at once; a killed evaluation resumes after its last batch of documents."""
    seed: int = 0
    """Seed of document samples, few-shot examples, the order of documents and resampling."""
    half: Half = Half.both
    """both, choosing (promotes nothing) or judging: the halves on which select=best of a sweep chooses and judges."""
    chosen_from: int = 1
    """Number of candidates among which the judged one was chosen, as the ledger records it."""

    def allowed_drop(self, task: GateTask) -> float:
        """Return the loss that a guard allows."""
        if task.max_drop is not None:
            return task.max_drop
        return MAX_DROP if self.pooled_max_drop is None else MAX_DROP_IN_POOL

    def problems(self) -> Sequence[tuple[str, str]]:
        """Return the settings that contradict each other or are out of range, each with what is wrong."""
        found = []
        if not 0.5 < self.confidence < 1:
            found.append(("confidence", f"{self.confidence} is not between 0.5 and 1"))
        if not self.against or not set(self.against) <= {"base", "parent"}:
            found.append(("against", f"{self.against} must name base, parent or both"))
        if self.pooled_max_drop is not None and not 0 <= self.pooled_max_drop < 1:
            found.append(("pooled_max_drop", f"{self.pooled_max_drop} is not between 0 and 1"))
        if self.batch_size < 1:
            found.append(("batch_size", f"{self.batch_size} is not positive"))
        if not 1 <= self.looks <= MOST_LOOKS:
            found.append(("looks", f"{self.looks} is not between 1 and {MOST_LOOKS}"))
        if self.chosen_from < 1:
            found.append(("chosen_from", f"{self.chosen_from} is not positive"))
        return found


@dataclass(kw_only=True)
class StageConfig:
    """Settings that every stage has."""

    kind: str = MISSING
    """Registered stage that runs here."""
    data: Any = MISSING
    """Training records: a path or hub name, a source, or a list of sources; null: the recipe's data."""
    replay: Any = None
    """General records against forgetting: {path: FILE, share: 0.1} of all tokens; auto in place of share finds it."""
    max_bad_share: float = number(0.0, least=0, below=1)
    """Share of the rows of all sources together that may be left out because they cannot be read."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Preparation of the records: duplicates, quality rules, documents of the gates."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Gate on this stage's artifact, chosen with gate@<stage>.gate=NAME."""

    def eval_sources(self) -> Any:
        """Return the sources of the eval loss, in the form of ``data``; None for a kind without such a setting."""
        return None

    def rewarding(self) -> Any:
        """Return the rewards of a stage that samples answers: names, or weights by name; None for any other."""
        return None

    @property
    def replays(self) -> bool:
        """True for a stage that trains replayed records beside its own, by their share of the tokens."""
        return False

    def problems(self) -> Sequence[tuple[str, str]]:
        """Return the settings out of range, each with what is wrong; a subclass adds those that contradict others."""
        return out_of_range(self)

    def advice(self, examples: int | None) -> Sequence[str]:
        """Return unusual settings for so many examples (None: unknown), each with the usual value and its reason."""
        return ()


WITHOUT_EFFECT = (
    "data", "eval_data", "replay", "max_bad_share", "gate", "checkpoint_minutes", "checkpoint_steps",
    "gradient_checkpointing",
)  # fmt: skip
"""Settings of a stage on which no trained number depends: records count by their content, not by their place."""
