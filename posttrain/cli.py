"""The command line: a dispatcher on the standard library alone, so that help and lists answer at once.

Words of the form ``key=value`` run a recipe: ``posttrain recipe=NAME key=value ...``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module

from posttrain.errors import (
    BY_HAND,
    BadInput,
    Interrupted,
    OutOfMemory,
    PosttrainError,
    Problem,
    explain,
    interruption,
    is_out_of_memory,
    nearest,
    suggest,
)
from posttrain.host import consent
from posttrain.quoting import SECRET, is_secret, quoted_streams, redacted
from posttrain.version import __version__

HELP = """\
posttrain: post-training of language models in which an evaluation gates every stage

  posttrain init FILE [--model DIR] [--pairs FILE] [--questions FILE]
                                               write a commented recipe for a file of chats, with a gate
  posttrain recipe=NAME [key=value ...]        run a recipe, or resume it
  posttrain plan recipe=NAME [key=value ...]   check it and show its stages, settings and gates
  posttrain show recipe=NAME [...]             print it in full, with the origin of each value; --all: defaults too
  posttrain tokens recipe=NAME [...]           show rendered and packed rows, trained tokens in colour; --all reads all
  posttrain data recipe=NAME [...]             prepare the data and show the rows left out, by source and rule
  posttrain doctor recipe=NAME [...]           prove the SFT gradient on the recipe's model and data
  posttrain list [recipes|stages|gates|models|variants|plugins|STAGE]
                                               everything available, or the settings of a stage
  posttrain gate adapter=DIR gate=NAME [baseline=FILE|DIR] [junit=FILE] [markdown=FILE]
                                               judge an existing adapter or model, for CI; --update-baseline writes FILE
  posttrain merge ADAPTER_DIR OUTPUT_DIR       write an adapter and its base as one model, logits compared
  posttrain card ARTIFACT [base_model=NAME] [license=ID]
                                               write its README.md for the hub: lineage, gate, what was not measured
  posttrain export ARTIFACT --to merged|gguf|gguf-lora [type=f16|f32|q8_0]
                                               write it as one model, or as files of llama.cpp that are compared
                                               with the artifact before they are called done
  posttrain push ARTIFACT OWNER/NAME [public=true]
                                               upload a promoted artifact with its card as a revision of the hub named
                                               by its digest; private by default, the token in HF_TOKEN
  posttrain serve RUN|ARTIFACT... [--port N]   serve promoted artifacts and their base over HTTP in OpenAI's form, each
                                               proven first; --host, --token-file FILE, --allow-unpromoted;
                                               --check URL asks the same proof of a running server
  posttrain chat RUN|ARTIFACT... [model=v1]    talk with them in the terminal; model=v1,v2 side by side
  posttrain promote ALIAS DIGEST               name an artifact for users; running servers follow within a second
  posttrain rollback ALIAS                     give the name back to the artifact before
  posttrain sample ARTIFACT QUESTIONS OUTPUT.jsonl [k=8] [reward=right] [keep=pairs|best|labels]
                                               records for training of an artifact's own answers, scored by a reward
  posttrain report [RUN]                       print the table of a run (default: the newest below ./runs) and rewrite
                                               its report.html and report.md
  posttrain runs [recipe=NAME] [RUN ...]       list the runs: state, lifts, what differs; --html writes a page that
                                               compares lifts, settings, curves and answers
  posttrain leaderboard [task=NAME] [top=N]    rank every artifact beside its base, by task; --html writes one page that
                                               filters and sorts without a server
  posttrain ledger export|verify|rebuild       every recorded lift: print them, detect changed rows, or rebuild them
                                               from the runs
  posttrain new-plugin NAME                    write a package with a stage of your own, its tests and its recipe

  --trust-tasks      let task files of your own run their code, and tasks with run_code: true the model's programs
  --json             with plan, list and data: print JSON
  --format NAME      with leaderboard: table, markdown or json; with ledger export: jsonl or csv
  output_root=DIR    with leaderboard and ledger: the folder of runs (./runs by default)
  --config-dir DIR   your own gates, models and variants, as in DIR/gate/NAME.yaml
  --multirun, -m     run every combination of comma-separated values: posttrain -m recipe=NAME sft.lr=1e-4,2e-4;
                     select=best judges the best of them, on documents that had no part in the choice
  --dry-run          with a run: posttrain plan
  --verbose, -v      with a run: show the debug lines of every library; the run's posttrain.log keeps what was shown
  --help, --version
  eval "$(posttrain -sc install=bash)"         complete commands, keys and names with the Tab key

Start here:        posttrain recipe=quickstart
Exit codes:        0 done, 1 a bug, 2 bad input or no room, 3 a gate failed an artifact, 4 a gate could not decide,
                   5 an artifact is damaged, 6 a plugin failed, 75 interrupted; run the same command to resume
"""
HELP_FLAGS = ("--help", "-h")
DRY_RUN = "--dry-run"
"""Flag that makes a run a plan."""
RUN = "run"
"""Command of a line that names none."""
COMPLETION = ("-sc", "--shell-completion")
COMMANDS = (
    "card",
    "chat",
    "data",
    "doctor",
    "export",
    "gate",
    "init",
    "leaderboard",
    "ledger",
    "list",
    "merge",
    "new-plugin",
    "plan",
    "promote",
    "push",
    "report",
    "rollback",
    "runs",
    "sample",
    "serve",
    "show",
    "tokens",
)
"""Commands of ``posttrain.commands``, each the ``main(words)`` of the module of its name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its documented code.

    The command of a shell runs under a supervisor, so that a plugin that ends the process is named. Help, the version,
    a list that is kept and given ``arguments`` need none.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _main(words, supervised=arguments is None)
    except KeyboardInterrupt:  # before the command is heard of
        sys.exit(explain(Interrupted(BY_HAND)))


def _main(words: list[str], *, supervised: bool) -> None:
    with quoted_streams():
        if supervised and _help(words) is None:
            if words[0] == "list":
                from posttrain.host import index

                index.use(words)
            if _kept(words) is None:
                from posttrain.host.supervisor import supervise

                sys.exit(supervise(lambda: answer(words)))
        sys.exit(answer(words))


def answer(words: list[str]) -> int:
    """Run one command, print its errors, and return its documented exit code."""
    heard: list[int] = []
    try:
        with _hearing(heard), consent.given_by(words):
            code = dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe went away, as with "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        code = _explain(interruption(error, heard=bool(heard)) or error)
    except KeyboardInterrupt:
        code = explain(Interrupted(BY_HAND))
    return code


@contextlib.contextmanager
def _hearing(heard: list[int]) -> Iterator[None]:
    """Note the number of each SIGINT as it is raised; another handler, a caller's or a shell's, stays."""

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    former = signal.getsignal(signal.SIGINT)
    if former is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _explain(error: Exception) -> int:
    """Print an error of the machine (memory, disk, path) as ours, a bug with its traceback; return the exit code."""
    known: PosttrainError | None = None
    if isinstance(error, PosttrainError):
        known = error
    elif is_out_of_memory(error):
        known = OutOfMemory(error)
    elif isinstance(error, OSError):
        from posttrain.disk import explain_error

        known = explain_error(error)
    if known is not None:
        return explain(known)
    import traceback

    traceback.print_exc()  # here, where it is quoted: Python itself would print it later
    return PosttrainError.exit_code


def dispatch(words: list[str]) -> int:
    """Run one command and return its exit code. Raises BadInput for words that hold a secret or name no command."""
    _check_secrets(words)
    _check_empty(words)
    if any(word in COMPLETION for word in words):
        return _complete(words) if "COMP_LINE" in os.environ else _complete_keys(words)
    if (text := _help(words)) is not None:
        print(text, end="")
        return 0
    if (text := _kept(words)) is not None:
        print(text)
        return 0
    command = _named(words)
    if command is None:
        raise BadInput(_no_command(words))
    _check_flags(command, words)
    rest = words if command == RUN else words[1:]
    if DRY_RUN in rest:
        return _command("plan")([word for word in rest if word != DRY_RUN])
    return _command(command)(rest)


def _named(words: list[str]) -> str | None:
    """Return the command of a line, ``run`` for the words of a recipe; None where the first is neither."""
    if words[0] in COMMANDS:
        return words[0]
    if _stands_before(words):
        return None
    return RUN if "=" in words[0] or words[0].startswith(("-", "~", "+")) else None


def _stands_before(words: list[str]) -> bool:
    """Return whether a flag precedes a command; the value of ``--config-dir`` is none."""
    return words[0].startswith("-") and words[0] != "--config-dir" and len(words) > 1 and words[1] in COMMANDS


def _no_command(words: list[str]) -> Problem:
    """Return the problem of a first word that is no command: a flag, a recipe's name, one too many, a misspelt one."""
    if _stands_before(words):
        fix = f"The command comes first: posttrain {' '.join((*words[1:], words[0]))}"
        return Problem(where=words[0], what="stands before the command", fix=fix)
    from posttrain.config.paths import recipe_folders

    word, known = words[0], f"Commands: {', '.join(COMMANDS)}; posttrain --help explains them"
    recipes = {path.stem for folder in recipe_folders([]) for path in folder.glob("*.yaml")}
    if word in recipes:
        fix = f"Did you mean posttrain recipe={word}? "
    elif word == RUN:
        fix = f"Without it, the recipe runs: posttrain {' '.join(words[1:]) or 'recipe=NAME'}\n    "
    else:
        close = nearest(word, COMMANDS)
        fix = f"Did you mean {close}? " if close else ""
    return Problem(where=word, what="is not a command", fix=fix + known)


def _check_flags(command: str, words: list[str]) -> None:
    """Raise BadInput for each flag that is not the command's, before anything is read for it."""
    given = [word for word in words if word.startswith("-") and word.strip("-")]
    if not given:
        return
    from posttrain.commands.help import flags_of

    known = flags_of(command)
    listed = [*known, *HELP_FLAGS[:1], *(["--version"] if command == RUN else [])]
    problems = []
    for flag in (word.partition("=")[0] for word in given):
        if flag not in known:
            page = f"posttrain {command if command != RUN else 'recipe=NAME'} --help"
            fix = f"{suggest(flag, listed)}; {page} explains them"
            problems.append(Problem(where=flag, what="is no flag of this command", fix=fix))
    if problems:
        raise BadInput(problems)


def _check_empty(words: list[str]) -> None:
    """Raise BadInput for a word without text, such as a variable of the shell that is not set: no command takes one."""
    for place, word in enumerate(words):
        if not word.strip():
            where = " ".join(["posttrain", *words[:place]])
            fix = "Give it a value, or leave it out; a variable of the shell may be empty"
            raise BadInput(Problem(where=where, what=f"the word behind it is empty: {word!r}", fix=fix))


def _check_secrets(words: list[str]) -> None:
    """Raise BadInput naming, and not showing, each word with a secret: words are recorded and shown in reports."""
    fix = "Give it in an environment variable that the service reads, such as HF_TOKEN or WANDB_API_KEY"
    settings = [word.lstrip("+~").partition("=") for word in words]
    problems = [
        Problem(where=key if value else "a word of the command", what=SECRET, fix=fix)
        for key, _, value in settings
        if is_secret(key, value) or redacted(key) != key
    ]
    if problems:
        raise BadInput(problems)


def _help(words: list[str]) -> str | None:
    """Return the help or the version, or None for any other command."""
    if words[:1] == ["--version"]:
        return f"posttrain {__version__}\n"
    if words[:1] == ["help"] and words[1:2] and words[1] in COMMANDS:
        words = [words[1], *HELP_FLAGS]
    asked = not words or words[0] == "help" or (words[0] in HELP_FLAGS)
    if asked or not any(word in HELP_FLAGS for word in words):
        return HELP if asked else None
    command = _named(words)
    if command is None:
        return None
    from posttrain.commands.help import help_of  # a page a command, read when one is asked for

    return help_of(command)


def _kept(words: list[str]) -> str | None:
    """Return what a list printed, while all that decides it is as it was, or None."""
    if words[:1] != ["list"]:
        return None
    from posttrain.host import index

    found = index.of_command()
    return None if found is None else found.text


def _command(name: str) -> Callable[[list[str]], int]:
    """Import the command on demand: one that needs no torch must not wait for it."""
    command: Callable[[list[str]], int] = import_module(f"posttrain.commands.{name.replace('-', '_')}").main
    return command


def _complete(words: list[str]) -> int:
    """Answer the shell, which gives the typed line in COMP_LINE and the cursor in COMP_POINT.

    Commands are completed here, keys and values by Hydra, which must not see the command's name.
    """
    line = os.environ["COMP_LINE"]
    typed = line.split()
    current = "" if line.endswith(" ") else typed[-1]
    arguments = typed[1:] if line.endswith(" ") else typed[1:-1]
    if not arguments:
        print("\n".join(name for name in COMMANDS if name.startswith(current)))
    from posttrain.commands.completion import offers, values

    found = offers(arguments[0], arguments[1:], current) if arguments[:1] and arguments[0] in COMMANDS else None
    if found is None:
        found = values(current)
    if found is not None:
        print("\n".join(found))
        return 0
    if arguments[:1] and arguments[0] in COMMANDS:
        shorter = line.replace(f" {arguments[0]} ", " ", 1)
        os.environ["COMP_LINE"], os.environ["COMP_POINT"] = shorter, str(len(shorter))
    return _complete_keys(words, "regression" if arguments[:1] == ["gate"] else "config")


def _complete_keys(words: list[str], primary: str = "config") -> int:
    """Print the keys and values that go on with the line, or the script that makes the shell ask for them."""
    from posttrain.config.compose import complete
    from posttrain.host import plugins

    sys.argv = ["posttrain", *words]  # the name in the script
    complete(plugins.load(), [word for word in words if word not in COMPLETION], primary)
    return 0
