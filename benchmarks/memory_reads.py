"""Time reading rows through the memory against a plain LMDB read of the same rows.

Both sides run in turns in one process, from the page cache. Prints medians and their ratio, and for
reference joblib's own backend and SQLite on fewer rows.

    python benchmarks/memory_reads.py [--rows 20000] [--width 1280] [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable

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


def read_sqlite(path: str, keys: list[bytes], out: np.ndarray) -> None:
    with sqlite3.connect(path) as database:
        for i, key in enumerate(keys):
            found = database.execute("SELECT value FROM items WHERE key = ?", (key,)).fetchone()
            out[i] = np.frombuffer(found[0], out.dtype)


def report(name: str, seconds: list[float], rows: np.ndarray, reference: float = 0.0) -> float:
    median = statistics.median(seconds)
    ratio = f"  {median / reference:5.2f} x plain" if reference else ""
    speed = f"{1e6 * median / len(rows):8.2f} µs a row {rows.nbytes / median / 1e6:7.0f} MB/s"
    print(f"{name:34}{1e3 * median:9.1f} ms {speed}{ratio}")
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
        write = timed(lambda: write_chunks(memory, keys, rows))

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
        report(f"ImageMemory.write, {CHUNK} rows a call", [write], rows)
        reference_sides(folder, keys[:2000], rows[:2000], out[:2000])


def reference_sides(folder: str, keys: list[bytes], rows: np.ndarray, out: np.ndarray) -> None:
    """Time joblib's own backend through the same calls, and SQLite."""
    print(f"{len(rows)} rows, for reference:")
    files = ImageMemory(joblib.Memory(os.path.join(folder, "files"), verbose=0))
    write = timed(lambda: files.write(FUNC_ID, keys, rows))
    report("joblib's backend, read", [timed(lambda: files.read(FUNC_ID, keys, out))], rows)
    report("joblib's backend, write", [write], rows)
    path = os.path.join(folder, "items.sqlite")
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE items (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        items = [(key, row.tobytes()) for key, row in zip(keys, rows, strict=True)]
        database.executemany("INSERT INTO items VALUES (?, ?)", items)
    report("SQLite, read", [timed(lambda: read_sqlite(path, keys, out)) for _ in range(5)], rows)


if __name__ == "__main__":
    main()
