import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub.utils import validate_repo_id
from networks import Untraceable, small
from scipy.special import softmax
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sktransfer import PretrainedFeatureExtractor, get_model, list_models, register_model
from sktransfer.metrics import h_score, knn_score, leep_score, log_me_score
from sktransfer.model_selection import _ranking, rank_backbones, transfer_gain
from sktransfer.model_selection._transfer_gain import TransferGain, corrected_interval
from sktransfer.models import RECOMMENDED
from sktransfer.models._origins import find_origin
from sktransfer.models._registry import Backbone, imagenet_accuracy
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


class Colours(nn.Module):
    """Its embedding is the mean colour; blind, it is noise that depends on the image."""

    def __init__(self, is_blind: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)
        if is_blind:  # hundreds of differences between neighbours
            with torch.no_grad():
                self.conv.weight -= self.conv.weight.mean((2, 3), keepdim=True)

    def forward(self, x):
        return self.head(self.pool(self.conv(x)).flatten(1))


def build(weights, *, helps=True):
    """Build a network that is blind from random weights, or, if they do not help, with its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1 if weights is None else 0)
        categories = None if weights is None else tuple("abcd")
        return Backbone(Colours((weights is None) == helps), SIZE, categories)


@pytest.fixture(autouse=True, scope="module")
def _models():
    register_model("small", lambda weights: Backbone(small(), SIZE))
    register_model("colours", build)
    register_model("blind", lambda weights: build(weights, helps=False))


def pictures(n=40, step=25):
    """Noise, a little brighter in one of two classes."""
    y = np.arange(n) % 2
    X = np.random.default_rng(0).integers(0, 200, (n, 32, 32, 3)) + step * y[:, None, None, None]
    return X.astype(np.uint8), np.array(["dim", "bright"])[y]


# ------------------------------------------------------------------------------ ranking


@pytest.fixture(scope="module")
def ranked(tiles):
    """The embedded network with its weights and without, on tiles of two photographs."""
    _, paths, labels = tiles
    network = "efficientnet_lite0"
    scoring = ["knn", "logme", "h_score", "leep"]
    options = {"scoring": scoring, "cv": 2, "random_state": 0, "image_size": 64, "pairs": False}
    return rank_backbones(paths, labels, [(network, None), network], **options), options


def test_a_row_a_network_the_best_first(ranked):
    table, _ = ranked
    assert table.columns.tolist() == [
        "backbone",
        "weights",
        "knn",
        "knn_std",
        "logme",
        "h_score",
        "leep",
        "seconds_per_1000_images",
        "n_parameters",
        "n_features",
        "imagenet_accuracy",
    ]
    assert table.weights.tolist() == ["default", None]
    pretrained, random = table.iloc[0], table.iloc[1]
    assert pretrained.knn > random.knn and pretrained.knn_std >= 0
    assert pretrained.leep < 0 and math.isnan(random.leep)  # without weights, there are no classes
    assert (table.seconds_per_1000_images > 0).all()
    assert table.n_parameters.tolist() == [4652008] * 2 and table.n_features.tolist() == [1280] * 2
    assert table.imagenet_accuracy.isna().all()  # none is published with these


def test_scores_are_those_of_the_embeddings(ranked, tiles):
    table, _ = ranked
    _, paths, y = tiles
    options = {"image_size": 64}
    X = PretrainedFeatureExtractor(**options).transform(paths)
    row = table.iloc[0]
    assert row.logme == pytest.approx(log_me_score(X, y))
    assert row.h_score == pytest.approx(h_score(X, y))
    logits = PretrainedFeatureExtractor(layer="output", **options).transform(paths)
    assert row.leep == pytest.approx(leep_score(softmax(logits, axis=1), y), abs=1e-5)
    seed = np.random.RandomState(0).randint(2**31 - 1)
    folds = StratifiedKFold(2, shuffle=True, random_state=seed)
    assert row.knn == pytest.approx(knn_score(X, y, cv=folds))


def test_every_image_is_embedded_once_a_backbone(tiles, run_log, tmp_path):
    _, paths, labels = tiles
    networks = [Backbone(small(seed), SIZE, name=f"small{seed}") for seed in (1, 2)]
    options = {"scoring": ["knn", "leep"], "memory": tmp_path, "random_state": 0}
    first = rank_backbones(paths, labels, networks, **options)
    assert len(run_log()) == 80
    pair = first.backbone.str.contains(" + ", regex=False)
    assert sorted(first.backbone[~pair]) == ["small1", "small2"]
    assert set(first.weights[~pair]) == {"own"}
    assert first.weights[pair].tolist() == [("own", "own")] and first.leep[pair].isna().all()
    again = rank_backbones(paths, labels, networks, **options)
    assert len(run_log()) == 80
    assert again.seconds_per_1000_images.isna().all()
    pd.testing.assert_frame_equal(
        *(t.drop(columns="seconds_per_1000_images") for t in (first, again))
    )


def test_logistic_regression_with_a_search_for_c():
    X, y = pictures(step=6)
    folds = [(np.arange(30), np.arange(30, 40)), (np.arange(10, 40), np.arange(10))]
    table = rank_backbones(X, y, ["colours"], scoring="logistic", cv=folds, random_state=0)
    assert table.columns[2:4].tolist() == ["logistic", "logistic_std"]
    embeddings = PretrainedFeatureExtractor("colours").transform(X)
    scores = []
    for C in (0.001, 0.01, 0.1, 1):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C))
        scores.append(cross_val_score(model, embeddings, y, cv=folds))
    low, high = np.min(scores, axis=0), np.max(scores, axis=0)
    assert low.mean() < high.mean()  # C matters
    assert 0.5 < low.mean() <= table.logistic[0] <= high.mean()


@pytest.mark.parametrize("sort_by", [None, "knn", "h_score"])
def test_the_best_comes_first(sort_by):
    X, y = pictures(step=12)
    names = ["blind", ("colours", None), "colours", "small"]
    table = rank_backbones(
        X, y, names, scoring=("logme", "knn", "h_score"), sort_by=sort_by, random_state=0
    )
    values = table[sort_by or "logme"].tolist()
    assert values == sorted(values, reverse=True) and len(set(values)) > 2
    assert table.index.tolist() == [0, 1, 2, 3, 4]


def test_without_a_score_last():
    X, y = pictures()
    table = rank_backbones(X, y, [("colours", None), "blind", "colours"], scoring="leep")
    assert table.weights.tolist() == ["default", "default", None]
    assert table.columns[2:4].tolist() == ["leep", "seconds_per_1000_images"]


def test_another_metric_folds_and_form_of_images():
    X, y = pictures()
    flat = X.reshape(40, -1) / 255
    options = {"scoring": ["knn"], "metric": "roc_auc", "image_shape": (32, 32, 3)}
    table = rank_backbones(flat, y == "bright", ["colours"], random_state=0, **options)
    assert 0.5 < table.knn[0] <= 1
    half = [(np.arange(20), np.arange(20, 40)), (np.arange(20, 40), np.arange(20))]
    table = rank_backbones(X, pd.Series(y), ["colours"], scoring=["knn"], cv=half)
    embeddings = PretrainedFeatureExtractor("colours").transform(X)
    assert table.knn[0] == pytest.approx(knn_score(embeddings, y, cv=half))


def test_published_accuracies(tmp_path):
    assert imagenet_accuracy("resnet50", "IMAGENET1K_V1") == pytest.approx(0.7613)
    assert imagenet_accuracy("resnet50", "default") == pytest.approx(0.80858)
    file = tmp_path / "own.pth"
    torch.save({}, file)
    for name, weights in (
        ("resnet50", None),
        ("resnet50", file),
        ("efficientnet_lite0", "default"),
        ("timm/resnet18.a1_in1k", "default"),
        ("colours", "default"),
    ):
        assert math.isnan(imagenet_accuracy(name, weights))


def test_progress_is_shown(capsys):
    rank_backbones(*pictures(), ["colours"], scoring=["knn"], verbose=1)
    err = capsys.readouterr().err
    assert "backbones: 100%" in err and "40/40" in err
    rank_backbones(*pictures(), ["colours"], scoring=["knn"])
    assert capsys.readouterr().err == ""


def test_the_best_pair_knows_what_neither_of_its_networks_knows():
    """One network sees the brightness alone, one the red alone; the label is of both."""
    chance = np.random.default_rng(0)
    bright, red = np.divmod(np.arange(32) % 4, 2)
    X = chance.integers(0, 60, (32, 32, 32, 3), dtype=np.uint8)
    X += (90 * bright)[:, None, None, None].astype(np.uint8)
    X[..., 0] += (90 * red)[:, None, None].astype(np.uint8)
    y = 2 * bright + red

    def seeing(weights, name):
        conv = nn.Conv2d(3, 4, 1, bias=False)
        nn.init.zeros_(conv.weight)
        with torch.no_grad():
            conv.weight[0, :, 0, 0] = torch.tensor(weights)
        network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        return Backbone(network, SIZE, name=name)

    networks = [
        seeing([1.0, -1.0, 0.0], "red"),
        seeing([0.0, 1.0, 1.0], "bright"),
        seeing([0.0, 0.0, 0.0], "neither"),
    ]
    options = {"scoring": "logistic", "cv": 2, "random_state": 0}
    table = rank_backbones(X, y, networks, **options)
    assert {*table.backbone[0].split(" + ")} == {"red", "bright"}
    assert len(table) == 4 and table.n_features[0] == 8
    alone = table[~table.backbone.str.contains(" + ", regex=False)]
    assert table.logistic[0] > alone.logistic.max()
    pd.testing.assert_frame_equal(
        rank_backbones(X, y, networks, pairs=False, **options).drop(
            columns="seconds_per_1000_images"
        ),
        alone.reset_index(drop=True).drop(columns="seconds_per_1000_images"),
    )


def test_a_ranking_holds_the_embeddings_of_three_networks_at_most(monkeypatch):
    held, score = weakref.WeakValueDictionary(), _ranking._score
    most = 0

    def counted(name, X, *others):
        nonlocal most
        held[id(X)] = X
        gc.collect()
        most = max(most, len(held))
        return score(name, X, *others)

    monkeypatch.setattr(_ranking, "_score", counted)
    rank_backbones(*pictures(12), ["colours"] * 5, scoring="knn", cv=2, pairs=False, random_state=0)
    assert most == 4  # one is being scored


def test_without_names_what_can_be_loaded_is_ranked(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):  # nothing listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    X, y = pictures(12)
    options = {"scoring": "knn", "cv": 2, "image_size": 32, "random_state": 0}
    words = "Ranked are efficientnet_lite0, .*can't be loaded here: timm/mobilenetv4_conv_small"
    with pytest.warns(UserWarning, match=words) as caught:
        table = rank_backbones(X, y, **options)
    assert caught[0].filename == __file__
    assert {*RECOMMENDED["without a download"]} < {*table.backbone}


def test_recommended_networks_are_in_the_list_and_in_the_guide():
    names = [name for of_purpose in RECOMMENDED.values() for name in of_purpose]
    of_hub = [name for name in names if name.startswith("hf:")]
    assert len({*names}) == len(names) and {*names} - {*of_hub} <= {*list_models()}
    for name in of_hub:
        origin = find_origin(name)
        validate_repo_id(origin.place)
        assert origin.place.count("/") == 1 and not origin.is_folder
    guide = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()
    table = guide.partition("### Which networks to try")[2].partition("\n#")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    assert [row[2].strip(" `") for row in rows[2:]] == names


@pytest.mark.parametrize(
    "backbones, error, message",
    [
        (["colours", "resnet5"], ValueError, r"backbones\[1\], 'resnet5', can't .*mean 'resnet50'"),
        ([("resnet50", "nope.pth")], ValueError, r"backbones\[0\], \('resnet50', 'nope.pth'\)"),
        ([Untraceable()], ValueError, r"backbones\[0\], 'Untraceable', can't be ranked"),
        ([3], TypeError, r"backbones\[0\] is 3: pass a name, a pair"),
        (("colours", None), TypeError, r"backbones\[1\] is None"),
        ([], ValueError, "name at least one network"),
        ("colours", ValueError, "backbones"),
    ],
)
def test_bad_backbones_are_named(backbones, error, message, run_log):
    with pytest.raises(error, match=message):
        rank_backbones(*pictures(), backbones)
    assert run_log() == []  # before any image is embedded


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):  # nothing listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"backbones\[1\], 'resnet18', can't.*could not be downl"):
        rank_backbones(*pictures(), ["colours", "resnet18"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scoring": ["knn", "leap"]}, "'knn', 'leap'.*one or several of knn, logistic"),
        ({"scoring": []}, "one or several of"),
        ({"scoring": ["knn"], "sort_by": "logme"}, "sort_by='logme' is not one of"),
        ({"cv": 30}, "for cv=30 folds: 'bright' has 20 images, 'dim' has 20 images"),
        ({"device": "warp"}, "device='warp'"),
        ({"batch_size": 0}, "batch_size"),
        ({"metric": "speed"}, "speed"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        rank_backbones(*pictures(), ["colours"], **options)


@pytest.mark.parametrize(
    "function", [lambda X, y: rank_backbones(X, y, ["colours"]), transfer_gain]
)
def test_bad_labels(function):
    X, y = pictures()
    for labels, message in (
        (["a"] * 40, "at least 2 classes: all 40 are 'a'"),
        (y[:3], "inconsistent numbers of samples"),
        (np.linspace(0, 1, 40), "continuous"),
        (np.where(y == "dim", np.nan, 1.0), "NaN"),
        (np.eye(40), "1d"),
        (None, "requires y to be passed"),
    ):
        with pytest.raises(ValueError, match=message):
            function(X, labels)


def test_a_bad_image_is_named_and_the_others_stay_in_the_memory(tiles, tmp_path, run_log):
    _, paths, labels = tiles
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    options = {"scoring": ["knn"], "memory": tmp_path / "memory"}
    with pytest.raises(ValueError, match=r"row 39 \('.*bad.jpg'\)"):
        rank_backbones([*paths[:-1], str(bad)], labels, ["small"], **options)
    n_before = len(run_log())
    assert n_before >= 32
    rank_backbones(paths, labels, ["small"], **options)
    assert len(run_log()) == 40


# ------------------------------------------------------------------------------ what transfer gains


def test_the_corrected_interval():
    d = np.array([0.1, 0.2, 0.0, 0.3])
    s2 = np.sum((d - 0.15) ** 2) / 3
    half = student.ppf(0.95, 3) * np.sqrt((1 / 4 + 1 / 3) * s2)
    assert corrected_interval(d, 1 / 3, 0.9) == pytest.approx((0.15 - half, 0.15 + half))
    assert corrected_interval(np.full(3, 0.25), 0.5, 0.95) == (0.25, 0.25)


def test_the_correction_keeps_the_promised_level():
    """Of two learners that are equally good, a plain t-test finds one better far too often."""
    rng = np.random.default_rng(0)
    found = {"corrected": 0, "plain": 0}
    for _ in range(400):
        # Splits share rows: their differences have a common part, of correlation 1/5 as 4:1 splits.
        common = rng.normal()
        d = np.sqrt(0.2) * common + np.sqrt(0.8) * rng.normal(size=10)
        for name, share in (("corrected", 1 / 4), ("plain", 0)):
            low, high = corrected_interval(d, share, 0.95)
            found[name] += low > 0 or high < 0
    assert 0.02 < found["corrected"] / 400 < 0.08 < 0.2 < found["plain"] / 400


def test_small_classes_are_named_once():
    X, y = pictures(12)
    y = np.array(["dim"] * 8 + ["rare"] * 4)
    options = {"random_state": 0}
    with pytest.warns(UserWarning) as caught:
        table = rank_backbones(X, y, ["small"], cv=5, **options)
    assert len(table) == 1 and len(caught) == 1
    assert "'rare' has 4 images. If that matters, pass cv=4" in str(caught[0].message)
    with pytest.raises(ValueError, match="cv=9 folds: 'dim' has 8 images, 'rare' has 4 images"):
        rank_backbones(X, y, ["small"], cv=9, **options)
    y[8:11] = "dim"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="'rare' has 1 image. Add im"):
        rank_backbones(X, y, ["small"], cv=2, **options)
    with pytest.raises(ValueError, match="'rare' has 1 image. To go on, pass cv=11"):
        transfer_gain(X, y, backbone="colours", baselines="majority", cv=12)


def test_fewer_images_than_neighbours():
    X, _ = pictures(6)
    y = ["a", "b"] * 3
    table = rank_backbones(X, y, ["small"], scoring=["knn", "logistic"], cv=3, random_state=0)
    assert np.isfinite(table[["knn", "logistic"]].to_numpy()).all()


@pytest.fixture(scope="module")
def helped(_models):
    """Images that are redder or greener, which grey thumbnails do not show."""
    options = {"backbone": "colours", "unfreeze": 0, "cv": 3, "random_state": 0}
    X, y = pictures(60, step=0)
    red = np.uint8(40) * (y == "dim")[:, None, None]
    X[..., 0] += red
    X[..., 1] += 40 - red
    return transfer_gain(X, y, scratch={"max_epochs": 1, "lr": 1e-6}, **options), (X, y), options


def test_transfer_helps(helped):
    gain, _, _ = helped
    assert isinstance(gain, TransferGain)
    assert gain.scores.shape == (6, 4)
    assert gain.scores.columns.tolist() == ["transfer", "scratch", "pixels", "majority"]
    assert (gain.scores.majority - 0.5).abs().max() < 0.05
    differences = gain.scores["transfer"] - gain.scores["pixels"]
    row = gain.gains.loc["pixels"]
    assert row.gain == pytest.approx(differences.mean())
    assert row.score == pytest.approx(gain.scores["pixels"].mean())
    interval = corrected_interval(differences.to_numpy(), 1 / 2, 0.95)
    assert (row.low, row.high) == pytest.approx(interval, abs=1e-3)  # folds are not quite equal
    # One step from random weights is a matter of chance, so of the three it may be unclear.
    assert gain.gains.transfer[["pixels", "majority"]].tolist() == ["helps"] * 2
    assert ((gain.gains.transfer == "helps") == (gain.gains.low > 0)).all()
    (X, y), options = helped[1:]
    gain = transfer_gain(X, y, baselines=["pixels", "majority"], **options)
    assert gain.verdict.startswith("Transfer helps: with transfer the score is ")


def test_transfer_helps_in_words(helped):
    gain, _, _ = helped
    text = str(gain)
    assert text == repr(gain) and text.replace("\n", " ").endswith(gain.verdict)
    assert "scratch: the same network from random weights" in text
    assert "pixels: an RBF SVM on 32 × 32 pixels" in text and "95% interval" in text


def test_the_same_seed_gives_the_same_scores(helped):
    gain, (X, y), options = helped
    again = transfer_gain(X, y, baselines=["majority"], **options)
    assert again.scores["transfer"].tolist() == gain.scores["transfer"].tolist()


def test_negative_transfer():
    X, y = pictures(step=60)
    gain = transfer_gain(
        X, y, backbone="blind", unfreeze=0, baselines="pixels", cv=4, random_state=0
    )
    assert gain.gains.transfer["pixels"] == "hurts" and gain.gains.high["pixels"] < 0
    assert gain.verdict.startswith("Transfer hurts (negative transfer): with transfer the score is")
    assert gain.scores.shape == (8, 2)


def test_it_can_not_be_told():
    X, y = pictures(step=0)
    options = {"backbone": "colours", "unfreeze": 0, "random_state": 0}
    gain = transfer_gain(X, y, baselines=["majority"], **options)
    assert gain.gains.transfer["majority"] == "unclear"
    assert gain.verdict.startswith("It can't be told whether transfer helps: ")


def test_from_scratch_nothing_is_pretrained():
    """The blind weights hurt, and the same network from random ones sees."""
    X, y = pictures(step=60)
    options = {"unfreeze": 0, "cv": 2, "n_repeats": 1, "random_state": 0}
    scratch = {"lr": 0.05, "max_epochs": 10}
    gain = transfer_gain(X, y, backbone="blind", baselines="scratch", scratch=scratch, **options)
    assert gain.scores["scratch"].mean() > 0.9 > gain.scores["transfer"].mean()


def test_a_scorer_a_splitter_and_parameters():
    X, y = pictures(step=60)
    gain = transfer_gain(
        X.reshape(40, -1) / 255,
        y,
        image_shape=(32, 32, 3),
        backbone="colours",
        scoring=lambda model, X, y: 100 * accuracy_score(y, model.predict(X)),
        cv=StratifiedKFold(4),
        baselines=["majority"],
        confidence_level=0.5,
        max_epochs=1,
        batch_size=8,
    )
    assert gain.scores.majority.tolist() == [50] * 4 and gain.scores["transfer"].mean() > 50
    assert "50% interval" in str(gain)


def test_fits_are_counted(capsys):
    options = {"backbone": "colours", "unfreeze": 0, "baselines": "majority", "cv": 2}
    transfer_gain(*pictures(8), n_repeats=1, verbose=1, **options)
    assert "fits: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"backbone": get_model("efficientnet_lite0")}, ValueError, "backbone"),
        ({"backbone": "small"}, ValueError, "nothing to transfer, or its builder ignores"),
        ({"weights": None}, ValueError, "nothing to transfer"),
        ({"baselines": ["pixel"]}, ValueError, r"\['pixel'\]: pass some of scratch, pixels, maj"),
        ({"baselines": []}, ValueError, "pass some of"),
        ({"cv": [(np.arange(30), np.arange(30, 40))]}, ValueError, "one fold only"),
        ({"scratch": {"epochs": 3}}, ValueError, "Invalid parameter 'epochs'"),
        ({"epochs": 3}, TypeError, "epochs"),
        ({"confidence_level": 95}, ValueError, "confidence_level"),
    ],
)
def test_bad_parameters_of_the_gain(options, error, message):
    with pytest.raises(error, match=message):
        transfer_gain(*pictures(), **{"backbone": "colours", **options})
