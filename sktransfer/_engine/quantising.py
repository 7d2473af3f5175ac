"""A network in 8 bits is made once, by NNCF, and kept in the memory's folder."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from sktransfer._bars import tqdm
from sktransfer._engine.openvino_program import converted, reason_of
from sktransfer._engine.program import ACTIVATION, Output, Outputs
from sktransfer._engine.program_file import KeptProgram, ProgramFile
from sktransfer._engine.runtime import has_int8
from sktransfer._memory.claims import open_claims
from sktransfer._torch_state import float32_by_default
from sktransfer.transforms import Preprocessing

if TYPE_CHECKING:
    from sktransfer._engine.runner import Runner

_OTHERS = "Use precision='bfloat16' or 'float32'."
_VERSION = 2  # of what is done here and in `nncf_child`; another one makes other rows
_N_CROPS = 128
_SMALLEST_CROP = 64  # pixels
_WARN_BELOW, _REFUSE_BELOW = 0.95, 0.85  # mean cosines of embeddings to those of float32
_NAMES = re.compile(rb'(name|names|value)="[^"]*"')  # of nodes, and of those that were merged


@functools.cache
def versions() -> tuple[str, ...]:
    """Name what shapes the results: versions, major and minor, and whether weights are halved."""
    names = ("nncf", "openvino")
    found = (importlib.metadata.version(name).split(".")[:2] for name in names)
    kind = () if has_int8() else ("halved weights",)
    return (str(_VERSION), *(".".join(version) for version in found), *kind)


# ------------------------------------------------------------------------------ calibration


def calibration_images(preprocessing: Preprocessing, n: int | None = None) -> np.ndarray:
    """Return crops of scikit-learn's two photographs as they enter a network, always the same.

    Returns
    -------
    uint8 array of shape (n, height, width, 3)

    Raises
    ------
    ValueError
        If the network takes no pictures: it would be calibrated on what it never sees.
    """
    if not preprocessing.channels.are_rgb:
        raise ValueError(
            "precision='int8' is calibrated on photographs, and this network takes images of "
            f"{len(preprocessing.mean)} channels or of a value_range: pass precision='bfloat16' or "
            "'float32'."
        )
    # The numbers of this older generator never change.
    random = np.random.RandomState(0)
    images = []
    for i in range(_N_CROPS if n is None else n):
        photo = _photograph(("china.jpg", "flower.jpg")[i % 2])
        side = random.randint(_SMALLEST_CROP, min(photo.shape[:2]) + 1)
        top, left = (random.randint(0, length - side + 1) for length in photo.shape[:2])
        crop = photo[top : top + side, left : left + side]
        crop = _grey(crop) if i % 8 in (2, 3, 7) else crop
        crop = 255 - crop if i % 8 in (4, 7) else crop
        pixels = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)
        images.append(preprocessing.fit_size(pixels).permute(1, 2, 0).numpy())
    return np.stack(images)


@functools.lru_cache(2)
def _photograph(name: str) -> np.ndarray:
    """Return one of scikit-learn's photographs, without an import of all of its data sets."""
    file = importlib.resources.files("sklearn") / "datasets" / "images" / name
    with file.open("rb") as content, Image.open(content) as image:
        return np.asarray(image)


def _grey(image: np.ndarray) -> np.ndarray:
    return np.repeat(image.mean(2, keepdims=True).round().astype(np.uint8), 3, axis=2)


# ------------------------------------------------------------------------------ making it


class Made(NamedTuple):
    """What NNCF has made of a network.

    Attributes
    ----------
    graph, weights : bytes
        As OpenVINO keeps them.
    places : dict
        From a position to the name of the node that has its activation, and which of its outputs.
    cosine : float
        Mean cosine of its embeddings of the calibration images to those of float32.
    digest : str
        Of what is computed: nodes have other names in each process.
    """

    graph: bytes
    weights: bytes
    places: dict[int, tuple[str, int]]
    cosine: float
    digest: str


class ImagesLast(nn.Module):
    """A module whose images have their channels last; what it returns is as it has it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x.permute(0, 3, 1, 2))


def _make(runner: Runner, preprocessing: Preprocessing) -> Made:
    """Quantise a network; this takes a while."""
    if not runner.can_be_cut:
        raise ValueError(refusal(runner, "it can't be traced"))
    positions = list(range(1, runner.embedding + 1))
    images = calibration_images(preprocessing)
    outputs = [Output(position, ACTIVATION) for position in positions]
    module = ImagesLast(Outputs(runner, outputs, preprocessing, None))
    with tempfile.TemporaryDirectory(prefix="sktransfer-int8-") as name:
        folder = Path(name)
        try:
            with float32_by_default(nullcontext()), torch.no_grad():
                model = converted(module, torch.from_numpy(images[:1]))
            _serialise(model, folder / "network.xml")
        except Exception as error:  # OpenVINO's own, of what it can't convert
            raise ValueError(refusal(runner, _with_hint(reason_of(error)))) from error
        np.save(folder / "images.npy", images)
        settings = {"halves_weights": not has_int8()}
        (folder / "settings.json").write_text(json.dumps(settings))
        if (failure := run_apart(folder)) is not None:
            raise ValueError(refusal(runner, _with_hint(failure)))
        report = json.loads((folder / "report.json").read_text())
        graph = (folder / "quantised.xml").read_bytes()
        weights = (folder / "quantised.bin").read_bytes()
    places = dict(zip(positions, map(tuple, report["places"]), strict=True))
    return _made(graph, weights, places, report["cosine"])


def _made(graph: bytes, weights: bytes, places: dict[int, Any], cosine: float) -> Made:
    digest = hashlib.sha256(_NAMES.sub(b"", graph))
    digest.update(weights)
    return Made(graph, weights, places, cosine, digest.hexdigest())


def refusal(runner: Runner, reason: str) -> str:
    """Say that there is no such network, why not, and what to use."""
    return f"Backbone {runner.name!r} can't be computed with precision='int8': {reason}. {_OTHERS}"


def _with_hint(reason: str) -> str:
    is_of_disk = "iostream" in reason  # all that OpenVINO says of it
    return f"{reason} (is the disk of {tempfile.gettempdir()} full?)" if is_of_disk else reason


def _serialise(model: Any, path: Path) -> None:
    import openvino

    openvino.serialize(model, path, path.with_suffix(".bin"))


def run_apart(folder: Path) -> str | None:
    """Let NNCF work in a process of its own; return what went wrong, if anything did.

    See `nncf_child` for why. The process ends with this call, and with this process.
    """
    is_over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        try:  # in a thread, as Ctrl-C may come when the process has begun, but is not known yet
            return thread.submit(_run_child, folder, is_over).result()
        finally:
            is_over.set()


def _run_child(folder: Path, is_over: threading.Event) -> str | None:
    # The child ends where its end of a pipe does: when this process was killed.
    ear, mouth = os.pipe()
    with open(ear, "rb"), open(mouth, "wb"):
        return _wait_for_child(folder, ear, is_over)


def _wait_for_child(folder: Path, ear: int, is_over: threading.Event) -> str | None:
    script = Path(__file__).with_name("nncf_child.py")
    code = (
        "import runpy, sys; sys.path[:] = sys.argv[3:]; sys.argv = sys.argv[1:3]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(script), str(folder), *sys.path],
        stdin=ear,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # It then reports nothing, and has no warnings, of which the user may have made errors.
        env={**os.environ, "NNCF_CI": "1", "PYTHONWARNINGS": "ignore"},
        start_new_session=True,  # Ctrl-C is for this process, which ends the other one
    )
    messages = None
    while messages is None:
        try:
            _, messages = child.communicate(timeout=0.1)
        except subprocess.TimeoutExpired:
            if is_over.is_set():
                child.kill()
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        return f"signal {-child.returncode} ended NNCF, maybe for want of memory"
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    return (lines or [f"NNCF ended with code {child.returncode}"])[-1].rstrip(".")


# ------------------------------------------------------------------------------ keeping it


def _file(runner: Runner, preprocessing: Preprocessing, folder: str) -> ProgramFile:
    parts = (runner.fingerprint, preprocessing.fingerprint, *versions())
    return ProgramFile(folder, *parts, suffix=".quantised", is_of_machine=False)


def _kept(file: ProgramFile) -> Made | None:
    """Return the network of a file; None if there is none, or if it is damaged."""
    if (program := file.read()) is None:
        return None
    ((header,),) = program.expected
    facts = json.loads(header.tobytes())
    graph, weights = program.blob[: facts["n_graph"]], program.blob[facts["n_graph"] :]
    places = {int(position): tuple(place) for position, place in facts["places"].items()}
    return _made(graph, weights, places, facts["cosine"])


def _keep(file: ProgramFile, made: Made) -> None:
    facts = {"n_graph": len(made.graph), "places": made.places, "cosine": made.cosine}
    header = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    file.write(KeptProgram(made.graph + made.weights, [[header]]))


def quantise(
    runner: Runner,
    preprocessing: Preprocessing,
    folder: str | None,
    known: Made | None,
    verbose: bool,
) -> Made:
    """Return a network in 8 bits: of a file, or `known`, or made anew; it is then in the file."""
    if folder is None:
        return known or _make_aloud(runner, preprocessing, None, verbose)
    file, owner = _file(runner, preprocessing, folder), object()
    if (made := _kept(file)) is not None:
        return made
    _try_to_make(folder)
    claims, place = open_claims(folder), int(file.path.stem[:8], 16)
    try:
        while not claims.take_free([place], owner)[0]:  # others make it just now
            claims.wait_until_free(place, owner)
        if (made := _kept(file)) is None:
            if known is not None:
                _keep(file, known)
            made = known or _make_aloud(runner, preprocessing, file, verbose)
    finally:
        claims.give_all_back(owner)
    return made


def _try_to_make(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:  # then nothing is kept
        pass


def _make_aloud(
    runner: Runner, preprocessing: Preprocessing, file: ProgramFile | None, verbose: bool
) -> Made:
    what = f"{runner.name}: to 8 bits, once"
    with tqdm(total=1, desc=what, unit="network", disable=not verbose) as bar:
        made = _make(runner, preprocessing)
        bar.update()
    if file is not None:
        _keep(file, made)  # before the warning, of which the user may make an error
    if _REFUSE_BELOW <= made.cosine < _WARN_BELOW:
        warnings.warn(f"{_loss(runner, made)} {_OTHERS}", UserWarning, stacklevel=2)
    return made


def check_loss(runner: Runner, made: Made) -> None:
    """Raise an error if too much is lost."""
    if not made.cosine >= _REFUSE_BELOW:  # it may be not a number
        raise ValueError(f"{_loss(runner, made)} {_OTHERS}")


def _loss(runner: Runner, made: Made) -> str:
    return (
        f"precision='int8' changes backbone {runner.name!r} much: the mean cosine of its "
        f"embeddings to those of float32 is {made.cosine:.3f} on {_N_CROPS} crops of photographs."
    )
