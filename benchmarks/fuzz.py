"""Damage images and model files at random for a chosen time: each must be decoded or refused.

Images are mutated and given as bytes and as files: each must decode, or raise a ValueError or a
TypeError that names its row, and its file if it has one. Model files are mutated, and crafted with
nodes of every kind that name what a file must not run; `load_model` must load or refuse them, and
neither it nor a prediction by what it loaded may run a command, unpickle, or write a file.

All of it runs in child processes with limits of memory and time, whose standard error must stay
empty. One of each kind of failure is kept in a folder.

    python benchmarks/fuzz.py [--seconds 300] [--parts images models] [--seed 0] [--keep folder]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from _common import environment, say
from _mutations import images, model_file, models, mutated
from PIL import Image
from tabulate import tabulate

from sktransfer import FineTunedClassifier, load_model
from sktransfer.io import check_images

SECONDS = 30  # that a case may take
MEMORY = 4 * 2**30  # bytes that a child may add to what it has once it is warm
FAILURES = ("odd error", "standard error", "crash", "hang", "canary")
IN_PREDICT = ("crash in predict", "hang in predict")  # of a damaged model: not promised
COLUMNS = ("cases", "decoded", "loaded", "refused", *FAILURES, *IN_PREDICT)
Case = tuple[str, str, bytes]  # part, a name whose suffix is the format, content


# ------------------------------------------------------------------------------ in a child

DEEDS = {"os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.mkdir"}
DEEDS |= {"os.remove", "os.rename", "os.rmdir", "socket.connect", "pickle.find_class", "os.putenv"}


class Child:
    """What runs in a child process: it answers a case with what came out, and a text."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp()
        os.chdir(self.folder)
        self.error = open("stderr", "w+b")  # noqa: SIM115
        os.dup2(self.error.fileno(), 2)
        sys.dont_write_bytecode = True
        self.deeds: list[str] | None = None
        self.good = images()["rgb.png"]
        self.row = [self.good]
        FineTunedClassifier(image_size=32, runtime="torch").fit([self.good] * 4, [0, 1, 0, 1])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        sys.addaudithook(self.watch)

    def watch(self, event: str, details: tuple) -> None:
        if self.deeds is None:
            return
        writes = event == "open" and isinstance(details[2], int) and details[2] & 3
        if event in DEEDS or writes:
            self.deeds.append(f"{event} {details}"[:200])

    def written(self) -> str:
        """Return what the last case wrote to the standard error."""
        self.error.seek(0)
        text = self.error.read().decode(errors="replace")
        self.error.seek(0)
        self.error.truncate()
        return text

    def image(self, name: str, data: bytes) -> tuple[str, str]:
        found = [self.one_image(data, "row 1")]
        Path(name).write_bytes(data)
        found.append(self.one_image(name, f"row 1 ('{name}')"))
        Path(name).unlink()
        bad = [answer for answer in found if answer[0] in FAILURES]
        return (bad or found)[0]

    def one_image(self, item: Any, where: str) -> tuple[str, str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Pillow's own, of what is large but below `max_pixels`; people may have filters for it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                pixels = check_images([item, item]).load(1)
                answer = "decoded", str(tuple(pixels.shape))
                assert pixels.shape[0] == 3 and str(pixels.dtype) == "torch.uint8"
            except (ValueError, TypeError) as error:
                answer = "refused", str(error)
                if where not in str(error):
                    answer = "odd error", f"{type(error).__name__}: {error}"
            except BaseException as error:
                answer = "odd error", f"{type(error).__name__}: {error}"
        odd = [str(w.message) for w in caught if where not in str(w.message)]
        return ("standard error", f"warning: {odd[0]}") if odd else answer

    def model(self, data: bytes, pipe: Connection) -> tuple[str, str]:
        Path("case.skops").write_bytes(data)
        before = sorted(os.listdir())
        self.deeds = deeds = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = self.loaded(pipe)
        finally:
            self.deeds = None
        if deeds or sorted(os.listdir()) != before:
            return "canary", f"{deeds} {os.listdir()}"
        return answer

    def loaded(self, pipe: Connection) -> tuple[str, str]:
        try:
            model = load_model("case.skops")
        except ValueError as error:
            is_good = str(error).startswith("'case.skops' ") and str(error).isprintable()
            return "refused" if is_good else "odd error", str(error)
        except BaseException as error:
            return "odd error", f"{type(error).__name__}: {error}"
        pipe.send(("predict", ""))
        with contextlib.suppress(Exception):  # a model of odd numbers may fail
            model.predict(self.row)
        self.written()  # what it says of them is not looked at
        return "loaded", type(model).__name__


def serve(pipe: Connection) -> None:
    child = Child()
    pipe.send(("ready", ""))
    child.written()
    with contextlib.suppress(EOFError):
        while True:
            part, name, data = pipe.recv()
            answer = child.image(name, data) if part == "images" else child.model(data, pipe)
            said = child.written()
            if said and answer[0] not in FAILURES:
                answer = "standard error", said
            pipe.send(answer)


# ------------------------------------------------------------------------------ in the parent


class Worker:
    """A warm child process and the case that it has."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.case: Case | None = None
        self.since = time.monotonic()
        self.is_ready = self.predicts = False

    def give(self, case: Case) -> None:
        self.case, self.since, self.predicts = case, time.monotonic(), False
        with contextlib.suppress(OSError):  # it died: the answer says so
            self.pipe.send(case)

    def answer(self) -> tuple[str, str] | None:
        """Return what came out of the case; None while it runs."""
        behind = " in predict" if self.predicts else ""
        try:
            if self.pipe.poll(0):
                kind, text = self.pipe.recv()
                if kind == "ready":
                    self.is_ready = True
                    self.since = time.monotonic()
                    return None
                if kind == "predict":
                    self.predicts = True
                    return None
                return kind, text
        except (EOFError, OSError):
            self.process.join()
            return f"crash{behind}", f"exit code {self.process.exitcode}"
        if self.case and time.monotonic() - self.since > SECONDS:
            return f"hang{behind}", f"{SECONDS} s"
        return None

    def end(self) -> None:
        self.pipe.close()  # it ends, if it does not hang
        self.process.join(5)
        self.process.kill()


def cases(parts: list[str], chance: random.Random) -> Iterator[Case]:
    seeds = {"images": images() if "images" in parts else {}}
    seeds["models"] = models() if "models" in parts else {}
    while True:
        for part in parts:
            name, data = chance.choice(list(seeds[part].items()))
            others = list(seeds[part].values())
            change = mutated if part == "images" else model_file
            yield part, name, change(data, chance, others)


def fuzz(source: Iterator[Case], seconds: float, n_workers: int, keep: Path) -> dict[str, Any]:
    """Run cases for so many seconds; return counts by group, and print what failed."""
    counts: dict[str, Any] = collections.defaultdict(collections.Counter)
    known: collections.Counter = collections.Counter()
    next(source)  # makes the seeds
    workers = [Worker() for _ in range(n_workers)]
    while not all(worker.is_ready for worker in workers):
        for worker in workers:
            if (answer := worker.answer()) is not None:
                raise RuntimeError(f"A child could not start: {answer}")
        time.sleep(0.1)
    say("the children are ready")
    end = time.monotonic() + seconds
    while time.monotonic() < end or any(worker.case for worker in workers):
        is_idle = True
        for i, worker in enumerate(workers):
            if worker.is_ready and worker.case is None and time.monotonic() < end:
                worker.give(next(source))
            answer = worker.answer()
            if answer is None or worker.case is None:
                continue
            is_idle = False
            count(counts, known, worker.case, answer, keep)
            worker.case = None
            if answer[0].startswith(("crash", "hang")):
                worker.end()
                workers[i] = Worker()
        if is_idle:
            time.sleep(0.001)
    for worker in workers:
        worker.end()
    return counts


def count(counts: Any, known: Any, case: Case, answer: tuple[str, str], keep: Path) -> None:
    part, name, data = case
    kind, text = answer
    group = f"{part}: {name.rpartition('.')[2] if part == 'images' else name}"
    counts[group].update(["cases", kind])
    if kind in ("decoded", "loaded", "refused"):
        return
    alike = f"{group} {kind} {re.sub(r'[0-9]+', '0', text)[:80]}"
    known[alike] += 1
    if known[alike] == 1:
        path = keep / f"{sum(known.values()):05}-{kind.replace(' ', '-')}-{name}"
        path.write_bytes(data)
        say(f"{kind}: {text[:300]!r}\n  kept as {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument(
        "--parts", nargs="+", choices=["images", "models"], default=["images", "models"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for what failed")
    args = parser.parse_args()
    keep = args.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    print(environment("skops"), "\n")
    counts = fuzz(cases(args.parts, random.Random(args.seed)), args.seconds, args.workers, keep)
    total = sum(counts.values(), collections.Counter())
    rows = [[group, *(c[kind] for kind in COLUMNS)] for group, c in sorted(counts.items())]
    rows.append(["all", *(total[kind] for kind in COLUMNS)])
    print(tabulate(rows, ["", *COLUMNS], tablefmt="github", intfmt=","))
    failures = sum(total[kind] for kind in FAILURES)
    print(f"\n{total['cases']:,} cases in {args.seconds:g} s, seed {args.seed}: {failures} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
