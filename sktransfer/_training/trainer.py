"""The phases of a fit: the frozen blocks once, the head, then the unfrozen blocks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit
from torch import nn
from tqdm.auto import tqdm

from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._engine.device import fetch
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.runner import Runner, network_lock
from sktransfer._memory.memory import check_memory
from sktransfer._torch_state import seeded_to_train
from sktransfer._training.data import TrainingData, allocate
from sktransfer._training.head import make_head, solve_head
from sktransfer._training.net import (
    Interrupted,
    Schedule,
    TrainedPart,
    make_net,
    train,
)
from sktransfer._training.plan import Plan, make_plan
from sktransfer._training.progress import Progress
from sktransfer._training.settings import Settings, find_cut, n_threads
from sktransfer.io import ImageSequence
from sktransfer.models import Backbone
from sktransfer.models._modules import copy_of
from sktransfer.transforms import Preprocessing

_CHUNK = 256  # images whose activations a prediction holds at once


class Examples(NamedTuple):
    """What is learnt from, and the seed of the chance in it."""

    views: Views
    targets: np.ndarray  # encoded, one or a row of them for each image
    weights: np.ndarray | None  # of the images
    seed: int


class Trainer:
    """Trains what follows the cut; predicts with it.

    Parameters
    ----------
    runner : Runner
    preprocessing : Preprocessing
    settings : Settings

    Attributes
    ----------
    plan : Plan
    net : skorch.NeuralNet
        Its module is a `TrainedPart`.
    n_left : int
        Epochs that an interrupted training still lacks.
    """

    plan: Plan
    net: Any

    def __init__(self, runner: Runner, preprocessing: Preprocessing, settings: Settings) -> None:
        self.settings = settings
        self.frozen = FrozenBlocks(runner, preprocessing, settings.pooling)
        self.cut, self.unfrozen = find_cut(runner, settings.unfreeze)
        self.n_left = 0
        self._progress = Progress()
        self._schedule: Schedule | None = None
        self._backbone: Backbone | None = None  # the result, once it is asked for
        self._find_views(None)

    @property
    def unfrozen_blocks(self) -> list[int]:
        return sorted(self.unfrozen if self.frozen.runner.block_names else [])

    @property
    def n_trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.net.module_.parameters() if p.requires_grad)

    # ------------------------------------------------------------------------ training

    def train(
        self,
        images: ImageSequence,
        targets: np.ndarray,
        weights: np.ndarray | None,
        seed: int,
        *,
        goes_on: bool,
    ) -> None:
        """Run the phases, or go on with the last one."""
        settings = self.settings
        learnt, held_out = self._split(targets, seed)
        examples = Examples(self._views(images), targets, weights, seed)
        is_solved = settings.solves_head and not goes_on
        n_epochs = 0 if is_solved and self.cut == self.frozen.embedding else settings.max_epochs
        n_epochs = self.n_left or n_epochs
        n_head = 0 if goes_on else self._head_epochs()
        with_embeddings = is_solved or n_head > 0
        if not goes_on:
            self.plan = self._plan(len(images), n_epochs, with_embeddings)
        n_images = (n_head + n_epochs) * len(learnt) + n_epochs * len(held_out)
        n_images += len(examples.views) * bool(self._to_run(with_embeddings, n_epochs > 0))
        with self._progress.shown(n_images, settings.verbose):
            stored, embeddings = self._run_frozen(examples.views, with_embeddings, n_epochs > 0)
            with network_lock, seeded_to_train(seed):
                if not goes_on:
                    head = self._new_head()
                    if is_solved:
                        self._solve(head, embeddings, learnt, examples)
                    elif n_head:
                        self._train_head(head, embeddings, learnt, examples, n_head)
                    self.module = self._new_module(head)
                self._train_blocks(stored, learnt, held_out, examples, n_epochs, goes_on)

    def _train_blocks(
        self,
        stored: np.ndarray | None,
        learnt: np.ndarray,
        held_out: np.ndarray,
        examples: Examples,
        n_epochs: int,
        goes_on: bool,
    ) -> None:
        """Run the second phase."""
        data = self._data(stored, learnt, examples)
        valid = None
        if self.settings.early_stopping:
            valid = self._data(stored, held_out, examples, is_valid=True)
        n_steps = self._n_steps(len(learnt)) * n_epochs
        if not (self.n_left and self._schedule):
            history = self.net.history if goes_on else None
            self._schedule = Schedule(n_steps)
            self.net = self._new_net(self.module, valid, self._schedule, examples.seed)
            if history is not None:
                self.net.history = history
        self._run_epochs(data, n_epochs)

    def train_part(
        self, images: ImageSequence, targets: np.ndarray, weights: np.ndarray | None, seed: int
    ) -> None:
        """Run one epoch over some images, at a constant learning rate."""
        is_new = not hasattr(self, "net")
        if is_new:
            self.plan = self._plan(len(images), 1, False)
        examples = Examples(self._views(images), targets, weights, seed)
        n_images = len(targets) + len(examples.views) * bool(self._to_run(False, True))
        with self._progress.shown(n_images, self.settings.verbose):
            stored, _ = self._run_frozen(examples.views, False, True)
            with network_lock, seeded_to_train(seed):
                data = self._data(stored, np.arange(len(targets)), examples)
                if is_new:
                    self.module = self._new_module(self._new_head())
                if is_new or self._schedule is not None:
                    # The net of a fit has a schedule, and may stop early by images held out.
                    history = [] if is_new else self.net.history
                    self.net = self._new_net(self.module, None, None, seed)
                    self.net.history.extend(history)
                    self._schedule = None
                self._run_epochs(data, 1)

    def _run_epochs(self, data: TrainingData, n_epochs: int) -> None:
        before = len(self.net.history)
        self._backbone = None
        if n_epochs:
            self._progress.stage("epoch", n_epochs)
        try:
            train(self.net, data, n_epochs)
        except Interrupted:
            done = len(self.net.history) - before
            self.n_left = n_epochs - done
            if self._schedule is not None:
                self._schedule.offset += done * self._n_steps(len(data))
            raise Interrupted(
                f"fit was interrupted after {done} of {n_epochs} epochs. The estimator predicts "
                f"with what it learnt in them; with warm_start=True, fit goes on for {self.n_left}."
            ) from None
        self.n_left = 0
        self.net.train_split = None  # it would hold on to the activations

    def _split(self, targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows to learn from, and those that are held out for early stopping."""
        rows = np.arange(len(targets))
        if not self.settings.early_stopping:
            return rows, rows[:0]
        share = self.settings.validation_fraction
        splitter: Any = ShuffleSplit(1, test_size=share, random_state=seed)
        if self.settings.kind == "class":
            splitter = StratifiedShuffleSplit(1, test_size=share, random_state=seed)
        try:
            return next(splitter.split(rows, targets if self.settings.kind == "class" else None))
        except ValueError as error:
            raise ValueError(
                f"early_stopping=True can't hold out validation_fraction={share} of {len(rows)} "
                f"images: {error} Pass early_stopping=False, or more images."
            ) from error

    def _solve(
        self, head: nn.Module, embeddings: np.ndarray, rows: np.ndarray, examples: Examples
    ) -> None:
        assert isinstance(head, nn.Sequential)
        self._progress.stage("head")
        targets, n_views = examples.targets, examples.views.n_views
        numbers = (rows[:, None] * n_views + np.arange(n_views)).ravel()
        each = np.ones(len(rows)) if examples.weights is None else examples.weights[rows]
        solve_head(
            head,
            embeddings[numbers],
            np.repeat(targets[rows], n_views, axis=0),
            np.repeat(each / n_views, n_views),
            self.settings.kind,
            is_start=self.cut < self.frozen.embedding,
        )

    def _train_head(
        self,
        head: nn.Module,
        embeddings: np.ndarray,
        rows: np.ndarray,
        examples: Examples,
        n_epochs: int,
    ) -> None:
        end = self.frozen.embedding
        module = TrainedPart(self.frozen, end, end, set(), head, self._step, False)
        data = self._data(embeddings, rows, examples)
        n_steps = self._n_steps(len(rows)) * n_epochs
        net = self._new_net(module, None, Schedule(n_steps), examples.seed)
        self._progress.stage("head, epoch", n_epochs)
        try:
            train(net, data, n_epochs)
        except Interrupted:
            raise KeyboardInterrupt(
                f"fit was interrupted in epoch {len(net.history) + 1} of {n_epochs} that train the "
                "head alone: nothing is fitted yet."
            ) from None

    def _head_epochs(self) -> int:
        """Return the epochs that train the head alone, before the blocks."""
        settings = self.settings
        if settings.solves_head or settings.is_from_scratch:
            return 0
        if settings.head_epochs != "auto":
            return int(settings.head_epochs)
        return 0 if self.cut == self.frozen.embedding else settings.max_epochs

    # ------------------------------------------------------------------------ parts

    def _n_steps(self, n_images: int) -> int:
        """Return the steps of an epoch."""
        return math.ceil(n_images / self.settings.images_a_step)

    def _new_head(self) -> nn.Module:
        settings = self.settings
        return make_head(settings.head, self.frozen.width, settings.n_outputs, settings.dropout)

    def _new_module(self, head: nn.Module) -> TrainedPart:
        # Random weights need the statistics of their batches; pretrained ones have better ones.
        moves = self.settings.is_from_scratch
        start, step = self.plan.start, self._step
        return TrainedPart(self.frozen, start, self.cut, self.unfrozen, head, step, moves)

    def _new_net(
        self,
        module: TrainedPart,
        valid: TrainingData | None,
        schedule: Schedule | None,
        seed: int,
    ) -> Any:
        settings = self.settings
        is_second_phase = module is getattr(self, "module", None)
        head_lr = settings.lr if settings.head_lr is None else settings.head_lr
        return make_net(
            module,
            settings.kind,
            module.parameter_groups(settings.lr, head_lr, settings.lr_decay, settings.weight_decay),
            valid,
            n_outputs=settings.n_outputs,
            max_epochs=settings.max_epochs,
            batch_size=settings.images_a_step,
            patience=settings.n_iter_no_change,
            callbacks=self._callbacks() if is_second_phase else [],
            schedule=schedule,
            seed=seed,
            progress=self._progress,
            verbose=settings.verbose,
            **self._task(),
        )

    def _callbacks(self) -> list[Any]:
        return list(self.settings.callbacks or [])

    def _task(self) -> dict[str, Any]:
        """Return options of `make_net` for what is not told by the kind of `y`."""
        return {}

    def _data(
        self,
        stored: np.ndarray | None,
        rows: np.ndarray,
        examples: Examples,
        *,
        is_valid: bool = False,
    ) -> TrainingData:
        augments = "draws" if self.cut == 0 and self.settings.augment is not None else "turns"
        return TrainingData(
            examples.views,
            stored,
            rows,
            examples.targets,
            examples.weights,
            seed=examples.seed,
            augments="no" if is_valid else augments,
            n_threads=n_threads(self.settings.n_jobs),
        )

    # ------------------------------------------------------------------------ frozen blocks

    def _views(self, images: ImageSequence) -> Views:
        """Return the fixed views in which images are learnt."""
        augmentation = self._find_views(self.settings.n_views)
        n_views = 1 if self.cut == 0 else augmentation.n_views  # else they are drawn
        return Views(images, self.frozen.preprocessing, augmentation, n_views)

    def _find_views(self, n_views: int | None) -> Augmentation:
        augmentation = Augmentation(self.settings.augment, n_views, self.frozen.size)
        most = Augmentation(self.settings.augment, None, self.frozen.size).n_views
        most = max(most, augmentation.n_views)
        if self.settings.predict_views > most:
            raise ValueError(
                f"predict_views={self.settings.predict_views}, but "
                f"augment={self.settings.augment!r} has {most} views of an image."
            )
        return augmentation

    def _plan(self, n_images: int, n_epochs: int, with_embeddings: bool) -> Plan:
        memory = check_memory(self.settings.memory)
        folder = None if memory is None else str(getattr(memory.memory, "location", None) or ".")
        n_views = 1 if self.cut == 0 else self._find_views(self.settings.n_views).n_views
        plan = make_plan(
            self.frozen,
            self.cut,
            n_images,
            n_views,
            n_epochs,
            with_embeddings,
            folder,
            tempfile.gettempdir(),
        )
        if self.settings.verbose > 1:
            tqdm.write(str(plan))
        return plan

    @property
    def _step(self) -> int:
        return self.frozen.runner.step(self.settings.batch_size, self.frozen.size)

    def _stream(self, positions: Sequence[int], progress: Progress) -> Activations:
        return Activations(
            self.frozen,
            positions,
            self.plan.keep,
            memory=check_memory(self.settings.memory),
            batch_size=self.settings.batch_size,
            n_jobs=self.settings.n_jobs,
            progress=progress,
        )

    def _to_run(self, with_embeddings: bool, with_start: bool) -> list[int]:
        """Return the positions to which the frozen blocks run before the training."""
        start = self.plan.start if with_start else 0
        return sorted({start, self.frozen.embedding if with_embeddings else 0} - {0})

    def _run_frozen(
        self, views: Views, with_embeddings: bool, with_start: bool
    ) -> tuple[np.ndarray | None, Any]:
        """Return what epochs start from, None if it is the images, and the embeddings."""
        start, end = self.plan.start if with_start else 0, self.frozen.embedding
        positions = self._to_run(with_embeddings, with_start)
        if not positions:
            return None, None
        self._progress.stage("frozen blocks")
        stream = self._stream(positions, self._progress)
        outs = {
            p: allocate((len(views), *self.frozen.shape(p)), self.frozen.dtype(p))
            for p in positions
        }
        if outs.get(start, views) is None:
            self.plan = self.plan.without_start()
            return self._run_frozen(views, with_embeddings, with_start)
        try:
            stream(views, [out for out in outs.values() if out is not None])
        except KeyboardInterrupt:
            kept = "lie in the memory" if stream.memory is not None else "are lost without a memory"
            raise KeyboardInterrupt(
                f"fit was interrupted while the frozen blocks ran: {stream.n_computed} of "
                f"{len(views)} images were computed and {kept}; call it again."
            ) from None
        return outs.get(start), outs.get(end)

    # ------------------------------------------------------------------------ prediction

    def outputs(self, images: ImageSequence) -> np.ndarray:
        """Return what the network says of each view, float32 (n, predict_views, n_outputs)."""
        settings = self.settings
        n_views = settings.predict_views
        augmentation = self._find_views(settings.n_views)
        views = Views(images, self.frozen.preprocessing, augmentation, n_views)
        results = np.empty((len(views), settings.n_outputs), np.float32)
        progress = Progress()  # two threads may predict at once
        stream = self._stream([self.cut or self.frozen.embedding], progress)
        with progress.shown(len(views), settings.verbose):
            progress.stage(self.frozen.runner.name)
            for first in range(0, len(images), _CHUNK):
                chunk = views[first : first + _CHUNK]
                chunk.images.digests(n_threads(settings.n_jobs))
                place = slice(first * n_views, first * n_views + len(chunk))
                results[place] = self._chunk_outputs(chunk, stream, progress)
        return results.reshape(len(images), n_views, settings.n_outputs)

    def _chunk_outputs(self, views: Views, stream: Activations, progress: Progress) -> np.ndarray:
        if self.cut:
            batches = torch.from_numpy(stream(views)[0])
        else:
            with ThreadPoolExecutor(n_threads(self.settings.n_jobs)) as threads:
                batches = torch.stack(list(threads.map(views.load, range(len(views)))))

        def run(step: int) -> np.ndarray:
            stream.step = step  # of the chunks to come, too
            return self._run_trained(batches, step)

        outputs = self.frozen.runner.in_smaller_steps(run, stream.step)
        if not self.cut:  # else the stream moved the bar
            progress.update(len(views))
        return outputs

    def _run_trained(self, stored: torch.Tensor, step: int) -> np.ndarray:
        """Return the outputs for what is stored at the cut."""
        module = self.net.module_.eval()
        outputs = []
        with torch.inference_mode():
            # Batches of one size: a prediction then does not depend on the others.
            for batch in stored.split(step):
                padding = batch[:1].expand(step - len(batch), *batch.shape[1:])
                found = module(torch.cat([batch, padding]), self.cut)
                outputs.append(fetch(found[: len(batch)]))
        return np.concatenate(outputs)

    # ------------------------------------------------------------------------ states

    def history(self) -> list[dict[str, Any]]:
        """Return what was recorded of each epoch."""
        return [
            {k: v if isinstance(v, str | int) else float(v) for k, v in epoch.items()}
            for epoch in ({k: v for k, v in e.items() if _is_plain(v)} for e in self.net.history)
        ]

    def state(self) -> dict[str, np.ndarray]:
        """Return what cannot be rebuilt."""
        return self.net.module_.trained_state()

    def restore(
        self, state: dict[str, np.ndarray], history: list[dict], plan: Plan, n_left: int
    ) -> None:
        """Take back a state."""
        self.plan, self.n_left = plan, n_left
        with network_lock, seeded_to_train(0):
            self.module = self._new_module(self._new_head())
            self.module.load_trained_state(state)
            self.module.eval()
            self.net = self._new_net(self.module, None, None, 0)
        self.net.history.extend(history)

    def backbone(self, prefix: str) -> Backbone:
        """Return the whole network as it is now; the same object until it is trained further."""
        if self._backbone is None:
            name = f"{prefix}-{self.frozen.runner.name.rpartition('/')[2]}"
            self._backbone = Backbone(self.whole_network(), self.frozen.preprocessing, name=name)
        return self._backbone

    def whole_network(self) -> nn.Module:
        """Return a copy of the whole network, with the blocks as they are now."""
        blocks = self.net.module_.blocks
        if not self.frozen.runner.can_be_cut:
            return copy_of(blocks[0].network if blocks else self.frozen.runner.network).cpu()
        network = copy_of(self.frozen.runner.network).cpu()
        state = network.state_dict()
        for block in blocks:
            state.update({k: v for k, v in block.state_dict().items() if k in state})
        network.load_state_dict(state)
        return network


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, np.number, np.bool_))
