"""Images told apart by words, against transformers' own pipeline, on small random networks."""

import json
import pickle
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from scipy.special import expit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.utils.estimator_checks import check_estimator

from sktransfer import PretrainedFeatureExtractor, ZeroShotClassifier, get_model, load_model
from sktransfer._estimators.word_probe import choose_probe
from sktransfer._memory.memory import check_memory
from sktransfer.model_selection import rank_backbones

tr = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = "this is a photo of cat dog eel broken cell dark . the".split()
WORDS += "0 1 2 - one two three".split()  # labels of scikit-learn's checks
MARKS = ["<pad>", "<unk>", "<start>", "<end>"]
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = TINY | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
TEXTS = TINY | {
    "num_hidden_layers": 2,
    "vocab_size": len(WORDS) + len(MARKS),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
LABELS = ["cat", "dog", "eel"]


def tokenizer(kind):
    numbers = {word: number for number, word in enumerate(MARKS + WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.normalizer = tokenizers.normalizers.Lowercase()
    around = "<start> $A <end>" if kind == "clip" else "$A <end>"
    marks = [(mark, numbers[mark]) for mark in ("<start>", "<end>")]
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single=around, special_tokens=marks
    )
    names = ["input_ids", "attention_mask"] if kind == "clip" else ["input_ids"]
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=64,
        model_input_names=names,
    )


def network(kind, images=IMAGES):
    both = {"text_config": TEXTS, "vision_config": images}
    if kind == "clip":
        return tr.CLIPModel(tr.CLIPConfig(**both, projection_dim=24, logit_scale_init_value=4.0))
    model = tr.SiglipModel(tr.SiglipConfig(**both))
    model.logit_scale.data.fill_(3.0)
    model.logit_bias.data.fill_(-2.0)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    tr.utils.logging.disable_progress_bar()
    size = {"size": {"height": 32, "width": 32}}
    processors = {
        "clip": tr.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size["size"]),
        "siglip": tr.SiglipImageProcessor(**size),
    }
    for kind, processor in processors.items():
        torch.manual_seed(1)
        for part in (network(kind), processor, tokenizer(kind)):
            part.save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def images():
    chance = np.random.default_rng(0)
    sizes = ((50, 70), (91, 40), (33, 33), (47, 120), (64, 64), (32, 40))
    return [chance.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def zero_shot(folder, prompts=LABELS, **options):
    return ZeroShotClassifier(str(folder), prompts, runtime="torch", **options)


# ------------------------------------------------------------------------------ as transformers


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_probabilities_are_those_of_transformers(folders, images, kind):
    pipe = tr.pipeline("zero-shot-image-classification", model=str(folders / kind))
    model = zero_shot(folders / kind)
    found = model.predict_proba(images)
    if kind == "siglip":
        found = expit(model.decision_function(images))
    for row, image in zip(found, images, strict=True):
        theirs = pipe(Image.fromarray(image), candidate_labels=LABELS)
        expected = {each["label"]: each["score"] for each in theirs}
        np.testing.assert_allclose(row, [expected[label] for label in LABELS], atol=1e-5)
    assert model.predict(images).tolist() == [LABELS[i] for i in found.argmax(1)]


def test_prompts_and_templates_are_averaged(folders, images):
    prompts = {1: ["a broken cell", "a dark cell"], 0: "a cell"}
    templates = ["This is {}.", "a photo of {}"]
    logits = zero_shot(folders / "clip", prompts, templates=templates).decision_function(images)
    tower = tr.CLIPModel.from_pretrained(folders / "clip")
    read = tr.AutoTokenizer.from_pretrained(folders / "clip")

    def row(*texts):
        rows = []
        for text in texts:
            with torch.no_grad():
                found = tower.get_text_features(**read(text, return_tensors="pt"))
            found = getattr(found, "pooler_output", found)
            rows.append(torch.nn.functional.normalize(found, dim=1)[0])
        return torch.nn.functional.normalize(torch.stack(rows).mean(0), dim=0).numpy()

    one = row("This is a broken cell.", "a photo of a broken cell", "This is a dark cell.")
    four = row(
        "This is a broken cell.",
        "a photo of a broken cell",
        "This is a dark cell.",
        "a photo of a dark cell",
    )
    assert not np.allclose(one, four)
    zero = row("This is a cell.", "a photo of a cell")
    rows = PretrainedFeatureExtractor(str(folders / "clip"), layer="output").transform(images)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.exp(4.0) * (rows @ (four - zero))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_whole_sentences(folders, images):
    said = zero_shot(folders / "clip", {"cat": "this is a cat", "dog": "this is a dog"})
    plain = said.set_params(templates=None).predict_proba(images)
    framed = zero_shot(folders / "clip", ["cat", "dog"], templates="this is a {}")
    np.testing.assert_array_equal(framed.predict_proba(images), plain)


def test_rows_are_those_of_everyone(folders, images, tmp_path):
    options = {"memory": tmp_path, "runtime": "torch"}
    PretrainedFeatureExtractor(str(folders / "clip"), layer="output", **options).transform(images)
    model = ZeroShotClassifier(str(folders / "clip"), LABELS, **options)
    n_entries = check_memory(tmp_path).info()["n_entries"]
    assert n_entries == len(images)
    model.fit(images, LABELS * 2).predict(images)
    model.search("a cat", images, k=1)
    assert check_memory(tmp_path).info()["n_entries"] == n_entries
    model.predict([images[0] * 0])
    assert check_memory(tmp_path).info()["n_entries"] == n_entries + 1


# ------------------------------------------------------------------------------ labelled images


def spotted(chance, colour, n):
    """Images of a colour, which a network tells apart, but no words that say nothing."""
    X = chance.integers(0, 20, (n, 32, 32, 3)).astype(np.uint8)
    X[..., colour] += 200
    return X


def test_labels_help_where_words_do_not(folders):
    chance = np.random.default_rng(0)
    X = np.concatenate([spotted(chance, k, 6) for k in range(3)])
    y = np.repeat(LABELS, 6)
    new = np.concatenate([spotted(chance, k, 4) for k in range(3)])
    truth = np.repeat(LABELS, 4)
    words = zero_shot(folders / "clip")
    assert words.score(new, truth) < 0.7
    fitted = clone(words).fit(X, y)
    assert fitted.blend_["C"] > 0 and fitted.score(new, truth) == 1
    assert cross_val_predict(words, X, y, cv=3).tolist() == y.tolist()
    alone = clone(words).fit(X)
    np.testing.assert_array_equal(alone.predict_proba(new), words.predict_proba(new))
    search = GridSearchCV(words, {"templates": [None, "a photo of {}."]}, cv=2).fit(X, y)
    assert search.best_score_ == 1


def test_labels_that_say_nothing_do_not_count(folders, images):
    chance = np.random.default_rng(0)
    X = chance.integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    words = zero_shot(folders / "siglip", {"cat": "cat", "dog": "dog"})
    y = words.predict(X)  # what the words say already
    if len(set(y)) < 2:
        y[0] = "cat" if y[0] == "dog" else "dog"
    fitted = clone(words).fit(X, y)
    assert (fitted.predict(images) == words.predict(images)).mean() > 0.6


def test_classes_without_images_are_left_to_the_words(folders):
    chance = np.random.default_rng(0)
    X = np.concatenate([spotted(chance, k, 6) for k in range(2)])
    words = zero_shot(folders / "clip")
    alone = clone(words).fit(X, ["cat"] * 12)
    assert alone.blend_["C"] == 0
    np.testing.assert_array_equal(alone.predict_proba(X), words.predict_proba(X))
    fitted = clone(words).fit(X, ["cat"] * 6 + ["dog"] * 6)
    assert fitted.predict(X).tolist() == ["cat"] * 6 + ["dog"] * 6
    # What is learnt about the two adds up to nothing, so their mean beside the third stays.
    before, after = (np.log(model.predict_proba(X)) for model in (words, fitted))
    margins = [p[:, :2].mean(1) - p[:, 2] for p in (before, after)]
    np.testing.assert_allclose(*margins, atol=1e-3)
    once = clone(words).fit(X[::6], ["cat", "dog"])  # nothing to judge by
    assert once.blend_["C"] == 1


def test_a_probe_is_a_logistic_regression_that_starts_from_words():
    chance = np.random.default_rng(0)
    rows = chance.normal(size=(40, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    numbers = (rows[:, 0] > 0).astype(int)
    weights, C = choose_probe(rows, numbers, np.zeros((40, 2)))
    plain = LogisticRegression(C=2 * C, fit_intercept=False, tol=1e-8).fit(rows, numbers)
    np.testing.assert_allclose(weights[:, 1] - weights[:, 0], plain.coef_[0], atol=0.01)
    right = np.eye(2)[numbers] * 20  # words that know it all, and nothing is to be added
    assert choose_probe(rows, numbers, right)[1] == 0


def test_labels_are_prompts(folders):
    chance = np.random.default_rng(0)
    X = np.concatenate([spotted(chance, k, 4) for k in range(2)])
    fitted = zero_shot(folders / "clip", None).fit(X, ["cat"] * 4 + ["dog"] * 4)
    given = zero_shot(folders / "clip", ["dog", "cat"]).fit(X, ["cat"] * 4 + ["dog"] * 4)
    assert fitted.classes_.tolist() == given.classes_.tolist() == ["cat", "dog"]
    np.testing.assert_array_equal(fitted.predict_proba(X), given.predict_proba(X))
    numbers = zero_shot(folders / "clip", {7: "cat", 3: "dog"}).fit(X, [7] * 4 + [3] * 4)
    assert numbers.classes_.tolist() == [3, 7] and numbers.score(X, [7] * 4 + [3] * 4) == 1


def test_a_fitted_one_travels_without_words(folders, images, tmp_path):
    place = shutil.copytree(folders / "clip", tmp_path / "clip")
    model = zero_shot(place).fit(images, ["cat", "dog", "eel"] * 2)
    expected = model.predict_proba(images)
    for file in place.glob("tokenizer*"):
        file.unlink()
    assert (pickle.loads(pickle.dumps(model)).predict_proba(images) == expected).all()
    skops = pytest.importorskip("skops.io")
    skops.dump(model, tmp_path / "model.skops")
    assert (load_model(tmp_path / "model.skops").predict_proba(images) == expected).all()


def test_labels_of_any_type_travel(folders, images, tmp_path):
    skops = pytest.importorskip("skops.io")
    for labels in ([False, True], [3, 7], [1.0, 2.0], [np.int64(2), np.int64(9)]):
        prompts = {labels[0]: ("a cat", "the cat"), labels[1]: np.array(["dog"])}
        model = zero_shot(folders / "clip", prompts).fit(images, labels * 3)
        assert model.classes_.tolist() == labels
        skops.dump(model, tmp_path / "model.skops")
        for copy in (load_model(tmp_path / "model.skops"), pickle.loads(pickle.dumps(model))):
            assert list(copy.prompts) == labels and clone(copy).classes_.tolist() == labels
            np.testing.assert_array_equal(copy.predict_proba(images), model.predict_proba(images))


def test_what_is_fitted_belongs_to_its_network(folders, images, tmp_path, monkeypatch):
    place = shutil.copytree(folders / "clip", tmp_path / "here" / "clip")
    monkeypatch.chdir(tmp_path / "here")
    model = zero_shot("clip", weights="clip/model.safetensors").fit(images, LABELS * 2)
    expected = model.predict_proba(images)
    copy = pickle.loads(pickle.dumps(model))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(copy.predict_proba(images), expected)
    moved = {"backbone": str(folders / "clip"), "weights": "default"}
    np.testing.assert_array_equal(copy.set_params(**moved).predict_proba(images), expected)
    with pytest.raises(ValueError, match="image_size was None when this estimator was fitted"):
        clone(copy).fit(images).set_params(image_size=48).predict(images)
    state = safetensors.torch.load_file(place / "model.safetensors")
    state["visual_projection.weight"] *= 2
    safetensors.torch.save_file(state, place / "model.safetensors")
    with pytest.raises(ValueError, match="are not those on which this estimator was fitted"):
        copy.set_params(backbone=str(place)).predict(images)


# ------------------------------------------------------------------------------ scikit-learn


@pytest.mark.filterwarnings("ignore:.*outside.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The brightest pixel:UserWarning")
def test_check_estimator_whole(folders, tmp_path):
    torch.manual_seed(1)
    few = IMAGES | {"image_size": 8, "num_hidden_layers": 1}
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    for part in (network("clip", few), tr.CLIPImageProcessor(**sizes), tokenizer("clip")):
        part.save_pretrained(tmp_path)
    results = check_estimator(zero_shot(tmp_path, None, image_shape=(1, -1)), on_fail=None)
    assert len(results) > 50
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    assert failed == {}


# ------------------------------------------------------------------------------ search


def test_search(folders, images, tmp_path):
    paths = []
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(image).save(paths[-1])
    model = zero_shot(folders / "clip", None, memory=tmp_path / "memory")
    found = model.search(["a cat", "the dog"], paths, k=len(paths))
    assert found["text"].tolist() == ["a cat"] * 6 + ["the dog"] * 6
    assert found["rank"].tolist() == [*range(1, 7)] * 2
    assert [paths[row] for row in found["row"]] == found["path"].tolist()
    logits = zero_shot(folders / "clip", ["a cat", "the dog"], templates=None)
    margin = logits.decision_function(paths) / np.exp(4.0)
    by_text = found.pivot(index="row", columns="text", values="similarity")
    np.testing.assert_allclose(by_text["the dog"] - by_text["a cat"], margin, atol=1e-5)
    assert model.search("eel", paths, k=2)["path"].isin(paths).all()


def test_ranked_beside_a_linear_probe(folders):
    chance = np.random.default_rng(0)
    X = np.concatenate([spotted(chance, k, 6) for k in range(2)])
    y = np.repeat(LABELS[:2], 6)
    networks = [str(folders / "clip"), "efficientnet_lite0"]
    scoring = ["logistic", "zero_shot"]
    options = {"scoring": scoring, "cv": 2, "random_state": 0, "image_size": 32}
    table = rank_backbones(X, y, networks, **options).set_index("backbone")
    expected = zero_shot(folders / "clip", LABELS[:2]).score(X, y)
    found = table["zero_shot"]
    assert found.notna().sum() == 1 and found.dropna().item() == expected
    assert rank_backbones(X, y, networks, **options | {"scoring": "zero_shot"}).shape[0] == 2


def test_ranked_by_words_and_a_few_labels(folders):
    chance = np.random.default_rng(0)
    X = np.concatenate([spotted(chance, k, 6) for k in range(2)])
    y = np.repeat(LABELS[:2], 6)
    networks = [str(folders / "clip"), "efficientnet_lite0"]
    folds = [(np.arange(12) % 2 == k, np.arange(12) % 2 != k) for k in range(2)]
    options = {"scoring": ["zero_shot", "few_shot"], "image_size": 32, "random_state": 0}
    options["cv"] = [tuple(map(np.flatnonzero, fold)) for fold in folds]
    table = rank_backbones(X, y, networks, **options).set_index("backbone")
    model = zero_shot(folders / "clip", LABELS[:2])
    expected = [model.fit(X[train], y[train]).score(X[test], y[test]) for train, test in folds]
    assert expected[0] > table["zero_shot"].iloc[0]  # labels help a network of random weights
    assert table["few_shot"].dropna().tolist() == [np.mean(expected)]
    assert table["few_shot_std"].dropna().tolist() == [np.std(expected)]


# ------------------------------------------------------------------------------ bad input


BAD = [
    ({"prompts": {}}, "prompts is empty"),
    ({"prompts": []}, "prompts is empty"),
    ({"prompts": ["cat"]}, "one class alone, 'cat'"),
    ({"prompts": ["cat", "dog", "cat"]}, "names 'cat' twice"),
    ({"prompts": {"cat": ["dark", "dark"], "dog": "big"}}, r"\['cat'\] holds 'dark' twice: .*mean"),
    ({"prompts": {0: "dark", 1: ["a big one", "A  big one "]}}, r"prompts\[1\] holds 'A  big one "),
    ({"prompts": {"cat": "cat", "dog": " "}}, r"prompts\['dog'\] holds ' '"),
    ({"prompts": {"cat": [], "dog": "dog"}}, r"prompts\['cat'\] is empty"),
    ({"prompts": {"cat": "cat", "dog": 3}}, r"prompts\['dog'\] holds 3"),
    ({"prompts": {"cat": "dark", "dog": ["dark"]}}, "'cat' and 'dog' have the same prompts"),
    ({"prompts": {"cat": "Dark  cell", "dog": ["dark cell "]}}, "have the same prompts"),
    ({"prompts": {"cat": "cat", 1: "dog"}}, "mix types"),
    ({"prompts": {"cat": {"a", "b"}, "dog": "dog"}}, r"prompts\['cat'\] holds {'"),
    ({"prompts": {"cat": iter(["a"]), "dog": "dog"}}, "list_iterator.*pass a text that says"),
    ({"prompts": {np.nan: "cat", 1.0: "dog"}}, "has the label nan: pass strings, numbers"),
    ({"prompts": {("a", "b"): "cat", ("c", "d"): "dog"}}, r"has the label \('a', 'b'\)"),
    ({"prompts": {None: "cat", "b": "dog"}}, "has the label None"),
    ({"prompts": ["cat", "\ud800"]}, "a text that says something"),
    ({"templates": "a photo"}, "does not stand once"),
    ({"templates": ["{} {}"]}, "does not stand once"),
    ({"templates": []}, "templates is empty"),
    ({"templates": ["a {}", "the {}", "a {}"]}, "templates holds 'a {}' twice"),
    (
        {"prompts": ["cat", "dog " * 70]},
        "'This is .* letters, has 78 tokens.* takes 64; nothing is cut off",
    ),
    ({"backbone": "efficientnet_lite0"}, "needs a network that was trained on images and texts"),
    ({"weights": "none.bin"}, "no file none.bin"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(folders, images, options, message):
    model = zero_shot(folders / "clip").set_params(**options)
    with pytest.raises((ValueError, OSError), match=message):
        model.predict(images)
    with pytest.raises((ValueError, OSError), match=message):
        model.fit(images, ["cat", "dog", "eel"] * 2)


def test_bad_labels_and_searches(folders, images):
    with pytest.raises(NotFittedError, match="prompts=None takes the labels"):
        zero_shot(folders / "clip", None).predict(images)
    assert not hasattr(zero_shot(folders / "clip", None), "classes_")
    model = zero_shot(folders / "clip")
    with pytest.raises(ValueError, match=r"y holds \['owl'\], for which there is no prompt"):
        model.fit(images, ["cat", "dog", "owl"] * 2)
    with pytest.raises(ValueError, match="6 images"):
        model.fit(images, ["cat", "dog"])
    with pytest.raises(ValueError, match="k must be an int from 1 to 6 images, got 7"):
        model.search("cat", images, k=7)
    with pytest.raises(ValueError, match="texts is empty"):
        model.search([], images)
    fitted = model.fit(images)
    with pytest.raises(ValueError, match="templates was .* when this estimator was fitted"):
        fitted.set_params(templates="a {}").predict(images)


def test_places_that_lack_something(folders, images, tmp_path):
    place = shutil.copytree(folders / "clip", tmp_path / "no words")
    for file in place.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(OSError, match="has no tokenizer"):
        zero_shot(place).predict(images)
    place = shutil.copytree(folders / "clip", tmp_path / "images alone")
    state = safetensors.torch.load_file(place / "model.safetensors")
    vision = {name: value for name, value in state.items() if name.startswith("vis")}
    safetensors.torch.save_file(vision, place / "model.safetensors")
    with pytest.raises(ValueError, match="lack .* tensors of the text part"):
        zero_shot(place).predict(images)
    place = shutil.copytree(folders / "clip", tmp_path / "other words")
    shutil.copy(folders / "siglip" / "config.json", place)
    with pytest.raises(ValueError):
        zero_shot(place).predict(images)
    place = shutil.copytree(folders / "clip", tmp_path / "larger")
    file = place / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["cat"] = 700
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gives the token 700, and its network knows 24"):
        zero_shot(place).predict(images)


def test_tokenizers_that_do_not_fit(folders, images, tmp_path):
    place = shutil.copytree(folders / "clip", tmp_path / "more")
    file = place / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"model_input_names": ["input_ids", "token_type_ids"]}))
    expected = zero_shot(folders / "clip", ["a cat", "dog"]).predict_proba(images)
    found = zero_shot(place, ["cat", "dog"]).predict_proba(images)
    assert found.shape == expected.shape  # what the network does not take is not given to it
    file.write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token"}))
    with pytest.raises(ValueError, match=r"tokenizer of .* can't read .*Take it and the network"):
        zero_shot(place, ["a cat", "dog"]).predict(images)
    with pytest.warns(UserWarning, match="The prompts of 'owl' and 'yak' are the same to the"):
        zero_shot(folders / "clip", ["owl", "cat", "yak"]).predict(images)


def test_names_of_places_that_are_none(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").touch()
    for name, message in (
        ("/nowhere/clip", "'/nowhere/clip': there is no such folder"),
        ("./clip", f"there is no such folder in '{tmp_path}', from which it is looked for"),
        ("empty", f"there is no config.json in '{tmp_path}/empty'"),
        (str(tmp_path / "file.bin"), "it is a file. Pass the folder in which it lies"),
        ("google/siglip2-base", "no folder of .*Did you mean 'hf:google/siglip2-base'"),
        ("https://hub.example/google/siglip/", "Did you mean 'hf:google/siglip'"),
        ("x" * 5000, "Unknown backbone"),
        ("local-dir:\0", "there is no such folder"),
        ("resnet18", "needs a network that was trained on images and texts"),
    ):
        for call in (get_model, lambda name: zero_shot(name).predict(images)):
            if name != "resnet18" or call is not get_model:
                with pytest.raises(ValueError, match=message):
                    call(name)
