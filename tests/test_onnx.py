import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Untraceable, small
from PIL import Image
from sklearn.exceptions import NotFittedError
from torch import nn
from torchvision.transforms.v2 import InterpolationMode, functional

from sktransfer import FineTunedClassifier, FineTunedRegressor
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 40), resize=(36, 44), interpolation="bicubic", std=(0.5,) * 3)


def options(**other):
    return {"max_epochs": 2, "lr": 0.01, "random_state": 0, **other}


def run(path, batch):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": batch})
    return output, session


def prepared(paths, metadata):
    """Bring files to the input as the metadata says, without this library."""
    said = json.loads(metadata["preprocessing"])
    assert said["mode"] == "center" and said["antialias"] is True
    images = []
    for path in paths:
        image = functional.pil_to_tensor(Image.open(path).convert("RGB"))
        scale = max(said["resize"][0] / image.shape[1], said["resize"][1] / image.shape[2])
        size = [int(image.shape[1] * scale), int(image.shape[2] * scale)]
        interpolation = InterpolationMode(said["interpolation"])
        image = functional.resize(image, size, interpolation, antialias=said["antialias"])
        images.append(functional.center_crop(image, said["center_crop"]))
    return torch.stack(images).numpy()


def test_a_classifier_on_files(tiles, tmp_path):
    _, paths, labels = tiles
    model = FineTunedClassifier(Backbone(small(), SIZE), unfreeze=1, **options())
    model.fit(paths, labels)
    before = model.predict_proba(paths)
    path = model.to_onnx(tmp_path / "model.onnx")
    assert path == tmp_path / "model.onnx" and [p.name for p in tmp_path.iterdir()] == [path.name]
    onnx.checker.check_model(path, full_check=True)

    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    batch = prepared(paths, metadata)
    assert batch.shape == (40, 3, 32, 40) and batch.dtype == np.uint8
    found, session = run(path, batch)
    assert [output.name for output in session.get_outputs()] == ["probabilities"]
    np.testing.assert_allclose(found, before, atol=1e-4)
    assert before.std() > 0.1  # they are not all alike
    names = np.array(json.loads(metadata["labels"]))
    np.testing.assert_array_equal(names[found.argmax(1)], model.predict(paths))
    one, _ = run(path, batch[7:8])  # any number of images
    np.testing.assert_allclose(one, found[7:8], atol=1e-6)
    np.testing.assert_array_equal(model.predict_proba(paths), before)  # left as it was
    assert {p.requires_grad for p in model.net_.module_.head.parameters()} == {True}


def test_a_regressor_with_hidden_layers(tiles, tmp_path):
    _, paths, labels = tiles
    y = np.c_[np.where(labels == "china", 100.0, 300.0), np.arange(40) / 1000]
    network = Backbone(small(), SIZE)
    model = FineTunedRegressor(network, unfreeze=0, head=(6,), **options()).fit(paths, y)
    path = model.to_onnx(str(tmp_path / "values.onnx"))
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    found, session = run(path, prepared(paths, metadata))
    assert [output.name for output in session.get_outputs()] == ["values"]
    assert json.loads(metadata["labels"]) is None
    np.testing.assert_allclose(found, model.predict(paths), rtol=1e-4, atol=1e-4 * y.std(0).max())


def test_several_labels_in_low_precision(tiles, tmp_path):
    _, paths, labels = tiles
    y = np.c_[labels == "china", np.arange(40) % 2, labels == "flower"].astype(int)
    model = FineTunedClassifier(
        Backbone(small(), SIZE), precision="bfloat16", augment="flip", predict_views=2, **options()
    ).fit(paths, y)
    path = model.to_onnx(tmp_path / "labels.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    found, _ = run(path, prepared(paths, metadata))
    assert found.shape == (40, 3) and json.loads(metadata["labels"]) == [0, 1, 2]
    model.set_params(predict_views=1)
    np.testing.assert_allclose(found, model.predict_proba(paths), atol=0.03)
    assert np.abs(found.sum(1) - 1).max() > 0.05  # no softmax


def test_errors(tiles, tmp_path, monkeypatch):
    _, paths, labels = tiles
    model = FineTunedClassifier(Backbone(small(), SIZE), unfreeze=0)
    with pytest.raises(NotFittedError):
        model.to_onnx(tmp_path / "model.onnx")
    model.fit(paths[::4], labels[::4])
    with pytest.raises(ValueError, match="nowhere/model.onnx': there is no folder"):
        model.to_onnx(tmp_path / "nowhere" / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"to_onnx needs onnxscript: pip install '\.\[onn"):
        model.to_onnx(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_torch_cannot_export(tiles, tmp_path):
    _, paths, labels = tiles
    network = nn.Sequential(Untraceable())
    model = FineTunedClassifier(Backbone(network, SIZE), unfreeze="all", max_epochs=1)
    model.fit(paths[::4], labels[::4])
    with pytest.raises(ValueError, match="torch can't write this network as ONNX"):
        model.to_onnx(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
