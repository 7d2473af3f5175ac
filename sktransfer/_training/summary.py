"""A network as a table of its blocks: what comes out of each, what it costs, what is trained."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.runner import Runner, get_runner
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer._training.cut import Unfrozen, find_cut
from sktransfer.models._registry import Backbone, get_architecture

_HEADERS = ("block", "output", "parameters", "GFLOP", "KB kept", "")


@dataclass(frozen=True)
class BlockRow:
    """A row of the table; None where something is not known."""

    name: str
    shape: tuple[int, ...] | None = None  # of one image's output
    n_parameters: int | None = None
    flops: int | None = None
    n_bytes: int | None = None
    state: str = ""  # "frozen", "trained" or neither


class ModelSummary:
    """A table of the blocks of a network; `model_summary` makes it.

    It prints as text, shows as a table in a notebook, and is a data frame on request.

    Attributes
    ----------
    name : str
        The network's.
    image_size : tuple of (height, width)
        Of the images, in pixels.
    rows : list of BlockRow
        `name`, `shape`, `n_parameters`, `flops`, `n_bytes` and `state` of the image, every block,
        the embedding and the head.
    """

    def __init__(self, name: str, image_size: tuple[int, int], rows: list[BlockRow]) -> None:
        self.name, self.image_size, self.rows = name, image_size, rows

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        table = tabulate(
            [_cells(row) for row in self.rows],
            headers=_HEADERS,
            colalign=("left", "left", "right", "right", "right", "left"),
            disable_numparse=True,
        )
        return f"{self._title()}\n\n{table}\n\n{self._total()}"

    def _repr_html_(self) -> str:
        caption = html.escape(f"{self._title()}. {self._total()}")
        return f"<table><caption>{caption}</caption>{_html_rows(self.rows)}</table>"

    def to_frame(self) -> Any:
        """Return the table as a data frame.

        Returns
        -------
        pandas.DataFrame
            A row for each block, by its name, with columns `output` (a tuple: the shape for one
            image), `parameters`, `gflop`, `kb` and `state`.
        """
        import pandas

        columns = {
            "output": [row.shape for row in self.rows],
            "parameters": pandas.array([row.n_parameters for row in self.rows], "Int64"),
            "gflop": [None if row.flops is None else row.flops / 1e9 for row in self.rows],
            "kb": [None if row.n_bytes is None else row.n_bytes / 1e3 for row in self.rows],
            "state": [row.state for row in self.rows],
        }
        names = pandas.Index([row.name for row in self.rows], name="block")
        return pandas.DataFrame(columns, index=names)

    def _title(self) -> str:
        return f"{self.name}, images of {self.image_size[0]} × {self.image_size[1]} pixels"

    def _total(self) -> str:
        n_all = sum(row.n_parameters or 0 for row in self.rows)
        n_trained = sum(row.n_parameters or 0 for row in self.rows if row.state == "trained")
        trained = f", {n_trained:,} of them trained" if n_trained else ""
        flops = sum(row.flops or 0 for row in self.rows)
        return f"{n_all:,} parameters{trained}; {_giga(flops)} GFLOP an image"


def model_summary(model: Any, image_size: Any = None) -> ModelSummary:
    """Show a network as a table of its blocks.

    Parameters
    ----------
    model : estimator, str, torch.nn.Module or Backbone
        An estimator of this library, fitted or not; or what its `backbone` takes. Nothing is
        downloaded: shapes and costs do not depend on the weights.
    image_size : int or tuple of (height, width), default=None
        Size in pixels at which images enter; None for that of the estimator, or of the weights.

    Returns
    -------
    ModelSummary
        Print it, or take `to_frame()`. A row for the image, each block, the embedding (what the
        head sees) and the head, with

        - the shape of the output for one image: (channels, height, width), (tokens, channels) or
          (features,);
        - the number of parameters;
        - GFLOP an image, a multiplication and an addition counted as two;
        - KB (1000 bytes) of one image's output as the memory keeps it: in half precision, images
          in 8 bits, embeddings in 32;
        - whether it is frozen or trained. Weights behind the last block go with it.

    Raises
    ------
    TypeError
        If `model` is none of these.
    ValueError
        If the network does not take images of this size.

    Examples
    --------
    >>> from sktransfer import FineTunedClassifier, model_summary
    >>> summary = model_summary(FineTunedClassifier("resnet18", unfreeze="layer4"))
    >>> [row.name for row in summary.rows if row.state == "trained"]
    ['layer4.0', 'layer4.1', 'embedding', 'head']
    >>> summary.rows[1].shape, summary.rows[1].n_parameters
    ((64, 56, 56), 9536)
    """
    if not hasattr(model, "get_params"):
        frozen = _frozen_blocks(get_architecture(model, "default"), {}, image_size)
        return summarize(frozen, head=_own_head(frozen))
    parameters = model.get_params(deep=False)
    if "backbone" not in parameters:
        raise TypeError(
            "model_summary takes an estimator of sktransfer, a name, a torch.nn.Module or a "
            f"Backbone, got {type(model).__name__}. Of a Pipeline or a search, pass the step or "
            "best_estimator_."
        )
    return summary_of(model, parameters, image_size)


def summary_of(model: Any, parameters: dict[str, Any], image_size: Any = None) -> ModelSummary:
    """Return the summary of an estimator."""
    if "plan_" in vars(model) and image_size is None:
        return _of_trained(model.trainer())
    backbone = get_architecture(parameters["backbone"], parameters["weights"])
    frozen = _frozen_blocks(backbone, parameters, image_size)
    if "unfreeze" in parameters:
        if isinstance(parameters["unfreeze"], str) and parameters["unfreeze"] == "auto":
            raise ValueError(
                "unfreeze='auto' is decided by fit: fit the estimator first, or pass a number."
            )
        unfrozen = find_cut(frozen.runner, parameters["unfreeze"])
        return summarize(frozen, unfrozen, BlockRow("head", state="trained"))
    is_whole = parameters.get("layer", "output") == "output"
    return summarize(
        frozen, find_cut(frozen.runner, 0), _own_head(frozen, "frozen") if is_whole else None
    )


def blocks_html(model: Any) -> str:
    """Return the blocks of a fitted estimator in HTML, in the style of scikit-learn's diagram.

    With sizes, if the network is loaded: it is not loaded for this.
    """
    names = vars(model).get("block_names_")
    if not names:
        return ""
    trained = set(vars(model).get("unfrozen_block_names_", ()))
    try:
        rows = _of_trained(model.trainer()).rows if "plan_" in vars(model) else _of_loaded(model)
    except (AttributeError, OSError, ValueError):  # not there, or not what it was
        rows = [BlockRow(name, state="trained" if name in trained else "frozen") for name in names]
    count = f"{len(names) - len(trained)} frozen" + (f", {len(trained)} trained" if trained else "")
    return (
        f'<div class="estimator-table"><details><summary>Blocks: {count}</summary>'
        f'<table class="parameters-table"><tbody>{_html_rows(rows)}</tbody></table></details></div>'
    )


def _of_trained(trainer: Any) -> ModelSummary:
    head = _module_row("head", trainer.net.module_.head, (trainer.frozen.width,), "trained")
    return summarize(trainer.frozen, trainer.unfrozen, head)


def _of_loaded(model: Any) -> list[BlockRow]:
    runner, preprocessing = model.load_network()
    frozen = FrozenBlocks(runner, preprocessing, model.pooling)
    return summarize(frozen, find_cut(runner, 0)).rows


def summarize(
    frozen: FrozenBlocks,
    unfrozen: Unfrozen | None = None,
    head: BlockRow | None = None,
) -> ModelSummary:
    """Put the table together; with `unfrozen=None`, nothing is said of what is trained."""
    runner, size = frozen.runner, frozen.size
    rows = [BlockRow("image", frozen.preprocessing.shape, n_bytes=frozen.n_bytes(0))]
    seen: set[nn.Parameter] = set()  # that blocks may share
    for position, count in enumerate(frozen.flops(), start=1):
        new = set(runner.segment(position - 1, size).parameters()) - seen
        seen |= new
        is_last = position == frozen.embedding
        shape = (frozen.width,) if is_last else runner.shape(position, size)
        n_parameters = sum(parameter.numel() for parameter in new)
        state = ""
        if unfrozen is not None:
            state = "trained" if unfrozen.trains(position - 1) else "frozen"
        name = "embedding" if is_last else runner.block_names[position - 1]
        if not runner.can_be_cut:
            name = runner.name
        n_bytes = frozen.n_bytes(position)
        rows.append(BlockRow(name, shape, n_parameters, count, n_bytes, state))
    return ModelSummary(runner.name, size, rows + ([] if head is None else [head]))


def _frozen_blocks(backbone: Backbone, parameters: dict[str, Any], image_size: Any) -> FrozenBlocks:
    size = parameters.get("image_size") if image_size is None else image_size
    preprocessing = backbone.preprocessing.with_size(size)
    runner = get_runner(backbone, "cpu", "float32", image_size=preprocessing.size)
    layer = parameters.get("layer", "auto") if "unfreeze" in parameters else "auto"
    return FrozenBlocks(runner, preprocessing, parameters.get("pooling", "avg"), layer)


def _own_head(frozen: FrozenBlocks, state: str = "") -> BlockRow | None:
    """Return the row of the head that the network came with, None if it has none."""
    runner: Runner = frozen.runner
    if not runner.can_be_cut:
        return None
    head = runner.trace.slice(runner.embedding, runner.trace.output, frozen.size)
    if not any(True for _ in head.parameters()):
        return None
    return _module_row("head", head, runner.shape(runner.embedding, frozen.size), state)


def _module_row(name: str, module: nn.Module, shape: tuple[int, ...], state: str) -> BlockRow:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    blank = torch.zeros(1, *shape, device=device)
    counter = FlopCounterMode(display=False)

    def count() -> torch.Tensor:
        with float32_by_default(), torch.inference_mode(), counter:
            return module.eval()(blank)

    output = network_lock.alone(count)  # counting adds hooks to the modules of all threads
    n_parameters = sum(parameter.numel() for parameter in module.parameters())
    return BlockRow(
        name, tuple(output.shape[1:]), n_parameters, counter.get_total_flops(), None, state
    )


def _cells(row: BlockRow) -> list[str]:
    return [
        row.name,
        "" if row.shape is None else " × ".join(map(str, row.shape)),
        "" if row.n_parameters is None else f"{row.n_parameters:,}",
        "" if row.flops is None else _giga(row.flops),
        "" if row.n_bytes is None else f"{row.n_bytes / 1e3:.1f}",
        row.state,
    ]


def _html_rows(rows: list[BlockRow]) -> str:
    parts = ["<tr>", *(f"<th>{html.escape(title)}</th>" for title in _HEADERS), "</tr>"]
    for row in rows:
        # The class is one that scikit-learn's style sheet knows.
        weight = ' style="font-weight: 600"' if row.state == "trained" else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
        parts.append(f'<tr class="default"{weight}>{cells}</tr>')
    return "".join(parts)


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3f}"
