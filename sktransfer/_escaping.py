"""Names of files and classes as text that is safe on a terminal, in a table and a spreadsheet."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# Control characters, the escape sequences of terminals among them; line and paragraph ends; marks
# that turn the direction of text; and what Python has for bytes of a name that are not UTF-8.
_UNSAFE = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
# A backslash that would read as the beginning of such an escape.
_AMBIGUOUS = r"\\(?=x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"
_FORMULA = ("=", "+", "-", "@", "'")  # tabs and returns are escaped before


def printable(text: str) -> str:
    r"""Return text in which characters that a terminal would obey are escapes, as `\x1b`.

    >>> printable("a name with \x1b[31m colour")
    'a name with \\x1b[31m colour'
    """
    return re.sub(_UNSAFE, _escaped, text)


def escape(name: str) -> str:
    r"""Return a name as `printable` does, such that different names stay different.

    >>> print(escape("two\nlines"), escape(r"two\nlines"), escape(r"two\x0alines"))
    two\x0alines two\nlines two\x5cx0alines
    """
    try:  # where the locale is not UTF-8, Python splits characters into bytes
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        pass  # halves of characters, which a name on Windows may have
    return re.sub(f"{_UNSAFE}|{_AMBIGUOUS}", _escaped, name)


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file: numbers as they are, text escaped and never a formula.

    Spreadsheets compute text that begins with one of ``= + - @``; an apostrophe before it makes it
    text. Text with an apostrophe of its own gets one as well, so that the first can be cut off.

    >>> [csv_cell(value) for value in (-0.5, "-0.5", "=1+1", "cat", "'tis")]
    [-0.5, "'-0.5", "'=1+1", 'cat', "''tis"]
    """
    if not isinstance(value, str):
        return value
    text = escape(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def map_text(table: Any, change: Callable[[Any], Any]) -> Any:
    """Return a pandas data frame in which names of columns and text are changed by a function."""
    text = table.select_dtypes(exclude="number")
    return table.assign(**{name: text[name].map(change) for name in text}).rename(columns=change)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
