import pickle

import numpy as np
import pytest
import torch
from networks import Small, Untraceable, small
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sktransfer import (
    FineTunedClassifier,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    get_model,
    model_summary,
    register_model,
)
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


def states(summary):
    return {row.name: row.state for row in summary.rows}


def test_a_small_network_by_hand():
    rows = model_summary(small(), image_size=32).rows
    found = [(r.name, r.shape, r.n_parameters, r.flops, r.n_bytes, r.state) for r in rows]
    assert found == [
        ("image", (3, 32, 32), None, None, 3 * 32 * 32, ""),
        ("stem", (8, 16, 16), 3 * 8 * 9 + 8 + 16, 2 * 27 * 8 * 16**2, 8 * 16**2 * 2, ""),
        ("body.0", (12, 8, 8), 8 * 12 * 9 + 12, 2 * 72 * 12 * 8**2, 12 * 8**2 * 2, ""),
        ("body.1", (16, 4, 4), 12 * 16 * 9 + 16, 2 * 108 * 16 * 4**2, 16 * 4**2 * 2, ""),
        ("embedding", (16,), 0, 0, 16 * 4, ""),
        ("head", (5,), 16 * 5 + 5, 2 * 16 * 5, None, ""),
    ]


@pytest.mark.parametrize("name", ["resnet18", "timm/vit_tiny_patch16_224"])
def test_totals_are_those_of_the_network(name):
    rows = model_summary(name).rows  # resnet18's published weights are not here: no download
    network = get_model(name, None).network
    assert sum(r.n_parameters or 0 for r in rows) == sum(p.numel() for p in network.parameters())
    # Attention by its parts: the counter does not know the fused kernel of a CPU.
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        network(torch.zeros(1, 3, 224, 224))
    assert sum(r.flops or 0 for r in rows) == counter.get_total_flops() > 1e9


@pytest.mark.parametrize(
    "unfreeze, trained",
    [
        (0, []),
        (1, ["body.1", "embedding"]),
        ("body", ["body.0", "body.1", "embedding"]),
        ("all", ["stem", "body.0", "body.1", "embedding"]),
        (["stem"], ["stem"]),
    ],
)
def test_what_a_fine_tuned_classifier_trains(tiles, unfreeze, trained):
    _, paths, labels = tiles
    model = FineTunedClassifier(Backbone(small(), SIZE), unfreeze=unfreeze, max_epochs=1)
    before = model_summary(model)
    assert [n for n, state in states(before).items() if state == "trained"] == [*trained, "head"]
    assert {states(before)[n] for n in ("stem", "body.0", "body.1")} <= {"frozen", "trained"}
    assert before.rows[-1].n_parameters is None  # the number of classes is not known
    after = model_summary(model.fit(paths[::2], labels[::2]))
    assert states(after) == states(before)
    n_trained = sum(row.n_parameters for row in after.rows if row.state == "trained")
    assert n_trained == model.n_trainable_parameters_
    assert after.rows[-1].shape == (2,) and after.rows[-1].n_parameters == 16 * 2 + 2
    again = model_summary(pickle.loads(pickle.dumps(model)))
    assert str(again) == str(after)


def test_of_extractors_and_classifiers():
    backbone = Backbone(small(), SIZE)
    extractor = model_summary(PretrainedFeatureExtractor(backbone))
    assert list(states(extractor).values()) == ["", "frozen", "frozen", "frozen", "frozen"]
    classifier = model_summary(PretrainedClassifier(backbone))
    assert states(classifier)["head"] == "frozen"
    large = model_summary(PretrainedFeatureExtractor(backbone, image_size=64))
    assert large.image_size == (64, 64) and large.rows[1].shape == (8, 32, 32)
    flat = model_summary(PretrainedFeatureExtractor(backbone, pooling="flatten"), image_size=64)
    assert flat.rows[1].shape == (8, 32, 32)


def test_it_prints_well():
    summary = model_summary(FineTunedClassifier(Backbone(small(7), SIZE, name="small")))
    text = str(summary)
    assert text == repr(summary)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines == [
        "small, images of 32 × 32 pixels",
        "",
        "block      output         parameters    GFLOP    KB kept",
        "---------  -----------  ------------  -------  ---------  -------",
        "image      3 × 32 × 32                               3.1",
        "stem       8 × 16 × 16           240    0.000        4.1  frozen",
        "body.0     12 × 8 × 8            876    0.000        1.5  frozen",
        "body.1     16 × 4 × 4          1,744    0.000        0.5  trained",
        "embedding  16                      0    0.000        0.1  trained",
        "head                                                      trained",
        "",
        "2,860 parameters, 1,744 of them trained; 0.000 GFLOP an image",
    ]


def test_as_a_frame_and_in_a_notebook():
    summary = model_summary(PretrainedFeatureExtractor(Backbone(small(8), SIZE, name="<small>")))
    frame = summary.to_frame()
    assert frame.loc["body.1", "output"] == (16, 4, 4)
    assert frame["parameters"].sum() == 2860
    assert frame.loc["stem", "kb"] == 4.096
    page = summary._repr_html_()
    assert page.count("<tr") == 6 and "&lt;small&gt;" in page and "<small>" not in page


def test_a_network_that_cannot_be_cut():
    summary = model_summary(Backbone(Untraceable(), SIZE, name="free"))
    assert [row.name for row in summary.rows] == ["image", "free"]
    assert summary.rows[1].n_parameters == 4 * 27 + 4
    model = FineTunedClassifier(Backbone(Untraceable(), SIZE, name="free"), unfreeze="all")
    assert states(model_summary(model)) == {"image": "", "free": "trained", "head": "trained"}


def test_shared_weights_are_counted_once():
    class Twice(Small):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1))
            self.more = nn.Sequential(nn.Conv2d(16, 8, 1), self.body)

        def forward(self, x):
            return self.head(self.pool(self.more(self.body(self.stem(x)))).flatten(1))

    network = Twice()
    rows = model_summary(network, image_size=32).rows
    assert sum(r.n_parameters or 0 for r in rows) == sum(p.numel() for p in network.parameters())


def test_nothing_of_the_network_changes():
    network = small().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model_summary(network, image_size=32)
    assert network.training
    for name, value in network.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


# ------------------------------------------------------------------------------ in a notebook


def never(weights):
    raise AssertionError("a network was loaded only to print an estimator")


@pytest.mark.parametrize(
    "kind", [PretrainedFeatureExtractor, PretrainedClassifier, FineTunedClassifier]
)
def test_nothing_is_loaded_to_print_an_unfitted_estimator(kind):
    register_model("never", never)
    model = kind("never")
    for page in (model._repr_html_(), model._repr_mimebundle_()["text/html"]):
        assert kind.__name__ in page and "Blocks:" not in page
    assert "never" in make_pipeline(model, SVC())._repr_html_()


def test_the_blocks_of_fitted_estimators_are_shown(tiles):
    _, paths, labels = tiles
    register_model("printed", lambda weights: Backbone(small(9), SIZE))
    model = FineTunedClassifier("printed", unfreeze=1, max_epochs=1).fit(paths[::2], labels[::2])
    page = model._repr_html_()
    assert "Blocks: 2 frozen, 1 trained" in page
    assert "<td>16 × 4 × 4</td><td>1,744</td>" in page
    stored = pickle.dumps(model)
    extractor = PretrainedFeatureExtractor("printed").fit(paths[:2])
    assert "Blocks: 3 frozen<" in extractor._repr_html_()
    pipeline = make_pipeline(PretrainedFeatureExtractor("printed"), SVC()).fit(paths, labels)
    assert "<td>8 × 16 × 16</td>" in pipeline._repr_html_()

    register_model("printed", never)  # as in another process, where it is not loaded yet
    page = pickle.loads(stored)._repr_html_()
    assert "Blocks: 2 frozen, 1 trained" in page
    assert "<td>body.1</td><td></td>" in page and "1,744" not in page


# ------------------------------------------------------------------------------ errors


def test_bad_input():
    with pytest.raises(TypeError, match="got Pipeline. Of a Pipeline or a search"):
        model_summary(make_pipeline(PretrainedFeatureExtractor(), SVC()))
    with pytest.raises(TypeError, match="a name, a torch.nn.Module"):
        model_summary(3)
    with pytest.raises(ValueError, match="Did you mean 'resnet50'"):
        model_summary("resnet5")
    with pytest.raises(ValueError, match="No block is called 'bodi'.*body"):
        model_summary(FineTunedClassifier(Backbone(small(), SIZE), unfreeze="bodi"))
    with pytest.raises(ValueError, match="can't take images of 100 × 100"):
        model_summary("timm/vit_tiny_patch16_224", image_size=100)


def test_a_depth_that_is_not_chosen_yet():
    with pytest.raises(ValueError, match="decided by fit"):
        model_summary(FineTunedClassifier(small(), unfreeze="auto"))
