"""``posttrain new-plugin NAME``: a complete package with a stage that trains, and its tests."""

from __future__ import annotations

import keyword
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from posttrain.errors import BadInput, Problem, reject
from posttrain.hookspecs import API_VERSION
from posttrain.host import plugins
from posttrain.host.registration import is_stage_name
from posttrain.version import __version__

TEMPLATES = Path(__file__).parent / "templates" / "plugin"
SUFFIX = ".j2"
LONGEST = 40
"""Characters in a name, at most."""
NEXT = """\
{folder} holds the package {distribution}.

  pip install --editable {folder}
  posttrain list {name}
  posttrain recipe=quickstart +stage@{name}={name}
  cd {folder} && pytest
"""


def main(words: list[str]) -> int:
    """Write the package into a new folder of the working directory.

    Raises BadInput for a bad name, and for a folder that cannot be written.
    """
    if len(words) != 1 or words[0].startswith("-"):
        fix = "posttrain new-plugin NAME, with the name of the new stage"
        reject(f"new-plugin {' '.join(words)}".strip(), "takes one name", fix)
    name = words[0]
    distribution = f"posttrain-{name.replace('_', '-')}"
    folder = Path(distribution)
    problem = _bad_name(name) or _taken(name) or _in_the_way(folder)
    if problem is not None:
        raise BadInput(problem)
    try:
        _write(folder, name, distribution)
    except OSError as error:
        raise BadInput(Problem(where=str(folder), what=f"cannot be written: {error}")) from None
    print(NEXT.format(folder=folder, name=name, distribution=distribution), end="")
    return 0


def _bad_name(name: str) -> Problem | None:
    if _can_be_a_name(name):
        return None
    what = f"{name!r} cannot be the name of a stage: it becomes part of a Python package and of keys in recipes"
    mended = re.sub(r"\W+|_+", "_", name.lower(), flags=re.ASCII).strip("_0123456789")[:LONGEST]
    fix = f"Try {mended}. " if _can_be_a_name(mended) else ""
    return Problem(
        where="new-plugin", what=what, fix=f"{fix}Use lower-case letters, digits and _, beginning with a letter"
    )


def _can_be_a_name(name: str) -> bool:
    return len(name) <= LONGEST and is_stage_name(name) and not keyword.iskeyword(name)


def _taken(name: str) -> Problem | None:
    """Name the stage, plugin, recipe, gate, list, key of recipes or package that has the name."""
    from posttrain.commands.list import SECTIONS
    from posttrain.config.schema import ROOT

    host = plugins.load()
    taken = None
    options = [host.options[option] for option in (f"recipes/{name}", f"gate/{name}") if option in host.options]
    if name in host.stages:
        taken = f"a stage of {host.origin(name)}"
    elif name in host.plugins:
        taken = f"a plugin ({host.plugins[name].origin})"
    elif name in ROOT:
        taken = "a key of every recipe"
    elif name in SECTIONS:
        taken = f"what posttrain list {name} shows"
    elif options:
        taken = str(options[0])
    elif find_spec(f"posttrain_{name}") is not None:
        taken = f"the package posttrain_{name}"
    if taken is None:
        return None
    return Problem(where="new-plugin", what=f"the name {name!r} is taken: it is {taken}", fix="Choose another name")


def _in_the_way(folder: Path) -> Problem | None:
    if not folder.exists():
        return None
    return Problem(where=str(folder), what="exists already", fix="Remove it, or work in another directory")


def _write(folder: Path, name: str, distribution: str) -> None:
    """Fill the templates in. The folder appears whole or not at all."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    engine = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True,
        variable_start_string="<<", variable_end_string=">>", block_start_string="<%", block_end_string="%>",
        comment_start_string="<#", comment_end_string="#>", autoescape=False,
    )  # fmt: skip
    package = f"posttrain_{name}"
    words = {
        "name": name,
        "title": "".join(part.capitalize() for part in name.split("_")),
        "package": package,
        "distribution": distribution,
        "version": __version__,
        "api": API_VERSION,
    }
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    for template in sorted(engine.list_templates(extensions=[SUFFIX.removeprefix(".")])):
        path = draft / _place(template, name, package)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(engine.get_template(template).render(words), encoding="utf-8")
    draft.rename(folder)


def _place(template: str, name: str, package: str) -> Path:
    """Return the path of the file made from a template."""
    path = template.removesuffix(SUFFIX).replace("name.", f"{name}.")
    path = path.replace("package/", f"{package}/", 1) if path.startswith("package/") else path
    return Path(".gitignore" if path == "gitignore" else path)
