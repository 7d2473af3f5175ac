"""The data file of a packed store: its keys, its values and their checksums, its seal and check.

LMDB trusts its file: a tree that leads astray, or a file shorter than its tree, can crash the
process that maps it. So a file is mapped only if it bears a *seal*, or has passed a check.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import lmdb
import numpy as np
from lmdb.verify import VerifyError, verify
from xxhash import xxh3_64_intdigest, xxh3_128_digest, xxh3_128_hexdigest

TABLES = (b"rows", b"files", b"used")  # of images, of joblib, and when each was last read
NAME = b"name:"  # begins the keys of what functions are called, which stand there as well
FILE = b"file:"  # begins the keys of joblib's items among the times, and seeds their checksums
_TIME = struct.Struct("<d")
_CHECKSUM = struct.Struct("<Q")
_BATCH_BYTES = 1 << 26
_ATTEMPTS = 100
_YEAR_2200 = 7.3e9
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

# ---------------------------------------------------------------------------------- the keys


def row_keys(func_id: str, digests: Iterable[bytes]) -> list[bytes]:
    """Return a hash of `func_id` with each digest: 32 bytes, and all of a function together."""
    prefix = xxh3_128_digest(func_id.encode())
    return [prefix + digest for digest in digests]


def name_key(func_id: str) -> bytes:
    """Return the key of the text that says what `func_id` stands for."""
    return NAME + xxh3_128_digest(func_id.encode())


def file_key(path: str, location: str) -> bytes:
    """Return the path below the location, its long parts shortened: LMDB takes 511 bytes."""
    parts = os.path.relpath(path, location).split(os.sep)
    short = [p if len(p) <= 48 else f"{p[:15]}~{xxh3_128_hexdigest(os.fsencode(p))}" for p in parts]
    return os.fsencode("/".join(short))


def item_of(key: bytes) -> bytes:
    """Return the key under which the time of a file's item stands: that of its folder."""
    return FILE + key.rpartition(b"/")[0]


def path_of(key: bytes, location: str) -> str:
    """Name an entry, given its key among the times, so that it can be deleted by that name."""
    if key.startswith(FILE):
        name = os.fsdecode(key.removeprefix(FILE))
    else:
        name = f"{key[:16].hex()}/{key[16:].hex()}"
    return os.path.join(location, *name.split("/"))


def row_prefix(key: bytes) -> bytes | None:
    """Return the rows' key, or the begin of it, that `path_of` gave this name, if it is one."""
    if re.fullmatch(b"[0-9a-f]{32}(/[0-9a-f]{32})?", key) is None:
        return None
    return bytes.fromhex(key.decode().replace("/", ""))


# -------------------------------------------------------------------------------- the values


def wrap(key: bytes, body: bytes) -> bytes:
    """Prepend a checksum of body and key, so that a value under a wrong key is wrong too."""
    return _CHECKSUM.pack(xxh3_64_intdigest(body, xxh3_64_intdigest(key))) + body


def unwrap(key: bytes, value: Any) -> bytes | None:
    """Return the body of an intact value."""
    body = bytes(value[_CHECKSUM.size :])
    return body if wrap(key, body) == value else None


@functools.lru_cache
def describe(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Return what stands before the bytes of an array of this kind."""
    if dtype.hasobject:
        raise TypeError(f"Rows of dtype {dtype} cannot be kept: they hold Python objects.")
    return repr((np.lib.format.dtype_to_descr(dtype), shape)).encode()


def fill_rows(
    get: Callable[[bytes], Any], keys: Sequence[bytes], out: np.ndarray
) -> tuple[np.ndarray, int]:
    """Copy the intact rows that `get` finds under `keys` into `out`, which is contiguous.

    Returns
    -------
    hits : ndarray of shape (n,), bool
    n_damaged : int
        Rows of the right kind whose checksum is wrong.
    """
    kind = describe(out.dtype, out.shape[1:])
    head = struct.Struct(f"<Q{len(kind)}s")
    unpack, start, n_bytes = head.unpack_from, head.size, out[:1].nbytes
    target = memoryview(out.reshape(-1).view(np.uint8).data)
    hits, n_damaged = np.zeros(len(keys), bool), 0
    for i, key in enumerate(keys):
        value = get(key)
        if value is None or len(value) != start + n_bytes:
            continue
        checksum, kind_of_row = unpack(value)
        if kind_of_row != kind:
            continue
        if xxh3_64_intdigest(value[8:], xxh3_64_intdigest(key)) != checksum:
            n_damaged += 1
            continue
        target[i * n_bytes : (i + 1) * n_bytes] = value[start:]
        hits[i] = True
    return hits, n_damaged


# ---------------------------------------------------------------------------------- the file


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes with every change of a file.

    The time of the change (`st_ctime`) is set by the kernel and cannot be put back, as a time of
    modification can. Linux before 6.13 counts it in steps of 1 to 10 ms.
    """
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _seal_of(status: os.stat_result) -> bytes:
    numbers = stamp(status)[1:]  # a device may get another number when it is mounted again
    return " ".join(map(str, numbers)).ljust(99).encode() + b"\n"


def seal(path: str, status: os.stat_result) -> None:
    """Note next to the data file that it is sound in this `status`, while no one else may write.

    Whoever writes, cuts, copies or replaces the file afterwards breaks the seal, even if the time
    of modification is put back.
    """
    # Overwritten in place: a disk that is full still takes it.
    descriptor = os.open(path + ".seal", os.O_WRONLY | os.O_CREAT | _FLAGS, 0o666)
    try:
        os.write(descriptor, _seal_of(status))
    finally:
        os.close(descriptor)


def is_sealed(path: str, status: os.stat_result) -> bool:
    """Whether nothing has touched the data file since `seal`."""
    try:
        with open(path + ".seal", "rb") as file:
            return file.read() == _seal_of(status)
    except OSError:
        return False


def find_problem(path: str) -> str | None:
    """Check the structure of a data file at rest: its pages, trees and free list.

    Values are not looked at, they carry their own checksums. Takes about 7 µs a row.

    Returns
    -------
    str or None
        The first thing that is wrong.
    """
    try:
        return next(iter(verify(path, subdir=False)), None)
    except OSError:
        raise
    except VerifyError as error:
        return str(error)
    except Exception as error:  # garbage that the check did not foresee
        return f"not readable as an LMDB file: {error!r}"


def batches(items: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Cut keys and values into lists for one transaction each: LMDB holds its changes in RAM."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += len(item[1])
        if total > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def put(
    txn: Any,
    table: Any,
    used: Any,
    items: Iterable[tuple[bytes, bytes]],
    name: tuple[bytes, bytes] = (NAME, b""),
) -> None:
    """Write keys and values into `table`, and note that they were used just now.

    Sound rows that are there stay, so that a row never changes. `name` is the key and the text of
    what their function is called; an empty one changes nothing.
    """
    used_keys = []
    new = []
    for key, value in items:
        used_keys.append(key)
        if not _is_kept(key, value, txn.get(key, db=table)):
            new.append((key, value))
    if name[1]:
        txn.put(*name, db=used)
    txn.cursor(table).putmulti(new)
    touch(txn, used, used_keys)


def _is_kept(key: bytes, value: bytes, kept: Any) -> bool:
    """Tell whether a sound row of this kind is there: two programs round otherwise."""
    if kept is None or len(kept) != len(value):
        return False
    body = unwrap(key, kept)
    return body is not None and _kind_of(body) == _kind_of(value[_CHECKSUM.size :])


def _kind_of(body: bytes) -> bytes:
    """Return what `describe` has put before a row."""
    return body.partition(b"))")[0]


def touch(txn: Any, used: Any, keys: Iterable[bytes]) -> None:
    """Note that these were used just now."""
    now = _TIME.pack(time.time())
    txn.cursor(used).putmulti([(key, now) for key in keys])


def time_of(value: Any) -> float:
    """Return the time that `touch` has noted; the epoch if it was damaged."""
    if len(value) != _TIME.size:
        return 0.0
    seconds = _TIME.unpack(value)[0]
    return seconds if 0.0 <= seconds < _YEAR_2200 else 0.0


def is_at(path: str, status: os.stat_result) -> bool:
    """Whether the path still names the file that was `found`."""
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def open_file(path: str, map_size: int) -> tuple[int, bool]:
    """Open the data file to lock it, and make it if there is none; say if it is read-only."""
    for _ in range(_ATTEMPTS):  # another process may delete it again at this very moment
        with contextlib.suppress(FileNotFoundError):
            return _open_existing(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            _create_file(path, map_size)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _open_existing(path: str) -> tuple[int, bool]:
    try:
        return os.open(path, os.O_RDWR | _FLAGS), False
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    return os.open(path, os.O_RDONLY | _FLAGS), True


def _create_file(path: str, map_size: int) -> None:
    """Make an empty data file, unless another process is faster."""
    ignore = os.path.join(os.path.dirname(path), ".gitignore")
    with contextlib.suppress(FileExistsError), open(ignore, "x") as file:
        file.write("*\n")
    fresh = f"{path}.{os.getpid()}-{threading.get_ident()}"
    try:
        with open_environment(fresh, map_size=map_size, lock=False) as env:
            for name in TABLES:
                env.open_db(name)
        # Linked when it is complete: so an empty data file is always a damaged one.
        try:
            os.link(fresh, path)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:  # a file system without links
            os.replace(fresh, path)
    except FileExistsError:
        pass
    except lmdb.Error as error:
        if str(error).endswith(os.strerror(errno.ENOENT)):  # another process clears the folder
            raise FileNotFoundError(errno.ENOENT, str(error)) from error
        raise OSError(str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(fresh)


def open_environment(path: str, **options: Any) -> lmdb.Environment:
    """Open LMDB on a data file, whose name may be any bytes: py-lmdb takes str as UTF-8."""
    return lmdb.open(os.fsencode(path), subdir=False, max_dbs=len(TABLES), **options)


def drop(txn: Any, table: Any, prefix: bytes) -> None:
    """Delete all whose keys begin with `prefix`."""
    cursor = txn.cursor(table)
    is_at_entry = cursor.set_range(prefix)
    while is_at_entry and cursor.key().startswith(prefix):
        cursor.delete()
        is_at_entry = bool(cursor.key())
