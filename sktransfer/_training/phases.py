"""The phases of a fit before the blocks are trained: frozen blocks once, then the head."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from torch import nn

from sktransfer._bars import tqdm
from sktransfer._engine.augmentation import Views
from sktransfer._engine.frozen import Activations
from sktransfer._engine.stream import Stream
from sktransfer._memory.memory import check_memory
from sktransfer._splits import hold_outs
from sktransfer._torch_state import Chance
from sktransfer._training.cut import find_cut
from sktransfer._training.data import allocate
from sktransfer._training.heads import solve_head
from sktransfer._training.interrupt import Interrupted
from sktransfer._training.net import Progress, Schedule, train
from sktransfer._training.plan import Plan, make_plan
from sktransfer._training.settings import Settings
from sktransfer._training.task import Examples, Task
from sktransfer._training.trained_part import TrainedPart


class Phases(NamedTuple):
    """Which phases a fit has, and how long they are."""

    solves_head: bool  # on the embeddings of the frozen network
    n_head_epochs: int  # that train the head alone
    n_epochs: int  # that train the blocks with it

    @property
    def needs_embeddings(self) -> bool:
        return self.solves_head or self.n_head_epochs > 0


def find_phases(task: Task, *, goes_on: bool, n_left: int) -> Phases:
    """Find the phases of a fit.

    Parameters
    ----------
    task : Task
    goes_on : bool
        Whether it goes on with what was fitted: then the head is there.
    n_left : int
        Epochs that an interrupted fit still lacks.
    """
    settings, trains_head_alone = task.settings, task.cut == task.frozen.embedding
    solves_head = settings.solves_head and not goes_on
    n_epochs = n_left or (0 if solves_head and trains_head_alone else settings.max_epochs)
    if goes_on or settings.solves_head or settings.is_from_scratch:
        n_head_epochs = 0
    elif settings.head_epochs != "auto":
        n_head_epochs = int(settings.head_epochs)
    else:
        n_head_epochs = 0 if trains_head_alone else settings.max_epochs
    return Phases(solves_head, n_head_epochs, n_epochs)


def hold_out(
    settings: Settings, targets: np.ndarray, groups: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to learn from, and those that are held out for early stopping."""
    rows = np.arange(len(targets))
    if not settings.early_stopping:
        return rows, rows[:0]
    share = settings.validation_fraction
    try:
        return hold_outs(1, share, targets, settings.kind, groups, seed)[0]
    except ValueError as error:
        raise ValueError(
            f"early_stopping=True can't hold out validation_fraction={share} of {len(rows)} "
            f"images: {error} Pass early_stopping=False, or more images."
        ) from error


# ------------------------------------------------------------------------------ frozen blocks


@contextmanager
def saying_what_is_kept(stream: Stream, n: int) -> Iterator[None]:
    """Say on Ctrl-C what is left of a stream over `n` views."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "lie in the memory" if stream.memory is not None else "are lost without a memory"
        raise KeyboardInterrupt(
            f"Interrupted while the frozen blocks ran: {stream.n_computed} of {n} images "
            f"were computed and {kept}; call it again."
        ) from None


class FrozenResults(NamedTuple):
    """What the frozen blocks make of all views; None of what is not needed."""

    start: np.ndarray | None = None  # what epochs start from, if it is not the images
    passed: np.ndarray | None = None  # rows of the layers in front of the cut
    embeddings: np.ndarray | None = None


class FrozenPhase:
    """One run of the frozen blocks over all views of the images.

    Parameters
    ----------
    task : Task
    plan : Plan
    progress : Progress

    Attributes
    ----------
    plan : Plan
        As given, or another one if the disk proved full.
    """

    def __init__(self, task: Task, plan: Plan, progress: Progress) -> None:
        self.task, self.plan, self.progress = task, plan, progress

    def positions(self, *, with_embeddings: bool, with_start: bool) -> list[int]:
        """Return the positions to which the frozen blocks run.

        Parameters
        ----------
        with_embeddings : bool
            Whether the head is trained on them.
        with_start : bool
            Whether there are epochs, which start somewhere.
        """
        frozen, start = self.task.frozen, self.plan.start if with_start else 0
        embedding = frozen.embedding if with_embeddings else 0
        # Embeddings have the rows in front of the cut among theirs.
        takes_rows = with_start and not with_embeddings and frozen.passed_rows
        return sorted({start, embedding, frozen.passed if takes_rows else 0} - {0})

    def run(self, views: Views, *, with_embeddings: bool, with_start: bool) -> FrozenResults:
        """Return what the phases take of the views."""
        frozen = self.task.frozen
        positions = self.positions(with_embeddings=with_embeddings, with_start=with_start)
        if not positions:
            return FrozenResults()
        self.progress.stage("frozen blocks")
        start = self.plan.start if with_start else 0
        outs: dict[int, np.ndarray] = {}
        for position in positions:
            wanted = (len(views), *frozen.shape(position)), frozen.dtype(position)
            if (out := allocate(*wanted)) is None and position == start:  # the disk is full
                self.plan = self.plan.without_start()
                return self.run(views, with_embeddings=with_embeddings, with_start=with_start)
            # Rows are needed in any case, and are small beside what the blocks are trained on.
            outs[position] = np.empty(*wanted) if out is None else out
        stream = self.stream(positions)
        with saying_what_is_kept(stream, len(views)):
            stream(views, list(outs.values()))
        embeddings, passed = outs.get(frozen.embedding), outs.get(frozen.passed)
        if embeddings is not None and with_start and frozen.passed_rows:
            passed = frozen.passed_of(embeddings)
        return FrozenResults(outs.get(start), passed, embeddings)

    def stream(self, positions: Sequence[int]) -> Activations:
        """Return what runs the frozen blocks up to some positions, through the memory."""
        settings = self.task.settings
        return Activations(
            self.task.frozen,
            positions,
            self.plan.keep,
            memory=check_memory(settings.memory),
            batch_size=settings.batch_size,
            n_jobs=settings.n_jobs,
            progress=self.progress,
        )


def plan_fit(task: Task, n_images: int, n_epochs: int, *, with_embeddings: bool) -> Plan:
    """Return the plan of what a fit keeps of the frozen blocks, and show it if that is wanted."""
    memory = check_memory(task.settings.memory)
    plan = make_plan(
        task.frozen,
        task.cut,
        n_images,
        task.n_views,
        n_epochs * task.n_shown,
        with_embeddings,
        None if memory is None else memory.folder,
        tempfile.gettempdir(),
        task.settings.searches_depth,
    )
    if task.settings.verbose > 1:
        tqdm.write(str(plan))
    return plan


# ------------------------------------------------------------------------------ the head


def solve_new_head(
    task: Task, head: nn.Module, embeddings: np.ndarray | None, rows: np.ndarray, examples: Examples
) -> None:
    """Set a linear head to its optimum on the embeddings of all views of some rows."""
    assert isinstance(head, nn.Sequential) and embeddings is not None
    n_views = examples.views.n_views
    numbers = (rows[:, None] * n_views + np.arange(n_views)).ravel()
    weights = np.ones(len(rows)) if examples.weights is None else examples.weights[rows]
    solve_head(
        head,
        embeddings[numbers],
        np.repeat(examples.targets[rows], n_views, axis=0),
        np.repeat(weights / n_views, n_views),
        task.settings.kind,
        is_start=task.cut < task.frozen.embedding and not task.is_on_layers,
        n_views=n_views,
        seed=examples.seed,
        groups=None if examples.groups is None else examples.groups[rows],
    )


def train_head(
    task: Task,
    head: nn.Module,
    embeddings: np.ndarray | None,
    rows: np.ndarray,
    examples: Examples,
    n_epochs: int,
    chance: Chance,
    progress: Progress,
) -> None:
    """Train a head alone, on the embeddings of some rows."""
    frozen = task.frozen
    nothing = find_cut(frozen.runner, 0)
    module = TrainedPart(frozen, frozen.embedding, nothing, head, task.step, False)
    data = task.data(embeddings, rows, examples)
    schedule = Schedule(task.n_steps(len(rows)) * n_epochs)
    net = task.new_net(module, schedule, examples.seed, progress)
    try:
        train(net, data, n_epochs, chance, progress=progress, stage="head, epoch")
    except Interrupted:
        raise KeyboardInterrupt(
            f"fit was interrupted in epoch {len(net.history) + 1} of {n_epochs} that train the "
            "head alone: the estimator is as it was."
        ) from None
