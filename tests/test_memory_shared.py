"""A memory whose file others damage, clear, shrink and count while this process uses it."""

import contextlib
import multiprocessing
import os
import random
import shutil
import threading
import time
import warnings

import joblib
import numpy as np
import pytest
from test_memory import digest, forked, join

from sktransfer._memory import store as _store
from sktransfer._memory import store_format
from sktransfer._memory.memory import BACKEND, check_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
NUMBERS = range(400)
WIDTHS = {"embedding": 300, "activation": 3000}  # in a page, and on pages of their own


def write(memory, numbers=NUMBERS):
    for func_id, width in WIDTHS.items():
        rows = [np.full(width, number, np.float32) for number in numbers]
        memory.write(func_id, [digest(number) for number in numbers], rows)


def n_hits(memory, numbers=NUMBERS):
    """Count the rows that are there; fail if one of them is wrong."""
    total = 0
    for func_id, width in WIDTHS.items():
        out = np.full((len(numbers), width), -1, np.float32)
        hits = memory.read(func_id, [digest(number) for number in numbers], out)
        wanted = np.where(hits, numbers, -1).astype(np.float32)
        assert (out == wanted[:, None]).all()
        total += hits.sum()
    return total


# ---------------------------------------------------------------------------------------- damage


def overwrite(path, seed, content):
    """Change one, 60 or 300 places, the pages that LMDB reads first included or not."""
    rng, size = random.Random(seed), os.path.getsize(path)
    length, n_places = [(4000, 1), (16, 60), (4, 300)][seed % 3]
    with open(path, "r+b") as file:
        for _ in range(n_places):
            file.seek(rng.randrange(0 if seed % 2 else 8192, size - 64))
            file.write(content(rng, length)[: size - file.tell()])


def damage(path, seed):
    """Damage a file and put its time of modification back."""
    found = os.stat(path)
    if seed % 10 == 0:
        os.truncate(path, random.Random(seed).randrange(found.st_size))
    elif seed % 10 == 5:
        overwrite(path, seed, lambda rng, length: bytes(length))
    else:
        overwrite(path, seed, lambda rng, length: rng.randbytes(length))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _use(folder, is_open_before, connection):
    """Read, after the parent has damaged the file, then compute again what is missing."""
    memory = check_memory(folder)
    if is_open_before:
        assert n_hits(memory) == 2 * len(NUMBERS)
    connection.send("ready")
    connection.recv()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = n_hits(memory)
        write(memory)
    assert n_hits(memory) == 2 * len(NUMBERS)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (found < 2 * len(NUMBERS) or bool(messages))
    assert all(folder in message and "damaged" in message for message in messages)


# Of seeds 0 to 299, the first three ended a process by SIGBUS or by an exception where the file was
# trusted; the others are of all the kinds there are.
def test_damage_that_kept_the_time_of_modification(tmp_path):
    write_to = check_memory(tmp_path / "sound")
    for start in range(0, len(NUMBERS), 50):
        write(write_to, NUMBERS[start : start + 50])
    for seed in (134, 196, 272, *range(12)):
        folder = tmp_path / str(seed)
        shutil.copytree(tmp_path / "sound", folder)
        assert n_hits(check_memory(folder), [0]) == 2  # which seals the copy
        ours, theirs = multiprocessing.Pipe()
        child = forked(_use, str(folder), seed % 4 < 2, theirs)
        assert ours.recv() == "ready"
        damage(folder / "joblib" / "data.mdb", seed)
        ours.send("go on")
        child.join(300)
        assert child.exitcode == 0, f"seed {seed}: exit code {child.exitcode}"


def test_a_seal_outlives_the_process_but_no_change(tmp_path, monkeypatch):
    """A sound file is checked only if something else than a memory has changed it."""
    checked = []
    monkeypatch.setattr(_store, "find_problem", lambda path: checked.append(path))
    memory = check_memory(tmp_path)
    write(memory)
    checked.clear()  # the new, empty file
    join(forked(write, memory), forked(n_hits, memory))
    assert n_hits(memory) == 2 * len(NUMBERS) and not checked
    path = tmp_path / "joblib" / "data.mdb"
    found = os.stat(path)
    with open(path, "r+b") as file:
        content = file.read(1)
        file.seek(0)
        file.write(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert n_hits(memory) == 2 * len(NUMBERS) and len(checked) == 1
    memory.memory.reduce_size(items_limit=100)
    assert n_hits(memory) == 100 and len(checked) == 1


# ------------------------------------------------------------------------ many at the same time


def _info(memory):
    assert set(memory.info()) == {"n_entries", "n_bytes"}


def _clear(memory):
    memory.memory.clear(warn=False)
    time.sleep(0.02)


def _reduce_size(memory):
    memory.memory.reduce_size(items_limit=20)
    time.sleep(0.01)


def _get_items(memory):
    memory.memory.store_backend.get_items()


def _write(memory):
    write(memory, range(50))


def _read(memory):
    n_hits(memory, range(50))


JOBS = [_info, _clear, _reduce_size, _get_items, _write, _write, _read]


def _repeat(job, folder, until, failures=None):
    memory = check_memory(folder)
    try:
        while time.monotonic() < until:
            job(memory)
    except BaseException as error:
        if failures is None:
            raise
        failures.append(repr(error))


def test_clear_and_info_beside_readers_and_writers(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "FIRST_MAP_SIZE", 1 << 16)  # others often enlarge the map
    until, failures = time.monotonic() + 1.5, []
    children = [forked(_repeat, job, tmp_path, until) for job in JOBS]
    threads = [
        threading.Thread(target=_repeat, args=(job, tmp_path, until, failures)) for job in JOBS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    join(*children)
    assert not failures
    memory = check_memory(tmp_path)
    write(memory)
    assert n_hits(memory) == 2 * len(NUMBERS)


@pytest.mark.parametrize("step", ["link", "open_environment"])
def test_a_new_file_that_another_process_deletes_is_made_again(tmp_path, monkeypatch, step):
    folder, n_cleared = tmp_path / "memory", 0
    module = os if step == "link" else store_format
    take_step = getattr(module, step)

    def clear_first(*args, **options):  # as another process may, just before this step
        nonlocal n_cleared
        if n_cleared < 3:
            n_cleared += 1
            shutil.rmtree(folder)
        return take_step(*args, **options)

    monkeypatch.setattr(module, step, clear_first)
    descriptor, is_read_only = store_format.open_file(str(folder / "data.mdb"), 1 << 16)
    os.close(descriptor)
    assert n_cleared == 3 and not is_read_only
    assert os.listdir(folder) and not list(folder.glob("data.mdb.*"))


def n_descriptors(folder):
    """Count those of files below a folder: others of the process come and go at any time."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # by now it is closed
            found += os.readlink(f"/proc/self/fd/{number}").startswith(f"{folder}/")
    return found


def test_descriptors_of_many_folders(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    memories = [check_memory(tmp_path / str(number)) for number in range(40)]
    for _ in range(2):
        for memory in memories:
            write(memory, range(2))
            assert memory.claim("embedding", [digest(9)], memory) == [True]
            memory.release_all(memory)
    n_open = n_descriptors(tmp_path)
    assert 0 < n_open <= 3 * _store.MAX_OPEN
    with contextlib.ExitStack() as stack:
        for memory in memories[:3]:
            memory.claim("embedding", [digest(9)], memory)
            stack.callback(memory.release_all, memory)
        assert n_descriptors(tmp_path) == n_open + 3
    assert all(n_hits(memory, range(2)) == 4 for memory in memories)
    del memory, memories
    assert n_descriptors(tmp_path) == 0


def _use_in_child(memory):
    store = memory.memory.store_backend._store
    assert store._env is None and not store.is_open and not store._mutex.locked()
    assert n_hits(memory) == 2 * len(NUMBERS)
    write(memory, range(400, 410))


def test_a_fork_in_the_middle_of_a_transaction(tmp_path):
    """The child uses nothing that its parent has opened, and finds all locks free."""
    memory = check_memory(tmp_path)
    write(memory)
    store = memory.memory.store_backend._store
    for is_writer in (False, True):
        begun = threading.Event()

        def stay_in_a_transaction(*tables, begun=begun):
            begun.set()
            time.sleep(0.1)

        options = {"write": is_writer}
        thread = threading.Thread(target=store.run, args=(stay_in_a_transaction,), kwargs=options)
        thread.start()
        begun.wait(300)
        child = forked(_use_in_child, memory)
        thread.join()
        join(child)
    assert n_hits(memory, range(410)) == 820


# ---------------------------------------------------------------- companions and odd folder names


@pytest.mark.parametrize("backend", [BACKEND, "local"])
def test_companions(tmp_path, backend):
    memory = check_memory(joblib.Memory(tmp_path, backend=backend, verbose=0))
    write(memory, range(5))
    before = memory.info()

    def keep_compiled(n_bytes):
        os.makedirs(memory.companions, exist_ok=True)
        with open(os.path.join(memory.companions, "model.blob"), "wb") as file:
            file.write(bytes(n_bytes))

    keep_compiled(10**6)
    after = memory.info()
    assert after["n_entries"] == before["n_entries"] == 10
    assert after["n_bytes"] == before["n_bytes"] + 10**6
    memory.memory.clear(warn=False)
    assert not os.path.exists(memory.companions) and n_hits(memory) == 0
    if backend == BACKEND:
        write(memory, range(5))
        keep_compiled(10**6)
        memory.memory.reduce_size(bytes_limit="2M")
        assert os.path.exists(memory.companions) and n_hits(memory) == 10
        memory.memory.reduce_size(bytes_limit=10**6 + 30_000)
        assert os.path.exists(memory.companions) and 0 < n_hits(memory) < 10
        memory.memory.reduce_size(bytes_limit="900K")
        assert not os.path.exists(memory.companions) and n_hits(memory) > 0


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    memory = check_memory(os.fsdecode(folder))
    write(memory)
    os.truncate(os.path.join(folder, b"joblib", b"data.mdb"), 50_000)
    with pytest.warns(UserWarning, match="damaged"):
        assert n_hits(memory) == 0
    write(memory)
    assert n_hits(memory) == 2 * len(NUMBERS)
    memory.memory.reduce_size(items_limit=10)
    assert n_hits(memory) == memory.info()["n_entries"] == 10
    assert memory.memory.cache(len)("abc") == 3
