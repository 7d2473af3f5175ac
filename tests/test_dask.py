"""Dask collections, on two real worker processes."""

import os
import re
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import joblib
import numpy as np
import pandas as pd
import pytest
import torch
import xxhash
import zarr
from distributed import Client, LocalCluster, get_worker, wait
from distributed.utils import get_mp_context
from networks import LOG, STRIKE, Deadly, Small, small
from packaging.version import Version
from PIL import Image
from processes import import_in_server
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from sktransfer import FineTunedClassifier, FineTunedRegressor, PretrainedFeatureExtractor
from sktransfer._estimators.dask_collections import _Shipped
from sktransfer._threads import n_threads
from sktransfer.transforms import Preprocessing

if Version(joblib.__version__) < Version("1.6"):  # whose own part for dask does what it deprecates
    pytestmark = pytest.mark.filterwarnings("ignore:`apply_async` is deprecated:DeprecationWarning")

TIMEOUT = 600
COPIES = "SKTRANSFER_TEST_COPIES"  # how often a network was copied in this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def client(folder):
    """Two processes of one thread; a user warning, such as joblib's, is an error in them."""
    env = {LOG: str(folder / "log"), STRIKE: str(folder / "strike")}
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "env": env}
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    get_mp_context()  # has the server import parts of dask only
    import_in_server()
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        client.run(warnings.simplefilter, "error", UserWarning)
        yield client


@pytest.fixture
def runs(client, folder):
    """A function that returns how often each image ran through a counted network on workers."""
    (folder / "log").write_text("")
    blank = Preprocessing().normalize(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0]
    timed = xxhash.xxh3_64_hexdigest(blank.contiguous().numpy())  # for the cost of blocks

    def count():
        counts = Counter((folder / "log").read_text().split())
        del counts[timed]
        return counts

    return count


@pytest.fixture(scope="module")
def pixels(tiles):
    _, paths, _ = tiles
    return np.stack([np.asarray(Image.open(path)) for path in paths[:12]])  # (12, 64, 64, 3)


def extractor(**options):
    return PretrainedFeatureExtractor(small(), **{"image_size": 32, **options})


def lazily(form, paths, pixels):
    """Return images in one of the forms that dask has, and the lengths of its partitions."""
    unknown = (np.nan,) * 3
    if form == "array":
        return da.from_array(pixels, chunks=(5, 30, -1, -1)), (5, 5, 2)
    if form == "array of floats":
        return da.from_array(pixels, chunks=(12, -1, -1, -1)) / 255, (12,)
    if form == "array of paths":
        return da.from_array(np.array(paths), chunks=5), (5, 5, 2)
    if form == "array of unknown length":
        strings = da.from_array(np.array(paths), chunks=4)
        return strings[strings != ""], unknown
    if form == "frame":
        return dd.from_pandas(pd.DataFrame({"path": paths}), npartitions=3), unknown
    if form == "series":
        return dd.from_pandas(pd.Series(paths), npartitions=3), unknown
    bag = db.from_sequence(paths, npartitions=3)
    loaded = {"bytes": lambda path: Path(path).read_bytes(), "PIL images": Image.open}
    kind = form.removeprefix("bag of ")
    return bag if kind == "paths" else bag.map(loaded[kind]), unknown


FORMS = ["array", "array of floats", "array of paths", "array of unknown length", "frame", "series"]
FORMS += ["bag of paths", "bag of bytes", "bag of PIL images"]


# ------------------------------------------------------------------------------ results


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_rows_of_its_images(form, tiles, pixels, runs):
    paths = tiles[1][:12]
    images, lengths = lazily(form, paths, pixels)
    rows = extractor().transform(images)
    assert isinstance(rows, da.Array) and rows.dtype == np.float32
    assert rows.chunks[1] == (16,)
    np.testing.assert_array_equal(rows.chunks[0], lengths)
    assert not runs()  # nothing is computed yet
    found = rows.compute()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, extractor().transform(paths), rtol=1e-4, atol=1e-6)
    assert len(runs()) == 12


def test_flat_rows(client):
    X = np.random.default_rng(0).random((7, 48))
    model = extractor(image_shape=(4, 4, 3)).fit(X)
    rows = model.transform(da.from_array(X, chunks=(3, 20)))
    np.testing.assert_allclose(rows.compute(), model.transform(X), rtol=1e-4, atol=1e-6)
    frame = pd.DataFrame(X)
    rows = clone(model).transform(dd.from_pandas(frame, npartitions=2))
    np.testing.assert_allclose(rows.compute(), model.transform(X), rtol=1e-4, atol=1e-6)


TARGETS = {
    "two classes": np.array(["a", "b"] * 6),
    "three classes": np.array([3, 5, 9] * 4),
    "labels": np.array([[0, 1, 1], [1, 0, 1]] * 6),
    "numbers": np.arange(12.0),
    "columns": np.arange(24.0).reshape(12, 2),
}


@pytest.mark.parametrize("target", TARGETS)
def test_predictions(target, tiles, client):
    paths, y = tiles[1][:12], TARGETS[target]
    is_number = y.dtype.kind == "f"
    model = (FineTunedRegressor if is_number else FineTunedClassifier)(small(), image_size=32)
    model.set_params(unfreeze=1, max_epochs=1, random_state=0).fit(paths, y)
    images = da.from_array(np.array(paths), chunks=5)
    methods = ["predict"] if is_number else ["predict", "predict_proba", "decision_function"]
    for method in methods:
        expected = getattr(model, method)(paths)
        found = getattr(model, method)(images)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        computed = found.compute()
        assert computed.dtype == expected.dtype
        if computed.dtype.kind == "f":
            np.testing.assert_allclose(computed, expected, rtol=1e-3, atol=1e-5)
        else:
            np.testing.assert_array_equal(computed, expected)
    assert model.score(paths, y) == pytest.approx(model.score(images, y))


def test_empty_partitions_give_no_rows(tiles, client):
    paths = tiles[1][:6]
    bag = db.from_sequence(paths, npartitions=3).filter(lambda path: path not in paths[2:4])
    rows = extractor().transform(bag).compute()
    kept = paths[:2] + paths[4:]
    np.testing.assert_allclose(rows, extractor().transform(kept), rtol=1e-4, atol=1e-6)
    assert extractor().transform(bag.filter(lambda path: False)).compute().shape == (0, 16)


def test_what_happens_to_the_estimator_later_changes_nothing(tiles, client):
    model = extractor()
    rows = model.transform(da.from_array(np.array(tiles[1][:4]), chunks=2))
    model.set_params(layer="stem")
    assert rows.compute().shape == (4, 16)


def test_without_a_cluster(tiles):
    paths = tiles[1][:4]
    rows = extractor().transform(da.from_array(np.array(paths), chunks=2))
    found = rows.compute(scheduler="threads")
    np.testing.assert_allclose(found, extractor().transform(paths), rtol=1e-4)


# ------------------------------------------------------------------------------ written


def test_parquet(tiles, tmp_path, client):
    frame = pd.DataFrame({"path": tiles[1][:12], "camera": np.arange(12)})
    frames = dd.from_pandas(frame, npartitions=3)
    model = extractor()
    rows = dd.from_dask_array(
        model.transform(frames["path"]), columns=model.get_feature_names_out(), index=frames.index
    )
    frames.join(rows).to_parquet(tmp_path / "rows")
    found = pd.read_parquet(tmp_path / "rows").reset_index(drop=True)
    assert found.columns[:3].tolist() == ["path", "camera", "pretrainedfeatureextractor0"]
    pd.testing.assert_frame_equal(found[["path", "camera"]], frame, check_dtype=False)
    np.testing.assert_allclose(found.iloc[:, 2:], model.transform(frame["path"]), rtol=1e-4)


def test_zarr(tiles, tmp_path, client):
    paths = tiles[1][:12]
    extractor().transform(da.from_array(np.array(paths), chunks=5)).to_zarr(str(tmp_path / "rows"))
    found = da.from_zarr(str(tmp_path / "rows"))
    assert found.chunks == ((5, 5, 2), (16,))
    np.testing.assert_allclose(found.compute(), extractor().transform(paths), rtol=1e-4)


# ------------------------------------------------------------------------------ wrong input


def test_wrong_input_is_told_before_anything_is_computed(pixels, tiles):
    model = extractor()
    with pytest.raises(ValueError, match="image_shape"):
        model.transform(da.zeros((10, 64), chunks=5))
    with pytest.raises(TypeError, match="column"):
        frame = pd.DataFrame({"path": tiles[1], "other": tiles[1]})
        model.transform(dd.from_pandas(frame, npartitions=2))
    with pytest.raises(TypeError, match="got Delayed"):
        model.transform(dask.delayed(list)(tiles[1]))
    with pytest.raises(ValueError, match="without axes"):
        model.transform(da.zeros(()))
    with pytest.raises(ValueError, match="batch_size"):
        extractor(batch_size=0).transform(db.from_sequence(tiles[1]))
    with pytest.raises(NotFittedError):
        FineTunedClassifier(small()).predict(db.from_sequence(tiles[1]))
    with pytest.raises(ValueError, match="from_dask_array"):
        extractor().set_output(transform="pandas").transform(db.from_sequence(tiles[1]))


@pytest.mark.parametrize("model", [extractor(), FineTunedClassifier(small())])
def test_fit_wants_images_that_are_there(model, tiles):
    with pytest.raises(TypeError, match=r"compute\(\).*parallel_config\('dask'\)"):
        model.fit(db.from_sequence(tiles[1]), tiles[2])


# ------------------------------------------------------------------------------ faults


def test_a_corrupt_image_costs_its_own_partition(tiles, tmp_path, client, runs):
    paths = [*tiles[1][:20]]
    paths[8] = str(tmp_path / "cut.jpg")
    whole = Path(tiles[1][8]).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    model = extractor(memory=str(tmp_path / "memory"))
    rows = model.transform(da.from_array(np.array(paths), chunks=5)).persist()
    wait(rows, TIMEOUT)
    with pytest.raises(ValueError, match=r"partition 1, row 3 .*cut\.jpg"):
        rows.compute()
    np.testing.assert_allclose(
        rows.blocks[2:].compute(), extractor().transform(paths[10:]), rtol=1e-4, atol=1e-6
    )
    before = runs()
    assert len(before) >= 15
    (tmp_path / "cut.jpg").write_bytes(whole)
    found = model.transform(da.from_array(np.array(paths), chunks=5)).compute()
    np.testing.assert_allclose(found, extractor().transform(paths), rtol=1e-4, atol=1e-6)
    assert sum((runs() - before).values()) <= 5


# ------------------------------------------------------------------------------ processes


def test_grid_search_on_the_cluster(tiles, tmp_path, client, runs):
    _, paths, y = tiles
    pipeline = make_pipeline(extractor(memory=str(tmp_path)), SVC())
    search = GridSearchCV(pipeline, {"svc__C": [0.1, 1, 10]}, cv=2)
    with joblib.parallel_config("dask"):
        search.fit(paths, y)
    assert max(runs().values()) == 1  # by whichever process
    assert len(runs()) == 40
    alone = clone(search).fit(paths, y)
    np.testing.assert_allclose(
        search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"]
    )


def test_search_over_the_depth_on_the_cluster(tiles, tmp_path, client, runs):
    _, paths, y = tiles
    model = FineTunedClassifier(small(), image_size=32, max_epochs=1, random_state=0)
    search = GridSearchCV(model.set_params(memory=str(tmp_path)), {"unfreeze": [0, 1]}, cv=2)
    with joblib.parallel_config("dask"):
        search.fit(paths, y)
    assert max(runs().values()) == 1
    assert set(search.predict(paths[:3])) <= {"china", "flower"}


class Counted(Small):
    """Counts how often it is unpickled or copied in this process."""

    def __setstate__(self, state):
        super().__setstate__(state)
        # Not in a list: what a network's code refers to is a part of its fingerprint.
        os.environ[COPIES] = str(1 + int(os.environ.get(COPIES, 0)))


def test_threads_of_a_worker_share_one_estimator(tiles, monkeypatch):
    monkeypatch.setenv(COPIES, "0")
    images = da.from_array(np.array(tiles[1][:40]), chunks=1)
    model = PretrainedFeatureExtractor(Counted(), image_size=32)
    n_threads_before = torch.get_num_threads()
    options = {"threads_per_worker": 4, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(n_workers=1, **options) as cluster, Client(cluster) as client:
        model.transform(images).compute()
        model.transform(images[::2]).compute()
        # Ours and the worker's, which is unpickled once and copied by get_model.
        assert 1 < int(os.environ[COPIES]) <= 3
        assert client.submit(torch.get_num_threads).result(TIMEOUT) >= 4
    torch.set_num_threads(n_threads_before)


class Late(PretrainedFeatureExtractor):
    """Its network comes late, as one that is downloaded."""

    begun, go_on = threading.Event(), threading.Event()

    def prepare(self):
        self.begun.set()
        assert self.go_on.wait(600)
        return super().prepare()


def test_an_estimator_that_is_ready_does_not_wait_for_another():
    ready, late = (_Shipped(model) for model in (extractor(), Late(small(), image_size=32)))
    expected = ready.estimator()
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(late.estimator) for _ in range(2)]
        try:
            assert Late.begun.wait(300)
            assert threads.submit(ready.estimator).result(300) is expected
        finally:
            Late.go_on.set()
        assert waiting[0].result(300) is waiting[1].result(300)


def test_threads_are_those_of_the_worker(client):
    def probe(_=None):
        return [n_threads(n) for n in (None, -1, -2, 1, 3)], get_worker().state.nthreads

    assert client.submit(probe).result(TIMEOUT) == ([1, 1, 1, 1, 3], 1)
    with joblib.parallel_config("dask"):
        assert joblib.Parallel()([joblib.delayed(probe)()]) == [([1, 1, 1, 1, 3], 1)]
    assert n_threads(None) == joblib.effective_n_jobs(-1)
    assert n_threads(3) == joblib.effective_n_jobs(3)


def test_snippets_of_the_page(tiles, tmp_path, monkeypatch, client):
    for path in tiles[1][:5] + tiles[1][-5:]:
        photo = tmp_path / "photos" / Path(path).relative_to(tiles[0])
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parent.parent / "docs" / "scale_out.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(snippets) > 5
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), namespace)
    rows = namespace["rows"].compute()
    np.testing.assert_array_equal(zarr.load(tmp_path / "rows.zarr"), rows)
    np.testing.assert_array_equal(pd.read_parquet("rows.parquet").iloc[:, 2:], rows)
    assert namespace["labels"].compute().tolist() == namespace["photos"].target.tolist()
    assert namespace["search"].score(namespace["photos"].data, namespace["photos"].target) > 0.9


# ------------------------------------------------------------------------------ killed
# Last, as a new worker takes seconds to import what it needs.


def test_a_killed_worker_costs_its_own_partition(tiles, tmp_path, client, folder, runs):
    white = str(tmp_path / "white.png")
    Image.new("RGB", (64, 64), "white").save(white)
    paths = [*tiles[1][:40]]
    paths[16] = white  # in the middle of partition 1
    before = client.run(os.getpid)
    deadly = Deadly()
    deadly.load_state_dict(small().state_dict())
    options = {"image_size": 32, "batch_size": 1, "memory": str(tmp_path / "memory")}
    model = PretrainedFeatureExtractor(deadly, **options)
    (folder / "strike").touch()
    found = model.transform(da.from_array(np.array(paths), chunks=10)).compute()
    np.testing.assert_allclose(found, extractor().transform(paths), rtol=1e-4, atol=1e-6)
    client.wait_for_workers(2, TIMEOUT)
    after = client.run(os.getpid)
    assert len(set(before.values()) - set(after.values())) == 1  # it was killed
    assert len(runs()) == 40
    # Of its partition, at most what had not been written yet ran again.
    assert sum(times > 1 for times in runs().values()) < 6
