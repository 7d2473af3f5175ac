"""The parser of the command line as its reference shows it: examples are code."""

from __future__ import annotations

import argparse

from sktransfer._cli import _parser


def parser() -> argparse.ArgumentParser:
    shown = _parser()
    commands = next(a for a in shown._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        if command.epilog:
            command.epilog = command.epilog.replace("examples:\n", "Examples:\n\n.. code::\n\n")
    return shown
