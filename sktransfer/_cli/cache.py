"""The command `cache`: what a memory holds, cleared or reduced."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from joblib import Memory

from sktransfer._cli.tables import as_table, show
from sktransfer._escaping import escape
from sktransfer._memory.memory import check_memory
from sktransfer._memory.store_backend import BACKEND

_COMPILED = "compiled networks"
_PAGES = "keys, times of use, unfilled ends of pages"


def cache(options: argparse.Namespace) -> None:
    """Print what a memory holds; clear or reduce it first, if that is asked for."""
    if not (Path(options.folder) / "joblib").is_dir():
        raise ValueError(f"{options.folder!r} is not a folder that --memory, or memory=, named.")
    memory = Memory(options.folder, backend=BACKEND, verbose=0)
    before = _size(memory)
    if options.action == "clear":
        memory.clear(warn=False)
    elif options.action == "reduce":
        limits = (options.bytes, options.items, options.days)
        if limits == (None, None, None):
            raise ValueError("Nothing to reduce by: pass --bytes, --items or --days.")
        age = None if options.days is None else datetime.timedelta(days=options.days)
        memory.reduce_size(options.bytes, options.items, age)
    document, text = {"folder": options.folder, **before}, f"{escape(options.folder)}: "
    text += _size_in_words(before)
    if options.action != "info":
        document["now"] = _size(memory)
        text += f"\nnow: {_size_in_words(document['now'])}"
    elif shares := _shares(memory):
        document["shares"] = shares
        document["rest"] = _rest(memory, before["n_bytes"] - sum(row["bytes"] for row in shares))
        text += f"\n{_tables_of_shares(shares, document['rest'], before['n_bytes'])}"
    show(options, document, text)


def _shares(memory: Memory) -> list[dict[str, Any]]:
    """Return what the results are of, as far as that is known."""
    opened = check_memory(memory)
    assert opened is not None
    names = "network", "size", "layer", "form"
    found = []
    for text, n_results, n_bytes in opened.shares():
        values = text.rsplit("\t", 3) if text else ["not known", "", "", ""]
        of = dict(zip(names, values, strict=True))
        found.append({**of, "results": n_results, "bytes": n_bytes})
    return found


def _rest(memory: Memory, n_bytes: int) -> dict[str, int]:
    """Return what takes the bytes that are not of results, largest first.

    The file consists of pages, and a result of more than half a page has pages of its own.
    """
    opened = check_memory(memory)
    assert opened is not None
    compiled = opened.n_companion_bytes()
    rest = {_COMPILED: compiled, _PAGES: n_bytes - compiled}
    return {what: rest[what] for what in sorted(rest, key=rest.__getitem__, reverse=True)}


def _tables_of_shares(shares: list[dict[str, Any]], rest: dict[str, int], total: int) -> str:
    """Return a table for each network, with what it takes above it, and the rest in a line each."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for share in shares:
        heading = ", ".join(escape(share[name]) for name in ("network", "size") if share[name])
        tables.setdefault(heading, []).append(share)
    lines = []
    for heading, rows in tables.items():
        megabytes, part = _amount(sum(row["bytes"] for row in rows), total)
        columns: dict[str, Any] = {n: [escape(r[n]) for r in rows] for n in ("layer", "form")}
        columns["results"] = [f"{row['results']:,}" for row in rows]
        columns["MB"], columns["share"] = zip(
            *(_amount(row["bytes"], total) for row in rows), strict=True
        )
        lines += ["", f"{heading}: {megabytes} MB, {part}", as_table(columns)]
    lines.append("")
    for what, n_bytes in rest.items():
        if n_bytes:
            megabytes, part = _amount(n_bytes, total)
            lines.append(f"{what}: {megabytes} MB, {part}")
    return "\n".join(lines)


def _amount(n_bytes: int, total: int) -> tuple[str, str]:
    return f"{n_bytes / 1e6:,.1f}", f"{100 * n_bytes / total:.0f} %"


def _size(memory: Memory) -> dict[str, Any]:
    opened = check_memory(memory)
    assert opened is not None
    info = opened.info()
    return {"n_results": info["n_entries"], "n_bytes": info["n_bytes"]}


def _size_in_words(size: dict[str, Any]) -> str:
    return f"{size['n_results']:,} results, {size['n_bytes'] / 1e6:,.1f} MB"
