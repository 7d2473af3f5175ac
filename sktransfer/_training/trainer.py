"""What an estimator trains: the phases of its fit, what it predicts, and what is kept of it."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from sktransfer._engine.augmentation import Views
from sktransfer._engine.device import fetch
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.runner import Runner
from sktransfer._threads import n_threads
from sktransfer._torch_state import Chance, chance_lock, network_lock, ready_to_train
from sktransfer._training.cut import find_cut
from sktransfer._training.data import TrainingData
from sktransfer._training.net import (
    Interrupted,
    Progress,
    Schedule,
    continue_net,
    recorded,
    train,
)
from sktransfer._training.phases import (
    FrozenPhase,
    Phases,
    find_phases,
    hold_out,
    plan_fit,
    solve_new_head,
    train_head,
)
from sktransfer._training.plan import Plan
from sktransfer._training.settings import Settings, unseen_blocks_error
from sktransfer._training.task import Examples, Task
from sktransfer._training.trained_part import TrainedPart
from sktransfer.io import ImageSequence
from sktransfer.models import Backbone
from sktransfer.models._modules import copy_of
from sktransfer.transforms import Preprocessing

_CHUNK = 256  # images whose activations a prediction holds at once


class Trainer:
    """Trains what follows the cut; predicts with it.

    Parameters
    ----------
    runner : Runner
    preprocessing : Preprocessing
    settings : Settings
        An estimator that goes on, or predicts, sets others.

    Attributes
    ----------
    unfrozen : Unfrozen
        The blocks that are trained.
    plan : Plan
    net : skorch.NeuralNet
        Its module is a `TrainedPart`.
    n_left : int
        Epochs that an interrupted training still lacks.
    """

    task_class: ClassVar[type[Task]] = Task

    plan: Plan
    net: Any
    module: TrainedPart

    def __init__(self, runner: Runner, preprocessing: Preprocessing, settings: Settings) -> None:
        self.settings = settings
        self.unfrozen = find_cut(runner, settings.unfreeze)
        layers = settings.pooling, settings.layer
        self.frozen = FrozenBlocks(runner, preprocessing, *layers, self.unfrozen.cut)
        self._check_sees_trained()
        self.n_left = 0
        self._progress = Progress()
        self._chance = Chance(0)  # of the fit in progress
        self._schedule: Schedule | None = None
        self._before: Any = None  # the net whose interrupted training goes on
        self._backbone: Backbone | None = None  # the result, once it is asked for
        self._task.augmentation(None)  # raises an error of the parameters now

    def _check_sees_trained(self) -> None:
        """Raise an error if there are blocks that are trained and that the head does not see."""
        positions = {row.position for row in self.frozen.rows}
        if not self.unfrozen.blocks or self.frozen.is_at_the_end:
            return
        last, settings = max(self.unfrozen.blocks), self.settings
        if None in positions or max(p for p in positions if p is not None) <= last:
            name = self.frozen.runner.block_names[last]
            raise unseen_blocks_error(settings.layer, settings.unfreeze, name, None in positions)

    @property
    def _task(self) -> Task:
        """What is learnt, by the settings as they now are."""
        return self.task_class(self.settings, self.frozen, self.unfrozen.cut)

    @property
    def unfrozen_blocks(self) -> list[int]:
        """The numbers of the trained blocks; none of a network that has no blocks."""
        return sorted(self.unfrozen.blocks if self.frozen.runner.block_names else [])

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
        groups: np.ndarray | None = None,
    ) -> None:
        """Run the phases, or go on with the last one; parts held out are ones of whole groups."""
        self._progress.n_shown = len(images)
        task = self._task
        learnt, held_out = hold_out(self.settings, targets, groups, seed)
        views = task.views(images, len(targets))
        examples = Examples(views, targets, weights, seed, groups=groups)
        phases = find_phases(task, goes_on=goes_on, n_left=self.n_left)
        n_epochs, with_embeddings = phases.n_epochs, phases.needs_embeddings
        if not goes_on:
            self.plan = plan_fit(task, len(images), n_epochs, with_embeddings=with_embeddings)
        n_images = (phases.n_head_epochs + n_epochs) * len(learnt) + n_epochs * len(held_out)
        frozen = FrozenPhase(task, self.plan, self._progress)
        asked = {"with_embeddings": with_embeddings, "with_start": n_epochs > 0}
        n_images += len(examples.views) * bool(frozen.positions(**asked))
        with self._progress.shown(n_images, self.settings.verbose):
            found = frozen.run(examples.views, **asked)
            self.plan = frozen.plan
            self._chance, fitting = Chance(seed), threading.Lock()
            with fitting, ready_to_train(fitting):
                if not goes_on:
                    head = self._trained_head(phases, found.embeddings, learnt, examples)
                    self.module = self._new_module(head)
                examples = examples._replace(passed=found.passed)
                self._train_blocks(found.start, learnt, held_out, examples, n_epochs, goes_on)

    def _trained_head(
        self,
        phases: Phases,
        embeddings: np.ndarray | None,
        learnt: np.ndarray,
        examples: Examples,
    ) -> nn.Module:
        """Return a new head, trained alone if there is a phase for it."""
        task, n_epochs = self._task, phases.n_head_epochs
        head, chance = self._drawn_head(task), self._chance
        if phases.solves_head:
            self._progress.stage("head")
            solve_new_head(task, head, embeddings, learnt, examples)
        elif n_epochs:
            train_head(task, head, embeddings, learnt, examples, n_epochs, chance, self._progress)
        return head

    def _train_blocks(
        self,
        stored: np.ndarray | None,
        learnt: np.ndarray,
        held_out: np.ndarray,
        examples: Examples,
        n_epochs: int,
        goes_on: bool,
    ) -> None:
        """Run the second phase, from its start or from where it was interrupted."""
        task = self._task
        data = task.data(stored, learnt, examples)
        valid = None
        if self.settings.early_stopping:
            valid = task.data(stored, held_out, examples, is_valid=True)
        schedule, before = Schedule(task.n_steps(len(learnt)) * n_epochs), None
        if self.n_left and self._schedule:
            schedule, before = self._schedule, self._before
        self._renew_net(schedule, examples.seed, valid, keeps_history=goes_on)
        if before is not None:
            continue_net(self.net, before)
        self._run_epochs(data, n_epochs)

    def train_part(
        self, images: ImageSequence, targets: np.ndarray, weights: np.ndarray | None, seed: int
    ) -> None:
        """Run one epoch over some images, at a constant learning rate."""
        self._progress.n_shown = len(images)
        task, is_new = self._task, not hasattr(self, "net")
        if is_new:
            self.plan = plan_fit(task, len(images), 1, with_embeddings=False)
        examples = Examples(task.views(images, len(targets)), targets, weights, seed)
        frozen = FrozenPhase(task, self.plan, self._progress)
        asked = {"with_embeddings": False, "with_start": True}
        n_images = len(targets) + len(examples.views) * bool(frozen.positions(**asked))
        with self._progress.shown(n_images, self.settings.verbose):
            found = frozen.run(examples.views, **asked)
            self.plan = frozen.plan
            self._chance, fitting = Chance(seed), threading.Lock()
            with fitting, ready_to_train(fitting):
                examples = examples._replace(passed=found.passed)
                data = task.data(found.start, np.arange(len(targets)), examples)
                if is_new:
                    self.module = self._new_module(self._drawn_head(task))
                if is_new or self._schedule is not None:
                    # The net of a fit has a schedule, and may stop early by images held out.
                    self._renew_net(None, seed, keeps_history=not is_new)
                self._run_epochs(data, 1)

    def _run_epochs(self, data: TrainingData, n_epochs: int) -> None:
        """Train the blocks; if that is interrupted, remember how much is left."""
        self._backbone = self._before = None
        self.module.get_ready()
        try:
            train(self.net, data, n_epochs, self._chance, progress=self._progress)
        except Interrupted as interrupted:
            n_done = interrupted.n_done
            self.n_left = n_epochs - n_done
            if self._schedule is not None:
                self._schedule.offset += n_done * self._task.n_steps(len(data))
            raise Interrupted(
                f"fit was interrupted after {n_done} of {n_epochs} epochs. The estimator predicts "
                f"with what it learnt in them; with warm_start=True, fit goes on for {self.n_left}."
            ) from None
        self.n_left = 0
        self.net.train_split = None  # it would hold on to the activations

    def _drawn_head(self, task: Task) -> nn.Module:
        # A head of the user's runs once: its modules must not meet a trace of another thread.
        with chance_lock, self._chance.in_torch(), network_lock.shared():
            return task.new_head()

    def _new_module(self, head: nn.Module) -> TrainedPart:
        # Random weights need the statistics of their batches; pretrained ones have better ones.
        moves = self.settings.is_from_scratch
        start, step = self.plan.start, self._task.step
        precision = self.settings.precision_of_steps(self.frozen.runner.device)
        return TrainedPart(self.frozen, start, self.unfrozen, head, step, moves, precision)

    def _renew_net(
        self,
        schedule: Schedule | None,
        seed: int,
        valid: TrainingData | None = None,
        *,
        keeps_history: bool,
    ) -> None:
        """Put a new net around the module; its optimizer knows nothing of an earlier one."""
        history = list(self.net.history) if keeps_history else []
        task = self._task
        self._schedule = schedule
        self.net = task.new_net(
            self.module, schedule, seed, self._progress, callbacks=task.callbacks(), valid=valid
        )
        self.net.history.extend(history)

    # ------------------------------------------------------------------------ prediction

    def outputs(self, images: ImageSequence) -> np.ndarray:
        """Return what the network says of each view, float32 (n, predict_views, n_outputs)."""
        settings = self.settings
        n_views = settings.predict_views
        augmentation = self._task.augmentation(settings.n_views)
        views = Views(images, self.frozen.preprocessing, augmentation, n_views)
        results = np.empty((len(views), settings.n_outputs), np.float32)
        progress = Progress()  # two threads may predict at once
        positions = [self.unfrozen.cut or self.frozen.embedding]
        positions += [self.frozen.passed] if self.frozen.passed_rows else []
        stream = FrozenPhase(self._task, self.plan, progress).stream(positions)
        stream.n_expected = len(views)
        with progress.shown(len(views), settings.verbose):
            progress.stage(self.frozen.runner.name)
            for first in range(0, len(images), _CHUNK):
                chunk = views[first : first + _CHUNK]
                chunk.images.digests(n_threads(settings.n_jobs))
                place = slice(first * n_views, first * n_views + len(chunk))
                results[place] = self._chunk_outputs(chunk, stream, progress)
        return results.reshape(len(images), n_views, settings.n_outputs)

    def _chunk_outputs(self, views: Views, stream: Activations, progress: Progress) -> np.ndarray:
        """Return what the network says of views (n, n_outputs), all held in memory at once."""
        cut = self.unfrozen.cut
        if cut:
            stored = [torch.from_numpy(results) for results in stream(views)]
        else:
            with ThreadPoolExecutor(n_threads(self.settings.n_jobs)) as threads:
                stored = [torch.stack(list(threads.map(views.load, range(len(views)))))]

        # Whether OpenVINO is still to be compiled makes no difference to what is trained.
        most = 1 if self.frozen.runner.runtime == "openvino" else stream.step

        def run(step: int) -> np.ndarray:
            if step < most:
                stream.step = step  # of the chunks to come, too
            return self._run_trained(stored, step)

        outputs = self.frozen.runner.in_smaller_steps(run, most)
        if not cut:  # else the stream moved the bar
            progress.update(len(views))
        return outputs

    def _run_trained(self, stored: list[torch.Tensor], step: int) -> np.ndarray:
        """Return the outputs for what is stored at the cut, and for rows in front of it."""
        module = self.net.module_.eval()
        outputs = []
        with torch.inference_mode():
            # Batches of one size: a prediction then does not depend on the others.
            for parts in zip(*(x.split(step) for x in stored), strict=True):
                batch, *passed = [
                    torch.cat([x, x[:1].expand(step - len(x), *x.shape[1:])]) for x in parts
                ]
                padded = module(batch, self.unfrozen.cut, None, *passed)
                outputs.append(fetch(padded[: len(parts[0])]))
        return np.concatenate(outputs)

    # ------------------------------------------------------------------------ states

    def history(self) -> list[dict[str, Any]]:
        """Return what was recorded of each epoch."""
        return recorded(self.net)

    def state(self) -> dict[str, np.ndarray]:
        """Return what cannot be rebuilt."""
        return self.net.module_.trained_state()

    def restore(
        self,
        state: dict[str, np.ndarray],
        history: list[dict],
        plan: Plan,
        n_left: int,
        head: nn.Module | None = None,
    ) -> None:
        """Take back a state; by default, into a new head."""
        self.plan, self.n_left = plan, n_left
        self._chance, restoring = Chance(0), threading.Lock()
        with restoring, ready_to_train(restoring):
            head = self._drawn_head(self._task) if head is None else head
            self.module = self._new_module(head)
            self.module.load_trained_state(state)
            self.module.eval()
            self._renew_net(None, 0, keeps_history=False)
        self.net.history.extend(history)

    def continued(self, settings: Settings, *, keeps_net: bool) -> Trainer:
        """Return a trainer that goes on from here; this one stays as it is.

        Parameters
        ----------
        settings : Settings
        keeps_net : bool
            Whether it goes on in the middle of a training, if these settings allow it: at the
            learning rate, and with the moments of the optimizer, that are there.
        """
        other = type(self)(self.frozen.runner, self.frozen.preprocessing, settings)
        # A head of the user's may have attributes of its own.
        head = copy_of(self.module.head)
        other.restore(self.state(), self.history(), self.plan, self.n_left, head)
        if keeps_net and not settings.needs_new_net(self.settings):
            if self._schedule is None:
                continue_net(other.net, self.net)
            else:
                other._schedule, other._before = copy.copy(self._schedule), self.net
        if settings.max_epochs != self.settings.max_epochs:
            other.n_left = 0  # not what is left of the old number
        return other

    def backbone(self, prefix: str) -> Backbone:
        """Return the whole network as it is now; the same object until it is trained further.

        `prefix` stands in front of its name.
        """
        if self._backbone is None:
            name = f"{prefix}-{self.frozen.runner.name.rpartition('/')[2]}"
            self._backbone = Backbone(self.whole_network(), self.frozen.preprocessing, name=name)
        return self._backbone

    def whole_network(self) -> nn.Module:
        """Return a copy of the whole network, with the blocks as they are now."""
        blocks = self.net.module_.blocks
        if not self.frozen.runner.can_be_cut:
            return copy_of(blocks[0].network if blocks else self.frozen.runner.network).cpu()
        network = copy_of(self.frozen.runner.network)
        network.to("cpu", memory_format=torch.contiguous_format)  # it may take views of maps
        state = network.state_dict()
        for block in blocks:
            state.update({k: v for k, v in block.state_dict().items() if k in state})
        network.load_state_dict(state)
        return network
