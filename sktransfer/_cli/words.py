"""Messages of the Python functions in words of the command line."""

from __future__ import annotations

import argparse
import ast
import re
import shlex

from sktransfer._cli.checks import option

# Names of files and classes stand in messages as `repr` quotes them: one may be called unfreeze=3.
_QUOTED = r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\""
_QUOTES = "'\""
_IN = rf"(?:{_QUOTED}|[^][()'\"])*"  # brackets
_VALUE = rf"{_QUOTED}|\[{_IN}\]|\({_IN}\)|[-\w.+/*]*[\w*]"
# Parameters whose option, the first of these that a command has, is called otherwise.
_RENAMED = {"unfreeze": ["depths", "depth"], "random_state": ["seed"], "n_splits": ["splits"]}
# Such that are no English words; others are known by the value that follows them.
_ALONE = {
    *("unfreeze", "test_size", "image_size", "max_epochs", "n_jobs", "max_pixels", "sort_by"),
    *("random_state", "n_splits"),
}
_WITHOUT_NAME = {"command", "action", "folder", "files", "model"}  # arguments that are no options
# What there is in Python alone.
_ONLY_IN_PYTHON = (
    rf"; if the parts are the classes, pass categories=\[{_IN}\]|: list_images lists such"
    r"|(?<=a prefix of names), a list of names|, or None for random ones"
    r"|, an instance of 'list' or an instance of 'tuple'"
)
# What is called otherwise there.
_OTHERWISE = {
    ", a path to a state dict, or None for random weights": " or a path to a state dict",
    "sktransfer.models.list_models() gives all names; ": "The names are those of torchvision and, "
    "as 'timm/NAME', of timm; ",
    "of the hub, 'local-dir:PATH' and a torch.nn.Module are": "of the hub and 'local-dir:PATH' are",
    ", a code such as '#ffffff', or three integers in 0..255": " or a code such as '#ffffff'",
    "Load the model by transformers and pass sktransfer.models.Backbone(network, preprocessing).": (
        "In Python, a sktransfer.models.Backbone can say it."
    ),
    "a str among {": "one of {",
}


def in_options(message: str, options: argparse.Namespace) -> str:
    """Return a message with the options of a command in place of parameters.

    What is quoted stays as it is.

    >>> from argparse import Namespace
    >>> options = Namespace(command="fit", depth="99")
    >>> in_options("'a unfreeze=1': unfreeze=99 is too deep for image_size=None", options)
    "'a unfreeze=1': --depth 99 is too deep for image_size=None"
    """
    flags = _flags(options)
    names, alone = "|".join(flags), "|".join(flags.keys() & _ALONE)
    pattern = (
        rf"(?P<python>{_ONLY_IN_PYTHON})|(?P<otherwise>{'|'.join(map(re.escape, _OTHERWISE))})"
        rf"|(?:\AThe '(?P<checked>{names})' parameter of \w+|\A(?P<subject>{names}))(?= must be )"
        r"|sktransfer\.set_config\((?P<setting>\w+)=(?P<to>[^)]*)\)"
        r"(?: or PIL\.Image\.MAX_IMAGE_PIXELS)?"
        rf"|load_image_folder\((?P<folder>{_QUOTED})\)"
        rf"|leave (?P<left>{names})=None"
        rf"|(?<![\w.-])(?P<name>{names})=(?P<value>{_VALUE})"
        rf"|(?<![\w.-])`?(?P<alone>{alone or '(?!)'})`?(?![\w=])"
        r"|(?<=another )(?P<cv>cv)(?=\.)"
        r"|(?P<drop>drop the row)"
        rf"|(?<!\w)(?:{_QUOTED})(?!\w)"
    )

    def replaced(found: re.Match[str]) -> str:
        if found["python"]:
            return ""
        if found["otherwise"]:
            return _OTHERWISE[found["otherwise"]]
        if name := found["checked"] or found["subject"]:
            return flags[name]
        if found["setting"]:
            value = "" if found["to"] == "..." else found["to"].strip("'\"")
            return f"{option(found['setting'])} {value}".strip()
        if found["folder"]:
            return f"`sktransfer {options.command} {_for_shell(found['folder'])}`"
        if found["left"]:
            return f"leave {flags[found['left']]} out"
        if found["name"]:
            return _as_option(flags[found["name"]], found["value"])
        if found["drop"]:
            skips = vars(options).get("skip_unreadable", True)
            return "remove it" if skips else "pass --skip-unreadable"
        if name := found["alone"] or found["cv"]:
            return flags.get(name, name)
        return found[0]

    return re.sub(pattern, replaced, message)


def _as_option(flag: str, value: str) -> str:
    """Return an option with its value, as a shell wants it."""
    if re.fullmatch(rf"\[({_QUOTED})(, ({_QUOTED}))*\]", value):  # several, with commas
        value = repr(",".join(ast.literal_eval(value)))
    return f"{flag} {_for_shell(value) if value[0] in _QUOTES else value}"


def _for_shell(quoted: str) -> str:
    """Return what `repr` quoted as a shell quotes it; with escapes, which it has not, as it is."""
    return quoted if "\\" in quoted else shlex.quote(quoted[1:-1])


def _flags(options: argparse.Namespace) -> dict[str, str]:
    """Return the options that a command has, by the names of their parameters."""
    known = vars(options).keys() - _WITHOUT_NAME
    renamed = {
        parameter: next((option(name) for name in names if name in known), "")
        for parameter, names in _RENAMED.items()
    }
    return {name: option(name) for name in known} | {k: v for k, v in renamed.items() if v}
