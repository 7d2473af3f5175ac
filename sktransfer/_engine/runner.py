"""The copies of networks in this process: what names their results, and what runs them."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
import torchvision
import xxhash

from sktransfer._config import get_config
from sktransfer._engine.cut_network import CutNetwork
from sktransfer._engine.device import (
    INT8,
    PRECISIONS,
    first_line,
    free_memory,
    is_out_of_memory,
    numerics,
    resolve_device,
    warn_of_copies,
)
from sktransfer._engine.openvino_program import OpenVinoProgram, reason_of
from sktransfer._engine.program import (
    ACTIVATION,
    Output,
    Outputs,
    Program,
    half_of,
    stored_form,
)
from sktransfer._engine.program_file import ProgramFile
from sktransfer._engine.quantised import QuantisedNetwork, QuantisedNetworks
from sktransfer._engine.quantising import versions
from sktransfer._engine.runtime import (
    check_can_quantise,
    forget_openvino,
    is_worth_compiling,
    resolve_runtime,
    waits_for_work,
    warn_fallback,
    warn_without_instructions,
    why_not_imported,
)
from sktransfer._threads import call_in_forks, renewed_in_forks
from sktransfer._torch_state import as_on, float32_by_default, network_lock
from sktransfer.models import Backbone
from sktransfer.models._weights import Describer
from sktransfer.transforms import Preprocessing

# What a CPU takes at once: few images, see benchmarks/batch_size.py, and fewer of large ones. The
# C library gets larger tensors anew from the system every time, which costs more than it saves.
_CPU_STEP = 4
_CPU_BYTES = 20e6
_BATCH = 32  # of images in flight
_GPU_BATCH = 256  # at most
_GPU_SHARE = 0.1  # of the free memory that the largest tensor may take; a few are alive at once
# Of the computation; a change that alters results makes old entries unreachable.
_VERSION = 5
TORCH_VERSIONS = [".".join(m.__version__.split(".")[:2]) for m in (torch, torchvision)]
_T = TypeVar("_T")
_runners_lock = renewed_in_forks(threading.Lock())
_building = renewed_in_forks(threading.RLock())  # of programs, each of which is built once
_all_runners: WeakSet[Runner] = WeakSet()  # also those of fitted estimators


def get_runner(
    backbone: Backbone,
    device: str | torch.device,
    precision: str,
    runtime: str = "auto",
    image_size: tuple[int, int] | None = None,
) -> Runner:
    """Return this process's one copy of `backbone` on this device in this precision.

    `image_size` is that of the images to come, if it is known.
    """
    resolved = resolve_device(device)
    asked = (resolved, precision, runtime)
    with _runners_lock, torch.inference_mode(False):
        runners = backbone.runners
        runner = runners.get(asked) or _new_runner(runners, backbone, asked)
    if image_size is not None:
        runner.add_size(image_size)
    return runner


def _new_runner(runners: dict[Any, Runner], backbone: Backbone, asked: Any) -> Runner:
    resolved, precision, runtime = asked
    warn_without_instructions(precision, resolved)
    warn_of_copies(resolved)
    chosen = resolve_runtime(runtime, resolved, precision, backbone.network, backbone.name)
    waits = chosen == "openvino" and waits_for_work(runtime, precision)
    key = (resolved, precision, runtime if waits else chosen)
    runners[key] = runners.get(key) or Runner(backbone, resolved, precision, chosen, waits)
    runners[asked] = runners[key]
    return runners[asked]


def _after_fork() -> None:
    """Let a forked child compute on torch, on one core.

    It has none of its parent's threads: OpenMP, through which torch uses several cores, and
    OpenVINO would wait for them forever; torch's may be of a network that is not ours.
    """
    torch.set_num_threads(1)
    forget_openvino([(runner._programs, runner._quantised) for runner in _all_runners])
    for runner in _all_runners:
        runner.backbone.runners.clear()
        runner.runtime, runner._programs, runner._n_cores = "torch", {}, 1
        runner._quantised = QuantisedNetworks(runner, 1)


call_in_forks(_after_fork)


class Runner(CutNetwork):
    """A network on a device, in a precision, with the programs that run it.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    precision : {"float32", "bfloat16", "float16", "int8"}
        In the half precisions, the operations that lose nothing by it run in it (torch's autocast);
        in bfloat16 on a GPU all do, by weights of that type, where this loses little more.
        In `"int8"`, see `QuantisedNetwork`, there are rows alone, of OpenVINO alone.
    runtime : {"torch", "openvino"}
        Where a program can't be made for OpenVINO, it becomes "torch".
    waits_for_work : bool, default=False
        Whether OpenVINO compiles a program only once there are enough images for it.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        precision: str,
        runtime: str = "torch",
        waits_for_work: bool = False,
    ) -> None:
        super().__init__(backbone, device)
        self.precision, self.runtime, self.half = precision, runtime, half_of(precision)
        self._waits_for_work = waits_for_work
        # As many cores as torch may use here, which joblib limits in its workers.
        self._n_cores = torch.get_num_threads()
        self._programs: dict[Any, Program] = {}
        self._has_good_half: bool | None = None  # see `_loses_no_more`
        self._quantised = QuantisedNetworks(self, self._n_cores)
        _all_runners.add(self)

    def _prepare(self) -> None:
        # One that can't be cut may take views of its maps, which have none with channels last.
        if self.precision != INT8:  # of which torch runs the head
            network_lock.alone(self.lay_out_for_torch)

    # ------------------------------------------------------------------------ how many at once

    def batch_size(self, given: int | str, image_size: tuple[int, int]) -> int:
        """Return the images in flight: those given or, if `"auto"`, what suits the device."""
        if given != "auto":
            return int(given)
        if self.device.type != "cuda":
            return _BATCH
        fitting = self.fitting(0, image_size, free_memory(self.device) * _GPU_SHARE)
        return max(1, min(_GPU_BATCH, 2 ** int(math.log2(max(1, fitting)))))

    def step(self, batch_size: int | str, image_size: tuple[int, int]) -> int:
        """Return how many of a batch's images torch runs at once: on a GPU all, on a CPU few."""
        batch_size = self.batch_size(batch_size, image_size)
        if self.device.type != "cpu":
            return batch_size
        fitting = self.fitting(0, image_size, _CPU_BYTES)
        return max(1, min(batch_size, _CPU_STEP, fitting))

    def in_smaller_steps(self, run: Callable[[int], _T], step: int) -> _T:
        """Call `run(step)`; while the memory does not suffice, with half as many images."""
        while True:
            try:
                return run(step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if step == 1:
                    raise MemoryError(
                        f"Not even one image fits into the memory of {str(self.device)!r} beside "
                        f"backbone {self.name!r} ({first_line(error)}). Pass a smaller "
                        "image_size, a smaller backbone or another device."
                    ) from error
            # Out of the handler, which holds on to the tensors of the failed step.
            step //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"The memory of {str(self.device)!r} did not suffice: backbone {self.name!r} goes "
                f"on with {step} images at once.",
                UserWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------------ names

    def key(self, position: int | None, form: str, preprocessing: Preprocessing) -> str:
        """Name all that shapes a result but the image: the memory's name of this function.

        `position` and `form` are those of an `Output`. Where `names_its_runtime`, a program must
        have been made before: only then it is settled what computes.
        """
        if form != ACTIVATION and self.layout(position, preprocessing.size) == "vector":
            form = "flatten"  # there is nothing left to pool
        return self._name(preprocessing, "output" if position is None else position, form)

    def claim_key(self, preprocessing: Preprocessing) -> str:
        """Return the one name under which all that run this network claim images.

        Whoever runs an image keeps what others would run it for.
        """
        return self._name(preprocessing, "any")

    @property
    def names_its_runtime(self) -> bool:
        """Whether keys depend on what computes: in float32, all agree but for rounding.

        In 8 bits only OpenVINO does.
        """
        return self.precision not in ("float32", INT8) and self.runtime != "torch"

    def _name(self, preprocessing: Preprocessing, *what: Any) -> str:
        parts: tuple[Any, ...] = (
            _VERSION,
            *TORCH_VERSIONS,
            self.fingerprint,
            preprocessing.fingerprint,
            *what,
            self.precision,
        )
        if self.names_its_runtime:
            parts += (self.runtime,)
        if self.precision == INT8:
            parts += versions()
        if difference := numerics(self.device, self.precision):
            parts += (difference,)
        if get_config()["damaged"] == "error":  # what "warn" let pass is not taken from the memory
            parts += ("whole files",)
        if type(preprocessing) is not Preprocessing:  # its settings do not tell what it does
            parts += (Describer()([type(preprocessing), vars(preprocessing)]),)
        readable = self.name.rpartition("/")[2]
        return f"{readable}-{xxhash.xxh3_128_hexdigest(repr(parts).encode())}"

    # ------------------------------------------------------------------------ running

    def autocast(self, precision: str | None = None) -> AbstractContextManager[Any]:
        """Return a context in which the network computes in a precision; by default, its own."""
        precision = precision or self.precision
        if precision not in PRECISIONS or precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[precision])

    @contextmanager
    def _running(self, precision: str | None = None) -> Iterator[None]:
        """Within this context torch runs the network, without gradients; see `autocast`.

        `network_lock` must be held, shared: Ctrl-C could leave it locked if it were taken in here.
        """
        with (
            torch.inference_mode(),
            float32_by_default(),
            as_on(self.device),
            self.autocast(precision),
        ):
            yield

    def program(
        self,
        outputs: Sequence[Output],
        preprocessing: Preprocessing,
        is_alone: bool = False,
        n_images: float = math.inf,
        folder: str | None = None,
        verbose: bool = False,
    ) -> Program:
        """Return what runs images to `outputs`; each kind of it is made once.

        Nobody may ask for it who holds `network_lock`: it is taken here only where the network
        runs, so that a compilation keeps nobody waiting.

        Parameters
        ----------
        outputs : sequence of Output
        preprocessing : Preprocessing
        is_alone : bool, default=False
            OpenVINO's program takes one core for each call or, for the single image of a whole
            pass, all.
        n_images : float, default=inf
            That will run at most. Torch runs them if they are too few to compile a program.
        folder : str or None, default=None
            Where compiled programs, and networks in 8 bits, are kept.
        verbose : bool, default=False
            Show a bar while a network is brought to 8 bits.
        """
        what, n_streams = (tuple(outputs), preprocessing), 1 if is_alone else self._n_cores
        if self.precision == INT8:
            return self._program_in_8_bits(*what, n_streams, folder, verbose)
        if self.runtime == "torch" and self.precision != "float32":
            return self._made(*what)  # rows are named after what computes: one for all of them
        if (compiled := self._programs.get((*what, n_streams))) is not None:
            return compiled
        if self.runtime == "torch":
            return self._made(*what)
        file = None if folder is None else self._file(folder, *what, n_streams)
        if self._is_worth_compiling(*what, is_alone, n_images, file):
            return self._made(*what, n_streams, file)
        return self._made(*what)

    def in_8_bits(
        self, preprocessing: Preprocessing, folder: str | None = None, verbose: bool = False
    ) -> QuantisedNetwork:
        """Return this network in 8 bits: as a folder keeps it, or made now; see `program`."""
        check_can_quantise(self.runtime, self.device)  # a fork loses what its parent had
        return self._quantised.get(preprocessing, folder, verbose)

    def _program_in_8_bits(
        self,
        outputs: tuple[Output, ...],
        preprocessing: Preprocessing,
        n_streams: int,
        folder: str | None,
        verbose: bool,
    ) -> Program:
        # Not while programs are built: it takes long, and others may need another network's.
        network = self.in_8_bits(preprocessing, folder, verbose)
        key = outputs, preprocessing, n_streams, network
        if (program := self._programs.get(key)) is None:
            with _building, float32_by_default(_building), torch.inference_mode(False):
                run = network.run_of(outputs, n_streams, folder)
            program = Program(run, self.device, runs_in_threads=True)
            self._programs[key] = program
        return program

    def _file(
        self,
        folder: str,
        outputs: Sequence[Output],
        preprocessing: Preprocessing,
        n_streams: int,
    ) -> ProgramFile:
        keys = [self.key(*output, preprocessing) for output in outputs]
        return ProgramFile(folder, *keys, self.precision, self._n_cores, n_streams)

    def _is_worth_compiling(
        self,
        outputs: tuple[Output, ...],
        preprocessing: Preprocessing,
        is_alone: bool,
        n_images: float,
        file: ProgramFile | None,
    ) -> bool:
        if not self._waits_for_work or not self.can_be_cut:
            return True
        on_torch = self._programs.get((outputs, preprocessing, None))
        if is_alone:  # who waits for one image, and then for another one, will for many
            return on_torch is not None
        n_images += 0 if on_torch is None else on_torch.n_images
        counted = n_images, self._n_cores, file
        if not is_worth_compiling(math.inf, *counted):
            return False  # of no network, so its operations need not be counted
        positions = [output.position for output in outputs]
        flops = self.flops(preprocessing.size)
        last = len(flops) if None in positions else max(p for p in positions if p is not None)
        return is_worth_compiling(sum(flops[:last]), *counted)

    def _made(
        self,
        outputs: tuple[Output, ...],
        preprocessing: Preprocessing,
        n_streams: int | None = None,
        file: ProgramFile | None = None,
    ) -> Program:
        """Return a program of OpenVINO for so many streams, or of torch; it is made once."""
        what = outputs, preprocessing
        if (program := self._programs.get((*what, n_streams))) is not None:
            return program
        if network_lock.is_held():
            raise RuntimeError("A thread that runs a network can't ask for another program.")
        self.can_be_cut  # noqa: B018 may trace, for which this thread must be alone
        # Out of inference mode, in which sizes can't be found.
        with (
            _building,
            float32_by_default(_building),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            if self.runtime == "torch":  # by now another thread has found that OpenVINO can't
                n_streams = None
            if (program := self._programs.get((*what, n_streams))) is None:
                program = self._make_program(*what, n_streams, file)
                made_for = n_streams if program.runs_in_threads else None
                self._programs[*what, made_for] = program
        return program

    def _make_program(
        self,
        outputs: Sequence[Output],
        preprocessing: Preprocessing,
        n_streams: int | None,
        file: ProgramFile | None,
    ) -> Program:
        layouts = {o: self.layout(o.position, preprocessing.size) for o in outputs}

        def finish(x: torch.Tensor, output: Output) -> torch.Tensor:
            return stored_form(x, output, self.half, layouts[output])

        if n_streams is not None:
            if (reason := why_not_imported()) is None:
                try:
                    return self._on_openvino(outputs, preprocessing, finish, n_streams, file)
                except Exception as error:  # OpenVINO's own, of what it can't convert or compile
                    reason = f"it can't take this network ({reason_of(error)})"
            self.runtime = "torch"
            warn_fallback(self.name, reason)
        dtype, precision = None, self.precision
        if self.device.type == "cuda" and precision == "bfloat16" and self._loses_no_more():
            dtype, precision = torch.bfloat16, "float32"  # without autocast
        module = Outputs(self, outputs, preprocessing, finish, dtype)

        def run(batch: torch.Tensor) -> list[torch.Tensor]:
            with network_lock.shared(), self._running(precision):
                return list(module(batch))

        return Program(run, self.device)

    def _loses_no_more(self) -> bool:
        """Tell whether weights in bfloat16 lose little more than autocast does.

        With such weights nothing has to be cast while the network runs. But positions that are
        computed by buffers, for one, can be lost in bfloat16.
        """
        if self._has_good_half is None:
            preprocessing = self.backbone.preprocessing
            outputs = [Output(self.embedding_or_output, "flatten")]
            noise = np.random.default_rng(0).integers(256, size=(4, *preprocessing.shape))
            images = torch.from_numpy(noise.astype(np.uint8)).to(self.device)

            def rows(precision: str, dtype: torch.dtype | None = None) -> torch.Tensor:
                module = Outputs(self, outputs, preprocessing, None, dtype)
                with network_lock.shared(), self._running(precision):
                    return module(images)[0].double()

            try:
                exact, cast = rows("float32"), rows("bfloat16")
                error = rows("float32", torch.bfloat16).sub(exact).norm()
            except RuntimeError:  # some of its operations are for float32 alone
                self._has_good_half = False
            else:
                tolerance = 2 * cast.sub(exact).norm() + 1e-6 * exact.norm()
                self._has_good_half = bool(error <= tolerance)
        return self._has_good_half

    def _on_openvino(
        self,
        outputs: Sequence[Output],
        preprocessing: Preprocessing,
        finish: Any,
        n_streams: int,
        file: ProgramFile | None,
    ) -> Program:
        """Compile a module whose results are finished behind: it is as fast, compiled earlier."""
        if not self.can_be_cut:
            raise ValueError("it can't be traced, so what it does may depend on the pixels")
        noise = np.random.default_rng(0).integers(256, size=(1, *preprocessing.shape))
        example = torch.from_numpy(noise.astype(np.uint8))

        def make() -> Outputs:
            return Outputs(self, outputs, preprocessing, None)

        compiled = OpenVinoProgram(make, example, self.precision, self._n_cores, n_streams, file)

        def run(batch: torch.Tensor) -> list[torch.Tensor]:
            with torch.inference_mode():
                pairs = zip(compiled(batch), outputs, strict=True)
                return [finish(x, output) for x, output in pairs]

        return Program(run, self.device, runs_in_threads=True)
