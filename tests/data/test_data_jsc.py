"""The jet substructure data: columns by name, three file formats, the cache, and where the file comes from."""

import json
import multiprocessing
import sys
import zipfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch

from bitfront.data import jsc_arff, jsc_files
from bitfront.data.base import DataRequest
from bitfront.data.jsc import ARFF_NAME
from bitfront.data.jsc_columns import CLASSES, FEATURES
from bitfront.data.loading import load_dataset
from bitfront.errors import DataError, DownloadError, MissingExtraError
from bitfront.testing.data import check_dataset

N = 200
RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, size=(N, 16)).astype(np.float32)
LETTERS = np.array(CLASSES)[np.arange(N) % 5]
OPENML = ("g", "q", "t", "w", "z")


def numbers(order):
    return np.array([order.index(c) for c in LETTERS])


def write_npz(path=Path("jsc.npz"), order=OPENML, columns=FEATURES, **more):
    place = [FEATURES.index(c.removeprefix("j_")) for c in columns]
    arrays = {
        "X": X[:, place],
        "y": numbers([c.removeprefix("j_") for c in order]),
        "class_names": order,
        "feature_names": columns,
        **more,
    }
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def write_arff(path=Path("jets.arff"), rows=None, order=OPENML, columns=FEATURES, head="", end="\n"):
    place = [FEATURES.index(c) for c in columns]
    if rows is None:
        rows = [",".join(map(repr, X[i, place].tolist())) + f",{LETTERS[i]}" for i in range(N)]
    lines = ["% a comment", "@RELATION hls4ml_lhc_jets_hlf", head, *(f"@ATTRIBUTE {c} REAL" for c in columns)]
    lines += [f"@ATTRIBUTE class {{{', '.join(order)}}}", "", "@DATA", *rows]
    path.write_bytes(end.join(lines).encode() + end.encode())
    return path


def write_hdf5(path=Path("jets.z"), drop=(), labels=None):
    h5py = pytest.importorskip("h5py")
    names = ["j_ptfrac", *(f"j_{f}" for f in reversed(FEATURES)), *(f"j_{c}" for c in OPENML), "j_index"]
    table = np.zeros(N, dtype=[(n, "f4") for n in names if n not in drop])
    for index, feature in enumerate(FEATURES):
        if f"j_{feature}" in table.dtype.names:
            table[f"j_{feature}"] = X[:, index]
    for letter in CLASSES:
        if f"j_{letter}" in table.dtype.names:
            table[f"j_{letter}"] = (letter == LETTERS) if labels is None else labels
    with h5py.File(path, "w") as file:
        file["t_allpar_new"] = table
    return path


def read(path, **request):
    return load_dataset("jsc", DataRequest(path=Path(path), **request))


@pytest.fixture
def expected():
    dataset = read(write_npz(Path("expected.npz")))
    check_dataset(dataset)
    return dataset


# -- labels and features go by name -------------------------------------------------------------


def test_classes_are_g_q_w_z_t_whatever_the_file_says(expected):
    assert expected.class_names == ("g", "q", "w", "z", "t")
    letters = [expected.class_names[i] for i in expected.y["test"].tolist()]
    raw = expected.x["test"] * torch.tensor(expected.scaler.scale) + torch.tensor(expected.scaler.mean)
    for row, letter in zip(raw, letters, strict=True):
        assert LETTERS[np.abs(X - row.numpy()).sum(1).argmin()] == letter


@pytest.mark.parametrize("order", [OPENML, CLASSES, ("t", "z", "w", "q", "g"), ("j_g", "j_q", "j_w", "j_z", "j_t")])
def test_every_order_of_the_labels_gives_the_same_dataset(expected, order):
    y = numbers([c.removeprefix("j_") for c in order])
    assert read(write_npz(order=order, y=y)).fingerprint == expected.fingerprint
    assert read(write_npz(order=order, y=np.eye(5)[y])).fingerprint == expected.fingerprint


def test_labels_written_out_need_no_order(expected):
    assert read(write_npz(y=LETTERS, class_names=None)).fingerprint == expected.fingerprint


def test_features_in_another_order_or_with_the_prefix_are_the_same(expected):
    assert read(write_npz(columns=FEATURES[::-1])).fingerprint == expected.fingerprint
    assert read(write_npz(columns=tuple(f"j_{f}" for f in FEATURES))).fingerprint == expected.fingerprint
    assert read(write_npz(feature_names=None)).fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": None}, "holds numbers, and the file has no class_names .*Add the array class_names"),
        ({"class_names": ["a", "b", "c", "d", "e"]}, "class_names are a, b, c, d, e; needed are these five"),
        ({"y": np.full(N, 5)}, "is int64 .* from 5 to 5; needed are integers from 0 to 4"),
        ({"y": np.where(LETTERS == "t", "b", LETTERS)}, "y has the label 'b'; allowed: g, q, w, z, t"),
        ({"feature_names": [*FEATURES[:-1], "mult"]}, "lacks the feature 'multiplicity'; it has zlogz, c1_b0"),
        ({"X": X[:, :15]}, r"X has the shape \(200, 15\); needed is \(samples, 16\)"),
        ({"X": X[:, 0]}, r"X has the shape \(200,\)"),
        ({"train_mean": np.zeros(3), "train_scale": np.ones(3)}, r"train_mean \(3,\) and train_scale \(3,\) need one"),
    ],
)
def test_the_message_names_what_a_file_lacks(change, message):
    with pytest.raises(DataError, match=message):
        read(write_npz(**change))


def test_the_published_scaler_makes_a_test_only_dataset():
    mean, scale = np.arange(16.0), np.arange(1.0, 17.0)
    dataset = read(write_npz(columns=FEATURES[::-1], train_mean=mean[::-1], train_scale=scale[::-1], name="rows"))
    check_dataset(dataset, test_only=True)
    assert torch.allclose(dataset.x["test"], torch.from_numpy(((X - mean) / scale).astype(np.float32)))
    assert dataset.notes == ("test only: standardised with the scaler in the file",)
    for split in ("train", "val"):
        with pytest.raises(DataError, match=f"'rows' .* has no '{split}' split; allowed: test. To train or search"):
            dataset.split(split)


# -- ARFF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [OPENML, CLASSES])
def test_arff(expected, order):
    dataset = read(write_arff(order=order))
    check_dataset(dataset)
    assert dataset.fingerprint == expected.fingerprint
    assert dataset.name == "jsc (jets)"


def test_arff_in_every_spelling(expected):
    rows = [",".join(map(repr, X[i].tolist())) + f", '{LETTERS[i]}'" for i in range(N)]
    rows.insert(50, "% a remark")
    rows.insert(20, "")
    assert read(write_arff(rows=rows, end="\r\n")).fingerprint == expected.fingerprint
    assert read(write_arff(columns=FEATURES[::-1])).fingerprint == expected.fingerprint
    path = write_arff()
    path.write_bytes(path.read_bytes().rstrip().replace(b"@ATTRIBUTE zlogz REAL", b"@attribute 'zlogz' numeric"))
    assert read(path).fingerprint == expected.fingerprint


def test_arff_longer_than_a_chunk(expected, monkeypatch):
    monkeypatch.setattr(jsc_arff, "CHUNK_BYTES", 1000)
    assert read(write_arff()).fingerprint == expected.fingerprint


ROW = ",".join(["1.5"] * 16)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"rows": [f"{ROW},g", f"{ROW},b"]}, r"about line 24: the class is 'b'; allowed: g, q, w, z, t"),
        ({"rows": [f"{ROW},g", "1,2,g"]}, "about line 24: 3 values; needed are 17: '1,2,g'"),
        ({"rows": [f"{ROW},g", f"{ROW},1.5,g"]}, "about line 24: 18 values"),
        ({"rows": [f"?,{ROW[4:]},g"]}, "zlogz is '\\?', which is not a number"),
        ({"rows": [f"1.5,abc,{ROW[8:]},g"]}, "c1_b0_mmdt is 'abc', which is not a number"),
        ({"rows": []}, "has no rows after @DATA"),
        ({"order": ("a", "b")}, "the attribute class has the values a, b; needed are the classes"),
        ({"columns": FEATURES[1:]}, "lacks the feature 'zlogz'; it has c1_b0_mmdt"),
        ({"head": "@ATTRIBUTE other {g,q,w,z,t}"}, "declares 2 attributes with the classes"),
    ],
)
def test_a_broken_arff_names_the_line(written, message):
    with pytest.raises(DataError, match=message):
        read(write_arff(**written))


def test_arff_that_ends_in_its_header():
    Path("short.arff").write_text("@RELATION x\n@ATTRIBUTE zlogz REAL\n")
    with pytest.raises(DataError, match="has no @DATA line; the file may be cut short"):
        read("short.arff")


# -- HDF5 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jets.z", "jets.h5", "jets.data"])
def test_hdf5_by_its_content(expected, name):
    dataset = read(write_hdf5(Path(name)))
    check_dataset(dataset)
    assert dataset.fingerprint == expected.fingerprint


def test_broken_hdf5():
    h5py = pytest.importorskip("h5py")
    with pytest.raises(DataError, match="lacks the feature 'zlogz'"):
        read(write_hdf5(drop=["j_zlogz"]))
    with pytest.raises(DataError, match="lacks the label column 'j_w'; allowed: j_g, j_q"):
        read(write_hdf5(drop=["j_w"]))
    with pytest.raises(DataError, match=r"row 0 is not one-hot: \[1.0, 1.0"):
        read(write_hdf5(labels=1))
    with h5py.File("other.h5", "w") as file:
        file["jets"] = np.zeros(3)
    with pytest.raises(DataError, match=r"has no table 't_allpar_new'; it has jets"):
        read("other.h5")
    Path("cut.h5").write_bytes(write_hdf5().read_bytes()[:3000])
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        read("cut.h5")


def test_without_h5py_the_extra_is_named(monkeypatch):
    path = write_hdf5()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bitfront\[hdf5\]'"):
        read(path)


def test_a_file_of_an_unknown_format():
    Path("a.gz").write_bytes(b"\x1f\x8b\x08 whatever")
    with pytest.raises(DataError, match=r"neither .npz nor HDF5 nor ARFF .*compressed: unpack it first"):
        read("a.gz")
    with pytest.raises(DataError, match=r"there is no file none.npz"):
        read("none.npz")


# -- parsed files are cached --------------------------------------------------------------------


def test_the_second_start_reads_the_cached_copy(tmp_path, monkeypatch):
    path, lines = write_arff(), []
    first = read(path, report=lines.append)
    assert len(lines) == 1
    assert len(list((tmp_path / "cache/parsed").iterdir())) == 1
    monkeypatch.setattr(jsc_files, "read_arff", None)
    second = read(path, report=lines.append)
    assert second.fingerprint == first.fingerprint
    assert (second.name, second.source, second.class_names) == (first.name, first.source, first.class_names)
    assert len(lines) == 1


def test_a_changed_file_is_read_again(expected):
    path = write_arff()
    read(path)
    rows = [f"{','.join(map(repr, (X[i] + 1).tolist()))},{LETTERS[i]}" for i in range(N)]
    assert read(write_arff(path, rows=rows)).scaler != expected.scaler


def test_a_broken_cached_copy_is_replaced(tmp_path):
    path, lines = write_arff(), []
    first = read(path)
    kept = next((tmp_path / "cache/parsed").iterdir())
    kept.write_bytes(kept.read_bytes()[:700])
    assert read(path, report=lines.append).fingerprint == first.fingerprint
    assert "is broken" in lines[0]
    assert zipfile.is_zipfile(kept)


def test_a_cache_that_cannot_be_written_only_costs_time(expected, tmp_path, monkeypatch):
    Path("blocked").write_text("")
    monkeypatch.setenv("BITFRONT_CACHE", "blocked")
    lines = []
    assert read(write_arff(), report=lines.append).fingerprint == expected.fingerprint
    assert "cannot be kept" in lines[1]


def _load_in_process(path, results):
    try:
        results.put(read(path).fingerprint)
    except Exception as error:  # the parent asserts on it
        results.put(error)


@pytest.mark.slow
def test_two_processes_started_together(expected, tmp_path):
    path = write_arff().resolve()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_load_in_process, args=(path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [expected.fingerprint] * 2
    for worker in workers:
        worker.join(timeout=10)
    assert [p.suffix for p in (tmp_path / "cache/parsed").iterdir()] == [".npz"]


# -- where the file comes from ------------------------------------------------------------------


def test_places_in_their_order(expected, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "data").mkdir()
    write_npz(tmp_path / "cache/jsc.npz", name="from the cache")
    assert load_dataset("jsc").name == "from the cache"
    monkeypatch.setenv("BITFRONT_DATA", str(tmp_path / "data"))
    assert load_dataset("jsc").name == "from the cache"
    write_arff(tmp_path / "data" / ARFF_NAME)
    assert load_dataset("jsc").source == str(tmp_path / "data" / ARFF_NAME)
    write_npz(tmp_path / "data/jsc.npz", name="from the folder")
    assert load_dataset("jsc").name == "from the folder"
    assert read(tmp_path / "cache").name == "from the cache"
    with pytest.raises(
        DataError, match=r"dataset_path is the folder .* holds no file of the jet data; allowed: jsc.npz"
    ):
        read(tmp_path / "data" / "..")
    monkeypatch.setenv("BITFRONT_DATA", "nowhere")
    with pytest.raises(DataError, match="BITFRONT_DATA is 'nowhere', which is not a folder"):
        load_dataset("jsc")


def test_it_is_downloaded_once(expected, server, monkeypatch, tmp_path):
    body = write_arff().read_bytes()
    server.files["/file.arff"] = body
    about = {"url": f"{server.address}/file.arff", "md5_checksum": md5(body).hexdigest()}
    server.files["/about"] = json.dumps({"data_set_description": about}).encode()
    monkeypatch.setenv("BITFRONT_OPENML_URL", f"{server.address}/about")
    lines, steps = [], []
    request = DataRequest(report=lines.append, progress=lambda done, total: steps.append((done, total)))
    dataset = load_dataset("jsc", request)
    assert dataset.fingerprint == expected.fingerprint
    assert dataset.source == str(tmp_path / "cache" / ARFF_NAME)
    assert lines[0].startswith("downloading the jet data (OpenML 42468) from http")
    assert steps[-1] == (len(body), len(body))
    asked = len(server.ranges)
    load_dataset("jsc")
    assert len(server.ranges) == asked


def test_a_download_of_another_file_is_refused(server, monkeypatch):
    server.files["/file.arff"] = b"another"
    about = {"url": f"{server.address}/file.arff", "md5_checksum": "0" * 32}
    server.files["/about"] = json.dumps({"data_set_description": about}).encode()
    server.files["/none"] = json.dumps({"data_set_description": {}}).encode()
    monkeypatch.setenv("BITFRONT_OPENML_URL", f"{server.address}/about")
    with pytest.raises(DownloadError, match=f"its checksum is .* expected was md5:0+; .*put it at .*{ARFF_NAME}"):
        load_dataset("jsc")
    monkeypatch.setenv("BITFRONT_OPENML_URL", f"{server.address}/none")
    with pytest.raises(DownloadError, match="names no file to download"):
        load_dataset("jsc")


def test_without_a_network_the_message_says_which_file_goes_where(server, monkeypatch, tmp_path):
    server.faults = [404]
    monkeypatch.setenv("BITFRONT_OPENML_URL", f"{server.address}/about")
    with pytest.raises(DownloadError) as caught:
        load_dataset("jsc")
    for part in (ARFF_NAME, "42468", str(tmp_path / "cache"), "dataset_path", "BITFRONT_DATA"):
        assert part in str(caught.value)


# -- the shared files ---------------------------------------------------------------------------


def test_shared_jsc_keeps_its_splits(shared_file):
    path = shared_file("jsc.npz")
    dataset = read(path)
    check_dataset(dataset)
    assert [len(dataset.y[s]) for s in dataset.splits] == [270_000, 30_000, 100_000]
    with np.load(path) as raw:
        names = raw["class_names"][raw["y_test"]]
        x = raw["X_test"][:100]
    assert np.array_equal(np.array(CLASSES)[dataset.y["test"].numpy()], names)
    back = dataset.x["test"][:100] * torch.tensor(dataset.scaler.scale) + torch.tensor(dataset.scaler.mean)
    assert np.allclose(back, x, rtol=1e-4, atol=1e-4)


def test_shared_real_rows_are_test_only(shared_file):
    dataset = read(shared_file("jsc_real_1000.npz"))
    check_dataset(dataset, test_only=True)
    assert dataset.x["test"].mean(0).abs().max() < 0.2
