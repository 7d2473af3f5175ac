"""The findings of an audit, and similar images, as self-contained HTML pages."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from sktransfer._cli.checks import counted
from sktransfer._cli.whole_page import small_image, whole_page
from sktransfer._escaping import printable

_MOST = 24  # images of a kind that are shown
_MAIN = 5  # findings in the report of a comparison
# What a kind is, and what to do about it.
_ADVICE = {
    "damaged": (
        "Damaged images",
        "They can't be decoded, or not whole. Replace them, or leave them out.",
    ),
    "small class": (
        "Classes too small to split",
        "Add images, join classes, or leave the class out.",
    ),
    "leak": (
        "Copies across the split",
        "A model that is tested on a copy of what it was trained on seems better than it is. "
        "Remove one of both, or keep them together by groups.",
    ),
    "duplicate across classes": (
        "Copies with different labels",
        "One of both labels is wrong, or the classes are not what they seem.",
    ),
    "label": (
        "Labels that may be wrong",
        "A model of the other images doubts them. Look at each: it may also be a rare case that "
        "is right.",
    ),
    "exact duplicate": ("Equal images", "Keep one of each, or keep them together by groups."),
    "near duplicate": (
        "Nearly equal images",
        "Keep them in one part of every split: suggest_groups makes groups of them.",
    ),
    "blank": ("Blank images", "They show nothing."),
    "dark": ("Dark images", "Much darker than the others: a wrong exposure, or scaling?"),
    "bright": ("Bright images", "Much brighter than the others: a wrong exposure, or scaling?"),
    "blurred": ("Blurred images", "Out of focus, moved, or enlarged?"),
    "tiny": ("Tiny images", "Much smaller than the others: a preview instead of the image?"),
    "odd shape": ("Images of an odd shape", "Panoramas, strips, or parts of an image?"),
    "outlier": ("Images unlike all others", "They may not belong here, or be rare cases."),
}


def audit_page(table: Any, name: str) -> str:
    """Return the page of an audit's findings, a data frame; it loads nothing from elsewhere."""
    kinds = list(dict.fromkeys(table["kind"]))
    title = html.escape(printable(f"{name}: audit"))
    if not kinds:
        return whole_page(title, '<p class="headline">Nothing was found.</p>')
    counts = {kind: int((table["kind"] == kind).sum()) for kind in kinds}
    rows = "".join(
        f'<tr><td><a href="#{kind.replace(" ", "-")}">{_ADVICE[kind][0]}</a></td><td>{n:,}</td>'
        f"</tr>"
        for kind, n in counts.items()
    )
    overview = f"<table><thead><tr><th>finding</th><th>images</th></tr></thead>{rows}</table>"
    sections = "".join(_section(kind, table[table["kind"] == kind]) for kind in kinds)
    headline = f"<em>{len(table):,}</em> finding{'s' * (len(table) != 1)}, the most urgent first."
    return whole_page(
        title, f'<p class="headline">{headline}</p><div class="scroll">{overview}</div>{sections}'
    )


def main_findings(table: Any) -> str:
    """Return the section of a report on the first findings, the first of each kind before others.

    Parameters
    ----------
    table : data frame
        As of `audit`.
    """
    heading = "<h2>What to look at in the images</h2>"
    how = "<code>sktransfer audit FOLDER --output DIR</code>"
    if not len(table):
        return f'{heading}<p class="note">An audit found nothing: {how}.</p>'
    of_kind = table.groupby("kind").cumcount()
    shown = table.iloc[of_kind.to_numpy().argsort(kind="stable")[:_MAIN]].sort_values("rank")
    kinds = table["kind"].value_counts(sort=False)
    counts = ", ".join(f"{n:,} × {_ADVICE[kind][0].lower()}" for kind, n in kinds.items())
    cards = "".join(_card(finding) for finding in shown.itertuples())
    return (
        f'{heading}<p class="note">An audit has {counted(len(table), "finding")}: {counts}.</p>'
        f'<div class="pairs">{cards}</div>'
        f'<p class="note">All of them, and what to do about each kind: {how}.</p>'
    )


def _section(kind: str, table: Any) -> str:
    heading, advice = _ADVICE[kind]
    cards = "".join(_card(finding) for finding in table.head(_MOST).itertuples())
    more = len(table) - _MOST
    rest = f'<p class="note">And {more:,} more, in findings.csv.</p>' if more > 0 else ""
    return (
        f'<h2 id="{kind.replace(" ", "-")}">{heading}</h2><p class="note">{advice}</p>'
        f'<div class="pairs">{cards}</div>{rest}'
    )


def _card(finding: Any) -> str:
    sides = _side(finding.path, finding.label)
    if finding.other_path is not None:
        sides += _side(finding.other_path, finding.other_label)
    return (
        f'<figure><div class="side">{sides}</div><figcaption>{_text(finding.reason)}</figcaption>'
        "</figure>"
    )


def _side(path: str, label: Any, *, of: str = "") -> str:
    """Return an image, or what stands for one that can't be read, with its label and name."""
    source = small_image(path)
    name = _text(path.replace("\\", "/").rpartition("/")[2])
    shown = f'<img alt="{name}" src="{source}">' if source else '<div class="none">no image</div>'
    words = of or (f"<strong>{_text(label)}</strong>" if label is not None else "")
    return f"<div>{shown}{words} <small>{name}</small></div>"


def similar_page(table: Any) -> str:
    """Return the page of similar images, a data frame as of `find_similar`."""
    rows = "".join(_similar_row(found) for _, found in table.groupby("query_row", sort=True))
    return whole_page("Similar images", rows)


def _similar_row(found: Any) -> str:
    query = found["query_path"].iloc[0]
    sides: Iterable[str] = (
        f"<figure>{_side(one.path, None, of=f'{one.distance:.4f}')}</figure>"
        for one in found.itertuples()
    )
    return (
        f"<h2>{_text(query)}</h2>"
        f'<div class="thumbs"><figure>{_side(query, None, of="<strong>query</strong>")}</figure>'
        f'{"".join(sides)}</div><p class="note">Below each image: the cosine distance of its '
        "embedding from that of the query.</p>"
    )


def _text(text: Any) -> str:
    return html.escape(printable(str(text)))
