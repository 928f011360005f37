"""Data files that were made to do harm, or are odd: each is refused with its name, quickly and without much memory."""

import io
import zipfile

import numpy as np
import pytest

from bitfront.data.base import DataRequest
from bitfront.data.jsc_columns import CLASSES, FEATURES
from bitfront.data.loading import load_dataset
from bitfront.errors import DataError


def npy(array=None, *, shape=None, dtype="<f4", body=b""):
    """The bytes of a .npy file: of an array, or with a header that declares what is not there."""
    out = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(out, np.asarray(array), allow_pickle=True)
    else:
        np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
        out.write(body)
    return out.getvalue()


def npz(path, *members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


X, Y = np.random.default_rng(0).normal(size=(60, 4)).astype("f4"), np.arange(60) % 3


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("X.npy", npy(shape=(2**28, 56)))],
            r"the array X cannot be read.*declares 60,129,542,144 bytes, and 0 follow",
        ),
        ([("X.npy", npy(shape=(2**40, 2**40)))], r"the array X cannot be read.*declares"),
        ([("X.npy", npy(shape=(-3, 5)))], r"the array X cannot be read"),
        ([("X.npy", npy(shape=(3, 5), dtype="<M8[ns]", body=bytes(120))), ("y.npy", npy(Y[:3]))], r"datetime64"),
        ([("X.npy", npy(X)), ("y.npy", npy(np.array(["a", 1, None], dtype=object)))], r"holds Python objects"),
        ([("X.npy", npy(np.zeros(60, dtype="f4,i4"))), ("y.npy", npy(Y))], r"the array X has the dtype"),
        ([("X.npy", npy(X)), ("y.npy", npy(Y)), ("notes.txt", b"some text")], r"the array notes.txt cannot be read"),
        ([("X.npy", b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000)], r"the array X cannot be read"),
        ([("X.npy", npy(X)), ("y.npy", npy(Y)), ("standardise.npy", npy([1, 2]))], r"standardise is int64 \(2,\)"),
        ([("X.npy", npy(X.astype("c8"))), ("y.npy", npy(Y))], r"dtype complex64"),
        ([("X.npy", npy(X)), ("y.npy", npy(Y.astype("V8")))], r"dtype"),
    ],
)
def test_npz_that_is_not_what_it_says(tmp_path, members, message):
    path = npz(tmp_path / "odd.npz", *members)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("npz", DataRequest(path=path))
    assert "odd.npz" in str(caught.value)


def test_a_zip_bomb(tmp_path):
    zeros = npy(np.zeros((2**20, 25), dtype="f4"))
    path = npz(tmp_path / "bomb.npz", ("X.npy", zeros), ("y.npy", npy(Y)), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 300_000
    with pytest.raises(DataError, match=r"bomb.npz has .* bytes and declares 104,.* save it without compression"):
        load_dataset("npz", DataRequest(path=path))


def test_a_member_that_is_there_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = npz(tmp_path / "twice.npz", ("X.npy", npy(X)), ("y.npy", npy(Y)), ("X.npy", npy(X + 1)))
    with pytest.raises(DataError, match=r"twice.npz has the part 'X.npy' twice"):
        load_dataset("npz", DataRequest(path=path))


@pytest.mark.parametrize("labels", [["a", "b", "c"], [b"a", b"b", b"c"], [7, 8, 9]])
def test_labels_as_python_objects_in_memory(labels):
    from bitfront.data.arrays import from_arrays

    words = np.array([labels[i] for i in Y], dtype=object)
    same = from_arrays(X, np.array([labels[i] for i in Y]) if labels[0] != 7 else Y + 7, class_names=names(labels))
    assert from_arrays(X, words, class_names=names(labels)).fingerprint == same.fingerprint
    with pytest.raises(DataError, match="dtype object"):
        from_arrays(X, np.array([*words[:-1], None], dtype=object))


def names(labels):
    return tuple(map(str, range(10))) if labels[0] == 7 else ()


def test_labels_of_bytes_beyond_ascii(tmp_path):
    from bitfront.data.arrays import from_arrays

    words = np.array(["ä", "ö", "ü"])[Y]
    assert from_arrays(X, np.char.encode(words, "utf-8")).class_names == ("ä", "ö", "ü")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, that these kinds of tensors are young or old
@pytest.mark.parametrize("tensor", ["quantized", "sparse", "meta", "complex", "nested"])
def test_tensors_that_are_no_arrays(tensor):
    import torch

    from bitfront.data.arrays import from_arrays

    plain = torch.from_numpy(X)
    x = {
        "quantized": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "sparse": plain.to_sparse,
        "meta": lambda: plain.to("meta"),
        "complex": lambda: plain.to(torch.complex64),
        "nested": lambda: torch.nested.nested_tensor([plain, plain[:3]]),
    }[tensor]()
    with pytest.raises(DataError, match=r"^arrays in memory: x "):
        from_arrays(x, Y)


def rows(count=50):
    columns = [(f"j_{name}", "<f4") for name in FEATURES] + [(f"j_{name}", "<i4") for name in CLASSES]
    table = np.zeros(count, dtype=columns)
    table["j_g"] = 1
    return table


def changed(file, name, dtype):
    """Put the table with a column of another type into a file."""
    plain = rows().dtype
    file.create_dataset(NAME, (50,), np.dtype([(n, dtype if n == name else plain[n]) for n in plain.names]))


NAME = "t_allpar_new"


def h5_cases():
    h5py = pytest.importorskip("h5py")

    def soft(file):
        file["real"] = rows()
        file[NAME] = h5py.SoftLink("/real")

    def external(file):
        file[NAME] = h5py.ExternalLink("/etc/passwd", "/x")

    def dangling(file):
        file[NAME] = h5py.SoftLink("/nowhere")

    def elsewhere(file):
        file.create_dataset(NAME, (50,), rows().dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])

    def virtual(file):
        layout = h5py.VirtualLayout((50,), rows().dtype)
        layout[:] = h5py.VirtualSource("other.h5", "x", (50,), rows().dtype)
        file.create_virtual_dataset(NAME, layout)

    def huge(file):
        file.create_dataset(NAME, (10**11,), rows().dtype, chunks=(1000,), compression="gzip")

    return {
        "a soft link": (soft, "is a SoftLink, which is not followed"),
        "an external link": (external, "is a ExternalLink, which is not followed"),
        "a link to nothing": (dangling, "is a SoftLink, which is not followed"),
        "a group": (lambda f: f.create_group(NAME), "is a Group; needed is a table"),
        "a type": (lambda f: f.__setitem__(NAME, np.dtype("f4")), "is a Datatype; needed is a table"),
        "rows in other files": (elsewhere, "has its rows in other files"),
        "a virtual table": (virtual, "has its rows in other files"),
        "more rows than can be": (huge, "declares"),
        "plain numbers": (lambda f: f.__setitem__(NAME, np.zeros((5, 3))), "has the shape|lacks the feature"),
        "a scalar": (lambda f: f.__setitem__(NAME, 3.0), "has the shape"),
        "nothing in it": (lambda f: f.create_dataset(NAME, dtype="f4", data=h5py.Empty("f4")), "needed is"),
        "no rows": (lambda f: f.__setitem__(NAME, rows(0)), r"has the shape \(0,\)"),
        "texts": (lambda f: changed(f, "j_zlogz", h5py.string_dtype()), r"the column j_zlogz"),
        "short texts": (lambda f: changed(f, "j_zlogz", "S8"), r"the column j_zlogz"),
        "references": (lambda f: changed(f, "j_zlogz", h5py.ref_dtype), r"the column j_zlogz"),
        "lists": (lambda f: changed(f, "j_zlogz", h5py.vlen_dtype("f4")), r"the column j_zlogz"),
        "arrays": (lambda f: changed(f, "j_zlogz", ("f4", (3,))), r"the column j_zlogz"),
        "complex numbers": (lambda f: changed(f, "j_zlogz", "c8"), r"the column j_zlogz"),
        "tables": (lambda f: changed(f, "j_zlogz", [("a", "f4")]), r"the column j_zlogz"),
        "other names": (lambda f: f.__setitem__("x\nü", rows()), "has no table"),
    }


@pytest.mark.parametrize("case", h5_cases() if pytest.importorskip("h5py") else ())
def test_hdf5_that_is_odd(tmp_path, case):
    import h5py

    make, message = h5_cases()[case]
    path = tmp_path / "odd.h5"
    with h5py.File(path, "w") as file:
        make(file)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("jsc", DataRequest(path=path))
    assert "odd.h5" in str(caught.value)
