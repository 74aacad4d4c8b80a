"""Completion in a shell: our command words here, keys and values by Hydra."""

from __future__ import annotations

import os

COMMANDS = ("doctor", "gate", "leaderboard", "ledger", "list", "merge", "new-plugin", "plan", "report", "tokens")


def complete(words: list[str]) -> int:
    """Answer one request of the shell, which gives the line in COMP_LINE and the cursor in COMP_POINT."""
    from posttrain.commands.run import hydra_command

    line = os.environ["COMP_LINE"]
    typed = line.split()
    current = "" if line.endswith(" ") else typed[-1]
    arguments = typed[1:] if line.endswith(" ") else typed[1:-1]
    if not arguments:
        print("\n".join(name for name in COMMANDS if name.startswith(current)))
    if arguments[:1] == ["ledger"]:
        from posttrain.commands.ledger import ACTIONS

        print("\n".join(name for name in ACTIONS if name.startswith(current)))
        return 0
    if arguments[:1] and arguments[0] in COMMANDS:
        shorter = line.replace(f" {arguments[0]} ", " ", 1)
        os.environ["COMP_LINE"], os.environ["COMP_POINT"] = shorter, str(len(shorter))
    return hydra_command(words, "regression" if arguments[:1] == ["gate"] else "config")
