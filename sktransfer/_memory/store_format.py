"""The data file of a packed store: its values and their checksums, its seal, check and salvage.

LMDB trusts its file: a tree that leads astray, or a file shorter than its tree, can crash the
process that maps it. So a file is mapped only if it bears a *seal*, or has passed a check.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import lmdb
import numpy as np
from lmdb.verify import VerifyError, verify
from xxhash import xxh3_64_intdigest, xxh3_128_digest, xxh3_128_hexdigest

TABLES = (b"rows", b"files", b"used")  # of images, of joblib, and when each was last read
FILE = b"file:"  # begins the keys of joblib's items among the times, and seeds their checksums
TIME = struct.Struct("<d")
_CHECKSUM = struct.Struct("<Q")
_BATCH_BYTES = 1 << 26
# LMDB's data format 1 on 64 bits: the head of a page, and of a node in it
_PAGE = struct.Struct("=QHHHH")  # number, padding, flags, end of node offsets, start of nodes
_NODE = struct.Struct("=HHHH")  # low and high half of the value's size, flags, size of the key
_LEAF, _OVERFLOW, _ELSEWHERE = 0x02, 0x04, 0x01

# ---------------------------------------------------------------------------------- the keys


def row_keys(func_id: str, digests: Iterable[bytes]) -> list[bytes]:
    """Return a hash of `func_id` with each digest: 32 bytes, and all of a function together."""
    prefix = xxh3_128_digest(func_id.encode())
    return [prefix + digest for digest in digests]


def file_key(path: str, location: str) -> bytes:
    """Return the path below the location, its long parts shortened: LMDB takes 511 bytes."""
    parts = os.path.relpath(path, location).split(os.sep)
    short = [p if len(p) <= 48 else f"{p[:15]}~{xxh3_128_hexdigest(p.encode())}" for p in parts]
    return "/".join(short).encode()


def item_of(key: bytes) -> bytes:
    """Return the key under which the time of a file's item stands: that of its folder."""
    return FILE + key.rpartition(b"/")[0]


def path_of(key: bytes, location: str) -> str:
    """Name an entry, given its key among the times, so that it can be deleted by that name."""
    if key.startswith(FILE):
        name = key.removeprefix(FILE).decode()
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
        checksum, found = unpack(value)
        if found != kind:
            continue
        if xxh3_64_intdigest(value[8:], xxh3_64_intdigest(key)) != checksum:
            n_damaged += 1
            continue
        target[i * n_bytes : (i + 1) * n_bytes] = value[start:]
        hits[i] = True
    return hits, n_damaged


# ---------------------------------------------------------------------------------- the file


def _sealed_time(found: os.stat_result) -> int:
    """Give the modification time, in ns, of this file if it is sealed."""
    second = found.st_mtime_ns // 10**9
    mark = xxh3_64_intdigest(f"{found.st_ino} {found.st_size} {second}".encode())
    return second * 10**9 + mark % 10**7 * 100  # 100 ns are the finest step that NTFS keeps


def seal(path: str) -> None:
    """Mark a file that is known to be sound.

    The seal is a fraction of a second in the file's modification time that follows from inode
    and size: whoever writes, cuts, copies or replaces the file afterwards breaks it, and one
    `os.stat` sees that.
    """
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, _sealed_time(found)))


def is_sealed(found: os.stat_result) -> bool:
    """Whether nothing has touched the file since `seal`; by chance wrong once in 10 million."""
    return found.st_mtime_ns == _sealed_time(found)


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


def iter_nodes(path: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield every key and value that any leaf page of a damaged data file still shows.

    Each page is looked at for itself, whether a tree leads to it or not. So values may be stale
    or wrong: the caller must know how to tell.
    """
    size = min(mmap.PAGESIZE, 1 << 15)
    with open(path, "rb") as file:
        for number in range(os.path.getsize(path) // size):
            file.seek(number * size)
            page = file.read(size)
            if len(page) < size:
                return
            stored_number, _, flags, lower, upper = _PAGE.unpack_from(page)
            if (stored_number, flags) != (number, _LEAF) or not _PAGE.size <= lower <= upper < size:
                continue
            for offset in struct.unpack_from(f"={(lower - _PAGE.size) // 2}H", page, _PAGE.size):
                if offset + _NODE.size > size:
                    continue
                low, high, node_flags, key_size = _NODE.unpack_from(page, offset)
                start = offset + _NODE.size + key_size
                value_size = low | high << 16
                value = page[start : start + value_size]
                if node_flags & _ELSEWHERE:
                    value = _read_overflow(file, page[start : start + 8], size, value_size)
                if len(value) == value_size:
                    yield page[offset + _NODE.size : start], value


def _read_overflow(file: BinaryIO, pointer: bytes, page_size: int, value_size: int) -> bytes:
    """Read a value that is too large for its leaf; short if that is not where it points to."""
    number = int.from_bytes(pointer, sys.byteorder)
    if number * page_size + _PAGE.size + value_size > os.fstat(file.fileno()).st_size:
        return b""
    file.seek(number * page_size)
    stored_number, _, flags, _, _ = _PAGE.unpack(file.read(_PAGE.size))
    return file.read(value_size) if (stored_number, flags) == (number, _OVERFLOW) else b""


def create_file(path: str, rows: Iterable[tuple[bytes, bytes]], map_size: int) -> tuple[str, int]:
    """Write a sealed data file with `rows` next to `path`; return its path and their number."""
    fresh = f"{path}.{os.getpid()}-{threading.get_ident()}"
    try:
        with lmdb.open(
            fresh, subdir=False, lock=False, map_size=map_size, max_dbs=len(TABLES)
        ) as env:
            tables = [env.open_db(name) for name in TABLES]
            for batch in batches(rows):
                with env.begin(write=True) as txn:
                    put(txn, tables[0], tables[2], batch)
            with env.begin() as txn:
                n_rows = txn.stat(tables[0])["entries"]
        seal(fresh)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        if isinstance(error, lmdb.Error):
            raise OSError(str(error)) from error
        raise
    return fresh, n_rows


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


def put(txn: Any, table: Any, used: Any, items: Iterable[tuple[bytes, bytes]]) -> None:
    items = list(items)
    txn.cursor(table).putmulti(items)
    touch(txn, used, [key for key, _ in items])


def touch(txn: Any, used: Any, keys: Iterable[bytes]) -> None:
    now = TIME.pack(time.time())
    txn.cursor(used).putmulti([(key, now) for key in keys])


def stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def is_at(path: str, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), found)
    except OSError:
        return False


def open_file(path: str, map_size: int) -> tuple[int, bool]:
    """Open the data file to lock it, and make it if there is none; say if it is read-only."""
    flags = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with contextlib.suppress(FileNotFoundError):
        try:
            return os.open(path, os.O_RDWR | flags), False
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
        return os.open(path, os.O_RDONLY | flags), True
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(FileExistsError), open(os.path.join(folder, ".gitignore"), "x") as f:
        f.write("*\n")
    fresh, _ = create_file(path, (), map_size)
    # Linked when it is complete: so an empty data file is always a damaged one.
    try:
        os.link(fresh, path)
        os.unlink(fresh)
    except FileExistsError:
        os.unlink(fresh)
    except OSError:  # a file system without links
        os.replace(fresh, path)
    return os.open(path, os.O_RDWR | flags), False


def drop(txn: Any, table: Any, prefix: bytes) -> None:
    """Delete all whose keys begin with `prefix`."""
    cursor = txn.cursor(table)
    found = cursor.set_range(prefix)
    while found and cursor.key().startswith(prefix):
        cursor.delete()
        found = bool(cursor.key())
