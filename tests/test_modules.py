"""Networks of the user's own: parametrised, without blocks, compiled, with other outputs."""

import copy
import io
import math
import pickle
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from networks import Small, Untraceable
from sklearn.base import clone
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from sktransfer import FineTunedClassifier, PretrainedClassifier, PretrainedFeatureExtractor
from sktransfer._engine.cut_network import CutNetwork
from sktransfer._estimators.pretrained import embedding_of
from sktransfer.inspection import SaliencyDisplay, model_summary
from sktransfer.models import Backbone, get_model
from sktransfer.models._weights import fingerprint
from sktransfer.transforms import Preprocessing

SIZE = 32
X = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3)).astype(np.uint8)
Y = np.arange(6) % 2


def batch():
    """What enters a network."""
    preprocessing = Preprocessing().with_size(SIZE)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    return preprocessing.normalize(torch.stack([preprocessing.fit_size(i) for i in images]))


def embed(network, **options):
    return PretrainedFeatureExtractor(network, image_size=SIZE, **options).transform(X)


def tuned(network, **options):
    options = {"max_epochs": 1, "image_size": SIZE, "random_state": 0, "lr": 0.1, **options}
    return FineTunedClassifier(network, **options).fit(X, Y)


def assert_close(rows, expected):
    np.testing.assert_allclose(rows, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ parametrised


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch wants the new one
        return weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


KINDS = [
    parametrizations.spectral_norm,
    parametrizations.weight_norm,
    spectral_norm,
    old_weight_norm,
    pruned,
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}")
def parametrised(request):
    torch.manual_seed(0)
    network = nn.Sequential(
        *(request.param(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU()),
        *(request.param(nn.Conv2d(8, 6, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        request.param(nn.Linear(6, 4)),
    )
    network.train()(torch.randn(4, 3, SIZE, SIZE))  # moves the statistics of the batch-norm
    return network.eval()


def test_a_parametrised_layer_is_a_block(parametrised):
    extractor = PretrainedFeatureExtractor(parametrised, image_size=SIZE).fit(X)
    assert extractor.block_names_ == ["0", "3"]
    with torch.no_grad():
        assert_close(embed(parametrised), parametrised[:6](batch()))
        assert_close(embed(parametrised, layer="0"), parametrised[:3](batch()).mean((2, 3)))
        for runtime in ("torch", "openvino"):
            rows = embed(parametrised, layer="output", runtime=runtime)
            np.testing.assert_allclose(rows, parametrised(batch()), rtol=1e-3, atol=1e-4)


def test_frozen_parametrisations_stay_and_trained_ones_move(parametrised):
    before = {name: value.clone() for name, value in parametrised.state_dict().items()}
    for unfreeze, moved in ((0, ()), (1, ("3.",)), ("all", ("0.", "1.", "3."))):
        model = tuned(parametrised, unfreeze=unfreeze)
        after = model.to_backbone().network.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert all(name.startswith(moved) for name in changed) and bool(changed) == bool(moved)
        originals = [name for name in changed if "orig" in name or name.endswith(("_g", "_v"))]
        assert {name[:2] for name in originals} == set(moved) - {"1."}  # the batch-norm
        rows = model.to_feature_extractor().transform(X)
        assert rows.shape == (6, 6) and np.isfinite(rows).all()
        again = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_copies_and_pickles_of_parametrised_networks(parametrised):
    extractor = PretrainedFeatureExtractor(parametrised, image_size=SIZE)
    expected = extractor.transform(X)
    again = pickle.loads(pickle.dumps(extractor))
    np.testing.assert_array_equal(again.transform(X), expected)
    assert embedding_of(again).names() == embedding_of(extractor).names()
    backbone = pickle.loads(pickle.dumps(Backbone(parametrised)))
    assert backbone.fingerprint == fingerprint(parametrised)
    if "weight" not in vars(parametrised[0]):  # what torch itself can't copy, it can't clone
        np.testing.assert_array_equal(clone(extractor).transform(X), expected)


def test_the_fingerprint_is_that_of_the_weights_not_of_what_is_computed(parametrised):
    known = fingerprint(parametrised)
    with torch.no_grad():
        parametrised(torch.randn(2, 3, SIZE, SIZE))
        assert fingerprint(parametrised) == known
        next(parametrised[3].parameters()).add_(1)
    assert fingerprint(parametrised) != known


class Scaled(nn.Module):
    """A layer of one's own, whose weight a parametrisation of one's own computes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return nn.functional.linear(x.mean((2, 3)), self.weight)


def test_layers_of_ones_own_can_be_parametrised():
    for norm in (parametrizations.spectral_norm, spectral_norm):
        torch.manual_seed(0)
        network = nn.Sequential(norm(Scaled()), nn.ReLU(), nn.Linear(4, 2)).eval()
        attributes = [set(vars(module)) for module in network.modules()]
        extractor = PretrainedFeatureExtractor(network, image_size=SIZE).fit(X)
        assert extractor.block_names_ == ["0"]
        assert_close(extractor.transform(X), network[:2](batch()))
        assert [set(vars(module)) for module in network.modules()] == attributes
        assert isinstance(network[0].weight, torch.Tensor)


# ------------------------------------------------------------------------------ no blocks


def without_blocks(n_outputs):
    torch.manual_seed(0)
    layers = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, n_outputs)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("n_outputs", [48, 4])
def test_a_network_without_blocks_has_an_embedding(n_outputs):
    network = without_blocks(n_outputs)
    assert_close(embed(network), network[:2](batch()))
    both = embed(network, layer=["auto", "output"])
    assert_close(both, torch.cat([network[:2](batch()), network(batch())], 1))
    model = tuned(network, unfreeze="all")
    assert model.block_names_ == model.unfrozen_block_names_ == []
    assert_close(model.to_feature_extractor().transform(X), network[:2](batch()))
    assert PretrainedClassifier(network, image_size=SIZE).predict_proba(X).shape == (6, n_outputs)
    assert [row.name for row in model_summary(network, image_size=SIZE).rows] == [
        "image",
        "embedding",
        "head",
    ]


def test_no_blocks_and_not_to_be_traced_are_told_apart():
    traced = FineTunedClassifier(without_blocks(4), image_size=SIZE)
    whole = FineTunedClassifier(Untraceable(), image_size=SIZE)
    for model, reason in ((traced, r"no blocks\. Pass"), (whole, "no blocks, as it can't be tra")):
        with pytest.raises(ValueError, match=reason):
            model.set_params(unfreeze=1).fit(X, Y)
    for model, reason in ((traced, "has none: pass"), (whole, "none, as it can't be traced: pass")):
        with pytest.raises(ValueError, match=reason):
            model.set_params(unfreeze="auto").fit(X, Y)
    for network, reason in ((without_blocks(4), "No block of"), (Untraceable(), "cannot be cut")):
        with pytest.raises(ValueError, match=reason):
            SaliencyDisplay.from_estimator(PretrainedClassifier(network, image_size=SIZE), X)
    with pytest.raises(ValueError, match="cut into blocks.*layer='output', or with unfreeze=0"):
        embed(Untraceable())


def test_blocks_are_found_at_the_only_size_that_a_network_takes():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(900, 5))
    extractor = PretrainedFeatureExtractor(network.eval(), image_size=SIZE).fit(X)
    assert extractor.block_names_ == ["0"]
    assert_close(extractor.transform(X), network[:3](batch()))
    with pytest.raises(ValueError, match="any number of them as a float32 tensor .n, 3, 224, 224"):
        PretrainedFeatureExtractor(copy.deepcopy(network).double()).transform(X)


# ------------------------------------------------------------------------------ compiled, exported


def plain(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(*layers).eval()


def jit_script(network):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit")
        return torch.jit.script(network)


def jit_trace(network):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit")
        return torch.jit.trace(network, torch.zeros(2, 3, SIZE, SIZE))


def jit_freeze(network):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit")
        return torch.jit.freeze(torch.jit.script(network))


JIT = [jit_script, jit_trace, jit_freeze]


@pytest.mark.parametrize("compiled", JIT)
def test_a_scripted_or_traced_module_is_run_whole(compiled):
    network = compiled(plain())
    assert_close(embed(network, layer="output"), plain()(batch()))
    with pytest.warns(UserWarning, match="runs on torch, not on OpenVINO: .*can't be traced"):
        embed(network, layer="output", runtime="openvino")
    assert PretrainedClassifier(network, image_size=SIZE).predict(X).shape == (6,)
    with pytest.raises(ValueError, match=r"compiled by torch\.jit.*layer='output'"):
        embed(network)
    for unfreeze in (0, "all"):
        model = tuned(network, unfreeze=unfreeze)
        again = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
        moved = model.to_feature_extractor().transform(X) - plain()(batch()).detach().numpy()
        is_trained = unfreeze == "all" and compiled is not jit_freeze  # its weights are constants
        assert (np.abs(moved).max() > 1e-3) == is_trained


def test_what_runs_on_a_cpu_alone_says_so():
    # The meta device stands for a GPU: a frozen module has its weights as constants on the CPU.
    backbone = get_model(jit_freeze(plain()))
    words = r"runs on a CPU alone: pass device='cpu'\. On 'meta', torch says"
    with pytest.raises(ValueError, match=words):
        CutNetwork(backbone, torch.device("meta")).shape(None, (SIZE, SIZE))
    with pytest.raises(ValueError, match="can't take images of 1 × 1 pixels"):
        CutNetwork(backbone, torch.device("meta")).shape(None, (1, 1))


def reloaded(module):
    content = io.BytesIO()
    torch.jit.save(module, content)
    content.seek(0)
    return torch.jit.load(content)


@pytest.mark.parametrize("compiled", JIT)
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_the_fingerprint_of_a_compiled_module_is_that_of_weights_and_code(compiled):
    known = fingerprint(compiled(plain()))
    assert known == fingerprint(compiled(plain())) == fingerprint(reloaded(compiled(plain())))
    assert known != fingerprint(compiled(plain(seed=1)))
    other = plain()
    other[1] = nn.ReLU6()
    assert known != fingerprint(compiled(other))
    inside = [fingerprint(nn.Sequential(compiled(n), nn.ReLU())) for n in (plain(), other)]
    assert inside[0] != inside[1]


def exported(n_images, dynamic):
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    images = torch.zeros(n_images, 3, SIZE, SIZE)
    return torch.export.export(plain(), (images,), dynamic_shapes=shapes)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch 2.11's own
def test_modules_of_torch_export():
    program = exported(2, dynamic=True)
    extractor = PretrainedFeatureExtractor(program.module(), layer="output", image_size=SIZE)
    assert_close(extractor.transform(X), plain()(batch()))
    assert tuned(program.module(), unfreeze=0).predict(X).shape == (6,)
    other = exported(2, dynamic=True).module()
    assert fingerprint(other) == fingerprint(program.module())
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert fingerprint(other) != fingerprint(program.module())
    with pytest.raises(pickle.PicklingError, match=r"register_model\(name, builder\)"):
        pickle.dumps(extractor)
    with pytest.raises(ValueError, match=r"any number of them .*size\(\)\[0\] == 1"):
        embed(exported(1, dynamic=False).module(), layer="output")
    with pytest.raises(TypeError, match=r"ExportedProgram: pass its module\(\)"):
        embed(program)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # of what torch.compile imports
def test_wrappers_are_taken_off():
    inner = plain()
    inner[0] = torch.compile(inner[0])
    for network in (nn.DataParallel(plain()), nn.DataParallel(torch.compile(plain())), inner):
        extractor = PretrainedFeatureExtractor(network, image_size=SIZE).fit(X)
        assert extractor.block_names_ == ["0"]
        np.testing.assert_array_equal(extractor.transform(X), embed(plain()))


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to move
        return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of quantised tensors, which torch gives up
def test_a_quantised_network_is_run_whole():
    network = quantised()
    rows = embed(network, layer="output")  # it quantises by the range of a batch
    np.testing.assert_allclose(rows, network(batch()).detach(), atol=0.01)
    model = tuned(network, unfreeze="all")
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_networks_without_parameters_and_of_other_signatures():
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", plain()[0].weight.detach())

        def forward(self, *images, scale=1.0, **options):
            return nn.functional.conv2d(*images, self.kernel).relu().mean((2, 3)) * scale

    assert_close(embed(Buffers()), Buffers()(batch()))
    assert tuned(Buffers(), unfreeze="all").predict(X).shape == (6,)
    assert len(model_summary(Buffers(), image_size=SIZE).rows) == 2
    with pytest.raises(ValueError, match="run it once if it has lazy modules"):
        embed(nn.Sequential(nn.LazyConv2d(8, 3), *plain()[1:]))


# ------------------------------------------------------------------------------ outputs


@dataclass
class Outputs:
    logits: torch.Tensor
    loss: None = None


class Named(NamedTuple):
    logits: torch.Tensor


WAYS = {
    "dict": lambda y: {"logits": y},
    "tuple": lambda y: (y,),
    "nested": lambda y: {"out": [y]},
    "data class": lambda y: Outputs(y),
    "named tuple": lambda y: Named(y),
    "list of maps": lambda y: [y.unflatten(1, (4, 1, 1)).repeat(1, 1, 8, 8), y[:, :, None, None]],
    "pair": lambda y: (y, y),
    "list": lambda y: [y, y],
    "names": lambda y: {"last": y, "pooled": y},
    "number": lambda y: y.mean(),
    "complex": lambda y: torch.complex(y, y),
    "none": lambda y: None,
}


class Wrapped(nn.Module):
    def __init__(self, way, is_traceable):
        super().__init__()
        self.network, self.way, self.is_traceable = plain(), way, is_traceable

    def forward(self, x):
        if not self.is_traceable and x.sum() > 1e9:
            return x
        return WAYS[self.way](self.network(x))


@pytest.mark.parametrize(
    "way", ["dict", "tuple", "nested", "data class", "named tuple", "list of maps"]
)
@pytest.mark.parametrize("is_traceable", [True, False])
def test_the_only_tensor_of_an_output_is_taken(way, is_traceable):
    network = Wrapped(way, is_traceable)
    assert_close(embed(network, layer="output"), plain()(batch()))
    if is_traceable:
        assert PretrainedFeatureExtractor(network, image_size=SIZE).fit(X).block_names_
        assert_close(embed(network, layer="network.0"), plain()[:2](batch()).mean((2, 3)))
    model = tuned(network, unfreeze="all")
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    assert model.to_feature_extractor().transform(X).shape[0] == 6
    if way != "list of maps":
        assert PretrainedClassifier(network, image_size=SIZE).predict(X).shape == (6,)


@pytest.mark.parametrize(
    "way, what",
    [
        ("pair", "a tuple of 2"),
        ("list", "a list of 2"),
        ("names", "a dict of last and pooled"),
        ("number", r"a tensor of shape \(\) for two images"),
        ("complex", "complex numbers"),
        ("none", "None"),
    ],
)
@pytest.mark.parametrize("layer", ["auto", "output"])
def test_other_outputs_are_named(way, what, layer):
    for is_traceable in (True, False):
        with pytest.raises((TypeError, ValueError)) as caught:
            embed(Wrapped(way, is_traceable), layer=layer)
        assert caught.match(f"^Backbone 'Wrapped' returns {what}, not one .*forward returns the ")
        assert "layer=" not in str(caught.value)


def test_the_last_map_of_a_network_of_maps_is_its_embedding():
    whole = timm.create_model("test_resnet")
    features = timm.create_model("test_resnet", features_only=True)
    features.load_state_dict(whole.state_dict(), strict=False)
    extractor = PretrainedFeatureExtractor(features, image_size=SIZE).fit(X)
    assert extractor.block_names_[-1] == "layer4.0"
    np.testing.assert_allclose(extractor.transform(X), embed(whole), rtol=1e-3, atol=1e-4)


def test_one_number_for_each_image_is_a_column():
    class Score(Small):
        def forward(self, x):
            return super().forward(x)[:, 0]

    assert embed(Score(), layer="output").shape == (6, 1)
    assert tuned(Score(), unfreeze=1).predict(X).shape == (6,)


@pytest.mark.parametrize("n_labels, n_tensors", [(3, 1), (0, 2)])
def test_models_of_transformers(n_labels, n_tensors):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIZE,
        patch_size=8,
        num_labels=n_labels,
    )
    if n_tensors == 1:
        network = transformers.ViTForImageClassification(config).eval()
        assert_close(embed(network, layer="output"), network(batch()).logits)
        assert tuned(network, unfreeze="all").predict(X).shape == (6,)
    else:
        with pytest.raises(TypeError, match="last_hidden_state and pooler_output, not one tensor"):
            embed(transformers.ViTModel(config), layer="output")


# ------------------------------------------------------------------------------ tried out


class Tried(Small):
    """Its forward does something between its parts that no graph shows, or no row should hold."""

    def __init__(self, way, is_cut=True):
        super().__init__()
        self.way, self.is_cut = way, is_cut
        self.register_buffer("seen", torch.zeros(()))
        self.bare_norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        if self.way == "mean":
            x = (x - x.mean()) / x.std()
        x = self.stem(x)
        if not self.is_cut and float(x.abs().max()) < 0:  # which can't be traced
            x = x * 2
        if self.way == "type" and isinstance(x, torch.Tensor):
            x = x * 2
        if self.way == "random":
            x = nn.functional.dropout(x)
        if self.way == "batch":
            x = self.bare_norm(x)
        if self.way == "past":
            self.seen.add_(x.detach().mean())
            x = x + self.seen
        if self.way == "counted":
            self.seen.add_(1)
        return self.head(self.pool(self.body(x)).flatten(1))


def test_a_network_whose_graph_computes_something_else_is_run_whole():
    network = Tried("type").eval()
    assert_close(embed(network, layer="output"), network(batch()))
    with pytest.raises(
        ValueError, match=r"computes something else. Its code asks .*layer='output'"
    ):
        embed(network)
    with pytest.raises(ValueError, match="unfreeze"):
        tuned(network, unfreeze=1)
    assert tuned(network, unfreeze="all").predict(X).shape == (6,)


@pytest.mark.parametrize(
    "way, message",
    [
        ("random", "'Tried' gives the same image other features each time"),
        ("batch", "'Tried' gives an image other features beside other images"),
        ("mean", "'Tried' gives an image other features beside other images"),
        ("past", "'Tried' changes its buffers while it runs"),
    ],
)
@pytest.mark.parametrize("is_cut", [True, False])
def test_rows_that_are_not_of_one_image_are_warned_of(way, message, is_cut):
    network = Tried(way, is_cut).eval()
    with pytest.warns(UserWarning, match=message):
        embed(network, layer="output")
    assert network.seen == 0


def test_what_a_forward_counts_is_no_fault():
    network = Tried("counted").eval()
    assert_close(embed(network), network.pool(network.body(network.stem(batch()))).flatten(1))


class Measured(Small):
    """What it takes grows with the square of the pixels."""

    def __init__(self):
        super().__init__()
        self.most = [0]

    def __deepcopy__(self, memo):
        copied = Measured()
        copied.most = self.most
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, x):
        if type(x) is torch.Tensor and x.device.type != "meta":
            self.most[0] = max(self.most[0], x.shape[-1])
        return super().forward(x)


def test_networks_are_tried_out_on_the_size_of_the_images_to_come():
    network = Measured().eval()
    embed(network)
    assert network.most == [SIZE]


class Refusing(Small):
    """It refuses what is not traced."""

    def forward(self, x):
        if type(x) is torch.Tensor:
            raise ValueError("not this")
        return super().forward(x)


def test_a_network_that_fails_alone_and_beside_others_is_not_said_to_be_of_a_batch():
    assert embed(Refusing().eval()).shape[0] == 6  # and its graph does not


# ------------------------------------------------------------------------------ shared weights


class Tied(nn.Module):
    """Two of its blocks have one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.head(self.last(self.first(self.stem(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize("unfreeze", [2, "all"])
def test_blocks_that_share_a_weight_are_trained_together(unfreeze):
    network = Tied()
    before = network.first.weight.clone()
    model = tuned(network, unfreeze=unfreeze)
    trained = model.to_backbone().network
    assert torch.equal(network.first.weight, before)  # the user's own is not touched
    assert trained.first.weight is trained.last.weight
    assert not torch.equal(trained.first.weight, before)
    copied = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(copied.predict_proba(X), model.predict_proba(X), atol=1e-6)
    rows = model.to_feature_extractor().set_params(layer="output").transform(X)
    assert_close(rows, trained(batch()))


@pytest.mark.parametrize("unfreeze, trained", [(1, "last"), (["first"], "first")])
def test_a_weight_that_a_frozen_block_has_too_stands_still(unfreeze, trained):
    network = Tied()
    before = copy.deepcopy(network.state_dict())
    model = tuned(network, unfreeze=unfreeze)
    after = model.to_backbone().network.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {f"{trained}.bias"}
    rows = model.to_feature_extractor().set_params(layer="output").transform(X)
    assert_close(rows, model.to_backbone().network(batch()))


# ------------------------------------------------------------------------------ memory formats


class Flat(nn.Module):
    """Takes a view of its maps, as networks of many tutorials do: they lie channels first."""

    def __init__(self, loops=False):
        super().__init__()
        self.loops = loops
        self.conv, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(4)
        self.hidden, self.head = nn.Linear(6 * 8 * 8, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.pool(self.conv(x).relu())
        n = math.prod(list(x.shape[1:])) if self.loops else 384  # which can't be traced
        return self.head(self.hidden(x.view(-1, n)).relu())


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("unfreeze", [0, "all"])
def test_maps_may_be_viewed(loops, unfreeze):
    torch.manual_seed(0)
    network = Flat(loops).eval()
    assert_close(embed(network, layer="output"), network(batch()))
    assert get_model(network) is get_model(network)  # one network for both runtimes
    assert_close(embed(network, layer="output", runtime="torch"), network(batch()))
    assert_close(embed(network, layer="output"), network(batch()))
    if not loops:
        assert_close(
            embed(network, layer=0), network.pool(network.conv(batch()).relu()).mean((2, 3))
        )
    model = tuned(network, unfreeze=unfreeze)
    trained = model.to_backbone().network
    expected = model.to_feature_extractor().set_params(layer="output").transform(X)
    assert_close(expected, trained(batch()))
    assert model.predict(X).shape == (6,)


def test_frames_may_be_convolved():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.over_time, self.head = nn.Conv3d(3, 4, (1, 4, 4), (1, 4, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.over_time(x.unsqueeze(2)).mean((2, 3, 4)))

    assert_close(embed(network := Frames()), network.over_time(batch()[:, :, None]).mean((2, 3, 4)))
    assert tuned(network, unfreeze=1).predict(X).shape == (6,)


def test_the_kept_copy_is_not_the_users_network():
    network = old_weight_norm(nn.Conv2d(3, 4, 3))
    before = {id(tensor) for tensor in (*network.parameters(), network.weight)}
    copied = get_model(network).network
    assert not before & {id(tensor) for tensor in (*copied.parameters(), copied.weight)}
    assert next(network.parameters()).requires_grad
