"""Networks whose results are no numbers: which row, which network, and what helps."""

import numpy as np
import pytest
import torch
from networks import Small, small
from PIL import Image
from sklearn.base import clone

from sktransfer import (
    FineTunedClassifier,
    FineTunedDetector,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
)
from sktransfer._estimators.pretrained import embedding_of
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))
N, WHITE = 10, 6  # images, and the row of a white one
LABELS = np.arange(N) % 2


class Blinded(Small):
    """Its first block has a value that is no number for images that are white all over."""

    def __init__(self, value):
        super().__init__()
        self.load_state_dict(small().state_dict())
        self.value = value

    def forward(self, x):
        is_white = (x.flatten(1).amin(1) > 1.5)[:, None, None, None]
        stem = torch.where(is_white, self.value, self.stem(x))
        return self.head(self.pool(self.body(stem)).flatten(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(256, size=(N, 32, 32, 3), dtype=np.uint8)
    pixels[WHITE] = 255
    paths = [str(folder / f"{row}.png") for row in range(N)]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def extractor(value, **options):
    return PretrainedFeatureExtractor(Backbone(Blinded(value), SIZE), **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("with_memory", [False, True])
def test_embeddings(files, tmp_path, value, runtime, with_memory):
    options = {"memory": tmp_path if with_memory else None, "batch_size": 4, "runtime": runtime}
    model = extractor(value, layer=["stem", "auto"], **options)
    message = r"row 6 \(.*6.png'\): network 'Blinded' returned NaN or infinity.* float32\. Its"
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(ValueError, match=message):
            model.transform(files)
    rows = model.transform(np.delete(files, WHITE))
    assert np.isfinite(rows).all()
    if with_memory:  # the first two batches but for the white one, then the last two
        assert embedding_of(model).memory.info()["n_entries"] == 2 * (N - 1)


def test_what_was_computed_before_stays(files, tmp_path):
    model = extractor(torch.nan, memory=tmp_path, batch_size=4)
    with pytest.raises(ValueError, match="row 6"):
        model.transform(files)
    assert embedding_of(model).memory.info()["n_entries"] == 7  # of rows 0 to 7, but for 6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:This CPU has no bfloat16")
def test_frozen_blocks(files, tmp_path, value, precision):
    model = FineTunedClassifier(
        Backbone(Blinded(value), SIZE),
        unfreeze=1,
        max_epochs=1,
        memory=tmp_path,
        precision=precision,
        random_state=0,
    )
    with pytest.raises(ValueError, match=rf"row 6 \(.*6.png'\): .*infinity.* {precision}"):
        clone(model).fit(files, LABELS)
    fitted = clone(model).fit(np.delete(files, WHITE), np.delete(LABELS, WHITE))
    with pytest.raises(ValueError, match=r"row 1 \(.*6.png'\): network"):
        fitted.predict(files[WHITE - 1 : WHITE + 1])
    views = clone(model).set_params(unfreeze=0, augment="flip")
    with pytest.raises(ValueError, match=r"row 6 \("):  # of the image, not of its view
        views.fit(files, LABELS)


def test_large_activations_are_kept_as_large_as_half_precision_can(files):
    model = FineTunedClassifier(Backbone(Blinded(1e6), SIZE), unfreeze=1, max_epochs=1)
    assert np.isfinite(model.fit(files, LABELS).predict_proba(files)).all()


def test_the_backbone_of_a_detector(files):
    detector = FineTunedDetector(backbone=Backbone(Blinded(torch.nan), SIZE), max_epochs=1)
    boxes = [{"boxes": [[4, 4, 20, 20]], "labels": ["thing"]}] * N
    with pytest.raises(ValueError, match=r"row 6 \(.*6.png'\): network 'Blinded' returned NaN"):
        detector.fit(files, boxes)


def test_the_tensor_to_blame_is_named(files):
    network = small()
    network.head.bias.data[2] = torch.nan
    model = PretrainedClassifier(Backbone(network, SIZE))
    with pytest.raises(ValueError, match=r"row 0 .*: its head.bias holds such.* other weights"):
        model.predict(files)
    # What comes before the head is not touched by it.
    assert np.isfinite(PretrainedFeatureExtractor(Backbone(network, SIZE)).transform(files)).all()


def test_another_precision_is_recommended(files):
    network = small()
    for layer in network.body:
        layer.weight.data *= 1e4
    model = PretrainedFeatureExtractor(Backbone(network, SIZE), precision="float16")
    with pytest.raises(ValueError, match=r"row 0 .*float16, whose .* 65504.*'bfloat16'.*'float32'"):
        model.transform(files)
    assert np.isfinite(model.set_params(precision="float32").transform(files)).all()
