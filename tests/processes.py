"""New processes for the tests, without the seconds that its imports take each of them."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# It imports the library once and does nothing else; its children are as new as processes that
# have just imported the library. Those of the tests of multiprocessing are among them.
_SERVER = multiprocessing.get_context("forkserver")


def import_in_server():
    """Have the server import the library; without effect once it runs."""
    _SERVER.set_forkserver_preload(["sktransfer", "timm"])


import_in_server()


def start_code(code, *args, folder="."):
    """Run Python code in a new process; returns the process and the files of what it prints."""
    out, err = (tempfile.mkstemp()[1] for _ in range(2))
    process = _SERVER.Process(target=_run, args=(code, [*map(str, args)], str(folder), out, err))
    process.start()
    return process, Path(out), Path(err)


def run_code(code, *args, folder=".", timeout=600):
    """Run Python code in a new process that must not fail, and return what it prints."""
    process, *files = start_code(code, *args, folder=folder)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    out, err = (file.read_text() for file in files)
    for file in files:
        file.unlink()
    assert process.exitcode == 0, f"It ended with {process.exitcode}:\n{err}"
    return subprocess.CompletedProcess(code, process.exitcode, out, err)


def _run(code, args, folder, out, err):
    os.chdir(folder)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.argv = ["-c", *args]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
