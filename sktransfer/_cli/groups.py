"""`--groups`: which images of a folder belong together, by their names or by a table."""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sktransfer._escaping import csv_cell

_TABLE = re.compile(r"(?P<file>.+\.csv):(?P<column>.+)", re.IGNORECASE | re.DOTALL)
_SECONDS = 10.0  # and a thousandth for each image, after which an expression is given up
# An "ü" may be one character, as on a keyboard, or two, as in the names of files of macOS.
_composed = partial(unicodedata.normalize, "NFC")


def add_groups(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--groups",
        metavar="REGEX|FILE.csv:COLUMN",
        help="images that belong together, as those of one patient, are never on both sides of a "
        "split. A regular expression, whose first part in parentheses is found in an image's path "
        "below FOLDER and names its group, as '(patient[0-9]+)'; or a table with a column `path` "
        "and one that holds the groups",
    )


def check_groups_option(text: str) -> None:
    """Refuse what can name no groups, before anything is imported or read."""
    if table := _TABLE.fullmatch(text):
        _read(table["file"], table["column"])
    else:
        _pattern(text)


def groups_of(files: Iterable[str], options: argparse.Namespace, folder: str = "") -> Any:
    """Return the group of each file, as the option names it; None without the option.

    The files are in the folder that the options name, unless another is given.
    """
    if not (text := getattr(options, "groups", None)):
        return None
    folder = folder or options.folder
    named = [(file, Path(file).relative_to(folder).as_posix()) for file in files]
    if table := _TABLE.fullmatch(text):
        return _by_table(named, table["file"], table["column"])
    return _by_name(named, text)


# ------------------------------------------------------------------------------ by name


def _pattern(text: str) -> re.Pattern[str]:
    otherwise = "To name a table, write FILE.csv:COLUMN."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what a later Python will read
            pattern = re.compile(_composed(text))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"--groups {text!r} is no regular expression: {error}. {otherwise}"
        ) from error
    if not pattern.groups:
        raise ValueError(
            f"--groups {text!r} has no part in parentheses, which says what in an image's path "
            f"names its group, as '(patient[0-9]+)' does. {otherwise}"
        )
    return pattern


def _by_name(named: list[tuple[str, str]], text: str) -> list[str]:
    pattern, groups = _pattern(text), []
    with _time_limit(_SECONDS + len(named) / 1000, text):
        for _, path in named:
            found = pattern.search(_composed(path))
            groups.append((found[1] if found else None) or "")
    if without := [path for (_, path), group in zip(named, groups, strict=True) if not group]:
        raise ValueError(
            f"--groups {text!r} finds no group in the paths of {len(without)} of {len(named)} "
            f"images; the first is {without[0]!r}. Change it so that its first part in parentheses "
            "is found in each path, rename the image, or pass a table, FILE.csv:COLUMN."
        )
    return groups


@contextmanager
def _time_limit(seconds: float, text: str) -> Iterator[None]:
    """Give up an expression that would try for years; where no signal can, Ctrl-C still can."""

    def give_up(*_: Any) -> NoReturn:
        raise ValueError(
            f"--groups {text!r} was given up after {seconds:.0f} s: a repeat within a repeat, as "
            "in '(a+)+', can be tried in endless ways. Write it without, as '(a+)', or pass a "
            "table, FILE.csv:COLUMN."
        )

    is_free = (
        hasattr(signal, "SIGALRM")  # not on Windows
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    )
    if not is_free:
        yield
        return
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


# ------------------------------------------------------------------------------ by a table


def _by_table(named: list[tuple[str, str]], table: str, column: str) -> list[str]:
    """Return the groups of files whose rows name them as they are, or below the folder."""
    known = _read(table, column)
    groups = []
    for file, path in named:
        # As this library writes them to its own tables, too.
        names = [_composed(name) for name in (path, file, csv_cell(path), csv_cell(file))]
        groups.append(next((known[name] for name in names if name in known), ""))
    if without := [path for (_, path), group in zip(named, groups, strict=True) if not group]:
        example = f"; its first path is {next(iter(known))!r}" if known else ""
        raise ValueError(
            f"{table!r} has no group in the column {column!r} for {len(without)} of {len(named)} "
            f"images; the first is {without[0]!r}{example}. Add a row with this path below FOLDER, "
            "or its whole path, in the column 'path'."
        )
    return groups


def _read(table: str, column: str) -> dict[str, str]:
    """Return the groups of a table by the paths in it."""
    if not os.path.isfile(table):
        raise ValueError(f"--groups names {table!r}, which is no file: write FILE.csv:COLUMN.")
    known: dict[str, str] = {}
    try:
        with open(table, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if missing := [name for name in ("path", column) if name not in header]:
                raise ValueError(
                    f"{table!r} has no column {missing[0]!r}. --groups needs a header and, "
                    f"separated by commas, columns 'path' and {column!r}; it has {_few(header)}."
                )
            path, group = header.index("path"), header.index(column)
            for number, row in enumerate(rows, start=2):
                cells = [*row, *[""] * (len(header) - len(row))]
                name, value = _composed(cells[path]), cells[group].strip()
                if value != known.setdefault(name, value):
                    raise ValueError(
                        f"{table!r}, row {number}: {name!r} has the group {value!r}, and in an "
                        f"earlier row {known[name]!r}. Leave one of the rows out."
                    )
    except csv.Error as error:
        raise ValueError(f"{table!r} can't be read as a table: {error}.") from error
    return known


def _few(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:6])) or "none"
    return shown + (", ..." if len(names) > 6 else "")
