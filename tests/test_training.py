import numpy as np
import pytest
import torch
from networks import small
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from torch import nn

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor, model_summary
from sktransfer._training.cut import trained_blocks
from sktransfer._training.depth_search import OnRows
from sktransfer._training.heads import make_head, make_projection
from sktransfer._training.net import parameter_groups
from sktransfer.io import check_images
from sktransfer.model_selection._comparison import fit_and_score
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


def pictures(n=12):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------ unfreeze


@pytest.mark.parametrize(
    "unfreeze, trained",
    [
        (0, []),
        (1, ["body.1"]),
        ("body", ["body.0", "body.1"]),
        (["stem"], ["stem"]),
        (["body.1", "stem"], ["stem", "body.1"]),
        ("all", ["stem", "body.0", "body.1"]),
    ],
)
def test_unfreeze_means_the_same_to_the_fit_the_parameters_and_the_summary(unfreeze, trained):
    backbone = Backbone(small(), SIZE)
    model = FineTunedClassifier(backbone, unfreeze=unfreeze, max_epochs=1, batch_size=6)
    before = [row.state for row in model_summary(model).rows]
    X, y = pictures(), np.arange(12) % 2
    model.fit(X, y)
    assert model.unfrozen_block_names_ == trained
    rows = {row.name: row for row in model_summary(model).rows}
    assert [row.state for row in rows.values()] == before
    assert [name for name in model.block_names_ if rows[name].state == "trained"] == trained
    part = model.net_.module_
    numbers = [p.numel() for p in part.blocks.parameters() if p.requires_grad]
    assert sum(numbers) == sum(
        row.n_parameters for row in rows.values() if row.state == "trained" and row.name != "head"
    )
    cut = model.block_names_.index(trained[0]) if trained else len(model.block_names_) + 1
    assert part.cut == cut


def test_unfreeze_on_names_alone():
    names = ["stem", "body.0", "body.1"]
    assert trained_blocks(2, names, "it has") == {1, 2}
    assert trained_blocks("all", [], "it has") == {0}
    assert trained_blocks([], names, "it has") == set()
    with pytest.raises(ValueError, match=r"unfreeze=4, but it has 3 blocks: stem, body.0, body.1"):
        trained_blocks(4, names, "it has")
    with pytest.raises(ValueError, match="it has no blocks, as it is one. Pass 0 or 'all'"):
        trained_blocks(1, [], "it has", ", as it is one")


# ------------------------------------------------------------------------------ parameters


def test_only_matrices_decay_unless_all_are_to():
    frozen, layer, norm = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 3), nn.BatchNorm1d(3)
    parts = [(frozen.parameters(), 0.5), ([*layer.parameters(), *norm.parameters()], 0.1)]
    decaying, others = parameter_groups(parts, 0.01)
    assert decaying == {"params": [layer.weight], "lr": 0.1, "weight_decay": 0.01}
    assert others == {
        "params": [layer.bias, norm.weight, norm.bias],
        "lr": 0.1,
        "weight_decay": 0.0,
    }
    parts = [(layer.parameters(), 0.1)]
    (group,) = parameter_groups(parts, 0.01, only_matrices_decay=False)
    assert group["params"] == list(layer.parameters()) and group["weight_decay"] == 0.01


@pytest.mark.parametrize(
    "make, module, message",
    [
        (lambda head: make_head(head, 4, 3, 0.0), nn.Linear(5, 3), "embeddings of 4 features"),
        (lambda head: make_head(head, 4, 3, 0.0), nn.Linear(4, 2), r"a row of 3 outputs.*\(2, 3\)"),
        (lambda head: make_projection(head, 4), nn.Linear(5, 3), "embeddings of 4 features"),
        (lambda head: make_projection(head, 4), nn.Flatten(0), r"\(2, d\) for 2; it.*\(8,\)"),
    ],
)
def test_what_is_wrong_with_a_head(make, module, message):
    with pytest.raises(ValueError, match=message):
        make(module)


def test_a_head_is_copied_and_lazy_layers_get_their_shape():
    given = nn.Sequential(nn.LazyLinear(3), nn.Dropout(0.5))
    head = make_head(given, 4, 3, 0.0)
    assert head[0].weight.shape == (3, 4) and head.training
    assert isinstance(given[0].weight, nn.UninitializedParameter)
    assert make_projection(nn.LazyLinear(7), 4)(torch.zeros(2, 4)).shape == (2, 7)


# ------------------------------------------------------------------------------ fits and scores


def test_one_split_is_fitted_and_scored_as_by_hand():
    X, y = pictures(18), np.array(["cat", "dog", "eel"])[np.arange(18) % 3]
    network = PretrainedFeatureExtractor(Backbone(small(), SIZE))
    images, rows = check_images(X), X.reshape(18, -1) / 255
    models = [
        (make_pipeline(network, LogisticRegression()), images),
        (KNeighborsClassifier(), rows),
    ]
    train, test = next(StratifiedKFold(3).split(rows, y))
    for model, data in models:
        result = fit_and_score(model, data, y, (train, test), "accuracy")
        expected = model.fit(data[train], y[train]).score(data[test], y[test])
        assert result["test_score"] == expected and result["fit_time"] > 0
        assert type(result["estimator"]) is type(model) and result["estimator"] is not model
        predicted = result["estimator"].predict(data[test])
        assert np.array_equal(predicted, model.predict(data[test]))


def test_clones_share_the_images_and_fit_models_of_their_own():
    images, y = check_images(pictures()), np.arange(12) % 2
    network = PretrainedFeatureExtractor(Backbone(small(), SIZE))
    model = OnRows(make_pipeline(network, LogisticRegression()), images, weights=None)
    copy = model.__sklearn_clone__()
    assert copy.X is images and copy.model is not model.model
    assert copy.fit(np.arange(8), y[:8]).score(np.arange(8, 12), y[8:]) in np.arange(5) / 4
    assert not hasattr(model, "fitted_") and not hasattr(copy.model[-1], "classes_")
