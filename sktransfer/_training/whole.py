"""A network in one piece: for gradients through all of it, and as an ONNX file."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from sktransfer._engine.augmentation import Augmentation, fixed_views
from sktransfer._engine.embedding import MeanEmbedding, Rows
from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.program import Output, Outputs
from sktransfer._engine.runner import Runner
from sktransfer._optional import load_optional
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer._training.trainer import Trainer
from sktransfer.models._modules import copy_of
from sktransfer.transforms import Preprocessing

_T = TypeVar("_T")
_LARGE = 2**31 - 2**27  # bytes of weights; protobuf, in which the file is written, ends at 2 GiB
OUTPUTS = {"class": "probabilities", "label": "probabilities", "value": "values"}


# ------------------------------------------------------------------------------ in one piece


class WholeNetwork(nn.Module):
    """Blocks one after the other, the pooling, and a head.

    What lies at the cut in front of the trained blocks is rounded as it is kept, so that this says
    what the estimator says. All in float32; nothing in it is shared with the estimator.

    Parameters
    ----------
    blocks : list of nn.Module
        From the normalised image to the embedding; number i leads to position i + 1.
    cut : int
        The position of the cut; 0 if nothing is rounded.
    frozen : FrozenBlocks or None
        Pools and rounds; None for a network that is used as it is.
    head : nn.Module
    """

    frozen: FrozenBlocks | None

    def __init__(
        self,
        blocks: list[nn.Module],
        cut: int,
        frozen: FrozenBlocks | None,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.blocks = copy_of(nn.ModuleList(blocks))
        self.head = copy_of(head)
        self.cut = cut
        self.__dict__["frozen"] = frozen  # not a part of this module
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn normalised images (n, 3, height, width) into outputs (n, n_outputs)."""
        rows: dict[Output, torch.Tensor] = {}
        for position, block in enumerate(self.blocks, start=1):
            x = block(x)
            if self.frozen is not None:
                rows |= self.frozen.rows_at(x, position)
                x = self.frozen.round(x) if position == self.cut else x
        return self.head(x if self.frozen is None else self.frozen.joined(rows))


def whole_of_trainer(trainer: Trainer) -> WholeNetwork:
    """Return frozen and trained blocks with the new head, on the trainer's device."""
    frozen, part = trainer.frozen, trainer.net.module_
    before = [frozen.runner.segment(i, frozen.size) for i in range(part.cut)]
    if not frozen.is_at_the_end and None in {row.position for row in frozen.rows}:
        before.append(frozen.runner.segment(frozen.embedding, frozen.size))  # the head it had
    rounded = part.cut if part.cut < frozen.embedding else 0  # the embedding is exact
    return WholeNetwork([*before, *part.blocks], rounded, frozen, part.head)


def whole_of_runner(runner: Runner, image_size: tuple[int, int]) -> WholeNetwork:
    """Return a network as it is, in blocks."""
    blocks: list[Any] = [runner.segment(i, image_size) for i in range(runner.embedding)]
    head: nn.Module = nn.Identity()
    if runner.can_be_cut:
        head = runner.trace.slice(runner.embedding, runner.trace.output, image_size)
    return WholeNetwork(blocks, 0, None, head)


class RowsNetwork(nn.Module):
    """From images of the network's size, 0 to 255, to the rows of an extractor, of one view."""

    def __init__(self, embedding: Rows) -> None:
        super().__init__()
        outputs = Outputs(embedding.runner, embedding.wanted, embedding.preprocessing, None)
        outputs.slices = [(at, copy_of(part).cpu()) for at, part in outputs.slices]
        self.outputs = outputs
        self.parts = nn.ModuleList([part for _, part in outputs.slices])
        self.eval().requires_grad_(False)

    def forward(self, fitted: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.outputs(fitted), 1)


class MeanOverViews(nn.Module):
    """What a network makes of images: for each, the mean over its views.

    Parameters
    ----------
    network : nn.Module
    augmentation : Augmentation
        Makes the views, by symmetries.
    """

    def __init__(self, network: nn.Module, augmentation: Augmentation) -> None:
        super().__init__()
        self.network = network
        self.__dict__["augmentation"] = augmentation  # not a module

    def forward(self, fitted: torch.Tensor) -> torch.Tensor:
        views = fixed_views(self.__dict__["augmentation"], fitted)
        return torch.stack([self.network(view) for view in views]).mean(0)


class PowerNormalized(nn.Module):
    """What `power_normalize` does.

    Parameters
    ----------
    embedding : Rows
        Whose columns these are.
    """

    def __init__(self, embedding: Rows) -> None:
        super().__init__()
        self.widths = [part.stop - part.start for part in embedding.columns]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        roots = [part.sign() * part.abs().sqrt() for part in rows.split(self.widths, 1)]
        tiny = float(np.finfo(np.float32).tiny)
        scaled = [part / part.norm(dim=1, keepdim=True).clamp(min=tiny) for part in roots]
        return torch.cat(scaled, 1) / len(self.widths) ** 0.5


def augmentation_of(embedding: Rows) -> Augmentation | None:
    """Return the views over which rows are the mean, if there are several."""
    return embedding.augmentation if isinstance(embedding, MeanEmbedding) else None


# ------------------------------------------------------------------------------ as a file


class _Exported(nn.Module):
    """From uint8 images of the network's size to what the estimator predicts."""

    def __init__(self, preprocessing: Preprocessing, whole: WholeNetwork, last: nn.Module) -> None:
        super().__init__()
        self.__dict__["preprocessing"] = preprocessing  # not a module
        self.whole, self.last = whole, last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.whole(self.__dict__["preprocessing"].normalize(images)))


class Affine(nn.Module):
    """Brings standardised values back to their unit."""

    scale: torch.Tensor
    mean: torch.Tensor

    def __init__(self, scale: np.ndarray, mean: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("scale", torch.from_numpy(scale).float())
        self.register_buffer("mean", torch.from_numpy(mean).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.mean


def export_onnx(
    trainer: Trainer, path: str | os.PathLike, last: nn.Module, labels: list[Any] | None
) -> Path:
    """Write the network to a file; see `to_onnx` of the estimators.

    Parameters
    ----------
    trainer : Trainer
    path : path
    last : nn.Module
        What follows the head.
    labels : list or None
        Of the columns of the output.

    Returns
    -------
    Path
    """
    target = check_target(path)
    preprocessing = trainer.frozen.preprocessing
    network = whole_with_preprocessing(trainer, last)
    blank = torch.zeros(2, *preprocessing.shape, dtype=torch.uint8, device="cpu")
    program = onnx_program(network, blank, "images", OUTPUTS[trainer.settings.kind])
    for name, value in _metadata(trainer, labels).items():
        program.model.metadata_props[name] = text_of(value)
    n_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    program.save(target, external_data=n_bytes > _LARGE)
    return target


def check_target(path: str | os.PathLike) -> Path:
    """Return where a file is to be written, if it can be and all is there that writes it."""
    for module in ("onnx", "onnxscript"):
        load_optional(module, "to_onnx", "'.[onnx]'")
    return path_in_folder(path)


def path_in_folder(path: str | os.PathLike) -> Path:
    """Return a path; an error if there is no such folder."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: there is no folder {str(target.parent)!r}.")
    return target


def whole_with_preprocessing(trainer: Trainer, last: nn.Module) -> nn.Module:
    """Return what leads from images of the network's size, 0 to 255, to predictions."""
    whole = whole_of_trainer(trainer).cpu()
    return _Exported(trainer.frozen.preprocessing, whole, last).eval()


def onnx_program(
    network: nn.Module, blank: torch.Tensor, given: str, output: str, opset: int | None = None
) -> Any:
    """Write a network as torch's ONNX program, for any number of images like `blank`.

    The weights of the network are laid out anew. With channels last, torch writes pooling with
    operators that OpenVINO can't convert all of, with onnxscript before 0.7.2.
    """
    network.to(memory_format=torch.contiguous_format)
    return call_exporter(
        lambda: torch.onnx.export(
            network,
            (blank,),
            dynamo=True,
            opset_version=opset,
            input_names=[given],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    )


def call_exporter(export: Callable[[], _T]) -> _T:
    """Call one of torch's exporters, without what it prints; ValueError if it fails."""
    # They count operators that nobody asked for, and tell of what they do not fold.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]

    def exported() -> _T:
        with float32_by_default(), torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the exporter itself will change one day
            return export()

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return network_lock.alone(exported)
    except Exception as error:
        raise ValueError(
            f"{type(error).__name__}: torch can't write this network as ONNX: {error}"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def text_of(value: Any) -> str:
    """Return a value of a file's metadata as text: JSON, unless it is text already."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _metadata(trainer: Trainer, labels: list[Any] | None) -> dict[str, Any]:
    """Return what the file says of itself, above all how images must be made ready."""
    preprocessing = trainer.frozen.preprocessing
    return {
        "producer": f"sktransfer {version('sktransfer')}",
        "backbone": trainer.frozen.runner.name,
        "input": f"{words_of_channels(preprocessing)}, resized and cropped as 'preprocessing' "
        "says; the graph does the rest",
        "preprocessing": {
            "resize": list(preprocessing.resize),
            "mode": preprocessing.mode,
            "interpolation": preprocessing.interpolation,
            "antialias": True,
            "center_crop": list(preprocessing.size),
        },
        "labels": labels,
    }


def facts_of(preprocessing: Preprocessing) -> dict[str, str]:
    """Return what each file says that takes images of any size."""
    return {
        "producer": f"sktransfer {version('sktransfer')}",
        "input": f"{words_of_channels(preprocessing)}, of any size; the graph does the rest",
    }


def words_of_channels(preprocessing: Preprocessing) -> str:
    if preprocessing.channels.are_rgb:
        return "RGB, uint8"
    words = f"{len(preprocessing.mean)} channels, uint8"
    pairs = preprocessing.value_range
    return words if pairs is None else f"{words}: 0 and 255 at the ends of {list(pairs)}"
