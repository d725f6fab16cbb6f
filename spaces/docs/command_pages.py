"""The page of the command line: what each command says to --help."""

from __future__ import annotations

import argparse
import os

from spar_cli.main import build_parser


def commands_page() -> str:
    """Markdown of all commands, in the parser's order."""
    os.environ["COLUMNS"] = "100"  # argparse wraps to the terminal's width
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = ["# Commands", "", "`spar COMMAND --help` prints these.", ""]
    for name, command in commands.choices.items():
        lines += [f"## spar {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(lines)
