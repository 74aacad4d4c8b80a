"""A YAML file of settings, read as data, and the words of a command line: a stranger may have written either.

A file is measured before it is built, because aliases and merge keys can grow tenfold with every line. It loads no
code, reads no environment, sets nothing of Hydra's own and holds no secret; the same is asked of every word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config.expansion import MOST_DEPTH, MOST_KEY, check_interpolations, items, leaves, shown_key
from posttrain.errors import BadInput, Problem, reject, shown
from posttrain.quoting import SECRET, is_secret

MOST_BYTES = 100_000
MOST_VALUES = 5_000
"""Values of all files of a recipe, aliases replaced by what they stand for."""
MOST_CHARACTERS = 10_000
"""Characters of one value, and of one word of the command line."""
MOST_DEFAULTS = 100
"""Entries of a list of defaults, and files that a recipe includes, each as often as it is included."""
RESOLVERS = ("shipped",)
"""Resolvers that files and words may use."""
GROUPS = ("recipe", "gate", "model", "variant", "tracker", "launch", "stage", "settings")
"""Groups of options, each a folder."""
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FAULTS = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError)
"""What the parsers raise for text that is no sound YAML, such as an integer of 5,000 digits."""
HYDRA = "hydra"


@dataclass
class Reading:
    """The files that one composition has read, as far as it has come."""

    form: Callable[[Path, Mapping[str, Any]], tuple[dict[str, Any], dict[str, str]]] | None = None
    """Return the full form of a plain recipe, and the keys of the recipe by those of the full form."""
    origins: dict[str, str] = field(default_factory=dict)
    """Key of a plain recipe by key of its full form, where the two differ."""
    files: dict[str, tuple[Path, Mapping[str, Any]]] = field(default_factory=dict)
    """Path and settings of each file, by its name."""
    included: dict[str, list[str]] = field(default_factory=dict)
    """The files that each file includes, by their paths without a suffix, such as ``recipe/mine``."""
    values: int = 0

    def read(self, path: Path, name: str) -> tuple[DictConfig, str | None]:
        """Return the settings in a file and the package of its header. Raises BadInput naming the file."""
        text = _text(path)
        self.values += _count_values(path, text)
        if self.values > MOST_VALUES:
            _reject_size(path, f"{MOST_VALUES:,} values, aliases replaced and files that it includes counted")
        try:
            config = OmegaConf.create(text)
        except FAULTS as error:
            _reject_yaml(path, error)
        if not isinstance(config, DictConfig):
            reject(str(path), "must be a mapping of keys to values", "See recipes/quickstart.yaml")
        raw: Any = OmegaConf.to_container(config, resolve=False)
        _reject_code(path, raw)
        if name.startswith("recipe/"):  # alone, it is measured before Hydra may resolve any of it
            check_interpolations(raw, str(path))
            if self.form is not None and "defaults" not in raw and not self._is_part(name):
                config, raw = self._full_form(path, name, raw)
        self.files[name] = (path, raw)
        self._include(path, name, raw.get("defaults"))
        return config, _package(path, text)

    def places(self) -> list[str]:
        """Return the groups with a place that the files choose in their defaults, such as ``gate@sft.gate``."""
        entries = [entry for _, raw in self.files.values() for entry in raw.get("defaults") or ()]
        keys = [str(key).split()[-1].lstrip("/") for entry in entries if isinstance(entry, Mapping) for key in entry]
        return list(dict.fromkeys(key for key in keys if "@" in key))

    def _full_form(self, path: Path, name: str, plain: Mapping[str, Any]) -> tuple[DictConfig, dict[str, Any]]:
        """Return the full form of a plain recipe. Raises BadInput for one that is no data, or grows too large."""
        raw, self.origins = self.form(path, plain) if self.form is not None else (dict(plain), {})
        _reject_code(path, raw)
        self._include(path, name, raw["defaults"])
        if sum(1 for _ in leaves(raw)) > MOST_VALUES:
            _reject_size(path, f"{MOST_VALUES:,} values in its full form")
        return OmegaConf.create(raw), raw

    def _is_part(self, name: str) -> bool:
        """Return True for a file that another one includes: it needs no stages of its own."""
        return any(name in included for included in self.included.values())

    def _include(self, path: Path, name: str, defaults: Any) -> None:
        """Add the file's list of defaults. Raises BadInput for a ring of files, and for too many."""
        if defaults is None:
            return
        if not isinstance(defaults, list):
            reject(f"{path}: defaults", f"must be a list, not {shown(defaults)}")
        if len(defaults) > MOST_DEFAULTS:
            _reject_size(path, f"{MOST_DEFAULTS} defaults")
        entries = [_entry(path, entry) for entry in defaults]
        if name.startswith("recipe/") and any(key == "/recipe" for key, _ in entries):
            what = "- /recipe: NAME is the choice of the command line, so that the recipe would include itself"
            reject(f"{path}: defaults", what, "Write - /recipe/NAME to include another one")
        self.included[name] = [each for key, values in entries for each in _included(name, key, values)]
        for each in self.included:
            if self._count(each, (), path) > MOST_DEFAULTS:
                _reject_size(path, f"{MOST_DEFAULTS} files included by {each}, each as often as it is included")

    def _count(self, name: str, above: tuple[str, ...], path: Path) -> int:
        """Return the number of files that a file brings with it, at most about MOST_DEFAULTS."""
        if name in above:
            ring = " includes ".join([*above[above.index(name) :], name])
            reject(str(path), f"is part of a ring: {ring}", "Take one of them out of the defaults")
        count = 1
        for other in self.included.get(name, ()):
            count += self._count(other, (*above, name), path)
            if count > MOST_DEFAULTS:
                break
        return count


def _text(path: Path) -> str:
    """Return the text of a file. Raises BadInput for one that is too long or no text."""
    if not path.is_file():  # a pipe would keep its reader waiting
        reject(str(path), "is not a file")
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        reject(str(path), f"cannot be read: {error.strerror}")
    if len(data) > MOST_BYTES:
        _reject_size(path, f"{MOST_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        reject(str(path), "is not text in UTF-8", "Save it as UTF-8")


def _reject_size(path: Path, most: str) -> None:
    reject(str(path), f"has more than {most}", "A recipe is settings; records belong into files of data")


@dataclass
class _Collection:
    """A mapping or a list that is being measured."""

    anchor: str | None
    is_mapping: bool
    values: int = 1
    children: int = 0
    height: int = 1


def _count_values(path: Path, text: str) -> int:
    """Return the number of values, aliases replaced by what they stand for, without building any.

    Raises BadInput for tags, for a text or key that is too long, and for collections within collections without end.
    """
    open_ones = [_Collection(None, is_mapping=False)]
    anchors: dict[str, tuple[int, int]] = {}
    try:
        for event in yaml.parse(text, Loader=LOADER):
            _check_event(path, event, open_ones[-1])
            if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                open_ones.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            elif isinstance(event, yaml.CollectionEndEvent):
                ended = open_ones.pop()
                _close(open_ones[-1], ended.values, ended.height, ended.anchor, anchors)
            elif isinstance(event, yaml.ScalarEvent):
                _close(open_ones[-1], 1, 1, event.anchor, anchors)
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in anchors:
                    reject(_line(path, event), f"the alias *{event.anchor} stands for nothing, or contains itself")
                _close(open_ones[-1], *anchors[event.anchor], None, anchors)
            if len(open_ones) + open_ones[-1].height > MOST_DEPTH:
                reject(_line(path, event), f"holds collections within collections, {MOST_DEPTH} deep")
            if open_ones[-1].values > MOST_VALUES:
                _reject_size(path, f"{MOST_VALUES:,} values, aliases replaced")
    except FAULTS as error:
        _reject_yaml(path, error)
    return open_ones[0].values


def _reject_yaml(path: Path, error: Exception) -> NoReturn:
    """Raise BadInput with the line of the fault, where the parser knows it."""
    mark = getattr(error, "problem_mark", None)
    where = str(path) if mark is None else f"{path}:{mark.line + 1}"
    reject(where, f"is not sound YAML: {getattr(error, 'problem', None) or _one_line(error)}")


def _close(
    parent: _Collection, values: int, height: int, anchor: str | None, anchors: dict[str, tuple[int, int]]
) -> None:
    """Add a value that is complete to the collection around it."""
    parent.values += values
    parent.children += 1
    parent.height = max(parent.height, height + 1)
    if anchor is not None:
        anchors[anchor] = (values, height)


def _check_event(path: Path, event: yaml.Event, parent: _Collection) -> None:
    tag = getattr(event, "tag", None)
    if tag not in (None, "!", *PLAIN_TAGS):
        reject(_line(path, event), f"has the tag {shown(tag)}: settings are data", "Remove the tag")
    if isinstance(event, yaml.ScalarEvent):
        is_key = parent.is_mapping and parent.children % 2 == 0
        most = MOST_KEY if is_key else MOST_CHARACTERS
        if len(event.value) > most:
            reject(_line(path, event), f"has a {'key' if is_key else 'value'} of more than {most:,} characters")


def _line(path: Path, event: yaml.Event) -> str:
    return f"{path}:{event.start_mark.line + 1}" if event.start_mark is not None else str(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _entry(path: Path, entry: Any) -> tuple[str, list[str]]:
    """Return the key of one entry of a list of defaults, and the options it chooses."""
    key, value = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, [])
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not isinstance(key, str) or not all(isinstance(each, str) for each in values):
        what = f"{shown(entry)} is no entry of a list of defaults"
        reject(f"{path}: defaults", what, "Write - /GROUP@PLACE: NAME, such as - /gate@sft.gate: none")
    if any(leads_elsewhere(each) for each in (key.split()[-1:] or [""])[0].split("@")[:1] + values):
        reject(f"{path}: defaults: {shown(entry)}", "leads out of the folders of recipes and options", "Give a name")
    if HYDRA in re.split(r"[\s/@.:]+", key):
        reject(f"{path}: defaults: {shown(key)}", "a recipe is data and sets nothing of Hydra's", "Remove the entry")
    return key, values


def leads_elsewhere(option: str) -> bool:
    """Return True for the name of an option that is a path to another folder."""
    return not {"", ".", ".."}.isdisjoint(option.removeprefix("/").split("/"))


def _included(name: str, key: str, values: list[str]) -> Iterator[str]:
    """Yield the files that an entry of the defaults of the file ``name`` includes."""
    keywords = key.split()
    if "override" in keywords[:-1]:
        return
    group = keywords[-1].split("@")[0] if keywords else ""
    parent = "" if group.startswith("/") else name.rpartition("/")[0]
    base = "/".join(part for part in (parent, group.strip("/")) if part)
    for path in [f"{base}/{value}" for value in values] or [base]:
        yield path.removesuffix(".yaml")


def _package(path: Path, text: str) -> str | None:
    """Return the package of the file's header; None without one."""
    found = None
    for line in filter(None, map(str.strip, text.splitlines())):
        if not line.startswith("#"):
            break
        words = line.lstrip("# ").split()
        if words[:1] == ["@package"]:
            found = words[1] if len(words) == 2 else ""
            if not re.fullmatch(r"[\w.]+", found) or HYDRA in found.split("."):
                reject(
                    f"{path}: # @package", f"{shown(' '.join(words[1:]))} is no place in a recipe", "Remove the line"
                )
    return found


def _reject_code(path: Path, raw: Any) -> None:
    """Raise BadInput for anything but data."""
    problems = [
        Problem(where=f"{path}: {shown_key(key)}", what="a recipe is data and cannot set this", fix="Remove the key")
        for key in _keys(raw)
        if key.split(".")[0] == HYDRA or key.split(".")[-1].startswith("_target_")
    ]
    for key, value in leaves(raw):
        if is_secret(key, str(value)):
            problems.append(Problem(where=f"{path}: {shown_key(key)}", what=SECRET, fix="Give it in the environment"))
        problems += _text_problems(f"{path}: {shown_key(key)}", f"{key} {value}")
    if problems:
        raise BadInput(problems)


def _text_problems(where: str, text: str) -> list[Problem]:
    """Return the problems of the interpolations in a text."""
    if "${" not in text:
        return []
    fix = f"Write the value itself; allowed resolvers: {', '.join(RESOLVERS)}"
    depth = 0
    for mark in re.findall(r"\$\{|\}", text):
        depth = depth + 1 if mark == "${" else max(depth - 1, 0)
        if depth > 1:
            return [Problem(where=where, what="has an interpolation within an interpolation", fix=fix)]
    names = [found.partition(":")[0].strip() for found in re.findall(r"\$\{([^}]*)", text) if ":" in found]
    return [
        Problem(where=where, what=f"a recipe cannot use the resolver {shown(name)}", fix=fix)
        for name in names
        if name not in RESOLVERS
    ]


def _keys(raw: Any, prefix: str = "") -> Iterator[str]:
    for key, value in items(raw):
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


def check_words(words: Sequence[str]) -> None:
    """Raise BadInput with every word that is too long, too deep, Hydra's own, or more than data."""
    problems = []
    for word in words:
        key = word.partition("=")[0]
        where = shown_key(word)
        group, _, place = key.lstrip("+~").partition("@")
        if is_secret(key.lstrip("+~"), word.partition("=")[2]):
            problems.append(Problem(where=shown_key(key), what=SECRET, fix="Give it in the environment"))
        elif len(word) > MOST_CHARACTERS or len(key) > MOST_KEY:
            what = f"is longer than {MOST_CHARACTERS:,} characters, or its key than {MOST_KEY}"
            problems.append(Problem(where=where, what=what))
        elif _depth(word) > MOST_DEPTH:
            problems.append(Problem(where=where, what=f"holds brackets within brackets, {MOST_DEPTH} deep"))
        elif ("@" in key or group in GROUPS) and leads_elsewhere(f"{group}/{word.partition('=')[2] or 'none'}"):
            problems.append(Problem(where=where, what="leads out of the folders of options", fix=_as_name(word)))
        elif group == "recipe" and "/" in word.partition("=")[2]:
            problems.append(Problem(where=where, what="is a path, and a recipe has a name", fix=_as_name(word)))
        elif re.split(r"[/.]", group)[0] == HYDRA or HYDRA in re.split(r"[/.:]", place):
            what = "sets something of Hydra's own, which a pipeline does not use"
            problems.append(Problem(where=where, what=what, fix="Leave it out"))
        else:
            problems += _text_problems(where, word)
    if problems:
        raise BadInput(problems)


def _as_name(word: str) -> str:
    """Return the fix of an option that is given by its path."""
    key, _, value = word.partition("=")
    name = re.split(r"[/\\]", value)[-1].removesuffix(".yaml")
    fix = f"Give a name: {shown_key(f'{key}={name}')}" if re.fullmatch(r"[\w.-]*\w", name) else "Give a name"
    return f"{fix}; your own recipes are read from ./recipes/NAME.yaml" if key == "recipe" else fix


def _depth(text: str) -> int:
    deepest = depth = 0
    for mark in re.findall(r"[\[({})\]]", text):
        depth += 1 if mark in "[({" else -1
        deepest = max(deepest, depth)
    return deepest
