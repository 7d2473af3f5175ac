"""What runs a slice of a network: torch, or on a CPU OpenVINO, where it is installed."""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib.util
import platform
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sktransfer._engine.program_file import KeptProgram, ProgramFile
from sktransfer._torch_state import network_lock

RUNTIMES = ("auto", "torch", "openvino")
Program = Callable[[torch.Tensor], list[torch.Tensor]]  # takes a batch; safe to call in threads

_SMALL = 100_000  # parameters; a smaller network takes less time than reading its images
# Largest difference to torch, as a share of the largest value; more means that it is not the same.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "exact": 0.0}
_SMALLEST_COSINE = 0.5  # to torch's results, of one image in 8 bits; its loss is measured elsewhere
# Images for each core until a compiled program has paid off: some for any network, and more the
# smaller it is, as compiling a small one takes as long. Measured by `benchmarks/cold_start.py`.
_IMAGES_TO_PAY_OFF, _GFLOP_TO_PAY_OFF = 25, 30
_SHARE_IF_KEPT = 0.4  # of them, for a program that is only read from a file
_KNOWN = ("torch.nn.", "timm.layers.")  # convolutions and norms whose maths is known
_EXTRA = "pip install 'sktransfer[openvino]'"
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")  # OpenVINO's names of what only passes on
_lost_threads = False  # this process was forked from one in which OpenVINO runs


def resolve_runtime(
    runtime: str, device: torch.device, precision: str, network: nn.Module, name: str
) -> str:
    """Return `"torch"` or `"openvino"`; warn if what is asked for can't be had.

    In 8 bits nothing else can take its place, so that is an error. Whether OpenVINO can be
    imported is not tried where it may never be used.
    """
    if precision == "int8":
        check_can_quantise(runtime, device)
        return "openvino"
    if runtime == "torch":
        return runtime
    reason = _reason_against(device, precision)
    if reason is None and runtime == "auto" and _is_small(network):
        return "torch"
    if reason is None and not waits_for_work(runtime, precision):
        if reason := why_not_imported():
            runtime = "openvino"  # it is installed, so the user counts on it
    if reason is None:
        return "openvino"
    if runtime == "openvino":
        warn_fallback(name, reason)
    return "torch"


def waits_for_work(runtime: str, precision: str) -> bool:
    """Tell whether torch computes until compiling pays off.

    Below float32 the rows of both differ, so one of them computes all.
    """
    return runtime == "auto" and precision == "float32"


def is_worth_compiling(
    flops: float, n_images: float, n_cores: int, file: ProgramFile | None = None
) -> bool:
    """Tell whether OpenVINO, compiling included, takes less time than torch.

    Parameters
    ----------
    flops : float
        Floating point operations of the program for one image, as torch counts them.
    n_images : float
        That the program has run, or will.
    n_cores : int
        They share the images, but not the compiling.
    file : ProgramFile, optional
        Where the program is, if it was compiled before.
    """
    worth = _IMAGES_TO_PAY_OFF + _GFLOP_TO_PAY_OFF / max(flops / 1e9, 1e-3)
    share = _SHARE_IF_KEPT if file is not None and file.exists() else 1
    return n_images >= n_cores * worth * share


def reason_of(error: Exception) -> str:
    """Return the line of OpenVINO's message that tells most."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    lines = [line for line in lines if not line.startswith("Check '")] or lines or [""]
    missing = [line for line in lines if line.startswith("No conversion rule")]
    return f"{type(error).__name__}: {(missing or lines)[0]}"


def warn_fallback(name: str, reason: str) -> None:
    """Say that torch computes instead, and why."""
    message = f"Backbone {name!r} runs on torch, not on OpenVINO: {reason}."
    warnings.warn(message, UserWarning, stacklevel=2)


def forget_openvino(programs: Iterable[Any]) -> None:
    """Have a forked child use torch: OpenVINO waits for threads that only the parent has.

    So does the end of its objects, which therefore never comes: not even with the process.
    """
    global _lost_threads
    if _core.cache_info().currsize:
        _lost_threads = True
        for kept in (_core(), *programs):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _reason_against(device: torch.device, precision: str) -> str | None:
    if device.type != "cpu":
        return f"runtime='openvino' is for a CPU, and the device is {str(device)!r}"
    if precision not in _TOLERANCE:
        return f"it does not compute in {precision}"
    if (reason := why_not_after_fork()) is not None:
        return reason
    if importlib.util.find_spec("openvino") is None:
        return f"it is not installed: {_EXTRA}"
    return None


def why_not_after_fork() -> str | None:
    """Return why OpenVINO can't be used in this process, if it is a fork."""
    if not _lost_threads:
        return None
    return (
        "this process was forked from one in which OpenVINO runs; start it by the method 'spawn' "
        "or 'forkserver' of multiprocessing, or by joblib's default, loky"
    )


def why_not_imported() -> str | None:
    """Return why OpenVINO, which is installed, can't be imported."""
    if error := _import_error():
        return f"OpenVINO can't be imported ({error}); reinstall it: {_EXTRA}"
    return None


def _is_small(network: nn.Module) -> bool:
    return sum(p.numel() for p in network.parameters()) < _SMALL


@functools.cache
def _import_error() -> str:
    try:
        _core()
    except Exception as error:  # a broken installation can fail in any way
        return f"{type(error).__name__}: {error}"
    return ""


@functools.cache
def _core() -> Any:
    # One a process: the end of one of several made Ctrl-C a segmentation fault.
    import openvino

    return openvino.Core()


def check_can_quantise(runtime: str, device: torch.device) -> None:
    """Raise an error, which says what to use, where 8 bits can't be had."""
    if device.type != "cpu":
        raise ValueError(
            f"precision='int8' is for a CPU, and the device is {str(device)!r}. Pass "
            "precision='bfloat16' or 'float16' there, or device='cpu'."
        )
    if runtime == "torch":
        raise ValueError(
            "precision='int8' is computed by OpenVINO. Pass runtime='auto' or 'openvino', or "
            "precision='bfloat16' or 'float32' with runtime='torch'."
        )
    if (reason := why_not_after_fork()) is not None:
        raise RuntimeError(f"precision='int8' can't be computed here: {reason}.")
    for package in ("openvino", "nncf"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"precision='int8' needs {package}, which is not installed: "
                "pip install 'sktransfer[int8]'"
            )
    if reason := why_not_imported():
        raise ImportError(f"precision='int8' can't be computed here: {reason}")


def warn_without_instructions(precision: str, device: torch.device) -> None:
    """Warn if a CPU computes in `bfloat16` or `int8` but has no instructions for it."""
    if precision == "int8" and device.type == "cpu" and not has_int8():
        warnings.warn(
            "This CPU has no instructions for 8 bits (VNNI): precision='int8' makes little faster "
            "here. precision='float32' is more exact.",
            UserWarning,
            stacklevel=2,
        )
    if precision == "bfloat16" and device.type == "cpu" and not has_bfloat16():
        warnings.warn(
            "This CPU has no bfloat16 instructions: precision='bfloat16' makes nothing faster "
            "here, and torch slower. Use precision='float32'.",
            UserWarning,
            stacklevel=2,
        )


@functools.cache
def has_bfloat16(if_unknown: bool = True) -> bool:
    """Tell whether the CPU multiplies in bfloat16; `if_unknown` where that is not known."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return if_unknown
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


@functools.cache
def has_int8() -> bool:
    """Tell whether the CPU multiplies in 8 bits and adds in 32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known
    names = ("_is_vnni_supported", "_is_avx512_vnni_supported", "_is_amx_tile_supported")
    known = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    return not known or any(is_supported() for is_supported in known) or _has_avx_vnni()


def _has_avx_vnni() -> bool:
    """Tell whether the system names the instructions of CPUs without AVX-512."""
    try:
        return "avx_vnni" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


# ------------------------------------------------------------------------------ torch


def fold_batch_norms(module: fx.GraphModule) -> fx.GraphModule:
    """Return the module with every batch-norm behind a convolution made a part of it.

    All other modules are shared with the given one.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    folded = fx.GraphModule(module, graph)
    for node in list(graph.nodes):
        if (before := _foldable(folded, node)) is None:
            continue
        convolution, norm = _module_at(folded, before), _module_at(folded, node)
        # timm's norms have a dropout and an activation in them.
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        folded.set_submodule(str(before.target), _fuse(convolution, norm))
        folded.set_submodule(str(node.target), nn.Sequential(*rest).eval())
    folded.recompile()
    return folded


def _fuse(convolution: nn.Conv2d, norm: Any) -> nn.Conv2d:
    """Return one layer for two; torch's own function copies the convolution's weights first."""
    fused = copy.copy(convolution)
    fused._parameters = dict(convolution._parameters)
    fused.weight, fused.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    return fused


def _module_at(module: nn.Module, node: fx.Node) -> Any:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _foldable(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the convolution whose only use is this batch-norm."""
    before = node.args[0] if len(node.args) == 1 else None
    if not isinstance(before, fx.Node) or len(before.users) > 1:
        return None
    convolution, norm = _module_at(module, before), _module_at(module, node)
    if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
        return None
    uses = [n.target for n in module.graph.nodes if n.op == "call_module"]
    if uses.count(before.target) > 1 or uses.count(node.target) > 1:
        return None  # shared layers
    known = all(type(m).__module__.startswith(_KNOWN) for m in (convolution, norm))
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in (convolution, norm))
    computed = parametrize.is_parametrized(convolution) or parametrize.is_parametrized(norm)
    return (
        before if known and not hooks and not computed and norm.running_mean is not None else None
    )


# ------------------------------------------------------------------------------ OpenVINO


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
            self._compiled = _core().import_model(kept.blob, "CPU", self._settings)
            # It was compared whole before it was written.
            self._check(inputs, expected, n_inputs=1, mine=mine)
        except Exception:  # OpenVINO's own, of what it can't import
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
        mine = [self(x) for x in inputs] if self._precision not in _TOLERANCE else []
        arrays = [[y.float().numpy() for y in results] for results in expected + mine]
        file.write(KeptProgram(blob, arrays))

    def _compile(self, module: nn.Module, example: torch.Tensor) -> None:
        self._idle = []
        make_model = getattr(module, "openvino_model", None)
        if make_model is not None:
            self._compiled = _core().compile_model(make_model(), "CPU", self._settings)
            return
        # The rest takes longer, and nobody has to wait for it who wants to trace a network.
        with network_lock.shared():
            traced = _trace(_ChannelsLast(module), _channels_last(example))
        model = _convert(traced, _channels_last(example))
        # A call of the traced graph does not meet torch.fx, which may trace in another thread.
        self._pass_on = traced.forward if _only_moves(model) else None
        if self._pass_on is None:
            self._compiled = _core().compile_model(model, "CPU", self._settings)

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

        # Named, to live until the results are copied: they may lie in it.
        shared = _channels_last(x).numpy()
        request.infer({0: openvino.Tensor(shared, shared_memory=True)})
        return _maps_first([torch.from_numpy(t.data.copy()) for t in request.output_tensors])

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
            if self._precision not in _TOLERANCE:
                _compare(results, known.setdefault(i, results), "exact", what)
        self._idle = requests


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
        if precision not in _TOLERANCE:
            _compare_direction(a, b, what)
            continue
        error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        if not error <= _TOLERANCE[precision]:
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


def read_model(graph: bytes, weights: bytes) -> Any:
    """Return a model of OpenVINO that was serialised."""
    return _core().read_model(graph, weights)


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
