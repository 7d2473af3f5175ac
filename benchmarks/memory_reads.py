"""Time reading rows through the memory against LMDB, SQLite and diskcache with the same rows.

All sides run in turns in one process, from the page cache. SQLite and diskcache are set up as their
users set them up: SQLite with a write-ahead log, `executemany` and one query with ``IN`` for each
batch of keys; diskcache with a transaction for each batch. A second SQLite maps no file into
memory: its journal is a file, its pages are large. Prints medians and their ratio to plain LMDB,
and for reference joblib's own backend on fewer rows. Needs diskcache, of the extra `benchmarks`.

    python benchmarks/memory_reads.py [--rows 20000] [--width 1280] [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import joblib
import lmdb
import numpy as np

from sktransfer._memory import store as _store
from sktransfer._memory.memory import ImageMemory, check_memory

FUNC_ID = "some-network-cut-pooling-precision"
CHUNK = 64  # rows that an estimator looks up at once; it writes `batch_size` of them


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain_lmdb(folder: str, keys: list[bytes], rows: np.ndarray) -> lmdb.Environment:
    env = lmdb.open(folder, map_size=4 * rows.nbytes + (1 << 30))
    with env.begin(write=True) as txn:
        for key, row in zip(keys, rows, strict=True):
            txn.put(key, row.tobytes())
    return env


def read_plain(env: lmdb.Environment, keys: list[bytes], out: np.ndarray) -> None:
    with env.begin(buffers=True) as txn:
        for i, key in enumerate(keys):
            out[i] = np.frombuffer(txn.get(key), out.dtype)


def read_multi(env: lmdb.Environment, keys: list[bytes], out: np.ndarray) -> None:
    with env.begin(buffers=True) as txn:
        for i, (_, value) in enumerate(txn.cursor().getmulti(keys)):
            out[i] = np.frombuffer(value, out.dtype)


def read_chunks(memory: ImageMemory, keys: list[bytes], out: np.ndarray) -> None:
    for start in range(0, len(keys), CHUNK):
        memory.read(FUNC_ID, keys[start : start + CHUNK], out[start : start + CHUNK])


def write_chunks(memory: ImageMemory, keys: list[bytes], rows: np.ndarray) -> None:
    for start in range(0, len(keys), CHUNK):
        memory.write(FUNC_ID, keys[start : start + CHUNK], rows[start : start + CHUNK])


def chunks(keys: list[bytes], rows: np.ndarray) -> Iterator[tuple[list[bytes], np.ndarray]]:
    for start in range(0, len(keys), CHUNK):
        yield keys[start : start + CHUNK], rows[start : start + CHUNK]


def open_sqlite(path: str, journal: str = "WAL", page_size: int = 4096) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA page_size={page_size}")
    database.execute(f"PRAGMA journal_mode={journal}")
    database.execute("PRAGMA synchronous=NORMAL")
    database.execute("CREATE TABLE items (key BLOB PRIMARY KEY, value BLOB)")
    return database


def write_sqlite(database: sqlite3.Connection, keys: list[bytes], rows: np.ndarray) -> None:
    for some_keys, some_rows in chunks(keys, rows):
        items = [(key, row.tobytes()) for key, row in zip(some_keys, some_rows, strict=True)]
        with database:
            database.executemany("INSERT OR REPLACE INTO items VALUES (?, ?)", items)


def read_sqlite(database: sqlite3.Connection, keys: list[bytes], out: np.ndarray) -> None:
    for some_keys, some_rows in chunks(keys, out):
        place = {key: i for i, key in enumerate(some_keys)}
        marks = ",".join("?" * len(some_keys))
        query = f"SELECT key, value FROM items WHERE key IN ({marks})"
        for key, value in database.execute(query, some_keys):
            some_rows[place[key]] = np.frombuffer(value, out.dtype)


def open_diskcache(path: str) -> Any:
    try:
        import diskcache
    except ImportError:
        raise SystemExit('Run pip install ".[benchmarks]" for diskcache.') from None
    return diskcache.Cache(path, size_limit=1 << 40)


def write_diskcache(cache: Any, keys: list[bytes], rows: np.ndarray) -> None:
    for some_keys, some_rows in chunks(keys, rows):
        with cache.transact():
            for key, row in zip(some_keys, some_rows, strict=True):
                cache[key] = row.tobytes()


def read_diskcache(cache: Any, keys: list[bytes], out: np.ndarray) -> None:
    for some_keys, some_rows in chunks(keys, out):
        with cache.transact():
            for i, key in enumerate(some_keys):
                some_rows[i] = np.frombuffer(cache[key], out.dtype)


def report(name: str, seconds: list[float], rows: np.ndarray, reference: float = 0.0) -> float:
    median = statistics.median(seconds)
    ratio = f"  {median / reference:5.2f} x plain" if reference else ""
    speed = f"{1e6 * median / len(rows):8.2f} µs a row {rows.nbytes / median / 1e6:7.0f} MB/s"
    print(f"{name:42}{1e3 * median:9.1f} ms {speed}{ratio}")
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rows = np.random.default_rng(0).random((args.rows, args.width), dtype=np.float32)
    keys = [os.urandom(16) for _ in rows]
    out = np.empty_like(rows)
    with tempfile.TemporaryDirectory() as folder:
        env = plain_lmdb(os.path.join(folder, "plain"), keys, rows)
        memory = check_memory(os.path.join(folder, "memory"))
        assert memory is not None
        database = open_sqlite(os.path.join(folder, "items.sqlite"))
        unmapped = open_sqlite(os.path.join(folder, "unmapped.sqlite"), "TRUNCATE", 65536)
        cache = open_diskcache(os.path.join(folder, "diskcache"))
        writes = {
            "ImageMemory.write": timed(lambda: write_chunks(memory, keys, rows)),
            "SQLite": timed(lambda: write_sqlite(database, keys, rows)),
            "SQLite, no map": timed(lambda: write_sqlite(unmapped, keys, rows)),
            "diskcache": timed(lambda: write_diskcache(cache, keys, rows)),
        }

        def read() -> None:
            assert memory.read(FUNC_ID, keys, out).all()

        touching = []
        for _ in range(3):  # as after TOUCH_EVERY: all times of last access are looked at, written
            memory.memory.store_backend._store._recent.clear()
            _store.TOUCH_EVERY, kept = -1.0, _store.TOUCH_EVERY
            touching.append(timed(read))
            _store.TOUCH_EVERY = kept
        read()
        sides: dict[str, Callable[[], object]] = {
            "plain LMDB, txn.get": lambda: read_plain(env, keys, out),
            "plain LMDB, cursor.getmulti": lambda: read_multi(env, keys, out),
            "ImageMemory.read": read,
            f"ImageMemory.read, {CHUNK} rows a call": lambda: read_chunks(memory, keys, out),
            f"SQLite, {CHUNK} rows a query": lambda: read_sqlite(database, keys, out),
            "SQLite, the same, no map": lambda: read_sqlite(unmapped, keys, out),
            f"diskcache, {CHUNK} rows a transaction": lambda: read_diskcache(cache, keys, out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                out[:] = 0
                seconds[name].append(timed(side))
                assert np.array_equal(out, rows), name
        plain = 0.0
        for name, times in seconds.items():
            median = report(name, times, rows, plain)
            plain = plain or median
        report("ImageMemory.read, all times stale", touching, rows, plain)
        for name, seconds_to_write in writes.items():
            report(f"write, {CHUNK} rows at once: {name}", [seconds_to_write], rows)
        database.close()
        unmapped.close()
        cache.close()
        reference_sides(folder, keys[:2000], rows[:2000], out[:2000])


def reference_sides(folder: str, keys: list[bytes], rows: np.ndarray, out: np.ndarray) -> None:
    """Time joblib's own backend through the same calls."""
    print(f"{len(rows)} rows, for reference:")
    files = ImageMemory(joblib.Memory(os.path.join(folder, "files"), verbose=0))
    write = timed(lambda: files.write(FUNC_ID, keys, rows))
    report("joblib's backend, read", [timed(lambda: files.read(FUNC_ID, keys, out))], rows)
    report("joblib's backend, write", [write], rows)


if __name__ == "__main__":
    main()
