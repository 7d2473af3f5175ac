"""The directive ``chart``: a picture drawn from the table inside of it, so that both say the same.

    :::{chart} Accuracy (longer is better)
    :values: accuracy
    :kind: dots

    | classifier | accuracy |
    | --- | --- |
    | majority class | 0.688 ± 0.000 |
    | **RBF SVM** | 0.881 ± 0.012 |
    :::

Each row is a mark. Bold rows are drawn in the first colour and the others in grey; without any bold
row, each column of `values` has a colour. `kind` is ``bars`` (from zero, the default), ``dots``
(with a whisker for "± deviation" or "(low to high)"), or ``lines`` (one for each row, against the
numbers in the heads of `values`). Several heads are separated by ``;``. Cells without a number are
left out. Colours follow the theme: they are classes of ``_static/pages.css``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

WIDTH = 400  # units; at most pixels of a telephone, so that letters stay readable there
PLOT = 310  # where values end, and their numbers begin
ROW, BAR = 17, 11
_NUMBER = r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?"
_CELL = re.compile(rf"({_NUMBER})(?:\s*±\s*({_NUMBER}))?(?:\s*\(({_NUMBER}) to ({_NUMBER})\))?")


class Value(NamedTuple):
    """A number of a cell, its interval, and how it is written."""

    number: float
    low: float
    high: float
    text: str


class Mark(NamedTuple):
    """A row of a table."""

    label: str
    values: list[Value | None]
    is_bold: bool


# ------------------------------------------------------------------------------ reading


def read(cell: str) -> Value | None:
    """Return the number at the start of a cell; None if there is none."""
    match = _CELL.match(cell.strip())
    if match is None:
        return None
    number, deviation, low, high = (
        None if part is None else float(part.replace(",", "")) for part in match.groups()
    )
    if deviation is not None:
        low, high = number - deviation, number + deviation
    text = match[1] if match[2] is None else f"{match[1]} ± {match[2]}"
    return Value(number, number if low is None else low, number if high is None else high, text)


def marks(table: nodes.table, labels: Sequence[str], values: Sequence[str]) -> list[Mark]:
    """Return the rows of a table that have a number in one of the named columns."""
    rows = [list(row.findall(nodes.entry)) for row in table.findall(nodes.row)]
    heads = [entry.astext() for entry in rows[0]]
    if unknown := [name for name in (*labels, *values) if name not in heads]:
        raise ValueError(f"no column {', '.join(unknown)}; there are {'; '.join(heads)}")
    found = []
    for row in rows[1:]:
        cells = dict(zip(heads, row, strict=True))
        label = ", ".join(filter(None, (cells[name].astext() for name in labels)))
        read_values = [read(cells[name].astext()) for name in values]
        is_bold = any(True for entry in row for _ in entry.findall(nodes.strong))
        if any(read_values):
            found.append(Mark(label, read_values, is_bold))
    return found


# ------------------------------------------------------------------------------ drawing


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{style}">{escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _legend(names: Sequence[str], y: float) -> tuple[list[str], float]:
    """Draw a line for each series; return the parts and where they end."""
    parts = []
    for number, name in enumerate(names):
        parts.append(f'<rect x="0" y="{y:.1f}" width="11" height="11" class="chart-{number}"/>')
        parts.append(_text(17, y + 10, name))
        y += ROW
    return parts, y


def _colour(mark: Mark, number: int, has_bold: bool) -> str:
    if has_bold:
        return "chart-0" if mark.is_bold else "chart-rest"
    return f"chart-{number}"


def ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Return round numbers in a range, about five of them."""
    if is_log:
        return [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _written(number: float) -> str:
    return f"{number:,.6g}" if 1e-3 <= abs(number) < 1e7 or number == 0 else f"{number:.0e}"


def bars(title: str, rows: Sequence[Mark], names: Sequence[str]) -> str:
    """Draw bars from zero, one for each value, with its number behind it."""
    found = [value.number for row in rows for value in row.values if value]
    if min(found) < 0:
        raise ValueError("a bar can't show what is below zero: kind dots can")
    largest = max(found)
    has_bold = any(row.is_bold for row in rows)
    parts, y = _legend(names, 2) if len(names) > 1 and not has_bold else ([], 0)
    for row in rows:
        y += ROW
        parts.append(_text(0, y - 4, row.label))
        for number, value in enumerate(row.values):
            if value is None:
                continue
            length = max(1.0, PLOT * value.number / largest)
            colour = _colour(row, number, has_bold)
            parts.append(
                f'<rect x="0" y="{y:.1f}" width="{length:.1f}" height="{BAR}" class="{colour}"/>'
            )
            parts.append(_text(length + 5, y + BAR - 1, value.text, style="chart-number"))
            y += BAR + 2
        y += 4
    return _svg(title, y, parts)


def dots(title: str, rows: Sequence[Mark], names: Sequence[str], is_log: bool = False) -> str:
    """Draw a dot for each value, with its interval, above an axis."""
    scale = math.log10 if is_log else float
    found = [value for row in rows for value in row.values if value]
    low, high = min(scale(v.low) for v in found), max(scale(v.high) for v in found)
    margin = 0.04 * (high - low) or 1
    low, high = low - margin, high + margin
    if is_log:
        low, high = math.floor(low), math.ceil(high)
    has_bold = any(row.is_bold for row in rows)
    parts, y = _legend(names, 2) if len(names) > 1 and not has_bold else ([], 0)
    top = y

    def place(number: float) -> float:
        return 5 + (PLOT - 10) * (scale(number) - low) / (high - low)

    for row in rows:
        y += ROW
        parts.append(_text(0, y - 4, row.label))
        for number, value in enumerate(row.values):
            if value is None:
                continue
            colour, middle = _colour(row, number, has_bold), y + BAR / 2
            parts.append(
                f'<path d="M{place(value.low):.1f} {middle}H{place(value.high):.1f}" '
                f'class="{colour}"/>'
                f'<circle cx="{place(value.number):.1f}" cy="{middle}" r="4.5" class="{colour}"/>'
            )
            parts.append(_text(PLOT + 5, y + BAR - 1, value.text, style="chart-number"))
            y += BAR + 2
        y += 4
    lines = []
    for tick in ticks(low, high, is_log):
        x = place(tick)
        lines.append(f'<path d="M{x:.1f} {top + 4:.1f}V{y:.1f}" class="chart-grid"/>')
        parts.append(_text(x, y + 13, _written(tick), "middle", "chart-number"))
    return _svg(title, y + ROW, [*lines, *parts])


def lines(title: str, rows: Sequence[Mark], names: Sequence[str]) -> str:
    """Draw a line for each row against the numbers in the heads, on a logarithmic axis."""
    if len(names) < 2:
        raise ValueError("a line needs two columns")
    at = [math.log(float(name.replace(",", ""))) for name in names]
    found = [value for row in rows for value in row.values if value]
    low, high = min(v.low for v in found), max(v.high for v in found)
    parts, top = _legend([row.label for row in rows], 2)
    top, bottom = top + 8, top + 208

    def x_of(place: float) -> float:
        return 40 + (WIDTH - 60) * (place - at[0]) / (at[-1] - at[0])

    def y_of(number: float) -> float:
        return bottom - (bottom - top) * (number - low) / (high - low)

    for tick in ticks(low, high, False):
        y = y_of(tick)
        parts.append(f'<path d="M36 {y:.1f}H{WIDTH}" class="chart-grid"/>')
        parts.append(_text(31, y + 4, _written(tick), "end", "chart-number"))
    for place, name in zip(at, names, strict=True):
        parts.append(_text(x_of(place), bottom + 18, name, "middle", "chart-number"))
    for number, row in enumerate(rows):
        points = [(x_of(a), v) for a, v in zip(at, row.values, strict=True) if v]
        path = "L".join(f"{x:.1f} {y_of(v.number):.1f}" for x, v in points)
        parts.append(f'<path d="M{path}" class="chart-{number} chart-line"/>')
        for x, value in points:
            parts.append(
                f'<path d="M{x:.1f} {y_of(value.low):.1f}V{y_of(value.high):.1f}" '
                f'class="chart-{number}"/>'
                f'<circle cx="{x:.1f}" cy="{y_of(value.number):.1f}" r="3.5" '
                f'class="chart-{number}"/>'
            )
    return _svg(title, bottom + 24, parts)


KINDS = {"bars": bars, "dots": dots, "lines": lines}


# ------------------------------------------------------------------------------ the directive


def _names(argument: str) -> list[str]:
    return [name.strip() for name in argument.split(";")]


class Chart(SphinxDirective):
    """A table and its picture."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec = {
        "kind": lambda argument: directives.choice(argument, tuple(KINDS)),
        "labels": _names,  # by default the first column
        "values": _names,
        "log": directives.flag,  # of dots
    }

    def run(self) -> list[nodes.Node]:
        inside = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, inside)
        table = next(inside.findall(nodes.table), None)
        if table is None:
            raise self.error("A chart needs a table inside of it.")
        first = next(table.findall(nodes.entry)).astext()
        labels, values = self.options.get("labels", [first]), self.options["values"]
        draw, options = KINDS[self.options.get("kind", "bars")], {}
        if "log" in self.options:
            options["is_log"] = True
        try:
            picture = draw(self.arguments[0], marks(table, labels, values), values, **options)
        except ValueError as error:
            raise self.error(str(error)) from error
        return [nodes.raw("", picture, format="html"), *inside.children]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("chart", Chart)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
