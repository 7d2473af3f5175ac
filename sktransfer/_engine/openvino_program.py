"""A slice of a network as OpenVINO's program: compiled, compared with torch, and run in threads."""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from sktransfer._engine.program_file import KeptProgram, ProgramFile
from sktransfer._threads import called_once
from sktransfer._torch_state import network_lock

# Largest difference to torch, as a share of the largest value; more means that it is not the same.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "exact": 0.0}
_SMALLEST_COSINE = 0.5  # to torch's results, of one image in 8 bits; its loss is measured elsewhere
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")  # OpenVINO's names of what only passes on


@called_once
def core() -> Any:
    # One a process: the end of one of several made Ctrl-C a segmentation fault.
    openvino = _imported()
    made = openvino.Core()
    # What this knows of NumPy it finds out at its first array: two threads with the first ones
    # could wait for each other forever.
    _ = openvino.Tensor(np.zeros(1, np.float32)).data
    return made


def _imported() -> Any:
    """Import OpenVINO, unless it is, without the part that reports its import over the network.

    That part forks the process while others of its threads hold locks.
    """
    if "openvino" in sys.modules or "openvino_telemetry" in sys.modules:
        return importlib.import_module("openvino")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        sys.modules.pop("openvino_telemetry", None)


def reason_of(error: Exception) -> str:
    """Return the line of OpenVINO's message that tells most."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    lines = [line for line in lines if not line.startswith("Check '")] or lines or [""]
    missing = [line for line in lines if line.startswith("No conversion rule")]
    return f"{type(error).__name__}: {(missing or lines)[0]}"


class _ChannelsLast(nn.Module):
    """A module whose images and maps have their channels last, as they lie in memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = self.module(x.permute(0, 3, 1, 2) if x.ndim == 4 else x)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(y.permute(0, 2, 3, 1) if y.ndim == 4 else y for y in results)


class OpenVinoProgram:
    """A module compiled for one batch size.

    Parameters
    ----------
    make_module : callable
        Called where there is no file to read. Returns an nn.Module in eval mode, from a tensor to
        one, or to a tuple of them. If it has a method `openvino_model`, that model computes, for
        inputs and maps with their channels last, and the module says what comes out in float32.
    example : Tensor
        An input, of the only shape and dtype that calls then take.
    precision : {"float32", "bfloat16", "int8"}
    n_cores : int
        To be used in all.
    n_streams : int
        That many calls run at once, on ``n_cores / n_streams`` cores each.
    file : ProgramFile, optional
        Read instead of compiling, or written once the program is compiled. Its name must tell
        the module and all of the other parameters.

    Raises
    ------
    Exception
        Whatever OpenVINO says of a module that it can't take; ValueError if it computes something
        else than torch.

    Notes
    -----
    OpenVINO copies no input and not every weight. The weights that it takes from the module are
    held by the compiled model. Of an input, it knows the address alone: its memory is held until
    the results are copied, as they may lie there too.
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        example: torch.Tensor,
        precision: str,
        n_cores: int,
        n_streams: int,
        file: ProgramFile | None = None,
    ) -> None:
        self._settings = _settings(precision, n_cores, n_streams)
        self._precision, self._n_streams = precision, n_streams
        # What computes nothing is not worth a call of OpenVINO, whose result would be its input.
        self._pass_on: Callable[[torch.Tensor], Any] | None = None
        self._idle: list[Any] = []  # requests, each with buffers of its own
        self._joined: dict[int, int] = {}  # widths of rows that are one result, by their places
        inputs = [example, (example / 2).to(example.dtype)]
        if file is None or not self._read(file, inputs):
            self._make(make_module(), inputs, file)

    def _read(self, file: ProgramFile, inputs: list[torch.Tensor]) -> bool:
        """Take the program of a file, if there is one that works and computes what torch did."""
        if (kept := file.read()) is None:
            return False
        found = [[torch.from_numpy(y) for y in results] for results in kept.expected]
        expected, mine = found[: len(inputs)], found[len(inputs) :]
        try:
            self._joined = _row_widths(expected[0])
            self._compiled = core().import_model(kept.blob, "CPU", self._settings)
            # It was compared whole before it was written.
            self._check(inputs, expected, n_inputs=1, mine=mine)
        except Exception:  # OpenVINO's own, of what it can't import, among them
            file.remove()
            self._idle = []
            return False
        return True

    def _make(
        self, module: nn.Module, inputs: list[torch.Tensor], file: ProgramFile | None
    ) -> None:
        with network_lock.shared(), torch.inference_mode():
            results = [module(x) for x in inputs]
        expected = [list(y) if isinstance(y, tuple) else [y] for y in results]
        self._joined = _row_widths(expected[0])
        try:
            self._compile(module, inputs[0])
            self._check(inputs, expected)
        except WrongResult as error:
            self._compile_again(module, inputs, expected, error)
        if file is not None and self._pass_on is None:
            self._write(file, inputs, expected)

    def _write(
        self, file: ProgramFile, inputs: list[torch.Tensor], expected: list[list[torch.Tensor]]
    ) -> None:
        try:
            blob = self._compiled.export_model().getvalue()
        except Exception:  # OpenVINO's own, of what it can't export; it can be used all the same
            return
        mine = [self(x) for x in inputs] if self._precision not in TOLERANCE else []
        arrays = [[y.float().numpy() for y in results] for results in expected + mine]
        file.write(KeptProgram(blob, arrays))

    def _compile(self, module: nn.Module, example: torch.Tensor) -> None:
        self._idle = []
        make_model = getattr(module, "openvino_model", None)
        if make_model is not None:
            self._compile_model(make_model())
            return
        # The rest takes longer, and nobody has to wait for it who wants to trace a network.
        with network_lock.shared():
            traced = _trace(_ChannelsLast(module), _channels_last(example))
        model = _convert(traced, _channels_last(example))
        # A call of the traced graph does not meet torch.fx, which may trace in another thread.
        self._pass_on = traced.forward if _only_moves(model) else None
        if self._pass_on is None:
            self._compile_model(model)

    def _compile_model(self, model: Any) -> None:
        model = _with_joined_rows(model) if self._joined else model
        self._compiled = core().compile_model(model, "CPU", self._settings)

    def _compile_again(
        self,
        module: nn.Module,
        inputs: list[torch.Tensor],
        expected: list[list[torch.Tensor]],
        error: WrongResult,
    ) -> None:
        """Give OpenVINO a second chance: very seldom, a network is compiled wrongly."""
        self._compile(module, inputs[0])
        self._check(inputs, expected)
        warnings.warn(
            f"OpenVINO compiled a network wrongly ({error}), which was found before it was used. "
            "Compiled once more, it is right.",
            UserWarning,
            stacklevel=2,
        )

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self._pass_on is not None:
            results = self._pass_on(_channels_last(x))
            return _maps_first([y.clone() for y in results])  # they share no memory with inputs
        request = self._idle_request()
        try:
            return self._infer(x, request)
        finally:
            self._idle.append(request)

    def _infer(self, x: torch.Tensor, request: Any) -> list[torch.Tensor]:
        import openvino

        # By NumPy: each operation of torch costs more, and lets another thread in between. Named,
        # to live until the results are copied: they may lie in it.
        shared = x.numpy()
        shared = np.ascontiguousarray(shared.transpose(0, 2, 3, 1) if x.ndim == 4 else shared)
        found = request.infer(openvino.Tensor(shared, shared_memory=True), share_outputs=True)
        results = [torch.from_numpy(y.copy()) for y in found.to_tuple()]
        return _maps_first(_apart(results, self._joined) if self._joined else results)

    def _idle_request(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request()

    def _check(
        self,
        inputs: list[torch.Tensor],
        expected: list[list[torch.Tensor]],
        n_inputs: int | None = None,
        mine: Sequence[list[torch.Tensor]] = (),
    ) -> None:
        """Compare with torch: what traced or compiled wrongly must not be used.

        In 8 bits, results are far from those of torch, so all streams must have the same, which
        are `mine`, if they are known.

        Every stream has a graph of its own, and a graph may be right only for the first input
        that it is given. So each stream runs all inputs, or `n_inputs` of them in turns.
        """
        if self._pass_on is not None:
            for x, results in zip(inputs, expected, strict=True):
                _compare(self(x), results, self._precision, "what computes nothing")
            return
        n_inputs = n_inputs or len(inputs)
        requests = [self._compiled.create_infer_request() for _ in range(self._n_streams)]
        # Threads that run at the same time take a stream each. On a busy machine, one could have
        # done all of its work before another begins, so they wait for each other.
        together = threading.Barrier(self._n_streams, timeout=60)

        def run(stream: int) -> list[list[torch.Tensor]]:
            try:
                found = []
                for k in range(n_inputs):
                    together.wait()
                    found.append(self._infer(inputs[(stream + k) % len(inputs)], requests[stream]))
                return found
            except BaseException:
                together.abort()
                raise

        with ThreadPoolExecutor(self._n_streams) as threads:
            found = list(threads.map(run, range(self._n_streams)))
        known = dict(enumerate(mine))
        for stream, k in product(range(self._n_streams), range(n_inputs)):
            i, results = (stream + k) % len(inputs), found[stream][k]
            what = f"input {i}, stream {stream} of {self._n_streams}"
            _compare(results, expected[i], self._precision, what)
            if self._precision not in TOLERANCE:
                _compare(results, known.setdefault(i, results), "exact", what)
        self._idle = requests


def _row_widths(results: Sequence[torch.Tensor]) -> dict[int, int]:
    """Return the widths of the rows among results, by their places; nothing if it is one row."""
    widths = {place: y.shape[1] for place, y in enumerate(results) if y.ndim == 2}
    return widths if len(widths) > 1 else {}


def _with_joined_rows(model: Any) -> Any:
    """Return a model of OpenVINO whose rows come side by side, as its first result.

    Each result takes time of its own at every call, and all layers have dozens.
    """
    from openvino import Model, opset13

    sources = [result.input_value(0) for result in model.get_results()]
    ranks = [source.get_partial_shape().rank.get_length() for source in sources]
    rows = [source for source, rank in zip(sources, ranks, strict=True) if rank == 2]
    others = [source for source, rank in zip(sources, ranks, strict=True) if rank != 2]
    results = [opset13.result(opset13.concat(rows, 1)), *map(opset13.result, others)]
    return Model(results, model.get_parameters(), model.get_friendly_name())


def _apart(results: list[torch.Tensor], widths: dict[int, int]) -> list[torch.Tensor]:
    """Return the results of a model in their places, of which the first is the joined rows."""
    rows = dict(zip(widths, results[0].split(list(widths.values()), 1), strict=True))
    others = iter(results[1:])
    n = len(rows) + len(results) - 1
    return [rows[place] if place in rows else next(others) for place in range(n)]


def _maps_first(results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Turn maps with their channels last into (n, c, h, w)."""
    return [y.permute(0, 3, 1, 2) if y.ndim == 4 else y for y in results]


class WrongResult(ValueError):
    """OpenVINO computes something else than torch."""


def _compare(
    mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], precision: str, what: str
) -> None:
    """Raise a WrongResult if OpenVINO's results are not those of torch."""
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape:
            raise WrongResult(f"its result has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        if precision not in TOLERANCE:
            _compare_direction(a, b, what)
            continue
        error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        if not error <= TOLERANCE[precision]:
            raise WrongResult(f"its result differs by {error:.2g} of the largest value: {what}")


def _compare_direction(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    cosine = float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    if bool(b.any()) and not cosine >= _SMALLEST_COSINE:
        raise WrongResult(f"its result has a cosine of {cosine:.2g} to that of torch: {what}")


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous()


def _trace(module: nn.Module, example: torch.Tensor) -> Any:
    """Return the module's graph for inputs of this shape and dtype, its weights a part of it."""
    with warnings.catch_warnings(), torch.no_grad():
        # What is constant for one shape, and that torch.jit is not developed further. Filters are
        # those of all threads, and others may just now warn of a damaged image.
        for category in (torch.jit.TracerWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        return torch.jit.freeze(torch.jit.trace(module.eval(), example, check_trace=False))


def _convert(traced: Any, example: torch.Tensor) -> Any:
    """Return OpenVINO's model of a traced graph."""
    from openvino import PartialShape
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # openvino.convert_model does the same, and reports its use over the network.
    decoder = TorchScriptPythonDecoder(traced, example_input=(example,))
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    source = model.inputs[0].get_node()
    source.set_partial_shape(PartialShape(list(example.shape)))
    source.set_element_type(_element_type(example.dtype))
    model.validate_nodes_and_infer_types()
    return model


def converted(module: nn.Module, example: torch.Tensor) -> Any:
    """Return OpenVINO's model of a module for inputs like the example."""
    with network_lock.shared():
        traced = _trace(module, example)
    return _convert(traced, example)


def behind(source: Any, module: nn.Module) -> Any:
    """Return what a module makes of a result in a graph of OpenVINO, whose shape is known."""
    shape = list(source.get_partial_shape().to_shape())
    model = converted(module, torch.zeros(shape, device="cpu"))
    for use in model.get_parameters()[0].output(0).get_target_inputs():
        use.replace_source_output(source)
    return model.get_results()[0].input_value(0)


def read_model(graph: bytes, weights: bytes) -> Any:
    """Return a model of OpenVINO that was serialised."""
    return core().read_model(graph, weights)


def _only_moves(model: Any) -> bool:
    """Tell whether a model passes its input on, in another shape or order at most."""
    ahead = list(model.inputs[0].get_node().outputs())
    while ahead:
        for use in ahead.pop().get_target_inputs():
            node = use.get_node()
            if node.get_type_name() in _MOVES:
                ahead += node.outputs()
            elif node.get_type_name() not in ("Result", "ShapeOf"):
                return False
    return True


def _element_type(dtype: torch.dtype) -> Any:
    import openvino

    return openvino.Type.u8 if dtype == torch.uint8 else openvino.Type.f32


def _settings(precision: str, n_cores: int, n_streams: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "NUM_STREAMS": n_streams,
        "INFERENCE_NUM_THREADS": n_cores,
        "ENABLE_CPU_PINNING": False,  # or all processes would take the first cores
    }
