from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from networks import count, small
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from test_blocks import small_swin
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from sktransfer import (
    FineTunedClassifier,
    PretrainedFeatureExtractor,
    get_model,
    register_model,
)
from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._engine.embedding import Embedding
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.program import Output, stored_form
from sktransfer._engine.runner import Runner, get_runner
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._memory.memory import ImageMemory, check_memory
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


def run(frozen, outputs, X, step=4):
    """Return the stored results of images."""
    found = frozen.runner.program(outputs, frozen.preprocessing)(list(pixels(X)), step)
    return [np.asarray(x) for x in found]


def test_an_activation_is_that_of_the_network_rounded_once():
    X, frozen, network = pictures(4), frozen_blocks(), small().eval()
    positions = [STEM, BODY_0, BODY_1, EMBEDDING]
    found = run(frozen, frozen.outputs(positions), X)
    with torch.no_grad():
        x = frozen.unpack(pixels(X), 0)
        stem = network.stem(x)
        first = network.body[0](stem)
        second = network.body[1](first)
        embedding = network.pool(second).flatten(1)
    for position, mine, expected in zip(positions, found, [stem, first, second], strict=False):
        assert mine.dtype == np.float16 and mine.shape[1:] == frozen.shape(position)
        exact = expected.permute(0, 2, 3, 1).numpy()
        # Half a step of half precision; batch-norms are folded into the convolutions.
        np.testing.assert_allclose(mine.astype(np.float32), exact, rtol=2**-11, atol=1e-6)
    np.testing.assert_allclose(found[3], embedding, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packing_loses_nothing(precision):
    X, frozen = pictures(3), frozen_blocks(precision)
    for position in (STEM, BODY_0, BODY_1, EMBEDDING):
        (stored,) = run(frozen, frozen.outputs([position]), X, 3)
        assert stored.shape[1:] == frozen.shape(position)
        assert stored.dtype == frozen.dtype(position)
        assert stored[0].nbytes == frozen.n_bytes(position)
        x = frozen.unpack(torch.from_numpy(stored), position)
        assert x.dtype == torch.float32 and x.shape[1:] == frozen.runner.shape(position, (32, 32))
        if position < EMBEDDING:
            again = stored_form(x, *frozen.outputs([position]), frozen.half, "map")
            assert np.array_equal(again.numpy(), stored)
            program = frozen.program(position)
            assert torch.equal(frozen.activations(program, pixels(X), [position], 3)[0], x)


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
    positions = [1, frozen.embedding]
    found = run(frozen, frozen.outputs(positions), pictures(2))
    for x, position in zip(found, positions, strict=True):
        x = frozen.unpack(torch.from_numpy(x), position)
        assert x.isfinite().all() and (position > 1 or x.abs().max() > 60_000)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kept", [STEM, BODY_0, BODY_1])
@pytest.mark.parametrize("position", [BODY_0, BODY_1, EMBEDDING])
def test_nothing_is_computed_from_what_the_memory_keeps(
    tmp_path, run_log, precision, kept, position
):
    X, frozen = pictures(), frozen_blocks(precision)
    (expected,) = Activations(frozen, [position])(views(X))
    memory = check_memory(tmp_path)
    Activations(frozen, [kept], [kept], memory=memory)(views(X[:7]))
    n_before = len(run_log())
    (found,) = Activations(frozen, [position], [position], memory=memory)(views(X))
    n_run = len(set(run_log()[n_before:]))
    assert n_run == (3 if kept == position else 10)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_result_does_not_depend_on_the_others(precision, batch_size):
    X, frozen = pictures(), frozen_blocks(precision)

    def activations(some):
        return Activations(frozen, [BODY_0, EMBEDDING], batch_size=batch_size)(views(some))

    order = np.random.default_rng(0).permutation(len(X))
    whole, shuffled, single = activations(X), activations(X[order]), activations(X[5:6])
    for a, b, c in zip(whole, shuffled, single, strict=True):
        assert a[order].tobytes() == b.tobytes()
        assert a[5:6].tobytes() == c.tobytes()


def test_results_on_the_way_are_kept_with_their_rows(tmp_path, run_log):
    X, frozen, memory = pictures(), frozen_blocks(), check_memory(tmp_path)
    frozen.flops()  # on a blank image
    Activations(frozen, [EMBEDDING], [STEM, EMBEDDING], memory=memory)(views(X))
    frozen.flops()  # counted on a blank image, once
    n_before = len(run_log())
    for position in (STEM, EMBEDDING, BODY_1):
        stream = Activations(frozen, [position], [STEM, EMBEDDING], memory=memory)
        (found,) = stream(views(X))
        assert found.tobytes() == Activations(frozen, [position])(views(X))[0].tobytes()
        assert stream.n_computed == (10 if position == BODY_1 else 0)
    assert len(set(run_log()[n_before:])) == 10
    for position, pooling, n in [(STEM, "avg", 0), (EMBEDDING, "avg", 0), (STEM, "max", 10)]:
        options = (frozen.runner, [Output(position, pooling)], frozen.preprocessing)
        rows = Embedding(*options, memory=memory)
        found = rows(check_images(X))
        assert rows.n_computed == n
        assert found.tobytes() == Embedding(*options)(check_images(X)).tobytes()


def test_a_pass_goes_on_to_the_embedding_where_that_is_cheap(tmp_path):
    frozen, memory = frozen_blocks(), check_memory(tmp_path)
    assert frozen.is_worth_going_on(BODY_0) and not frozen.is_worth_going_on(STEM)
    for n, (cut, goes_on) in enumerate([(BODY_0, True), (STEM, False)]):
        stream = Activations(frozen, [cut], [cut, EMBEDDING], memory=memory)
        (embedding,) = frozen.outputs([EMBEDDING])
        assert (embedding in stream.outputs) == goes_on
        assert embedding not in Activations(frozen, [cut], [EMBEDDING]).outputs
        stream(views(pictures(seed=n)))
        last = Activations(frozen, [EMBEDDING], [EMBEDDING], memory=memory)
        last(views(pictures(seed=n)))
        assert last.n_computed == (0 if goes_on else 10)


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


def key(frozen, position):
    """Return the name in the memory of what is kept at a position."""
    return frozen.runner.key(*frozen.outputs([position])[0], frozen.preprocessing)


def test_keys_name_all_that_shapes_a_result():
    frozen = frozen_blocks()
    other_weights = frozen_blocks(backbone=Backbone(small(seed=1), SIZE))
    other_precision = frozen_blocks("bfloat16")
    other_size = FrozenBlocks(frozen.runner, Preprocessing((32, 32), (40, 40)), "avg")
    other_pooling = FrozenBlocks(frozen.runner, frozen.preprocessing, "flatten")
    keys = [
        *(key(frozen, p) for p in range(1, 5)),
        *(key(f, p) for p in (1, 4) for f in (other_weights, other_precision, other_size)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(other_pooling, 1) == key(frozen, 1)  # it comes later
    row = frozen.runner.key(EMBEDDING, "avg", frozen.preprocessing)
    assert key(frozen, EMBEDDING) == row  # an extractor's
    assert key(frozen_blocks(), 1) == key(frozen, 1)


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


def plan(cut, n_images=100, n_views=1, n_epochs=20, memory="memory", frozen=None, **options):
    counts = n_images, n_views, n_epochs
    return make_plan(frozen or frozen_blocks(), cut, *counts, False, memory, "/tmp", **options)


@pytest.mark.parametrize("cut", [STEM, BODY_0, BODY_1])
def test_a_plan_keeps_the_cut_and_the_embedding(slow_blocks, disk, cut):
    found = plan(cut)
    assert (found.cut, found.start) == (cut, cut)
    assert set(found.keep) == {cut, EMBEDDING}
    searching = plan(cut, searches_depth=True)
    assert set(searching.keep) == {cut, EMBEDDING, BODY_0, STEM}  # of depths 0, 1 and 2
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
    assert "from the images" in str(found) and "stem" in str(found)
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


# ------------------------------------------------------------------------------ sharing


torch.fx.wrap("count")


class Counted(ResNet):
    """A ResNet18 of which every image is counted."""

    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=3)

    def forward(self, x):
        return super().forward(count(x))


@pytest.fixture(scope="module")
def counted():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = get_model(Backbone(Counted(), SIZE))
    # Operations are counted on a blank image, before any image is.
    FrozenBlocks(get_runner(backbone, "cpu", "float32", "torch"), SIZE, "avg").flops()
    return backbone


def test_what_a_fit_and_a_search_keep_is_said(tmp_path, counted, monkeypatch):
    X, y = pictures(12), np.arange(12) % 2
    options = {"max_epochs": 1, "random_state": 0, "runtime": "torch", "memory": tmp_path}
    model = FineTunedClassifier(counted, **options, unfreeze=1).fit(X, y)
    memory = check_memory(tmp_path)

    def shares():
        return {tuple(text.split("\t")[2:]): n for text, n, _ in memory.shares()}

    of_the_fit = {("embedding", "avg"), ("layer4.0", "activation"), ("layer4.0", "avg")}
    assert shares() == dict.fromkeys(of_the_fit, 12)
    assert {text.split("\t")[0] for text, _, _ in memory.shares()} == {get_model(counted).name}
    bytes_of = {text.partition("\t")[2]: n_bytes for text, _, n_bytes in memory.shares()}
    values = np.prod(model.trainer().frozen.shape(model.plan_.cut))
    assert 0 < bytes_of["32×32\tlayer4.0\tactivation"] - 12 * 2 * values < 12 * 100
    clone(model).set_params(unfreeze=2).fit(X, y)  # as a search does
    assert {layer for layer, _ in shares()} == {"embedding", "layer4.0", "layer3.1", "layer2.1"}
    memory.memory.clear(warn=False)
    assert memory.shares() == []

    monkeypatch.setattr("sktransfer._engine.embedding._MUCH", 1000)
    extractor = PretrainedFeatureExtractor(counted, runtime="torch", memory=tmp_path / "other")
    message = r"other are about to take .* KB for each of 12 images\..*--memory"
    with pytest.warns(UserWarning, match=message):
        extractor.transform(X)
    monkeypatch.setattr("sktransfer._memory.store._COMPLAINED", set())
    extractor.transform(X)  # nothing is written, and nothing said
    with pytest.warns(UserWarning, match=message):
        extractor.set_params(layer="layer3").transform(X)


def images_that_ran(run_log, call):
    n_before = len(run_log())
    call()
    return len(run_log()) - n_before


def test_an_extractor_and_fine_tuners_share_a_memory(tmp_path, run_log, counted):
    X, y = pictures(16), np.arange(16) % 2
    options = {"runtime": "torch", "memory": tmp_path / "one"}
    tuned = {"max_epochs": 1, "random_state": 0, **options}
    assert (
        images_that_ran(
            run_log, lambda: FineTunedClassifier(counted, unfreeze=1, **tuned).fit(X, y)
        )
        == 16
    )
    found = {}

    def extract(layer="auto"):
        extractor = PretrainedFeatureExtractor(counted, layer=layer, **options)
        found[layer] = extractor.transform(X)

    for call in (
        lambda: FineTunedClassifier(counted, unfreeze=0, **tuned).fit(X, y).predict(X),
        extract,
        lambda: extract("layer4.0"),  # the cut
        lambda: FineTunedClassifier(counted, unfreeze=1, **tuned).fit(X, y).predict(X),
    ):
        assert images_that_ran(run_log, call) == 0
    for layer, rows in found.items():
        plain = PretrainedFeatureExtractor(counted, layer=layer, runtime="torch")
        assert rows.tobytes() == plain.transform(X).tobytes()
    options["memory"] = tuned["memory"] = tmp_path / "other"
    assert images_that_ran(run_log, extract) == 16
    fit = FineTunedClassifier(counted, unfreeze=0, **tuned).fit
    assert images_that_ran(run_log, lambda: fit(X, y)) == 0


def test_a_pass_reads_and_names_once(tmp_path, monkeypatch, counted):
    X, y = pictures(64), np.arange(64) % 2
    counts = Counter()

    def counting(cls, name):
        function = getattr(cls, name)

        def counted_function(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(cls, name, counted_function)

    counting(ImageMemory, "read")
    counting(Runner, "key")
    options = {"runtime": "torch", "max_epochs": 1, "memory": tmp_path, "random_state": 0}
    model = FineTunedClassifier(counted, unfreeze=1, **options).fit(X, y)
    # Two results for all images at once: looked up, and once more when they are claimed.
    assert counts["read"] == 4
    # The activation and the row of each cut, the embedding, and no more for each image.
    assert counts["key"] <= 2 * len(model.plan_.keep)
    counts.clear()
    model.predict(X)
    assert counts["read"] == 1


def test_a_search_over_depths_runs_every_image_once(tmp_path, run_log, counted):
    X, y = pictures(12), np.arange(12) % 2
    options = {"runtime": "torch", "max_epochs": 1, "random_state": 0, "memory": tmp_path / "m"}
    model = FineTunedClassifier(counted, **options)
    grid = [{"unfreeze": [0, 1, 2, "layer4"]}, {"unfreeze": [1], "lr": [1e-3]}]
    GridSearchCV(model, grid, cv=2, error_score="raise").fit(X, y)
    runs = Counter(run_log())
    assert len(runs) == 12 and set(runs.values()) == {1}


def test_an_extractor_waits_for_what_a_fit_computes(tmp_path, run_log, counted):
    X, y = pictures(16), np.arange(16) % 2
    options = {"runtime": "torch", "memory": tmp_path / "m", "batch_size": 4}
    model = FineTunedClassifier(counted, unfreeze=1, max_epochs=1, random_state=0, **options)
    with ThreadPoolExecutor(2) as threads:
        fit = threads.submit(model.fit, X, y)
        transform = threads.submit(PretrainedFeatureExtractor(counted, **options).transform, X)
        fit.result(), transform.result()
    # The fit may need the cut of images that the extractor claimed: no image runs three times.
    runs = Counter(run_log())
    assert len(runs) == 16 and max(runs.values()) <= 2
    frozen = model.trainer().frozen
    claimed = embedding_of(PretrainedFeatureExtractor(counted, **options)).names().claim
    assert claimed == frozen.runner.claim_key(frozen.preprocessing)


# ------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("unfreeze", [1, "all"])
@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v3_small",
        "squeezenet1_1",
        "small_swin",
        "timm/test_vit",
        "timm/test_convnext",
    ],
)
def test_architectures_can_be_fine_tuned(name, unfreeze):
    register_model("small_swin", lambda weights: Backbone(small_swin(), SIZE))
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
