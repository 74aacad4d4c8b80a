"""Files of models and adapters from strangers: data alone, in their own folder, and read behind one door.

Configurations have any keys, so known ones cannot be listed. The families of keys that load code, or fetch it, have an
allow-list each: a value that is not on it is rejected, wherever it is nested. Whatever a library raises about such
files is bad input, with the folder and the architecture. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.disk import explain_error
from posttrain.errors import BadInput, PosttrainError, Problem, brief, is_out_of_memory, reject
from posttrain.host.time_limit import time_limit

PRIVATE = frozenset({
    "_name_or_path", "_commit_hash", "_from_model_config", "_num_labels", "_attn_implementation_autoset",
    "_model_name_or_path",  # the name in a GGUF file from which it was converted
})  # fmt: skip
"""Keys with a leading underscore that transformers writes and only reads as names."""
ATTENTION = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"})
"""Implementations of attention that are part of transformers; any other name is a kernel to be fetched and run."""
EXPERTS = frozenset({"eager", "batched_mm", "grouped_mm"})
CODE: Mapping[str, str] = {
    "auto_map": "runs Python code from the model's repository",
    "auto_mapping": "names a Python module to import",
    "trust_remote_code": "asks to run code from the model's repository",
    "custom_generate": "runs Python code from the model's repository",
    "custom_pipelines": "runs Python code from the model's repository",
    "megatron_config": "imports a Python module by name",
    "megatron_core": "imports a Python module by name",
    "use_kernels": "fetches kernels and runs them",
    "kernel_config": "fetches kernels and runs them",
    "quantization_config": "holds quantised weights, which cannot be trained",
}
"""Keys that are rejected unless their value is empty."""
DEFAULTS: Mapping[str, object] = {"megatron_core": "megatron.core"}
"""Values that peft writes into every adapter; without their partner keys they do nothing."""
NEVER_EMPTY = frozenset({".json", ".safetensors", ".model"})
READ = NEVER_EMPTY | {".jinja", ".txt"}
"""Endings of the files that are read."""
OTHER = "Copy it again, or use another one"
LONGEST = 10_000
"""Characters of a text in a configuration: a pattern of modules among them is compiled and run."""


PATTERN_SECONDS = 10
"""Seconds of computing for the patterns of an adapter, over the names of a model's modules."""


@contextmanager
def foreign(folder: Path, what: str, seconds: float | None = None) -> Iterator[None]:
    """Turn whatever a library raises about the files of ``folder`` into BadInput, with the architecture's name.

    ``what`` is the fault in words, as in ``the model cannot be loaded``; ``seconds`` limits the computing. Errors with
    an exit code of their own pass: ours, those of the disk, and memory that ran out.
    """
    try:
        if seconds is None:
            yield
        else:
            with time_limit(seconds):
                yield
    except PosttrainError:
        raise
    except TimeoutError:
        reject(str(folder), f"{what} ({architecture(folder)}) within {seconds:g} s of computing", OTHER)
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and explain_error(error) is not None):
            raise
        why = f"{what} ({architecture(folder)}): {brief(error)}"
        raise BadInput(Problem(where=str(folder), what=why, fix=OTHER)) from error


def architecture(folder: Path) -> str:
    """Return the name of the architecture in ``folder``, as its configuration has it."""
    for name, keys in (("adapter_config.json", ("peft_type",)), ("config.json", ("architectures", "model_type"))):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            found = next(config[key] for key in keys if config.get(key))
            return f"{found[0] if isinstance(found, list) else found}"[:80] + (" adapter" if "peft" in keys[0] else "")
        except (OSError, ValueError, KeyError, AttributeError, StopIteration, RecursionError):
            continue
    return "of unknown architecture"


def find_code(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key of a configuration, however deep, that loads code or fetches it, and its fault."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:  # no recursion: the nesting is a stranger's
        path, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(f"{path}[{index}]", each) for index, each in enumerate(value)]
        if not isinstance(value, dict):
            if isinstance(value, str) and len(value) > LONGEST and not path.endswith("chat_template"):
                yield path, f"holds {len(value):,} characters"
            continue
        for key, inner in value.items():
            place = f"{path}.{key}" if path else str(key)
            if (why := _fault(str(key), inner)) is not None:
                yield place, why
            else:
                waiting.append((place, inner))


def _fault(key: str, value: Any) -> str | None:
    for ending, allowed in (("attn_implementation", ATTENTION), ("experts_implementation", EXPERTS)):
        if key in (ending, f"_{ending}"):
            names = value.values() if isinstance(value, dict) else [value]
            bad = [name for name in names if name is not None and name not in allowed]
            return (
                f"is {bad[0]!r}, which would be fetched and run; it may be {', '.join(sorted(allowed))}"
                if bad
                else None
            )
    if not value or DEFAULTS.get(key) == value:
        return None
    if key.startswith("_") and key not in PRIVATE:
        return "is private to transformers, and can load code by name"
    return CODE.get(key)


def check_adapter(folder: Path) -> None:
    """Raise BadInput when the adapter in ``folder`` would load code, or is not made of files of its own."""
    check_places(folder)
    path = folder / "adapter_config.json"
    if problems := [
        Problem(where=str(path), what=f"{key} {why}", fix=OTHER) for key, why in find_code(read_json(path))
    ]:
        raise BadInput(problems)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from ``path``. Raises BadInput when the file is missing or holds anything else."""
    if not path.exists():
        raise BadInput(Problem(where=str(path), what="the file is missing", fix=OTHER))
    if not path.is_file():  # reading a pipe would wait for ever
        raise BadInput(Problem(where=str(path), what="it is no regular file", fix=OTHER))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(Problem(where=str(path), what=f"it is damaged: {error}", fix=OTHER)) from None
    if not isinstance(value, dict):
        raise BadInput(Problem(where=str(path), what="it is damaged: not a JSON object", fix=OTHER))
    return value


def check_places(folder: Path) -> None:
    """Raise BadInput for files of a model or adapter that are pipes, empty, or links that lead out of ``folder``.

    A snapshot of the hub is made of links to the blobs beside it: those are inside.
    """
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    problems = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in READ or path.is_dir():
            continue
        if (what := _misplaced(path, inside)) is not None:
            problems.append(Problem(where=str(path), what=what, fix="Copy the files themselves into the folder"))
    if problems:
        raise BadInput(problems)


def _misplaced(path: Path, inside: list[Path]) -> str | None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a ring of links
        return "is a link that leads nowhere"
    if not any(target.is_relative_to(place) for place in inside):
        return f"is a link that leads out of the folder, to {target}"
    if not target.is_file():
        return "is no regular file"
    return "is empty" if path.suffix in NEVER_EMPTY and target.stat().st_size == 0 else None
