from collections import namedtuple

import numpy as np
import pytest
import torch
from networks import small
from torch import nn

from sktransfer import FineTunedClassifier, get_model
from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.runner import get_runner
from sktransfer._memory.memory import check_memory
from sktransfer._training import plan as plans
from sktransfer._training.plan import make_plan
from sktransfer.io import check_images
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))
PRECISIONS = ["float32", "bfloat16"]
STEM, BODY_0, BODY_1, EMBEDDING = 1, 2, 3, 4


def pictures(n=10, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, 32, 32, 3)).astype(np.uint8)


def frozen_blocks(precision="float32", backbone=None):
    backbone = get_model(backbone or Backbone(small(), SIZE))
    return FrozenBlocks(get_runner(backbone, "cpu", precision), backbone.preprocessing, "avg")


def views(X, augment=None, n_views=None):
    return Views(check_images(X), SIZE, Augmentation(augment, n_views, SIZE.size))


def pixels(X):
    return torch.from_numpy(X).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------------ numbers


def test_an_activation_is_that_of_the_network_rounded_at_every_cut():
    X, frozen, network = pictures(4), frozen_blocks(), small().eval()
    with torch.no_grad():
        x = frozen.unpack(pixels(X), 0)
        results = frozen.advance(x, 0, EMBEDDING, wanted={STEM, BODY_0, BODY_1})
        stem = network.stem(x).half()
        first = network.body[0](stem.float()).half()
        second = network.body[1](first.float()).half()
        embedding = network.pool(second.float()).flatten(1)
    for position, expected in enumerate([stem, first, second, embedding], start=1):
        # Batch-norms are folded into the convolutions, which may round to the next number.
        assert torch.allclose(results[position].float(), expected.float(), rtol=2e-3, atol=1e-6)
        assert results[position].dtype == expected.dtype
        assert results[position].dtype == expected.dtype


def test_only_what_is_wanted_is_returned():
    frozen = frozen_blocks()
    with torch.no_grad():
        x = frozen.unpack(pixels(pictures(2)), 0)
        assert set(frozen.advance(x, 0, BODY_1)) == {BODY_1}
        assert set(frozen.advance(x, 0, BODY_1, {STEM})) == {STEM, BODY_1}
        assert frozen.advance(x, 0, 0) == {0: x}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packing_loses_nothing(precision):
    frozen = frozen_blocks(precision)
    with torch.no_grad(), frozen.runner.autocast():
        x = frozen.unpack(pixels(pictures(3)), 0)
        results = frozen.advance(x, 0, EMBEDDING, {STEM, BODY_0, BODY_1})
    for position, x in results.items():
        stored = frozen.pack(x, position)
        assert stored.shape[1:] == frozen.shape(position)
        assert stored.dtype == frozen.dtype(position)
        assert stored[0].nbytes == frozen.n_bytes(position)
        assert torch.equal(frozen.unpack(torch.from_numpy(stored), position), x.float())


class Loud(nn.Module):
    """Its activations are beyond what half precision can hold."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        nn.init.constant_(self.stem.weight, 1e6)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_activations_stay_finite(precision):
    frozen = frozen_blocks(precision, Backbone(Loud(), SIZE))
    with torch.no_grad(), frozen.runner.autocast():
        x = frozen.unpack(pixels(pictures(2)), 0)
        results = frozen.advance(x, 0, frozen.embedding, {1})
    assert results[1].float().abs().max() > 60_000
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kept", [STEM, BODY_0, BODY_1])
@pytest.mark.parametrize("position", [BODY_0, BODY_1, EMBEDDING])
def test_from_a_kept_activation_and_from_the_image(tmp_path, run_log, precision, kept, position):
    X, frozen = pictures(), frozen_blocks(precision)
    (expected,) = Activations(frozen, [position])(views(X))
    memory = check_memory(tmp_path)
    Activations(frozen, [kept], [kept], memory=memory)(views(X[:7]))
    n_before = len(run_log())
    (found,) = Activations(frozen, [position], [position], memory=memory)(views(X))
    n_run = len(set(run_log()[n_before:]))
    assert n_run == (3 if kept <= position else 10)  # of the others, the stem was not run
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_result_does_not_depend_on_the_others(precision, batch_size):
    X, frozen = pictures(), frozen_blocks(precision)

    def run(some):
        return Activations(frozen, [BODY_0, EMBEDDING], batch_size=batch_size)(views(some))

    order = np.random.default_rng(0).permutation(len(X))
    whole, shuffled, single = run(X), run(X[order]), run(X[5:6])
    for a, b, c in zip(whole, shuffled, single, strict=True):
        assert a[order].tobytes() == b.tobytes()
        assert a[5:6].tobytes() == c.tobytes()


def test_results_on_the_way_are_kept(tmp_path, run_log):
    X, frozen, memory = pictures(), frozen_blocks(), check_memory(tmp_path)
    Activations(frozen, [EMBEDDING], [STEM, EMBEDDING], memory=memory)(views(X))
    n_before = len(run_log())
    for position in (STEM, EMBEDDING, BODY_1):
        stream = Activations(frozen, [position], [STEM, EMBEDDING], memory=memory)
        (found,) = stream(views(X))
        assert found.tobytes() == Activations(frozen, [position])(views(X))[0].tobytes()
        assert stream.n_computed == (10 if position == BODY_1 else 0)  # from the stem
    assert len(set(run_log()[n_before:])) == 10  # all of them without a memory
    again = Activations(frozen, [BODY_1], [STEM, EMBEDDING], memory=memory)
    again(views(X))
    assert again.n_computed == 10  # it was not to be kept


def test_views_are_results_of_their_own(tmp_path):
    X, frozen, memory = pictures(4), frozen_blocks(), check_memory(tmp_path)
    (rows,) = Activations(frozen, [EMBEDDING], [EMBEDDING], memory=memory)(views(X, "flip"))
    (mirrored,) = Activations(frozen, [EMBEDDING])(views(X[:, :, ::-1].copy()))
    (plain,) = Activations(frozen, [EMBEDDING])(views(X))
    assert rows[1::2].tobytes() == mirrored.tobytes()
    assert rows[::2].tobytes() == plain.tobytes()
    stream = Activations(frozen, [EMBEDDING], [EMBEDDING], memory=memory)
    stream(views(X, "dihedral", 4))
    assert stream.n_computed == 8  # two of the four views were there


def test_equal_images_are_computed_once(tmp_path):
    X = pictures(3)
    stream = Activations(frozen_blocks(), [STEM], [STEM], memory=check_memory(tmp_path))
    (rows,) = stream(views(X[[0, 1, 0, 2, 2]]))
    assert stream.n_computed == 3
    assert np.array_equal(rows[0], rows[2]) and np.array_equal(rows[3], rows[4])


def test_keys_name_all_that_shapes_a_result():
    frozen = frozen_blocks()
    other_weights = frozen_blocks(backbone=Backbone(small(seed=1), SIZE))
    other_precision = frozen_blocks("bfloat16")
    other_size = FrozenBlocks(frozen.runner, Preprocessing((32, 32), (40, 40)), "avg")
    other_pooling = FrozenBlocks(frozen.runner, frozen.preprocessing, "flatten")
    keys = [
        *(frozen.key(p) for p in range(1, 5)),
        *(f.key(p) for p in (1, 4) for f in (other_weights, other_precision, other_size)),
        other_pooling.key(4),
    ]
    assert len(set(keys)) == len(keys)
    assert other_pooling.key(1) == frozen.key(1)  # it comes later
    assert frozen_blocks().key(1) == frozen.key(1)


# ------------------------------------------------------------------------------ plans


@pytest.fixture
def slow_blocks(monkeypatch):
    """Blocks that take longer to run than their results to read."""
    monkeypatch.setattr(plans, "_FLOPS", {"cpu": 1e5})


@pytest.fixture
def disk(monkeypatch):
    """A function that says how many bytes of the disk are free."""
    usage = namedtuple("usage", "total used free")

    def set_free(n_bytes):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**15, 0, n_bytes))

    set_free(10**12)
    return set_free


def plan(cut, n_images=100, n_views=1, n_epochs=20, memory="memory", frozen=None):
    return make_plan(
        frozen or frozen_blocks(), cut, n_images, n_views, n_epochs, False, memory, "/tmp"
    )


@pytest.mark.parametrize("cut", [STEM, BODY_0, BODY_1])
def test_a_plan_keeps_the_cut_and_the_embedding(slow_blocks, disk, cut):
    found = plan(cut)
    assert (found.cut, found.start) == (cut, cut)
    assert {cut, EMBEDDING} <= set(found.keep)
    name = ["", "stem", "body.0", "body.1"][cut]
    assert f"starts from {name}" in str(found) and "the memory keeps" in str(found)


def test_a_plan_without_a_memory_keeps_nothing(slow_blocks, disk):
    found = plan(STEM, memory=None)
    assert found.keep == () and found.start == STEM
    assert "memory" not in str(found)


def test_a_plan_for_a_network_without_frozen_blocks(slow_blocks, disk):
    found = plan(0)
    assert (found.cut, found.start) == (0, 0)
    assert "nothing is frozen" in str(found)


def test_a_plan_drops_what_would_fill_the_disk(slow_blocks, disk):
    frozen = frozen_blocks()
    disk(10 * 100 * (frozen.n_bytes(EMBEDDING) + frozen.n_bytes(STEM) // 2))
    found = plan(STEM)
    assert found.keep == (EMBEDDING,)
    assert "a tenth of the free disk" in str(found)
    disk(0)
    assert plan(STEM).keep == ()
    disk(10**12)
    assert "a tenth" not in str(plan(STEM))


def test_a_plan_starts_from_images_where_activations_take_too_much_room(
    slow_blocks, disk, monkeypatch
):
    frozen = frozen_blocks()
    assert frozen.n_bytes(STEM) > frozen.n_bytes(BODY_1)
    monkeypatch.setattr(plans, "_IN_RAM", 100 * frozen.n_bytes(STEM) - 1)
    disk(0)
    found = plan(STEM)
    assert (found.cut, found.start) == (STEM, 0)
    assert "the images" in str(found) and "stem" in str(found)
    assert plan(STEM, n_images=99).start == STEM
    assert plan(BODY_1).start == BODY_1  # smaller ones fit
    disk(200 * frozen.n_bytes(STEM))  # half of it holds them
    assert plan(STEM).start == STEM


def test_a_plan_recomputes_what_is_faster_computed_than_read(disk, monkeypatch):
    monkeypatch.setattr(plans, "_FLOPS", {"cpu": 1e15})
    frozen = frozen_blocks()
    assert frozen.n_bytes(STEM) > frozen.n_bytes(0)
    found = plan(STEM, n_epochs=10**6, memory=None)
    assert found.start == 0
    assert "recomputes up to stem" in str(found)


def test_a_fit_gives_the_same_from_images_and_from_activations(slow_blocks, monkeypatch):
    X, y = pictures(24), np.arange(24) % 2
    options = {"max_epochs": 2, "batch_size": 8, "random_state": 0, "unfreeze": 2}
    model = FineTunedClassifier(Backbone(small(), SIZE), **options).fit(X, y)
    assert model.plan_.start == model.plan_.cut == STEM
    monkeypatch.setattr(plans, "_FLOPS", {"cpu": 1e18})
    other = FineTunedClassifier(Backbone(small(), SIZE), **options).fit(X, y)
    assert other.plan_.start == 0 < other.plan_.cut
    assert np.array_equal(model.predict_proba(X), other.predict_proba(X))


def test_flops_are_those_of_the_blocks():
    stem = 16 * 16 * 8 * 27 * 2
    body = 8 * 8 * 12 * 8 * 9 * 2, 4 * 4 * 16 * 12 * 9 * 2
    assert frozen_blocks().flops() == [stem, *body, 0]


# ------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("unfreeze", [1, "all"])
@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v3_small",
        "squeezenet1_1",
        "swin_t",
        "timm/test_vit",
        "timm/test_convnext",
    ],
)
def test_architectures_can_be_fine_tuned(name, unfreeze):
    size = None if name == "timm/test_vit" else 64
    X = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3)).astype(np.uint8)
    model = FineTunedClassifier(
        name, weights=None, unfreeze=unfreeze, image_size=size, max_epochs=1, random_state=0
    )
    model.fit(X, [0, 1, 2, 0])
    assert model.unfrozen_block_names_ == (
        model.block_names_ if unfreeze == "all" else model.block_names_[-1:]
    )
    before = get_model(name, None).network.state_dict()
    after = model.to_feature_extractor().backbone.network.state_dict()
    changed = [n for n, p in before.items() if not torch.equal(p, after[n])]
    assert changed
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1, rtol=1e-5)
