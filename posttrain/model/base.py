"""The base model: a directory or a hub repository, checked and hashed before anything is loaded.

Imports neither torch nor transformers: a plan names the exact bytes of its start without them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from posttrain.artifact import MANIFEST, ModelSource, Pins
from posttrain.chat_template import template_diff, template_in_config, variable_problems
from posttrain.config.schema import ModelConfig
from posttrain.digests import digest_of, file_digests
from posttrain.errors import ArtifactDamaged, BadInput, Problem, nearest
from posttrain.model.trust import check_places, find_code, read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SPARE_LAYERS = 1000
"""Layers that a configuration may have beyond its weights; loading names the missing ones."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
STORED = {
    "outside the language model": re.compile(r"vision|visual|image|audio|multi_modal"),
    "experts": re.compile(r"\bexperts\b|block_sparse_moe\.(in|out)put_linear"),
    "embeddings": re.compile(r"embed|lm_head|\bwte\b|\bwpe\b"),
}
"""Kinds of stored matrices by their names, the first that fits; all others are linear layers."""
HUB_PATTERNS = ["*.safetensors", WEIGHTS_INDEX, *MODEL_FILES, *TOKENIZER_FILES]


def resolve_base(model: ModelConfig, pins: Pins | None = None, *, dated: bool = True) -> ModelSource:
    """Return the base model of a recipe, with the SHA-256 of its weights, configuration, tokenizer and template.

    With the ``pins`` of an adapter, template, its variables and added tokens are the adapter's. A template that
    prints the day prints today's, unless the variables give another; with ``dated=False`` the day is left open.

    Raises BadInput when it is missing, damaged or pickled, runs code, or has no chat template, when the recipe gives
    another template or other tokens than the pinned ones, or a variable that the template does not read;
    ArtifactDamaged when the template does not read a pinned one.
    """
    folder = _folder(model)
    check_places(folder)
    weights = weight_files(folder)
    _check_configs(folder)
    _check_depth(folder, weights)
    template = _chat_template(model, folder) if pins is None else _pinned_template(model, pins)
    added = tuple(model.added_tokens) if pins is None else _pinned_tokens(model, pins)
    model_digest = digest_of(file_digests(_present(folder, MODEL_FILES) | {path.name: path for path in weights}))
    tokenizer = file_digests(_present(folder, TOKENIZER_FILES))
    source = ModelSource(
        name="base",
        model=folder,
        adapter=None,
        tokenizer=folder,
        chat_template=template,
        digest=digest_of(
            {"model": model_digest, "tokenizer": tokenizer, "chat_template": template, "added_tokens": added}
        ),
        base=model.path,
        model_digest=model_digest,
        added_tokens=added,
    ).with_variables(_variables(model, template, pins))
    return source.dated() if dated else source


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the weights in ``folder``, in order, with their headers checked.

    Raises BadInput when there are none, a shard is missing, or a file is damaged.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / WEIGHTS_INDEX).is_file():
        files = _shards(folder)
    else:
        raise BadInput(_no_weights(folder))
    for path in files:
        _check_header(path)
    return files


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight in ``folder`` by name, from the headers of its files alone.

    Raises BadInput as ``weight_files`` does.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="numpy") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
    return found


def stored_kind(name: str) -> str:
    """Return the kind of a stored matrix; kinds go by the names of the field's architectures."""
    return next((kind for kind, pattern in STORED.items() if pattern.search(name)), "linear layers")


def stored_kinds(folder: Path) -> dict[str, dict[str, int]]:
    """Return the weights in the matrices of ``folder`` by kind and name. Raises BadInput as ``weight_files`` does."""
    found: dict[str, dict[str, int]] = {}
    for name, shape in stored_shapes(folder).items():
        if len(shape) >= 2 and not name.endswith("bias"):
            found.setdefault(stored_kind(name), {})[name] = prod(shape)
    return found


def check_variables(model: ModelConfig) -> list[Problem]:
    """Report variables that the template of a recipe does not read; none while its model is not on this machine."""
    folder = Path(model.path).expanduser()
    if not model.template_variables or not folder.is_dir():
        return []
    try:
        return variable_problems(model.template_variables, _chat_template(model, folder))
    except BadInput as error:
        return list(error.problems)


def check_folder(model: ModelConfig) -> Problem | None:
    """Report a ``model.path`` that can be neither a directory nor a hub name."""
    local = Path(model.path).expanduser()
    if local.is_dir():
        return None
    if local.exists():
        return Problem(where="model.path", what=f"{model.path} is a file", fix="Give its directory")
    if _looks_local(model.path):
        return Problem(where="model.path", what=f"there is no directory {local}", fix=_sibling(local))
    return None


def _folder(model: ModelConfig) -> Path:
    problem = check_folder(model)
    if problem is not None:
        raise BadInput(problem)
    local = Path(model.path).expanduser()
    return local.resolve() if local.is_dir() else _download(model)


def _looks_local(path: str) -> bool:
    """Return True when ``path`` is no hub name (``name`` or ``owner/name``), or is unlikely to be one."""
    parts = Path(path).parts
    return path.startswith((".", "/", "~")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def hub_note(path: str) -> str | None:
    """Return a note on a name that names no folder, where a model's folder beside it is much like it; None else."""
    if os.path.lexists(path):
        return None
    meant = nearest(path, sorted(config.parent.name for config in Path().glob("*/config.json")))
    return None if meant is None else f"is taken as a name on the hub: no such folder; ./{meant} is one"


def _sibling(local: Path) -> str:
    parent = next(folder for folder in local.absolute().parents if folder.is_dir())
    names = [child.name for child in parent.iterdir() if child.is_dir()]
    close = nearest(local.name, names)
    return f"Did you mean {local.parent / close}?" if close else f"Give a directory below {parent}, or a hub name"


def _download(model: ModelConfig) -> Path:
    """Return the snapshot of a hub repository; without a network, the cached one."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:  # every error of the hub's client, and of the network, is one of these
        revision = f" at {model.revision}" if model.revision else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"there is no directory {model.path}, and downloading it from the hub{revision} failed: {reason}"
        fix = "Check the name, your access (hf auth login) and the network, or give a local directory"
        if (note := hub_note(model.path)) is not None:
            fix += f"\n    {model.path} {note}"
        raise BadInput(Problem(where="model.path", what=what, fix=fix)) from error


def _present(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    return {name: folder / name for name in names if (folder / name).is_file()}


def _shards(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(Problem(where=str(index), what="it lists no weights", fix="Copy the model again"))
    names = sorted({str(name) for name in weight_map.values()})
    bad = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if bad:
        raise BadInput(Problem(where=str(index), what=f"it lists missing files: {', '.join(bad)}"))
    return [folder / name for name in names]


def _no_weights(folder: Path) -> Problem:
    if (folder / "adapter_config.json").is_file():
        return Problem(
            where="model.path",
            what=f"{folder} is an adapter, not a base model",
            fix="Give the model under it",
        )
    if pickled := sorted(path.name for pattern in PICKLED for path in folder.glob(pattern)):
        return Problem(
            where="model.path",
            what=f"{folder} holds only pickled weights ({pickled[0]}), and unpickling runs code",
            fix="Use a revision with safetensors, or convert the weights with safetensors' own conversion script",
        )
    return Problem(where="model.path", what=f"{folder} holds no {WEIGHTS}", fix="Give the directory of a model")


def _check_header(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # reads the header and compares it with the file's length
            return
    except (SafetensorError, OSError) as error:
        raise BadInput(Problem(where=str(path), what=f"it is damaged: {error}", fix="Copy the model again")) from None


def _check_depth(folder: Path, weights: Sequence[Path]) -> None:
    """Reject a configuration with more layers than the weights have: building a million takes hours and all memory."""
    from safetensors import safe_open

    config = read_json(folder / "config.json")
    texts = [config, *(inner for inner in config.values() if isinstance(inner, dict))]
    claimed = [text[key] for text in texts for key in DEPTHS if type(text.get(key)) is int]
    deepest = 0
    for path in weights:
        with safe_open(path, framework="numpy") as file:
            numbers = [int(part) for name in file.keys() for part in name.split(".") if part.isdigit()]  # noqa: SIM118
            deepest = max([deepest, *numbers])
    if claimed and max(claimed) > deepest + 1 + SPARE_LAYERS:
        what = f"it has {max(claimed):,} layers, its weights {deepest + 1:,}"
        raise BadInput(Problem(where=str(folder / "config.json"), what=what, fix="Copy the model again"))


def _check_configs(folder: Path) -> None:
    """Reject configurations that load code or describe other weights than the files in ``folder``."""
    problems = []
    for name in CONFIGS:
        if name == "config.json" or (folder / name).exists():
            fix = "Use a model that transformers supports itself"
            problems += [
                Problem(where=str(folder / name), what=f"{key} {why}", fix=fix)
                for key, why in find_code(read_json(folder / name))
            ]
    if (folder / "adapter_config.json").is_file():  # transformers would silently load its base
        problems.append(Problem(where=str(folder), what="it holds an adapter beside the weights", fix="Move it away"))
    if problems:
        raise BadInput(problems)


def _chat_template(model: ModelConfig, folder: Path) -> str:
    if model.chat_template is not None:
        template = _read_template("model.chat_template", Path(model.chat_template).expanduser())
    elif (folder / "chat_template.jinja").is_file():
        template = _read_template("model.path", folder / "chat_template.jinja")
    else:
        template = template_in_config(folder / "tokenizer_config.json") or ""
    if not template.strip():
        raise BadInput(
            Problem(
                where="model.chat_template",
                what=f"the tokenizer of {model.path} has no chat template",
                fix="Write one, or copy the one of this model's chat version, and set model.chat_template=FILE.jinja",
            )
        )
    return template


def _pinned_template(model: ModelConfig, pins: Pins) -> str:
    if model.chat_template is not None:
        given = _read_template("model.chat_template", Path(model.chat_template).expanduser())
        if given != pins.chat_template:
            difference = template_diff(pins.chat_template, given)
            what = f"{model.chat_template} is not the template of {pins.path}:\n{difference}"
            fix = "Leave out model.chat_template: evaluation and later stages use the artifact's own"
            raise BadInput(Problem(where="model.chat_template", what=what, fix=fix))
    return pins.chat_template


def _pinned_tokens(model: ModelConfig, pins: Pins) -> tuple[str, ...]:
    if model.added_tokens and tuple(model.added_tokens) != pins.added_tokens:
        what = f"{pins.path} was trained with {list(pins.added_tokens)}, not with {model.added_tokens}"
        raise BadInput(Problem(where="model.added_tokens", what=what, fix="Leave out model.added_tokens"))
    return pins.added_tokens


def _variables(model: ModelConfig, template: str, pins: Pins | None) -> dict[str, Any]:
    """Return the values of the template's variables: the pinned ones, or those of the recipe."""
    given = dict(model.template_variables)
    if pins is not None and pins.template_variables is not None:
        pinned = dict(pins.template_variables)
        if problems := variable_problems(pinned, template):
            what = f"{problems[0].where}: {problems[0].what}"
            raise ArtifactDamaged(f"{pins.path / MANIFEST} is damaged: {what}")
        other = [name for name in given if name not in pinned or pinned[name] != given[name]]
        if other:
            what = f"{pins.path} was trained with {pinned or 'none'}, not with {other[0]}: {given[other[0]]}"
            fix = "Leave out model.template_variables: evaluation and later stages use the artifact's own"
            raise BadInput(Problem(where="model.template_variables", what=what, fix=fix))
        return pinned
    if problems := variable_problems(given, template):
        raise BadInput(problems)
    return given


def _read_template(where: str, path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(Problem(where=where, what=f"cannot read the chat template {path}: {error}")) from None
