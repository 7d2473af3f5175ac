"""Kill a process that writes to a memory at random moments, and look what it left.

A child writes rows of known content and reports each batch once it is written. The parent kills it
(SIGKILL), opens the memory and checks that no row is wrong and that no reported row is missing.
Every child goes on in the folder of the one before.

    python benchmarks/memory_kill.py [--kills 100]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection

import numpy as np

from sktransfer._memory.memory import ImageMemory, check_memory
from sktransfer._memory.store_format import is_sealed

FORK = multiprocessing.get_context("fork")  # a child that need not import anything
FUNC_ID, BATCH, WIDTH = "kill", 16, 1280


def digest_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def row_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).random(WIDTH, dtype=np.float32)


def write_forever(folder: str, first: int, report: Connection) -> None:
    memory = check_memory(folder)
    assert memory is not None
    while True:
        numbers = range(first, first + BATCH)
        memory.write(FUNC_ID, [digest_of(n) for n in numbers], [row_of(n) for n in numbers])
        first += BATCH
        report.send(first)


def kill_one(folder: str, first: int, seed: int) -> int:
    """Start a writer at row `first`, kill it, and return behind which row it had got."""
    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=write_forever, args=(folder, first, theirs))
    child.start()
    theirs.close()
    first = ours.recv()  # it has started
    time.sleep(random.Random(seed).uniform(0, 0.08))
    child.kill()
    child.join()
    with contextlib.suppress(EOFError):
        while True:
            first = ours.recv()
    return first


def check(memory: ImageMemory, n_rows: int) -> tuple[int, int]:
    """Count wrong rows up to two batches behind `n_rows`, and missing ones before it."""
    numbers = range(n_rows + 2 * BATCH)
    out = np.empty((len(numbers), WIDTH), np.float32)
    hits = memory.read(FUNC_ID, [digest_of(n) for n in numbers], out)
    wrong = sum(not np.array_equal(out[n], row_of(n)) for n in np.flatnonzero(hits))
    return wrong, int((~hits[:n_rows]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    args = parser.parse_args()
    warnings.simplefilter("error")  # a killed writer is no damage: nobody shall be warned
    n_rows = n_unsealed = wrong = missing = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.kills):
            n_rows = kill_one(folder, n_rows, seed)
            memory = check_memory(folder)
            assert memory is not None
            data_file = os.path.join(folder, "joblib", "data.mdb")
            n_unsealed += not is_sealed(data_file, os.stat(data_file))
            of_this = check(memory, n_rows)
            wrong, missing = wrong + of_this[0], missing + of_this[1]
            del memory
    print(
        f"{args.kills} kills, {n_unsealed} of them within a commit, {n_rows} reported rows: "
        f"{wrong} wrong, {missing} missing"
    )
    sys.exit(bool(wrong or missing))


if __name__ == "__main__":
    main()
