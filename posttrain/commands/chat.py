"""``posttrain chat``: talk in the terminal with what was trained, one model or several side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from posttrain import environment
from posttrain.commands.arguments import Arguments, parse
from posttrain.commands.serve import whole
from posttrain.errors import BadInput, Problem, explain, reject
from posttrain.quoting import lines
from posttrain.serve.catalogue import BasePlace, read_catalogue
from posttrain.serve.names import LATEST, names_of

if TYPE_CHECKING:
    from posttrain.serve.service import Service
    from posttrain.serve.talk import Talk

USAGE = "posttrain chat RUN|ARTIFACT... [model=latest] [temperature=0] [max_tokens=256] [--allow-unpromoted]"
KEYS = ("model", "temperature", "max_tokens", "model.path", "model.revision")
FLAG = "--allow-unpromoted"
HELP = "/model NAME [NAME ...] one model, or several side by side; /models; /new; /quit"


def main(words: list[str]) -> int:
    """Load and prove the models, then answer each line until the end of the input."""
    given = parse("chat", words, KEYS, flags=(FLAG,))
    if not given.plain:
        reject("chat", "needs a run or an artifact", USAGE)
    temperature, tokens = _temperature(given), whole(given, "max_tokens", 256)
    environment.prepare()
    place = BasePlace(path=given.settings.get("model.path"), revision=given.settings.get("model.revision"))
    catalogue = read_catalogue(given.plain, place, unpromoted=FLAG in given.flags)
    names = given.settings.get("model", LATEST).split(",")
    known = frozenset(served.digest for served in (*catalogue.bases, *catalogue.artifacts))
    names_of(catalogue, {}, known).require(names)  # before anything is loaded

    with environment.importing():
        from posttrain.serve.service import Limits, open_service
        from posttrain.serve.talk import Talk

    service = open_service(catalogue, Limits())
    try:
        _talk(Talk(service, names, temperature=temperature, max_tokens=tokens), service)
    except KeyboardInterrupt:  # an end as good as /quit: a talk leaves nothing to resume
        print()
    finally:
        service.engine.stop()
    return 0


def _talk(talk: Talk, service: Service) -> None:
    print(HELP)
    for line in _lines():
        command, *names = line.split()
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/models":
                _show(service)
            elif command == "/new":
                talk.forget()
            elif command == "/model" and names:
                talk.switch(names)
            elif command.startswith("/"):
                reject(command, "is no command", HELP)
            else:
                _answer(talk, line)
        except BadInput as error:
            explain(error)


def _answer(talk: Talk, line: str) -> None:
    """Print the answer of every model, each under its name when there are several."""
    for name in talk.names:
        pieces = talk.answer(name, line)
        first = next(pieces)  # a turn that cannot be answered is told without a name before it
        print(f"[{name}] " if len(talk.names) > 1 else "", end="")
        for piece in chain((first,), pieces):
            print(lines(piece), end="", flush=True)
        print()


def _show(service: Service) -> None:
    for digest, loaded in service.models.loaded.items():
        print(f"{', '.join(service.names.of(digest)) or digest[:12]}: {loaded.served.name}")


def _lines() -> Iterator[str]:
    """Yield every line that says something; a terminal shows a prompt."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


def _temperature(given: Arguments) -> float:
    text = given.settings.get("temperature", "0")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise BadInput(Problem(where=f"temperature={text}", what="is no number of 0 to 2", fix=USAGE))
    return value
