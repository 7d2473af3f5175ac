"""Messages of the Python functions in words of the command line."""

from __future__ import annotations

import argparse
import re
from functools import partial

from sktransfer._cli.checks import option

# Parameters whose option is called otherwise.
_RENAMED = {"unfreeze": "--depth", "random_state": "--seed", "n_splits": "--splits"}
# Such that are no English words; others are known by the value that follows them.
_ALONE = (
    "unfreeze test_size image_size max_epochs n_jobs max_pixels sort_by random_state n_splits"
).split()
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|\([^)]*\)|[-\w.+/*]*[\w*]"
# What there is in Python alone.
_ONLY_IN_PYTHON = (
    r",? (?:or )?set `categories`",
    r"; if the parts are the classes, pass categories=\[[^]]*\]",
    r": list_images lists such",
)
_SETTING = r"sktransfer\.set_config\((\w+)=([^)]*)\)(?: or PIL\.Image\.MAX_IMAGE_PIXELS)?"


def in_options(message: str, options: argparse.Namespace) -> str:
    """Return a message with the options of a command in place of parameters.

    >>> from argparse import Namespace
    >>> options = Namespace(command="fit", depth="99")
    >>> in_options("unfreeze=99 is too deep for image_size=None", options)
    '--depth 99 is too deep for image_size=None'
    """
    for pattern in _ONLY_IN_PYTHON:
        message = re.sub(pattern, "", message)
    message = message.replace("another cv.", "another --cv.")
    message = re.sub(_SETTING, _setting_as_option, message)
    message = re.sub(
        r"load_image_folder\(('[^']*')\)", rf"`sktransfer {options.command} \1`", message
    )
    for name, flag in _options(options).items():
        pattern = rf"(?<![\w.'\"-]){name}=({_VALUE})"
        message = re.sub(pattern, partial(_as_option, flag), message)
        if name in _ALONE:
            message = re.sub(rf"(?<![\w.'\"-])`?{name}`?(?![\w'\"=])", flag, message)
    return message


def _setting_as_option(found: re.Match[str]) -> str:
    value = "" if found[2] == "..." else found[2].strip("'\"")
    return f"{option(found[1])} {value}".strip()


def _as_option(flag: str, found: re.Match[str]) -> str:
    """Return an option with its value, without quotes that a shell does not need."""
    is_quoted_word = re.fullmatch(r"'[\w.-]+'", found[1])
    return f"{flag} {found[1][1:-1] if is_quoted_word else found[1]}"


def _options(options: argparse.Namespace) -> dict[str, str]:
    """Return the options that a command has, by the names of their parameters."""
    names = {flag: name for name, flag in _RENAMED.items()}
    flags = (option(name) for name in vars(options))
    return {names.get(flag, flag[2:].replace("-", "_")): flag for flag in flags}
