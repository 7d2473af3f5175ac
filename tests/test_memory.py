import contextlib
import datetime
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import lmdb
import numpy as np
import pytest

from sktransfer._memory import store as _store
from sktransfer._memory.claims import Claims
from sktransfer._memory.memory import BACKEND, ImageMemory, check_memory

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
FUNC = "network-1:cut-5:avg:float32"
ME = "me"  # the owner of claims
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def digest(i):
    return i.to_bytes(16, "big")


def row(i, width=300):
    return np.random.default_rng(i).random(width, dtype=np.float32)


def write(memory, numbers, width=300, func_id=FUNC):
    memory.write(func_id, [digest(i) for i in numbers], [row(i, width) for i in numbers])


def read(memory, numbers, width=300, func_id=FUNC):
    """Return which rows are there; fail if one of them is wrong."""
    out = np.full((len(numbers), width), -1, np.float32)
    hits = memory.read(func_id, [digest(i) for i in numbers], out)
    for i, hit, found in zip(numbers, hits, out, strict=True):
        np.testing.assert_array_equal(found, row(i, width) if hit else -1, err_msg=f"row {i}")
    return hits


@pytest.fixture
def memory(tmp_path):
    return check_memory(tmp_path)


@pytest.fixture(params=[BACKEND, "local"])
def any_memory(request, tmp_path):
    return check_memory(joblib.Memory(str(tmp_path), backend=request.param, verbose=0))


def data_file(tmp_path):
    return tmp_path / "joblib" / "data.mdb"


def forked(function, *args):
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    return child


def join(*children):
    for child in children:
        child.join(300)
        assert child.exitcode == 0


# ---------------------------------------------------------------------------- what a user gives


def test_check_memory(tmp_path):
    assert check_memory(None) is None
    assert check_memory(joblib.Memory(None)) is None
    for path in (tmp_path, str(tmp_path)):
        memory = check_memory(path)
        assert isinstance(memory, ImageMemory)
        assert memory.memory.store_backend.location == str(tmp_path / "joblib")
        assert str(tmp_path) in repr(memory)
    given = joblib.Memory(tmp_path / "own", verbose=0)
    assert check_memory(given).memory is given
    with pytest.raises(TypeError, match=r"None, a path or a joblib.Memory, got 3 of type int"):
        check_memory(3)


def test_one_path_is_one_open_file(tmp_path, monkeypatch):
    first = check_memory(tmp_path)
    write(first, range(3))
    monkeypatch.chdir(tmp_path.parent)
    second = check_memory(tmp_path.name)
    assert second.memory.store_backend._store is first.memory.store_backend._store
    assert read(second, range(3)).all()


# ------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("dtype", ["f4", "f2", ">f8", "i8", "u1", "?", "c8", "M8[s]", "U3"])
@pytest.mark.parametrize("shape", [(), (7,), (0,), (2, 3, 4), (60, 500)])
def test_round_trip(any_memory, dtype, shape):
    numbers = np.random.default_rng(0).integers(0, 2, (3, *shape))
    rows = numbers.astype(dtype)
    digests = [digest(i) for i in range(3)]
    any_memory.write(FUNC, digests[:2], rows[:2])
    out = np.zeros_like(rows)
    np.testing.assert_array_equal(any_memory.read(FUNC, digests, out), [True, True, False])
    np.testing.assert_array_equal(out[:2], rows[:2])


def test_hits_by_content_and_function(any_memory):
    write(any_memory, [1, 2, 3])
    np.testing.assert_array_equal(
        read(any_memory, [3, 9, 1, 3, 8]), [True, False, True, True, False]
    )
    assert not read(any_memory, [1, 2, 3], func_id="other").any()
    assert read(any_memory, []).shape == (0,)


def test_another_kind_of_row_is_a_miss(any_memory):
    write(any_memory, [1])
    for shape, dtype in [((299,), "f4"), ((300, 1), "f4"), ((300,), "i4"), ((150,), "f8")]:
        out = np.zeros((1, *shape), dtype)
        assert not any_memory.read(FUNC, [digest(1)], out).any()
    write(any_memory, [1], width=20)
    assert read(any_memory, [1], width=20).all()


def test_out_and_rows_that_are_not_contiguous(any_memory):
    wide = np.zeros((4, 600), np.float32)
    any_memory.write(FUNC, [digest(1)], np.asfortranarray(row(1)[None].repeat(2, 0))[:1])
    hits = any_memory.read(FUNC, [digest(1), digest(2)], wide[::2, ::2])
    np.testing.assert_array_equal(hits, [True, False])
    np.testing.assert_array_equal(wide[0, ::2], row(1))
    assert not wide[1:].any() and not wide[:, 1::2].any()


def test_wrong_calls(memory):
    with pytest.raises(ValueError, match="2 digests, but 1 rows"):
        memory.read(FUNC, [digest(1), digest(2)], np.zeros((1, 3)))
    with pytest.raises(ValueError, match="zip"):
        memory.write(FUNC, [digest(1), digest(2)], [row(1)])
    with pytest.raises(TypeError, match="Python objects"):
        memory.write(FUNC, [digest(1)], [np.array([None])])


def test_info(any_memory):
    write(any_memory, range(20))
    info = any_memory.info()
    assert info["n_entries"] == 20
    assert 20 * 1200 <= info["n_bytes"] <= 100_000


# ------------------------------------------------------------------- as any other joblib.Memory


def double(x):
    calls.append(x)
    return 2 * x


calls: list = []


@pytest.mark.parametrize("compress", [False, 3])
def test_memory_cache(tmp_path, compress):
    joblib_memory = joblib.Memory(str(tmp_path), backend=BACKEND, verbose=0, compress=compress)
    cached = joblib_memory.cache(double)
    calls.clear()
    big = np.arange(30_000.0)
    for argument in (3, "ab", big, 3, "ab", big):
        np.testing.assert_array_equal(np.asarray(cached(argument)), np.asarray(double(argument)))
        calls.pop()
    assert len(calls) == 3
    assert cached.check_call_in_cache(3) and not cached.check_call_in_cache(4)
    assert cached.call_and_shelve(3).get() == 6
    assert pickle.loads(pickle.dumps(cached))(3) == 6 and len(calls) == 3
    cached.clear(warn=False)
    assert not cached.check_call_in_cache(3)
    assert cached(3) == 6 and len(calls) == 4


def test_long_function_name(memory):
    name = "a/long/" + "name" * 200
    backend = memory.memory.store_backend
    backend.dump_item([name, "0" * 32], "value")
    assert backend.contains_item([name, "0" * 32])
    assert backend.load_item([name, "0" * 32]) == "value"
    backend.clear_path([name])
    assert not backend.contains_item([name, "0" * 32])


def test_clear(any_memory, tmp_path):
    write(any_memory, range(200))
    cached = any_memory.memory.cache(double)
    assert cached(5) == 10
    any_memory.memory.clear(warn=False)
    assert not read(any_memory, range(200)).any()
    assert any_memory.info()["n_entries"] == 0
    if any_memory.memory.backend == BACKEND:
        assert data_file(tmp_path).stat().st_size < 100_000
    write(any_memory, range(3))
    assert read(any_memory, range(3)).all() and cached(5) == 10


def test_clear_one_function(memory):
    write(memory, [1, 2])
    write(memory, [1, 2], func_id="other")
    memory.memory.store_backend.clear_path([FUNC])
    assert not read(memory, [1, 2]).any()
    assert read(memory, [1, 2], func_id="other").all()


@pytest.fixture
def aged(memory, monkeypatch):
    """A memory whose rows 0..9 were written one day after the other, and row 0 read just now."""
    monkeypatch.setattr(_store, "TOUCH_EVERY", 3600.0)
    now, day = time.time(), 86400
    for i in range(10):
        monkeypatch.setattr(time, "time", lambda i=i: now - (10 - i) * day)
        write(memory, [i])
    monkeypatch.setattr(time, "time", lambda: now)
    assert read(memory, [0]).all()
    return memory


@pytest.mark.parametrize(
    "limits",
    [
        {"items_limit": 4},
        {"bytes_limit": 4 * 1300},
        {"bytes_limit": "5K"},
        {"age_limit": datetime.timedelta(days=3.5)},
    ],
)
def test_reduce_size(aged, limits):
    aged.memory.reduce_size(**limits)
    assert np.flatnonzero(read(aged, range(10))).tolist() == [0, 7, 8, 9]


def test_reduce_size_gives_space_back(memory, tmp_path):
    write(memory, range(1000))
    full = data_file(tmp_path).stat().st_size
    for start in range(2000, 3000, 100):  # into the pages of the deleted
        memory.memory.reduce_size(items_limit=900)
        write(memory, range(start, start + 100))
    assert data_file(tmp_path).stat().st_size <= full * 1.3
    memory.memory.reduce_size(items_limit=100)
    assert data_file(tmp_path).stat().st_size < full / 4
    assert read(memory, range(3000)).sum() == 100


def test_reduce_size_counts_results_of_functions(memory):
    cached = memory.memory.cache(double)
    cached(1)
    write(memory, [1])
    items = memory.memory.store_backend.get_items()
    assert len(items) == 2 and min(item.size for item in items) > 20
    memory.memory.reduce_size(items_limit=0)
    assert memory.memory.store_backend.get_items() == []
    assert not cached.check_call_in_cache(1)


def test_a_warm_read_writes_nothing(memory, tmp_path):
    write(memory, range(50))
    read(memory, range(50))
    before = data_file(tmp_path).stat().st_mtime_ns
    read(memory, range(50))
    assert data_file(tmp_path).stat().st_mtime_ns == before


# ------------------------------------------------------------------------ many at the same time


# Without the package's __init__, whose imports take longer than the test.
WRITER = """
import pickle, sys, types
sys.path[:0] = sys.argv[1:3]
package = sys.modules["sktransfer"] = types.ModuleType("sktransfer")
package.__path__ = [sys.argv[2] + "/sktransfer"]
from test_memory import read, write
memory, start = pickle.load(sys.stdin.buffer), int(sys.argv[3])
for i in range(start, start + 300, 10):
    write(memory, range(i, i + 10))
    assert read(memory, range(start, i + 10)).all()
"""


def test_two_processes_write(memory, tmp_path):
    tests = os.path.dirname(__file__)
    folders = [tests, os.path.dirname(os.path.dirname(os.path.dirname(_store.__file__)))]
    command = [sys.executable, "-W", "error::UserWarning", "-c", WRITER, *folders]
    (tmp_path / "memory.pkl").write_bytes(pickle.dumps(memory))
    with contextlib.ExitStack() as stack:
        children = []
        for start in ("0", "200"):  # the rows from 200 to 300 are written by both
            stdin = stack.enter_context(open(tmp_path / "memory.pkl", "rb"))
            children.append(subprocess.Popen([*command, start], stdin=stdin))
        while any(child.poll() is None for child in children):
            read(memory, range(500))
    assert [child.returncode for child in children] == [0, 0]
    assert read(memory, range(500)).all()


def _write_and_read(memory, start):
    for i in range(start, start + 100, 10):
        write(memory, range(i, i + 10))
    assert read(memory, range(start, start + 100)).all()


@needs_fork
def test_fork(memory):
    write(memory, range(10))
    children = [forked(_write_and_read, memory, 100 * i) for i in (1, 2)]
    _write_and_read(memory, 300)
    join(*children)
    assert read(memory, [*range(10), *range(100, 400)]).all()


def test_threads(memory):
    failures = []

    def work(start):
        try:
            _write_and_read(memory, start)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert read(memory, range(400)).all()


def test_threads_that_write_leave_warnings_as_they_were(tmp_path):
    filters, show = list(warnings.filters), warnings._showwarnmsg_impl
    memories = [check_memory(joblib.Memory(tmp_path / name, verbose=0)) for name in "abc"]

    def work(memory):
        for i in range(60):
            write(memory, [i])

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, memories))
    assert warnings.filters == filters and warnings._showwarnmsg_impl is show
    assert all(read(memory, range(60)).all() for memory in memories)


def test_pickle(memory):
    write(memory, range(5))
    again = pickle.loads(pickle.dumps(memory))
    assert again.memory.store_backend._store is memory.memory.store_backend._store
    assert read(again, range(5)).all()


@needs_fork
def test_growth(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "FIRST_MAP_SIZE", 1 << 16)
    memory = check_memory(tmp_path)
    write(memory, range(5))
    join(forked(write, memory, range(5, 300)))  # this process learns of it by MapResizedError
    assert read(memory, range(300)).all()
    write(memory, range(300, 900), width=2000)
    assert read(memory, range(300, 900), width=2000).all()
    assert data_file(tmp_path).stat().st_size > 20 << 16


# ---------------------------------------------------------------------------------------- damage


def _cut(size):
    return lambda path, rng: os.truncate(path, size if size >= 0 else os.path.getsize(path) // 2)


def _overwrite(length, n_places=1):
    def damage(path, rng):
        with open(path, "r+b") as file:
            for _ in range(n_places):
                file.seek(rng.randrange(8192, os.path.getsize(path)))
                file.write(rng.randbytes(length))

    return damage


def _zero_header(path, rng):
    with open(path, "r+b") as file:
        file.write(bytes(8192))


def _text(path, rng):
    os.unlink(path)
    with open(path, "w") as file:
        file.write("no database\n" * rng.randrange(1, 5000))


DAMAGES = {
    "half": _cut(-1),
    "empty": _cut(0),
    "100 bytes": _cut(100),
    "block": _overwrite(30_000),
    "places": _overwrite(16, 60),
    "header": _zero_header,
    "text": _text,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(tmp_path, damage, reopened, seed):
    memory = check_memory(tmp_path)
    for start in range(0, 400, 100):
        write(memory, range(start, start + 100))
        write(memory, range(start, start + 100, 10), width=3000, func_id="activations")
    if reopened:
        del memory
    DAMAGES[damage](data_file(tmp_path), random.Random(seed))
    memory = check_memory(tmp_path) if reopened else memory
    with pytest.warns(UserWarning, match=f"{tmp_path}.* damaged .*computed again") as caught:
        read(memory, range(400))
        read(memory, range(0, 400, 10), width=3000, func_id="activations")
        write(memory, range(400))
        write(memory, range(0, 400, 10), width=3000, func_id="activations")
    assert len(caught) == 1
    is_renamed = "begins anew" in str(caught[0].message)
    assert data_file(tmp_path).with_name("data.mdb.damaged").exists() == is_renamed
    assert read(memory, range(400)).all()
    assert read(memory, range(0, 400, 10), width=3000, func_id="activations").all()


def test_damage_under_an_intact_seal(tmp_path, memory):
    write(memory, range(400))
    found = os.stat(data_file(tmp_path))
    _overwrite(50, 100)(data_file(tmp_path), random.Random(0))
    os.utime(data_file(tmp_path), ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.warns(UserWarning, match="damaged"):
        read(memory, range(400))
        write(memory, range(400))
        read(memory, range(400))
        write(memory, range(400))
    assert read(memory, range(400)).all()


def test_damaged_result_of_a_function(tmp_path, memory):
    cached = memory.memory.cache(double)
    cached("a needle")
    content = data_file(tmp_path).read_bytes()
    data_file(tmp_path).write_bytes(content.replace(b"needlea needle", b"needlea poodle"))
    assert cached("a needle") == "a needlea needle"


def test_sound_copies_and_deleted_files(tmp_path, memory):
    write(memory, range(5))
    content = data_file(tmp_path).read_bytes()
    write(memory, range(5, 9))
    data_file(tmp_path).write_bytes(content)
    assert read(memory, range(9)).sum() == 5
    os.unlink(data_file(tmp_path))
    assert not read(memory, range(9)).any()
    write(memory, range(9))
    os.rename(tmp_path / "joblib", tmp_path / "moved")
    assert not read(memory, range(9)).any()
    assert read(check_memory(joblib.Memory(tmp_path / "moved", backend=BACKEND)), range(9)).all()


@needs_fork
def test_another_process_begins_anew(tmp_path, memory):
    write(memory, range(50))
    os.truncate(data_file(tmp_path), 0)

    def rescue():
        with pytest.warns(UserWarning, match="damaged"):
            write(memory, range(3))

    join(forked(rescue))
    assert np.flatnonzero(read(memory, range(50))).tolist() == [0, 1, 2]  # and no second warning


def _write_on(memory, connection):
    for start in range(0, 10**6, 10):
        write(memory, range(start, start + 10))
        connection.send(start + 10)


@needs_fork
def test_killed_writers(memory):
    for seed in range(6):
        ours, theirs = multiprocessing.Pipe()
        child = forked(_write_on, memory, theirs)
        written = ours.recv()
        time.sleep(random.Random(seed).uniform(0, 0.05))
        child.kill()
        child.join()
        while ours.poll():
            written = ours.recv()
        hits = read(memory, range(written + 20))
        assert hits[:written].all()
        memory.memory.clear(warn=False)


# --------------------------------------------------------------------- places that do not take it


@contextlib.contextmanager
def mounted(folder, options):
    """Mount a small file system; most test runs may not, or are not on Linux."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("backend", [BACKEND, "local"])
def test_full_disk(tmp_path, backend):
    with mounted(tmp_path / "small", "size=2m"):
        memory = check_memory(joblib.Memory(str(tmp_path / "small"), backend=backend, verbose=0))
        write(memory, range(10))
        with pytest.warns(
            UserWarning, match=r"small.*cannot be written.*([Nn]o space|MB free)"
        ) as caught:
            for start in range(10, 5000, 100):
                write(memory, range(start, start + 100))
        assert len(caught) == 1
        assert read(memory, range(10)).all()
        read(memory, range(5000))
        if backend == BACKEND:
            memory.memory.clear(warn=False)
            write(memory, range(10))
            assert read(memory, range(10)).all()
        del memory


def test_limit_on_file_size(tmp_path):
    resource = pytest.importorskip("resource")
    memory = check_memory(tmp_path)
    write(memory, range(10))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        with pytest.warns(UserWarning, match="cannot be written") as caught:
            write(memory, range(10, 1000))
            write(memory, range(10, 1000))
        assert len(caught) == 1
        assert read(memory, range(10)).all()

    join(forked(limited))
    assert read(memory, range(1000)).sum() == 10


def test_read_only_folder(tmp_path):
    with mounted(tmp_path / "fixed", "size=8m"):
        write(check_memory(tmp_path / "fixed"), range(10))
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "fixed")], check=True)
        memory = check_memory(tmp_path / "fixed")
        assert read(memory, range(12)).sum() == 10
        with pytest.warns(UserWarning, match=r"fixed.*cannot be written.*[Rr]ead-only") as caught:
            write(memory, range(12))
            write(memory, range(12))
        assert len(caught) == 1
        assert read(memory, range(12)).sum() == 10
        assert memory.claim(FUNC, [digest(1)], ME) == [True]
        with pytest.raises(OSError, match="[Rr]ead-only"):
            memory.memory.clear(warn=False)
        del memory


def test_no_folder_there(tmp_path):
    (tmp_path / "file").write_text("")
    memory = check_memory(tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match=r"cannot be read: .*The work goes on") as caught:
        assert not read(memory, range(3)).any()
        write(memory, range(3))
        assert memory.claim(FUNC, [digest(1)], ME) == [True]
        assert memory.memory.cache(double)(3) == 6
    assert len(caught) == 1


def test_damage_in_a_read_only_folder(tmp_path):
    with mounted(tmp_path / "fixed", "size=8m"):
        write(check_memory(tmp_path / "fixed"), range(100))
        os.truncate(tmp_path / "fixed" / "joblib" / "data.mdb", 50_000)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "fixed")], check=True)
        memory = check_memory(tmp_path / "fixed")
        with pytest.warns(UserWarning, match="damaged.*[Rr]ead-only") as caught:
            assert not read(memory, range(12)).any()
            write(memory, range(3))
        assert len(caught) == 1
        del memory


def test_damaged_file_of_joblib(tmp_path):
    memory = ImageMemory(joblib.Memory(tmp_path, verbose=0))
    write(memory, range(3))
    (tmp_path / FUNC / digest(1).hex() / "output.pkl").write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="cannot be read") as caught:
        assert read(memory, range(3)).tolist() == [True, False, True]
        read(memory, range(3))
    assert len(caught) == 1


def test_the_plain_lmdb_file_stays_readable(memory, tmp_path):
    """The format is LMDB's: other tools can open what we write."""
    write(memory, range(3))
    copy = shutil.copy(data_file(tmp_path), tmp_path)
    with lmdb.open(copy, subdir=False, readonly=True, max_dbs=3) as env:
        assert env.stat()["entries"] == 3


# ---------------------------------------------------------------------------------------- claims


KEYS = [digest(i) for i in range(5)]


def _hold(memory, digests, connection):
    connection.send(memory.claim(FUNC, digests, ME))
    if connection.recv() == "release":
        memory.release_all(ME)
        connection.recv()


@pytest.fixture
def holder(any_memory):
    """Another process that holds the claims of KEYS[:2]."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    read(any_memory, [])
    ours, theirs = multiprocessing.Pipe()
    child = forked(_hold, any_memory, KEYS[:2], theirs)
    assert ours.recv() == [True, True]
    yield child, ours
    child.kill()
    child.join()


def test_claims_between_processes(any_memory, holder):
    _, connection = holder
    assert any_memory.claim(FUNC, KEYS, ME) == [False, False, True, True, True]
    assert any_memory.claim("other", KEYS[:2], ME) == [True, True]
    with pytest.raises(RuntimeError, match="Release your claims"):
        any_memory.wait(FUNC, KEYS[0], ME)
    any_memory.release("other", KEYS[:2], ME)
    any_memory.release(FUNC, KEYS, ME)
    released = threading.Event()

    def release():
        released.set()
        connection.send("release")

    threading.Timer(0.3, release).start()
    any_memory.wait(FUNC, KEYS[0], ME)
    any_memory.wait(FUNC, KEYS[1], ME)
    assert released.is_set()
    assert any_memory.claim(FUNC, KEYS[:2], ME) == [True, True]
    any_memory.release_all(ME)


def test_a_killed_process_holds_nothing(any_memory, holder):
    child, _ = holder
    threading.Timer(0.2, os.kill, [child.pid, signal.SIGKILL]).start()
    any_memory.wait(FUNC, KEYS[0], ME)
    any_memory.wait(FUNC, KEYS[1], ME)
    assert any_memory.claim(FUNC, KEYS, ME) == [True] * 5
    any_memory.release_all(ME)


def test_threads_open_one_file_of_claims(tmp_path, monkeypatch):
    """The process loses all its locks when it closes a second descriptor."""
    opened, really_open = [], os.open

    def slowly(path, *args):
        if str(path).endswith("claims"):
            time.sleep(0.05)
            opened.append(path)
        return really_open(path, *args)

    monkeypatch.setattr(os, "open", slowly)
    claims = Claims(str(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda place: claims.take_free([place], place), range(4)))
    assert len(opened) == 1


def test_claims_between_owners(memory):
    you = object()
    assert memory.claim(FUNC, KEYS[:2], ME) == [True, True]
    assert memory.claim(FUNC, KEYS[:3], ME) == [False, False, True]  # not even twice
    assert memory.claim(FUNC, KEYS[1:4], you) == [False, False, True]
    memory.release(FUNC, KEYS, you)  # what is its own
    assert memory.claim(FUNC, KEYS, you) == [False, False, False, True, True]
    waiter = threading.Thread(target=memory.wait, args=(FUNC, KEYS[0], "another"))
    waiter.start()
    time.sleep(0.1)
    assert waiter.is_alive()
    releaser = threading.Thread(target=memory.release_all, args=(ME,))
    releaser.start()
    releaser.join()
    waiter.join(300)
    assert not waiter.is_alive()
    with pytest.raises(RuntimeError, match="Release your claims"):
        memory.wait(FUNC, KEYS[0], you)
    memory.wait(FUNC, KEYS[0], ME)


def _compute_missing(memory, connection):
    """Do what an estimator does, and report what was computed."""
    computed, pending = [], list(range(60))
    while pending:
        pending = [i for i in pending if not read(memory, [i])[0]]
        mine = memory.claim(FUNC, [digest(i) for i in pending], ME)
        ours = [i for i, is_mine in zip(pending, mine, strict=True) if is_mine][:10]
        others = [i for i, is_mine in zip(pending, mine, strict=True) if is_mine][10:]
        memory.release(FUNC, [digest(i) for i in others], ME)
        missing = [i for i in ours if not read(memory, [i])[0]]
        time.sleep(0.01)
        write(memory, missing)
        computed += missing
        memory.release(FUNC, [digest(i) for i in ours], ME)
        if not ours and pending:
            memory.wait(FUNC, digest(pending[0]), ME)
    connection.send(computed)


@needs_fork
def test_nothing_is_computed_twice(memory):
    pipes = [multiprocessing.Pipe() for _ in range(3)]
    children = [forked(_compute_missing, memory, theirs) for _, theirs in pipes]
    computed = [i for ours, _ in pipes for i in ours.recv()]
    join(*children)
    assert sorted(computed) == list(range(60))
    assert read(memory, range(60)).all()


def test_no_warning_is_left_over(memory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(memory, range(3))
        assert read(memory, range(3)).all()
