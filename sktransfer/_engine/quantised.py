"""A network in 8 bits, and the programs by which OpenVINO runs it.

OpenVINO rounds otherwise where it may merge other layers, and in 8 bits that shows: the rows of a
program depend on all of its outputs. So there are few programs, each with outputs of its own that
never change, and each result comes from one of them alone, whatever else is asked for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sktransfer._engine.cut_network import layout_of, pool
from sktransfer._engine.device import INT8
from sktransfer._engine.openvino_program import OpenVinoProgram, behind, read_model, reason_of
from sktransfer._engine.program import ACTIVATION, Output, Outputs
from sktransfer._engine.program_file import ProgramFile
from sktransfer._engine.quantising import Made, calibration_images, check_loss, quantise, refusal
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer.transforms import Preprocessing

if TYPE_CHECKING:
    from sktransfer._engine.runner import Runner

# Programs, by what they have. Other results in that of the embedding would make it slower.
_KINDS = ("embedding", "rows", "activations")


class _FixedOutputs(nn.Module):
    """What a program has: as torch computes it in float32, and as OpenVINO does in 8 bits."""

    def __init__(self, network: QuantisedNetwork, outputs: Sequence[Output]) -> None:
        super().__init__()
        self._network, self._outputs = network, outputs
        self._float32 = Outputs(network.runner, outputs, network.preprocessing, None)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._float32(images)

    def openvino_model(self) -> Any:
        return self._network.model(self._outputs)


class _Pool(nn.Module):
    """The pooling of activations, to be made a part of a graph of OpenVINO."""

    def __init__(self, *how: Any) -> None:
        super().__init__()
        self._how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pool(x, *self._how)


class _Row(nn.Module):
    """What becomes of a result of a program that is not yet the row that is asked for."""

    def __init__(self, network: QuantisedNetwork, output: Output, head: nn.Module | None) -> None:
        super().__init__()
        self.head = head
        self.__dict__["network"], self.__dict__["output"] = network, output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
        x = x if self.head is None else self.head(x)
        return self.__dict__["network"].pooled(x, self.__dict__["output"])


class QuantisedNetwork:
    """A network in 8 bits up to its embedding, and its programs; the head stays in float32.

    Parameters
    ----------
    runner : Runner
    preprocessing : Preprocessing
    made : Made
    n_cores : int
        That programs use in all.
    """

    def __init__(
        self, runner: Runner, preprocessing: Preprocessing, made: Made, n_cores: int
    ) -> None:
        check_loss(runner, made)
        self.runner, self.preprocessing, self.made = runner, preprocessing, made
        self._n_cores = n_cores
        self._programs: dict[tuple[str, int], OpenVinoProgram] = {}

    # ------------------------------------------------------------------------ fixed outputs

    def _outputs(self, kind: str) -> list[Output]:
        """Return what a program has, which depends on the network alone."""
        if kind == "embedding":
            return [Output(self.runner.embedding, ACTIVATION)]
        return self._of_layers[kind]

    @functools.cached_property
    def _of_layers(self) -> dict[str, list[Output]]:
        model = read_model(self.made.graph, self.made.weights)
        nodes = {node.get_friendly_name() for node in model.get_ops()}
        found: dict[str, list[Output]] = {"rows": [], "activations": []}
        for position in range(1, self.runner.embedding):
            if self.made.places[position][0] not in nodes:
                continue
            for form in ("avg", "max", "token"):
                if self.runner.can_pool(position, form, self.preprocessing.size):
                    found["rows"].append(Output(position, form))
            found["activations"].append(Output(position, ACTIVATION))
        return found

    def _needed(self, output: Output) -> tuple[str, Output]:
        """Return the one program that has what an output takes, and what this is in there."""
        embedding = self.runner.embedding
        if output.position in (None, embedding):
            return "embedding", Output(embedding, ACTIVATION)
        wanted = Output(output.position, ACTIVATION) if output.form == "flatten" else output
        for kind in _KINDS:
            if wanted in self._outputs(kind):
                return kind, wanted
        raise ValueError(refusal(self.runner, f"it has no {output.form!r} at that layer"))

    def model(self, outputs: Sequence[Output]) -> Any:
        """Return OpenVINO's model of these outputs."""
        from openvino import Model, opset13

        model = read_model(self.made.graph, self.made.weights)
        nodes = {node.get_friendly_name(): node for node in model.get_ops()}
        results = []
        for output in outputs:
            assert output.position is not None
            name, index = self.made.places[output.position]
            source = nodes[name].output(index)
            if output.position != self.runner.embedding:
                source = _as_it_goes_on(source)
            results.append(opset13.result(self._formed(source, output)))
        return Model(results, model.get_parameters(), "int8")

    def _formed(self, source: Any, output: Output) -> Any:
        """Return a result in the form that is asked for; a whole map has its channels last."""
        from openvino import opset13

        shape = list(source.get_partial_shape().to_shape())
        if not output.is_row:
            last = opset13.constant(np.array([0, 2, 3, 1]))
            return opset13.transpose(source, last).output(0) if len(shape) == 4 else source
        layout = layout_of(shape[1:], self.preprocessing.size)
        how = _Pool(layout, output.form, self.runner.n_prefix(output.position))
        return behind(source, how)

    def rows_model(self, rows: Sequence[Output]) -> Any:
        """Return OpenVINO's model from images to pooled rows, side by side, for other programs.

        Its input is static, one uint8 image with channels last.
        """
        from openvino import Model, opset13

        needed = [self._needed(output)[1] for output in rows]
        distinct = list(dict.fromkeys(needed))
        model = self.model(distinct)
        sources = dict(zip(distinct, (r.input_value(0) for r in model.get_results()), strict=True))
        parts = []
        for output, found in zip(rows, needed, strict=True):
            row = _Row(self, output, self._head() if output.position is None else None)
            source = sources[found]
            parts.append(source if found == output else behind(source, row))
        joined = opset13.concat(parts, 1) if len(parts) > 1 else parts[0]
        return Model([opset13.result(joined)], model.get_parameters(), "int8")

    def pooled(self, x: torch.Tensor, output: Output) -> torch.Tensor:
        """Return the row of an activation, or of what the whole network has."""
        layout = layout_of(x.shape[1:], self.preprocessing.size)
        return pool(x.float(), layout, output.form, self.runner.n_prefix(output.position))

    # ------------------------------------------------------------------------ programs

    def run_of(
        self, outputs: Sequence[Output], n_streams: int, folder: str | None
    ) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        """Return what runs uint8 images (1, 3, h, w) to outputs, all of them rows."""
        needed = {output: self._needed(output) for output in outputs}
        kinds = [kind for kind in _KINDS if kind in {kind for kind, _ in needed.values()}]
        programs = {kind: self._program(kind, n_streams, folder) for kind in kinds}
        head = self._head() if any(output.position is None for output in outputs) else None

        def run(batch: torch.Tensor) -> list[torch.Tensor]:
            with torch.inference_mode():
                found: dict[tuple[str, Output], torch.Tensor] = {}
                for kind, program in programs.items():
                    values = zip(self._outputs(kind), program(batch), strict=True)
                    found |= {(kind, output): value for output, value in values}
                return [self._row(found[needed[output]], output, head) for output in outputs]

        return run

    def _program(self, kind: str, n_streams: int, folder: str | None) -> OpenVinoProgram:
        """Return the program of a kind; it is made once, as who asks for it builds alone."""
        if (program := self._programs.get((kind, n_streams))) is None:
            name = INT8, self.made.digest, kind, self._n_cores, n_streams
            file = None if folder is None else ProgramFile(folder, *name)
            crop = calibration_images(self.preprocessing, 1)
            example = torch.from_numpy(crop).permute(0, 3, 1, 2)
            settings = INT8, self._n_cores, n_streams, file
            try:
                program = OpenVinoProgram(
                    lambda: _FixedOutputs(self, self._outputs(kind)), example, *settings
                )
            except Exception as error:  # OpenVINO's own, of what it can't compile
                raise ValueError(refusal(self.runner, reason_of(error))) from error
            self._programs[kind, n_streams] = program
        return program

    def _head(self) -> nn.Module:
        self.runner.lay_out_for_torch()  # another order would round otherwise
        positions = {self.runner.embedding, None}
        with network_lock.shared():
            return self.runner.slices(positions, self.preprocessing.size)[-1][1]

    def _row(self, x: torch.Tensor, output: Output, head: nn.Module | None) -> torch.Tensor:
        """Return a row of what a program has, pooled if it is not yet."""
        if output.position is None and head is not None:
            with network_lock.shared(), float32_by_default():
                x = head(x)
        elif output.position != self.runner.embedding and output.form != "flatten":
            return x
        return self.pooled(x, output)


def _uses(source: Any, kind: str) -> list[Any]:
    nodes = (use.get_node() for use in source.get_target_inputs())
    return [node for node in nodes if node.get_type_name() == kind]


def _as_it_goes_on(source: Any) -> Any:
    """Return an activation behind its rounding to 8 bits, if it is rounded.

    In front of it, OpenVINO would have to write what it otherwise rounds at once.
    """
    rounded = sorted(_uses(source, "FakeQuantize"), key=lambda node: node.get_friendly_name())
    return rounded[0].output(0) if rounded else source


class QuantisedNetworks:
    """The networks in 8 bits of a runner: one for each preprocessing, of each folder.

    Parameters
    ----------
    runner : Runner
    n_cores : int
    """

    def __init__(self, runner: Runner, n_cores: int) -> None:
        self._runner, self._n_cores = runner, n_cores
        self._locks: dict[Preprocessing, Any] = {}
        self._made: dict[Preprocessing, Made] = {}  # those that are refused as well
        self._found: dict[tuple[Preprocessing, str | None], QuantisedNetwork] = {}

    def get(
        self, preprocessing: Preprocessing, folder: str | None, verbose: bool = False
    ) -> QuantisedNetwork:
        """Return the network that a folder keeps, or make it; whoever needs it, too, waits."""
        if (found := self._found.get((preprocessing, folder))) is not None:
            return found
        with self._locks.setdefault(preprocessing, threading.Lock()):
            if (preprocessing, folder) not in self._found:
                self._found[preprocessing, folder] = self._new(preprocessing, folder, verbose)
            return self._found[preprocessing, folder]

    def _new(
        self, preprocessing: Preprocessing, folder: str | None, verbose: bool
    ) -> QuantisedNetwork:
        known = self._made.get(preprocessing)
        made = quantise(self._runner, preprocessing, folder, known, verbose)
        self._made.setdefault(preprocessing, made)
        for (other, _), network in list(self._found.items()):  # programs are compiled once
            if other == preprocessing and network.made.digest == made.digest:
                return network
        return QuantisedNetwork(self._runner, preprocessing, made, self._n_cores)
