"""Which of many files can't be read, and why, before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sktransfer._bars import tqdm
from sktransfer._threads import n_threads
from sktransfer.io._decoding import file_name, open_image
from sktransfer.io._files import reading_turn


def find_unreadable(
    files: Iterable[Any], *, n_jobs: int | None = None, verbose: bool = False
) -> dict[int, str]:
    """Decode every file once, and return which can't be read, and why.

    What it returns nothing for is what all estimators take: the settings of `sktransfer.set_config`
    count as they do there, so a damaged file of which a part can be decoded is unreadable with
    ``damaged="error"`` alone. Nothing is kept of the pixels. A JPEG file is decoded at an eighth of
    its size, which takes about half as long as to load it.

    Parameters
    ----------
    files : iterable of paths or of encoded images
    n_jobs : int, default=None
        Threads; None means all cores.
    verbose : bool, default=False
        Show a progress bar.

    Returns
    -------
    dict of int to str
        For each unreadable file its row, from 0 and in order, and the reason.

    See Also
    --------
    sktransfer.load_image_folder : Leaves out unreadable files with ``errors="skip"``.

    Examples
    --------
    >>> import pathlib, sklearn.datasets
    >>> from sktransfer.io import find_unreadable
    >>> folder = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    >>> files = [folder / "china.jpg", folder / "README.txt", folder / "flower.jpg"]
    >>> unreadable = find_unreadable(files)
    >>> print(unreadable[1])
    Pillow knows no image that starts with b'Image: china'; replace it, or drop the row.
    >>> [file.name for row, file in enumerate(files) if row not in unreadable]
    ['china.jpg', 'flower.jpg']
    """
    if isinstance(files, (str, bytes, os.PathLike)):
        raise TypeError(f"Expected many files, got {files!r}: for one file, pass [file].")
    items = list(files)
    threads = ThreadPoolExecutor(n_threads(n_jobs))
    try:
        checks = threads.map(_why_unreadable, range(len(items)), items)
        bar = tqdm(checks, "checking", len(items), unit="file", disable=not verbose)
        reasons = list(bar)
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the other files
    return {row: reason for row, reason in enumerate(reasons) if reason}


def _why_unreadable(row: int, item: Any) -> str:
    """Return why a file can't be read; nothing if it can."""
    where = file_name(item) or f"row {row}"
    try:
        with reading_turn(item):
            open_image(item, where).check()
    except ValueError as error:
        return str(error).removeprefix(f"{where}: ")
    return ""
