import copy
import pickle
import re
import signal

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
import xxhash
from networks import Small, Untraceable, small
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from skorch.callbacks import Callback
from torch import nn
from torchvision.transforms import v2

from sktransfer import (
    ContrastivePretrainer,
    FineTunedClassifier,
    PretrainedFeatureExtractor,
    get_model,
    model_summary,
    register_model,
)
from sktransfer._engine.tiles import Tiles, TileViews
from sktransfer._training.heads import NTXent, matching_accuracy, spread
from sktransfer._training.pairs import batch_size_of
from sktransfer.io import check_images
from sktransfer.io._clips import check_clips
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


def compact():
    """The counted network, its activations smaller than the image: all are worth keeping."""
    network = small()
    network.stem[0] = nn.Conv2d(3, 8, 7, 4, 3).requires_grad_(False)
    nn.init.normal_(network.stem[0].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(network.stem[0].bias)
    return Backbone(network, SIZE)


@pytest.fixture(autouse=True, scope="module")
def _models():
    register_model("small", lambda weights: Backbone(small(), SIZE))


@pytest.fixture
def slow_machine(monkeypatch):
    """A machine on which nothing is computed twice that can be kept."""
    monkeypatch.setattr("sktransfer._training.plan._FLOPS", {"cpu": 1e5})


def pretrainer(backbone="small", **options):
    defaults = {"max_epochs": 2, "batch_size": 8, "head": (16, 8), "random_state": 0}
    return ContrastivePretrainer(backbone, **{**defaults, **options})


def pictures(n=12, size=32):
    """Noise, no two images alike."""
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def states(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def runs(log):
    """Return what ran through the network, but for the blank image by which blocks are timed."""
    blank = SIZE.normalize(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0]
    return [d for d in log if d != xxhash.xxh3_64_hexdigest(blank.contiguous().numpy())]


# ------------------------------------------------------------------------------ scikit-learn


@pytest.mark.filterwarnings("ignore")
def test_check_estimator_whole():
    model = pretrainer(max_epochs=1, image_shape=(1, -1), image_size=8, batch_size=256)
    results = check_estimator(model, on_fail=None)
    assert len(results) > 40
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    assert failed == {}


def test_names_of_features_and_data_frames(tiles):
    frame = pd.DataFrame({"image": tiles[1][:6]})
    model = pretrainer(max_epochs=1).fit(frame).set_output(transform="pandas")
    assert model.feature_names_in_.tolist() == ["image"]
    found = model.transform(frame)
    assert found.columns.tolist() == [f"contrastivepretrainer{i}" for i in range(16)]
    assert found.to_numpy().dtype == np.float32


def test_dask_arrays(tiles):
    da = pytest.importorskip("dask.array")
    model = pretrainer(max_epochs=1).fit(tiles[1][:8])
    rows = model.transform(da.from_array(np.array(tiles[1][:8]), chunks=5))
    assert rows.chunks == ((5, 3), (16,))
    assert np.array_equal(rows.compute(scheduler="sync"), model.transform(tiles[1][:8]))


# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("n, temperature", [(1, 0.5), (2, 0.1), (7, 0.2), (30, 1.0)])
def test_the_loss_is_that_of_the_paper(n, temperature):
    rows = np.random.default_rng(n).normal(size=(2 * n, 5))
    z = rows / np.sqrt((rows**2).sum(1))[:, None]
    losses = []
    for i in range(2 * n):
        partner = i + n if i < n else i - n
        others = [np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i]
        losses.append(-np.log(np.exp(z[i] @ z[partner] / temperature) / sum(others)))
    loss = NTXent(temperature)
    found = loss(torch.from_numpy(rows)).item()
    assert found == pytest.approx(np.mean(losses), rel=1e-9, abs=1e-12)
    swapped = np.concatenate([rows[n:], rows[:n]])
    assert loss(torch.from_numpy(swapped)).item() == pytest.approx(found)  # symmetric
    assert loss(torch.from_numpy(3 * rows)).item() == pytest.approx(found)


def test_matching_accuracy_and_spread():
    a = torch.eye(4)
    assert matching_accuracy(torch.cat([a, 5 * a])) == 1
    assert matching_accuracy(torch.cat([a, a.roll(1, 0)])) == 0
    half = a.clone()
    half[2:] = half[2:].flip(0)
    assert matching_accuracy(torch.cat([a, half])) == 0.5
    assert matching_accuracy(torch.ones(20, 3)) == pytest.approx(1 / 10)  # chance
    assert spread(torch.ones(6, 3)) == pytest.approx(0, abs=1e-6)
    assert spread(torch.zeros(6, 3)) == 0
    assert spread(torch.cat([a, -a])) == pytest.approx(1)
    rows = np.random.default_rng(0).normal(size=(9, 4))
    z = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert spread(torch.from_numpy(rows)) == pytest.approx(z.var(0).sum())


def test_matching_rises_from_chance_and_the_history_says_so(tiles):
    model = pretrainer(max_epochs=25, batch_size=20, lr=5e-3, weights=None).fit(tiles[1])
    first, last = model.history_[0], model.history_[-1]
    assert len(model.history_) == model.n_iter_ == 25
    assert last["train_loss"] < first["train_loss"]
    assert last["matching_accuracy"] > max(0.25, 1.5 * first["matching_accuracy"])  # chance: 0.05
    assert 0.1 < last["spread"] <= 1
    assert model.stop_reason_ is None


@pytest.mark.parametrize("n", [2, 3, 7, 9, 16, 17, 25])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_batches_are_even_and_no_picture_is_alone(n, batch_size):
    model = pretrainer(max_epochs=1, batch_size=batch_size).fit(pictures(n))
    sizes = [batch["train_batch_size"] // 2 for batch in model.net_.history[0]["batches"]]
    assert 2 <= min(sizes) and max(sizes) <= batch_size
    assert n - sum(sizes) in (0, 1)
    assert len(set(sizes[:-1])) <= 1 and sizes[0] == batch_size_of(n, batch_size)


# ------------------------------------------------------------------------------ freezing


@pytest.mark.parametrize(
    "unfreeze, prefixes",
    [(1, ("body.1.",)), (["stem"], ("stem.",)), ("all", ("stem.", "body."))],
)
@pytest.mark.parametrize("weights", ["default", None])
def test_only_unfrozen_blocks_learn(unfreeze, prefixes, weights):
    before = states(get_model("small").network)
    model = pretrainer(unfreeze=unfreeze, weights=weights, lr=0.01).fit(pictures())
    assert changed(states(get_model("small").network), before) == set()
    after = states(model.to_backbone().network)
    found = changed(before, after)
    parameters = {n for n in before if "running" not in n and "num_batches" not in n}
    learnt = {name for name in parameters if name.startswith(prefixes) and name[-4:] != "bias"}
    assert learnt <= found & parameters
    assert all(name.startswith(prefixes) for name in found)
    moved = any("running" in name for name in found)
    assert moved == (weights is None and unfreeze != 1)  # the only batch-norm is in the stem
    assert model.unfrozen_block_names_ == [
        name for name in model.block_names_ if f"{name}.".startswith(prefixes)
    ]


@pytest.mark.parametrize("n_views", [None, 3])
def test_every_fixed_tile_runs_once(run_log, slow_machine, tmp_path, n_views):
    X = pictures(6)
    options = {"unfreeze": 1, "n_views": n_views, "memory": tmp_path, "max_epochs": 9}
    model = pretrainer(compact(), **options).fit(X)
    found = runs(run_log())
    assert len(found) == len(set(found)) == 6 * (n_views or 4)
    n_before = len(run_log())
    again = pretrainer(compact(), **{**options, "lr": 1e-4, "random_state": 1}).fit(X)
    assert runs(run_log()[n_before:]) == []  # all came from the memory
    assert again.history_ != model.history_
    n_before = len(run_log())
    pretrainer(compact(), **options, crop_scale=(0.5, 1)).fit(X)
    assert len(runs(run_log()[n_before:])) == 6 * (n_views or 4)  # other tiles


def test_with_nothing_frozen_every_epoch_draws_new_tiles(run_log):
    pretrainer(max_epochs=3).fit(pictures(5))
    found = runs(run_log())
    assert len(found) == len(set(found)) == 3 * 2 * 5


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_memory_threads_and_order_change_no_result(tmp_path, unfreeze):
    X = pictures()
    expected = pretrainer(unfreeze=unfreeze, n_jobs=1).fit(X).transform(X)
    for _ in ("cold", "warm"):
        model = pretrainer(unfreeze=unfreeze, memory=tmp_path, n_jobs=2).fit(X)
        assert np.array_equal(model.transform(X), expected)
    order = np.random.default_rng(0).permutation(len(X))
    repeated = np.concatenate([order, order[:5]])  # equal images count once
    shuffled = pretrainer(unfreeze=unfreeze).fit(X[repeated])
    assert np.array_equal(shuffled.transform(X), expected)
    other = pretrainer(unfreeze=unfreeze, random_state=1).fit(X)
    assert not np.array_equal(other.transform(X), expected)


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_activations_that_are_recomputed_change_no_result(monkeypatch, unfreeze):
    X = pictures()
    expected = pretrainer(unfreeze=unfreeze).fit(X)
    monkeypatch.setattr("sktransfer._training.plan._keeps_cut", lambda *_: False)
    monkeypatch.setattr("sktransfer._training.data.in_ram", lambda _: False)
    found = pretrainer(unfreeze=unfreeze).fit(X)
    assert np.array_equal(found.transform(X), expected.transform(X))


def test_a_fit_leaves_the_seed_of_torch_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    pretrainer().fit(pictures(6))
    assert torch.equal(torch.rand(3), expected)


def test_a_network_that_cannot_be_traced():
    model = pretrainer(Backbone(Untraceable(), SIZE)).fit(pictures())
    assert model.block_names_ == model.unfrozen_block_names_ == []
    assert model.transform(pictures()).shape == (12, 4)


# ------------------------------------------------------------------------------ a backbone


def test_the_result_is_a_backbone(tiles):
    _, paths, labels = tiles
    model = pretrainer(unfreeze=2, image_size=24).fit(paths)
    network = model.to_backbone()
    assert network.name == "contrastive-small" and network.preprocessing.size == (24, 24)
    rows = PretrainedFeatureExtractor(model).fit_transform(paths)
    assert rows.shape == (40, 16)
    assert np.array_equal(rows, model.transform(paths))
    assert not np.allclose(rows, PretrainedFeatureExtractor("small").transform(paths), atol=1e-3)
    for unfreeze in (0, 1, "all"):
        tuned = FineTunedClassifier(model, unfreeze=unfreeze, max_epochs=2, random_state=0)
        tuned.fit(paths, labels)
        assert tuned.score(paths, labels) > 0.5
        copied = pickle.loads(pickle.dumps(tuned))
        assert np.array_equal(copied.predict_proba(paths), tuned.predict_proba(paths))
    assert model_summary(tuned).name == "contrastive-small"
    assert [row.state for row in model_summary(model).rows][1:4] == ["frozen", *["trained"] * 2]


def test_clones_keep_a_fitted_backbone(tiles, tmp_path):
    _, paths, labels = tiles
    model = pretrainer(max_epochs=1).fit(paths)
    extractor = PretrainedFeatureExtractor(model, memory=tmp_path)
    assert np.array_equal(clone(extractor).transform(paths), extractor.transform(paths))
    assert not hasattr(clone(model), "history_")
    pipeline = make_pipeline(extractor, LogisticRegression(max_iter=1000))
    assert cross_val_score(pipeline, paths, labels, cv=2, error_score="raise").shape == (2,)
    search = GridSearchCV(
        FineTunedClassifier(model, max_epochs=1, memory=tmp_path, random_state=0),
        {"unfreeze": [0, 1]},
        cv=2,
        error_score="raise",
    )
    assert search.fit(paths, labels).best_estimator_.backbone is model
    search.set_params(param_grid={"backbone": ["small", model.to_backbone()]})
    assert len(search.fit(paths, labels).cv_results_["params"]) == 2
    unfitted = PretrainedFeatureExtractor(pretrainer())
    assert clone(unfitted).backbone is not unfitted.backbone


def test_other_estimators_are_backbones_too(tiles):
    _, paths, labels = tiles
    tuned = FineTunedClassifier("small", max_epochs=1, random_state=0).fit(paths, labels)
    expected = tuned.to_feature_extractor().transform(paths)
    assert np.array_equal(PretrainedFeatureExtractor(tuned).transform(paths), expected)
    frozen = FrozenEstimator(tuned)
    assert np.array_equal(PretrainedFeatureExtractor(frozen).transform(paths), expected)
    on_top = pretrainer(tuned, max_epochs=1).fit(paths)
    assert on_top.to_backbone().name == "contrastive-fine-tuned-small"


def test_a_backbone_that_is_not_fitted_or_none(tiles):
    with pytest.raises(NotFittedError, match="ContrastivePretrainer instance is not fitted"):
        PretrainedFeatureExtractor(pretrainer()).fit(tiles[1])
    with pytest.raises(ValueError, match="The 'backbone' parameter"):
        PretrainedFeatureExtractor(LogisticRegression()).fit(tiles[1])
    with pytest.raises(TypeError, match="estimator with a method to_backbone, got int"):
        get_model(3)


def test_the_result_follows_the_training(tiles):
    model = pretrainer(max_epochs=1).fit(tiles[1])
    before = model.transform(tiles[1])
    extractor = model.to_feature_extractor()
    model.partial_fit(tiles[1])
    assert not np.array_equal(model.transform(tiles[1]), before)
    assert np.array_equal(extractor.transform(tiles[1]), before)  # it has a copy


COPIES = {
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "joblib": lambda model, path: joblib.load(joblib.dump(model, path / "model.joblib")[0]),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{"unfreeze": 1}, {"weights": None}])
def test_copies_embed_the_same(tmp_path, how, options):
    X = pictures()
    model = pretrainer(**options).fit(X)
    copied = COPIES[how](model, tmp_path)
    assert np.array_equal(copied.transform(X), model.transform(X))
    assert copied.history_ == model.history_ and copied.stop_reason_ is None
    assert copied.to_backbone().fingerprint == model.to_backbone().fingerprint
    assert COPIES[how](copied, tmp_path).partial_fit(X).n_iter_ == 3


def test_skops_asks_for_no_trust_but_in_this_library():
    X = pictures()
    model = pretrainer().fit(X)
    for kept in (model, PretrainedFeatureExtractor(model)):
        data = skops.io.dumps(kept)
        names = skops.io.get_untrusted_types(data=data)
        assert all(name.startswith("sktransfer.") for name in names), names
        loaded = skops.io.loads(data, trusted=names)
        assert np.array_equal(loaded.transform(X), model.transform(X))


# ------------------------------------------------------------------------------ going on


def test_learning_part_by_part():
    X = pictures(20)
    model = pretrainer(unfreeze=1, lr=0.01)
    for start in (0, 10):
        model.partial_fit(X[start : start + 10])
    assert model.n_iter_ == len(model.history_) == 2
    assert {group["lr"] for group in model.net_.optimizer_.param_groups} == {0.01}
    assert model.fit(X).n_iter_ == 2  # anew
    assert model.partial_fit(X[:5]).n_iter_ == 3


def test_warm_start_goes_on():
    X = pictures()
    model = pretrainer(warm_start=True).fit(X)
    first = [epoch["train_loss"] for epoch in model.history_]
    model.fit(X)
    assert [epoch["train_loss"] for epoch in model.history_][:2] == first
    assert model.n_iter_ == 4
    with pytest.raises(ValueError, match="head has changed"):
        model.set_params(head=(8, 4)).fit(X)


class Seen(Callback):
    def __init__(self, stop_after=None):
        self.n, self.stop_after = 0, stop_after

    def on_epoch_end(self, net, **kwargs):
        self.n += 1
        if self.n == self.stop_after:
            raise KeyboardInterrupt


def test_callbacks_of_the_user():
    seen = Seen(stop_after=3)
    model = pretrainer(callbacks=[seen], max_epochs=9).fit(pictures())
    assert seen.n == model.n_iter_ == 3
    assert "matching_accuracy" in model.history_[-1]


class PressingHead(nn.Linear):
    """A head in whose third batch somebody presses Ctrl-C."""

    n_calls = 0

    def forward(self, x):
        if self.training:
            self.n_calls += 1
            if self.n_calls == 3:
                signal.raise_signal(signal.SIGINT)
        return super().forward(x)


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is not signal.default_int_handler,
    reason="Ctrl-C is ignored here",
)
def test_ctrl_c_keeps_what_was_learnt():
    X = pictures()
    model = pretrainer(head=PressingHead(16, 4), max_epochs=3, warm_start=True)
    with pytest.raises(KeyboardInterrupt, match="after 1 of 3 epochs"):
        model.fit(X)
    assert model.n_iter_ == 1 and model.transform(X).shape == (12, 16)
    assert model.fit(X).n_iter_ == 3


def test_the_head_may_be_a_module():
    head = nn.Sequential(nn.ReLU(), nn.LazyLinear(4))
    model = pretrainer(head=head).fit(pictures())
    assert nn.parameter.is_lazy(head[1].weight)  # it is copied
    assert model.net_.module_.head[1].weight.shape == (4, 16)
    kinds = [type(layer).__name__ for layer in pretrainer().fit(pictures()).net_.module_.head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_what_it_shows(slow_machine, capfd, unfreeze):
    model = pretrainer(compact(), unfreeze=unfreeze, max_epochs=4, verbose=1).fit(pictures())
    shown = capfd.readouterr()
    assert shown.out == ""
    (bar,) = [line.split("\r")[-1] for line in shown.err.split("\n") if line.strip()]
    assert "12/12" in bar and "epoch 4/4" in bar and "train_loss=" in bar
    model.set_params(verbose=2).fit(pictures())
    out = capfd.readouterr().out
    assert str(model.plan_) in out.splitlines()
    assert "matching_accuracy" in out and len(re.findall(r"^ +[1-4] +", out, re.M)) == 4
    model.set_params(verbose=0).fit(pictures()).transform(pictures())
    assert capfd.readouterr() == ("", "")


def test_half_precision(tmp_path):
    X = pictures()
    model = pretrainer(unfreeze=1, precision="bfloat16", memory=tmp_path).fit(X)
    assert {p.dtype for p in model.net_.module_.parameters()} == {torch.float32}
    assert np.isfinite(model.transform(X)).all()


# ------------------------------------------------------------------------------ tiles


def a_photo(photos):
    return torch.tensor(photos[0][:64, :64]).permute(2, 0, 1)


@pytest.mark.parametrize("augment", ["auto", "dihedral", v2.RandomCrop(40), nn.Identity()])
@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_tiles_have_the_size_of_the_network(photos, augment, size):
    image = a_photo(photos)
    tiles = Tiles(augment, None, size, (0.2, 1.0))
    drawn = [tiles.draw(image, seed) for seed in range(6)]
    assert all(tile.shape == (3, *size) and tile.dtype == torch.uint8 for tile in drawn)
    assert torch.equal(drawn[0], tiles.draw(image, 0))
    assert torch.equal(drawn[0], drawn[1]) == isinstance(augment, nn.Identity)
    fixed = [tiles.view(image, number, b"x") for number in range(tiles.n_views)]
    assert tiles.n_views == 4 and torch.equal(fixed[2], tiles.view(image, 2, b"x"))
    assert len({tiles.digest(number, b"x") for number in range(4)}) == 4
    other = Tiles(augment, None, size, (0.3, 1.0))
    is_ours = isinstance(augment, str)  # crops of a callable are its own
    assert (other.digest(0, b"x") != tiles.digest(0, b"x")) == is_ours


def test_colour_is_changed_only_where_there_is_some(photos):
    image = a_photo(photos)
    tiles = Tiles("auto", None, (32, 32), (0.2, 1.0))
    grey = image[:1].expand(3, 64, 64)
    for seed in range(10):
        tile = tiles.draw(grey, seed)
        assert torch.equal(tile[0], tile[1]) and torch.equal(tile[1], tile[2])
    means = torch.stack([tiles.draw(image, s).float().mean((1, 2)) for s in range(20)])
    assert (means[:, 0] - means[:, 2]).std() > 3


def test_crops_have_the_share_that_is_asked_for():
    ramp = torch.arange(128, dtype=torch.uint8).expand(3, 128, 128).clone()
    plain = {"augment": v2.RandomResizedCrop(32, scale=(0.04, 0.04), antialias=True)}
    for options, low, high in ((plain, 16, 36), ({"augment": "auto"}, 100, 128)):
        tiles = Tiles(n_views=None, size=(32, 32), crop_scale=(1.0, 1.0), **options)
        if options["augment"] == "auto":
            tiles._transform.shades = v2.Identity()
        seen = tiles.draw(ramp, 1).float()[0].mean(0)
        assert low < seen.max() - seen.min() + 1 <= high


# ------------------------------------------------------------------------------ clips


def clips(n=6, n_frames=4):
    return np.random.default_rng(1).integers(0, 256, (n, n_frames, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_clips_in_any_form(tmp_path, unfreeze):
    X = clips()
    model = pretrainer(unfreeze=unfreeze).fit(X)
    expected = model.transform(X)
    forms = {
        "list of lists": [list(clip) for clip in X],
        "list of arrays": list(X),
        "tensor": torch.from_numpy(X).permute(0, 1, 4, 2, 3),
        "shuffled": X[::-1],
    }
    for name, form in forms.items():
        found = pretrainer(unfreeze=unfreeze).fit(form)
        assert np.array_equal(found.transform(X), expected), name
    frames = model.to_feature_extractor().transform(X.reshape(-1, 32, 32, 3))
    np.testing.assert_allclose(expected, frames.reshape(6, 4, -1).mean(1), rtol=1e-5)
    odd = model.transform([X[0], X[1, :3]])  # of any length, once it is fitted
    np.testing.assert_allclose(odd[1], frames[4:7].mean(0), rtol=1e-5)


def test_clips_of_paths(tiles):
    paths = np.array(tiles[1]).reshape(10, 4)
    model = pretrainer().fit(paths)
    assert model.transform(paths).shape == (10, 16)
    as_lists = pretrainer().fit(paths.tolist())
    assert np.array_equal(as_lists.transform(paths), model.transform(paths))
    model.partial_fit(paths[:4]).partial_fit(tiles[1])  # single images after clips
    assert model.n_iter_ == 4


def test_a_and_b_are_the_halves_of_a_clip():
    frames = np.arange(2 * 5, dtype=np.uint8).repeat(32 * 32 * 3).reshape(2, 5, 32, 32, 3)
    model = pretrainer(augment=nn.Identity(), batch_size=2, max_epochs=1)
    seen = []
    model.set_params(callbacks=[Spy(seen)]).fit(frames * 20)
    ((batch, numbers),) = seen
    means = batch["stored"].float().mean((1, 2, 3)).reshape(2, 2, 2)  # side, clip, frame
    order = means[0, :, 0].argsort()
    assert means[:, order].round().tolist() == [
        [[0, 20], [100, 120]],
        [[60, 80], [160, 180]],  # the middle one, 40 and 140, is left out
    ]
    assert sorted(numbers.tolist()) == [0, 1]


class Spy(Callback):
    def __init__(self, seen):
        self.seen = seen

    def on_batch_end(self, net, batch=None, **kwargs):
        self.seen.append(batch)


def test_frames_of_a_half_are_cut_alike(photos):
    images = check_images([photos[0]] * 4)
    tiles = Tiles("auto", None, (32, 32), (0.2, 1.0))
    views = TileViews(images, SIZE, tiles, 4, n_together=2)
    one, two, three, _ = (views.load(4 * number + 1) for number in range(4))
    assert torch.equal(one, two)
    assert torch.equal(one, three)  # as the halves have the same frames, too
    clip = check_images([photos[0], photos[0], photos[0], photos[1]])
    halves = TileViews(clip, SIZE, tiles, 4, n_together=2)
    assert not torch.equal(halves.load(1), halves.load(9))
    assert halves.digest(1) != halves.digest(9)
    assert halves.digest(1) == views.digest(1) != views.digest(2)


@pytest.mark.parametrize(
    "X, error, message",
    [
        ([[np.zeros((8, 8))], [np.ones((8, 8))] * 2], ValueError, "row 0 is a clip of 1 frame, b"),
        ([[], [np.ones((8, 8))] * 2], ValueError, "row 0 is a clip of 0 frames"),
        (list(clips(2)) + [clips(1, 3)[0]], ValueError, "row 2 is a clip of 3 frames, but row 0 h"),
        ([["a.png"] * 2, "b.png"], TypeError, "row 1 is a path, but row 0 is a clip"),
        ([["a.png", "b.png"], ["c.png", "d.png"]], ValueError, r"row 0, frame 0 \('a.png'\): the"),
    ],
)
def test_bad_clips(X, error, message):
    with pytest.raises(error, match=message):
        pretrainer().fit(X)


def test_frames_know_their_clip():
    frames = check_clips([["a", "b"], ["c", "d", "e"]])
    assert frames.where(4) == "row 1, frame 2 ('e')"
    assert frames[[3, 1]].where(0) == "row 1, frame 1 ('d')"
    assert frames.lengths.tolist() == [2, 3]
    assert frames.means(np.arange(5.0)[:, None]).tolist() == [[0.5], [3.0]]


# ------------------------------------------------------------------------------ bad input


def test_one_image():
    with pytest.raises(ValueError, match="at least 2 different ones; got 1 sample"):
        pretrainer().fit(pictures(1))
    with pytest.raises(ValueError, match="got 1 sample"):
        pretrainer().partial_fit(pictures(1))


def test_identical_images():
    with pytest.warns(ConvergenceWarning, match="All images are the same"):
        model = pretrainer(max_epochs=9).fit(np.repeat(pictures(1), 5, axis=0))
    assert model.n_iter_ == 1 and "look at them" in model.stop_reason_


class Dead(Small):
    """All that it sees is one to it."""

    def forward(self, x):
        return self.head(self.pool(self.body(self.stem(x)) * 0 + 1).flatten(1))


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_it_stops_where_the_representation_collapsed(unfreeze):
    model = pretrainer(Backbone(Dead(), SIZE), unfreeze=unfreeze, max_epochs=30)
    with pytest.warns(ConvergenceWarning, match="collapsed: for 3 epochs up to 3"):
        model.fit(pictures())
    assert model.n_iter_ == 3
    assert "one and the same row" in model.stop_reason_ and "lower lr" in model.stop_reason_
    assert model.history_[-1]["spread"] < 1e-3
    assert model.history_[-1]["matching_accuracy"] < 0.5
    with pytest.warns(ConvergenceWarning, match="for 4 epochs up to 4"):
        model.partial_fit(pictures())


def test_images_that_are_the_same_to_the_network_collapse():
    X = np.zeros((6, 64, 64, 3), np.uint8)
    X[np.arange(6), 0, np.arange(6)] = 255  # outside of what the network sees
    cropped = Preprocessing(size=(16, 16), resize=(32, 32))
    model = pretrainer(Backbone(small(), cropped), augment=nn.Identity(), max_epochs=1)
    with pytest.warns(ConvergenceWarning, match="pictures are the same"):
        model.fit(X)
    assert model.stop_reason_ is not None
    with pytest.warns(ConvergenceWarning):
        model.fit(X)
    assert pickle.loads(pickle.dumps(model)).stop_reason_ == model.stop_reason_
    assert model.fit(pictures(size=64)).stop_reason_ is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"unfreeze": 0}, "unfreeze=0 leaves all blocks frozen"),
        ({"unfreeze": []}, "leaves all blocks frozen"),
        ({"unfreeze": 9}, "3 blocks: stem, body.0, body.1"),
        ({"head": ()}, r"head=\(\): pass the sizes"),
        ({"head": (8, 0)}, "positive ints"),
        ({"head": nn.Linear(3, 2)}, "head can't take embeddings of 16 features"),
        ({"head": nn.Flatten(0)}, r"shape \(2, d\) for 2; it returned \(32,\)"),
        ({"crop_scale": (0, 1)}, r"crop_scale=\(0, 1\): pass the least and the greatest"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.5,)}, "crop_scale"),
        ({"temperature": 0}, "The 'temperature' parameter"),
        ({"batch_size": 1}, "The 'batch_size' parameter"),
        ({"n_views": 1, "unfreeze": 1}, "The 'n_views' parameter"),
        ({"augment": None}, "The 'augment' parameter"),
        ({"augment": v2.ToDtype(torch.float32)}, "augment must return uint8"),
        ({"augment": lambda x: x.float().mean()}, r"of any size; of one \(3, 64, 64\) it returned"),
        ({"augment": lambda x: x[:1]}, r"it returned a tensor \(1, 64, 64\)"),
    ],
)
def test_parameters_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        pretrainer(**options).fit(pictures())


def test_a_bad_image_is_named():
    X = [*pictures(3), np.zeros((2, 2, 7), np.uint8)]
    with pytest.raises(ValueError, match="row 3"):
        pretrainer().fit(X)


def test_a_loss_that_is_lost():
    with pytest.raises(ValueError, match="(?i)training loss became.*lr"):
        pretrainer(lr=1e30, max_epochs=5).fit(pictures())


class Full(nn.Linear):
    """A head at which the memory ends."""

    def forward(self, x):
        if self.training and len(x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().forward(x)


def test_a_batch_that_does_not_fit_into_the_memory():
    with pytest.raises(MemoryError, match="6 pairs of tiles do not fit.*smaller batch_size"):
        pretrainer(head=Full(16, 4)).fit(pictures())
    assert pretrainer(head=Full(16, 4), batch_size=4).fit(pictures()).n_iter_ == 2


def test_parameters_are_left_as_they_are():
    model = pretrainer(crop_scale=[0.3, 1], callbacks=[])
    before = model.get_params()
    model.fit(pictures())
    assert model.get_params() == before


def test_grey_tiles_stay_sharp_and_change_less_than_coloured_ones():
    board = (torch.arange(48)[:, None] + torch.arange(48)) % 2  # neighbours differ
    grey = (80 + 60 * board).to(torch.uint8).expand(3, -1, -1).contiguous()
    coloured = grey.clone()
    coloured[0] += 30
    tiles = Tiles("auto", None, (48, 48), (1.0, 1.0))  # all of the picture, mirrored or not

    def contrasts(picture):
        drawn = [tiles.draw(picture, seed).float() for seed in range(40)]
        return [float((tile[:, :, 1:] - tile[:, :, :-1]).abs().mean()) for tile in drawn]

    of_grey, of_coloured = contrasts(grey), contrasts(coloured)
    assert len(set(of_grey)) > 20
    assert min(of_grey) > 0.6 * 60
    assert max(of_grey) < 1.5 * 60
    assert min(of_coloured) < 0.3 * 60  # blurred
