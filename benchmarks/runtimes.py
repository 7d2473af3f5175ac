"""What runs a network fastest on this CPU: bare forward passes on ready tensors.

Every runtime runs the same network, without its head, on the same float32 tensors. Each lives in a
process of its own, chooses its batch size (and, for OpenVINO, its hint; for torch in bfloat16,
autocast or weights in bfloat16), and then they take turns; the table has the medians.

    torch           eager, channels last
    torch-folded    the same, its batch-norms folded into the convolutions
    torch-compile   torch.compile, with weights as constants, for batches of one size
    onnxruntime     ONNX Runtime, float32 only
    openvino        OpenVINO, converted by its own converter
    openvino-onnx   OpenVINO, converted through ONNX, as that may be faster

`ready after` is the time from the torch network to the first result: conversion, compilation and
one batch. `difference` is the largest difference of an output from torch's in float32, relative to
the largest output. EfficientNet-Lite has its weights; other networks get random ones.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import (
    Built,
    embedding_network,
    environment,
    median,
    say,
    sides,
    table,
    take_turns,
    tune,
    weights_of,
)
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer import get_model

NETWORKS = (
    "resnet50",
    "mobilenet_v3_large",
    "efficientnet_lite0",
    "vit_b_16",
    "convnext_tiny",
    "swin_t",
    "vgg16",
    "densenet121",
)


class Forward(NamedTuple):
    """A network that is ready to run."""

    ready: Callable[[torch.Tensor], Any]  # a float32 batch (n, 3, h, w) to what `run` takes
    run: Callable[[Sequence[Any]], Any]  # batches
    outputs: Callable[[Any], np.ndarray]  # of one batch
    note: str = ""


# ------------------------------------------------------------------------------ torch


def run_torch(network: nn.Module, precision: str, cast: str = "autocast") -> Forward:
    """Eager torch, channels last."""
    dtype = torch.bfloat16 if precision == "bfloat16" and cast == "weights" else torch.float32
    network = network.to(dtype=dtype, memory_format=torch.channels_last)
    is_autocast = precision == "bfloat16" and cast == "autocast"

    def ready(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype=dtype).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(batches: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            for batch in batches:
                y = network(batch)
        return y

    return Forward(ready, run, lambda batch: run([batch]).float().numpy())


class _Tracer(fx.Tracer):
    """Keeps convolutions and batch-norms whole: those of timm are classes of its own."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        is_one = isinstance(module, (nn.Conv2d, _BatchNorm))
        return is_one or super().is_leaf_module(module, name)


def fold(network: nn.Module) -> nn.Module:
    """Return a copy whose batch-norms are folded into the convolutions in front of them."""
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise ValueError("it has no batch-norms")
    graph = _Tracer().trace(network)
    network = copy.deepcopy(network)
    for node in graph.nodes:
        norm = network.get_submodule(node.target) if node.op == "call_module" else None
        before = node.args[0] if isinstance(norm, _BatchNorm) else None
        if before is None or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = network.get_submodule(before.target)
        if isinstance(convolution, nn.Conv2d):
            fused = nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
            network.set_submodule(before.target, fused)
            # timm's norms hold the activation behind them, too.
            network.set_submodule(node.target, getattr(norm, "act", nn.Identity()))
    return network


def run_folded(network: nn.Module, precision: str, cast: str = "autocast") -> Forward:
    """Eager torch, channels last, batch-norms folded."""
    return run_torch(fold(network), precision, cast)


def run_compiled(network: nn.Module, precision: str, cast: str = "autocast") -> Forward:
    """torch.compile; it freezes the weights, as nothing is trained."""
    # Else a second run would find the code of the first.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    torch.compiler.reset()
    compiled = torch.compile(network, dynamic=False, options={"freezing": True})
    return run_torch(compiled, precision, cast)


# ------------------------------------------------------------------------------ others


def to_onnx(network: nn.Module, x: torch.Tensor) -> bytes:
    """Export a network to ONNX, for batches of the shape of `x`."""
    buffer = io.BytesIO()
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator has no form in ONNX
    try:
        with torch.no_grad():
            torch.onnx.export(network, (x,), buffer, dynamo=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
    return buffer.getvalue()


def run_onnx(network: nn.Module, precision: str, batch: int, size: tuple[int, int]) -> Forward:
    """ONNX Runtime with its default options."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        to_onnx(network, torch.rand(batch, 3, *size)), options, ["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(batches: Sequence[np.ndarray]) -> np.ndarray:
        for x in batches:
            (y,) = session.run(None, {name: x})
        return y

    return Forward(lambda x: x.numpy(), run, lambda x: run([x]))


def run_openvino(
    network: nn.Module,
    precision: str,
    batch: int,
    size: tuple[int, int],
    hint: str = "THROUGHPUT",
    through: str = "torch",
) -> Forward:
    """OpenVINO: with the hint THROUGHPUT several batches at once, with LATENCY all cores on one.

    It computes in float32 where the processor has no bfloat16; the note says so.
    """
    import openvino

    core = openvino.Core()
    x = torch.rand(batch, 3, *size)
    if through == "onnx":
        model = core.read_model(to_onnx(network, x))
    else:
        model = openvino.convert_model(network, example_input=x, input=[tuple(x.shape)])
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    queue = openvino.AsyncInferQueue(compiled)

    def run(batches: Sequence[np.ndarray]) -> None:
        for x in batches:
            queue.start_async({0: x}, share_inputs=True)
        queue.wait_all()

    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    streams = compiled.get_property("NUM_STREAMS")
    fell_back = f", computes in {used}" if (used == "bf16") != (precision == "bfloat16") else ""
    return Forward(
        lambda x: x.numpy(), run, lambda x: compiled(x)[0].copy(), f"{streams} streams{fell_back}"
    )


# ------------------------------------------------------------------------------ sides

RUNTIMES: dict[str, Callable[..., Forward]] = {
    "torch": run_torch,
    "torch-folded": run_folded,
    "torch-compile": run_compiled,
    "onnxruntime": run_onnx,
    "openvino": run_openvino,
    "openvino-onnx": functools.partial(run_openvino, through="onnx"),
}


def build_forward(
    backbone: str,
    runtime: str,
    precision: str,
    n: int,
    n_tuning: int,
    batches: Sequence[int],
    reference: bool = True,
) -> Built:
    """Build a side whose turn is the forward pass of `n` images, ready in memory."""
    warnings.simplefilter("ignore")  # of what torch will give up some day, and its tracer's
    network = embedding_network(backbone)
    size = get_model(backbone, weights_of(backbone)).preprocessing.size
    batches = batches[:1] if runtime == "torch-compile" else batches  # each takes minutes
    n, n_tuning = (max(1, some // max(batches)) * max(batches) for some in (n, n_tuning))
    x = torch.randn(max(n, n_tuning), 3, *size, generator=torch.Generator().manual_seed(0))
    axes: dict[str, Sequence[Any]] = {"batch": batches}
    if runtime.startswith("torch") and precision == "bfloat16":
        axes["cast"] = ("autocast", "weights")
    if runtime.startswith("openvino"):
        axes["hint"] = ("THROUGHPUT", "LATENCY")
    shaped = () if runtime.startswith("torch") else ("batch", "size")
    notes: dict[str, Any] = {}

    def make(batch: int, images: int = n_tuning, **settings: Any) -> Callable[[], Any]:
        settings |= {name: {"batch": batch, "size": size}[name] for name in shaped}
        start = time.perf_counter()
        made = RUNTIMES[runtime](copy.deepcopy(network), precision, **settings)
        parts = [made.ready(part) for part in x[:images].split(batch)]
        first = made.outputs(parts[0])
        notes["ready after"] = time.perf_counter() - start
        notes["note"] = made.note
        notes["outputs"] = first
        return functools.partial(made.run, parts)

    settings = tune(axes, make)
    run = make(**settings, images=n)
    run()
    notes["images"] = n
    notes["settings"] = ", ".join([f"{k} {v}" for k, v in settings.items()] + [notes["note"]])
    notes["settings"] = notes["settings"].rstrip(", ")
    outputs = notes.pop("outputs")
    if reference:
        with torch.inference_mode():
            expected = network.float()(x[: len(outputs)]).numpy()
        notes["difference"] = float(np.abs(outputs - expected).max() / np.abs(expected).max())
    return Built(run, notes)


def compare(backbone: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Return a row of the table for each runtime and precision."""
    named = {
        (runtime, precision): (
            build_forward,
            backbone,
            runtime,
            precision,
            args.images,
            args.tune,
            [args.compile_batch] if runtime == "torch-compile" else args.batch,
        )
        for precision in args.precisions
        for runtime in args.runtimes
        if (runtime, precision) != ("onnxruntime", "bfloat16")  # it has no such kernels
    }
    say(backbone)
    rows = []
    with sides(named) as built:
        seconds = take_turns(built, args.repeats)
        speed = {
            key: side.notes["images"] / median(seconds[key]) if seconds[key] else None
            for key, side in built.items()
        }
        base = speed.get(("torch", "float32"))
        for (runtime, precision), side in built.items():
            row = {"network": backbone, "runtime": runtime, "precision": precision}
            found = speed[runtime, precision]
            if found is None:
                rows.append({**row, "settings": f"not measured: {side.error}"})
                continue
            row |= {
                "images/s": f"{found:.1f}",
                "against torch": f"{found / base:.2f}" if base else "",
                "ready after, s": f"{side.notes['ready after']:.1f}",
                "difference": f"{side.notes['difference']:.1e}",
                "settings": side.notes["settings"],
            }
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument(
        "--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 1, 16], help="sizes to try")
    parser.add_argument("--compile-batch", type=int, default=8, help="torch.compile's only one")
    parser.add_argument("--images", type=int, default=64, help="of a turn")
    parser.add_argument("--tune", type=int, default=32, help="images by which settings are chosen")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(environment("openvino", "onnxruntime", "onnx"))
    print(f"\n{args.images} images a turn, medians of {args.repeats} turns.\n", flush=True)
    for backbone in args.networks:
        print(f"{table(compare(backbone, args))}\n", flush=True)


if __name__ == "__main__":
    main()
