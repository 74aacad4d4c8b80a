"""The command line: a dispatcher on the standard library alone, so that help and lists answer at once.

Words that read ``key=value`` go to Hydra: ``posttrain recipe=NAME key=value ...`` runs a recipe.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from posttrain.errors import BadInput, Interrupted, PosttrainError, Problem, explain, nearest
from posttrain.version import __version__

HELP = """\
posttrain: post-training of language models in which an evaluation gates every stage

  posttrain recipe=NAME [key=value ...]        run a recipe, or go on with it
  posttrain plan recipe=NAME [key=value ...]   show what it would do, after checking everything that can be checked
  posttrain tokens recipe=NAME [...]           show rendered and packed rows, trained tokens in colour; --all counts all
  posttrain doctor recipe=NAME [...]           prove on the recipe's model and data that the SFT gradient is right
  posttrain list [recipes|stages|gates|models|variants|plugins|STAGE]
                                               what is available; with a stage's name, its settings
  posttrain gate adapter=DIR gate=NAME [baseline=FILE|DIR] [junit=FILE] [markdown=FILE]
                                               judge any adapter or model, for CI; --update-baseline writes FILE
  posttrain merge ADAPTER_DIR OUTPUT_DIR       write standalone weights of an adapter and its base, logits compared
  posttrain report [RUN]                       print the table of a run, the newest one below ./runs by default, and
                                               write its report.html and report.md again
  posttrain leaderboard [task=NAME]            rank every artifact beside its base, by task
  posttrain ledger export|verify|rebuild       every lift ever recorded: print it, check that nothing was changed, make
                                               it again from the runs
  posttrain new-plugin NAME                    write a distribution with a stage of your own, its tests and its recipe

  --json             with plan and list: print JSON alone
  --format NAME      with leaderboard: table, markdown or json; with ledger export: jsonl or csv
  output_root=DIR    with leaderboard and ledger: the folder of runs (./runs by default)
  --config-dir DIR   gates, models and variants of your own, from DIR/gate/NAME.yaml and the like
  --multirun, -m     run every combination of comma-separated values: posttrain -m recipe=NAME sft.lr=1e-4,2e-4
  --help, --version
  eval "$(posttrain -sc install=bash)"         complete commands, keys and names with the tab key

Start here:        posttrain recipe=quickstart
Exit codes:        0 done, 1 a bug, 2 bad input, 3 a gate refused, 4 a gate could not decide, 5 an artifact is damaged,
                   6 a plugin failed, 75 interrupted: the same command goes on
"""
HYDRA_FLAGS = ("--multirun", "-m", "--config-dir", "-cd", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc",
               "--experimental-rerun", "--package", "-p", "--resolve", "--hydra-help")  # fmt: skip
WITH_VALUE = ("--config-dir", "-cd", "--cfg", "-c", "--package", "-p")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and exits with its documented code.

    The command of a shell is supervised, so that no plugin can end it without being named. What needs no plugin is
    answered here, and so are ``arguments``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and _said_at_once(words) is None:
        from posttrain.host.supervisor import supervised

        sys.exit(supervised(lambda: answer(words)))
    sys.exit(answer(words))


def answer(words: list[str]) -> int:
    """Run one command; errors are printed. Returns its documented exit code."""
    try:
        code = dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe went away, as with "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except PosttrainError as error:
        code = explain(error)
    except KeyboardInterrupt:
        code = explain(Interrupted("stopped by Ctrl-C"))
    return code


def dispatch(words: list[str]) -> int:
    """Run one command and return its exit code."""
    if "COMP_LINE" in os.environ and any(word in ("-sc", "--shell-completion") for word in words):
        from posttrain.commands.completion import complete

        return complete(words)
    if (text := _said_at_once(words)) is not None:
        print(text, end="")
        return 0
    command = _command(words[0])
    return command(words[1:]) if command else _run(words)


def _said_at_once(words: list[str]) -> str | None:
    """Help and the version; None for words that something has to be done for."""
    if not words or words[0] in ("--help", "-h", "help"):
        return HELP
    return f"posttrain {__version__}\n" if words[0] == "--version" else None


def _command(word: str) -> Callable[[list[str]], int] | None:
    """The command of this name; None for a word that belongs to a run."""
    if word == "list":
        from posttrain.commands.list import list_command as command
    elif word == "plan":
        from posttrain.commands.plan import plan_command as command
    elif word == "tokens":
        from posttrain.commands.tokens import tokens_command as command
    elif word == "doctor":
        from posttrain.commands.doctor import doctor_command as command
    elif word == "gate":
        from posttrain.commands.gate import gate_command as command
    elif word == "merge":
        from posttrain.commands.merge import merge_command as command
    elif word == "report":
        from posttrain.commands.report import report_command as command
    elif word == "leaderboard":
        from posttrain.commands.leaderboard import leaderboard_command as command
    elif word == "ledger":
        from posttrain.commands.ledger import ledger_command as command
    elif word == "new-plugin":
        from posttrain.commands.new_plugin import new_plugin_command as command
    elif "=" in word or word.startswith(("-", "~", "+")):
        return None
    else:
        from posttrain.commands.completion import COMMANDS

        close = nearest(word, COMMANDS)
        fix = f"Did you mean {close}? " if close else ""
        raise BadInput(Problem(where=word, what="is not a command", fix=f"{fix}posttrain --help shows all of them"))
    return command


def _run(words: list[str]) -> int:
    from posttrain.commands.run import hydra_command, run_command

    flags = [word for word in words if word.split("=")[0] in HYDRA_FLAGS]
    return hydra_command(_flags_first(words)) if flags else run_command(words)


def _flags_first(words: list[str]) -> list[str]:
    """Hydra refuses overrides after a flag; users write them in any order."""
    flags, overrides = [], []
    waiting = iter(words)
    for word in waiting:
        if word.startswith("-"):
            flags.append(word)
            if word in WITH_VALUE:
                flags += [value for value in [next(waiting, None)] if value is not None]
        else:
            overrides.append(word)
    return flags + overrides
