"""Data of libraries, folders of images, tables and mapped arrays: read offline from files in the layouts that are met."""

import gzip
import json
import pickle
import sys

import numpy as np
import pytest
import torch

from bitfront.data.base import DataRequest
from bitfront.data.loading import is_path, load_dataset
from bitfront.data.targets import NUMBERS
from bitfront.errors import ConfigError, DataError, DownloadError, MissingExtraError, UnknownNameError
from bitfront.preparation import Preparation
from bitfront.testing.data import check_dataset

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def picture(folder, name, size=(10, 8), shade=0):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 200, (size[1], size[0], 3)) + shade
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
    return pixels.astype(np.uint8)


@pytest.fixture
def photos(tmp_path):
    """A folder of images with train and val, in two classes; images of different sizes."""
    for split, count in (("train", 8), ("val", 3)):
        for shade, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(tmp_path / "photos" / split / name, f"{i}", (10 + i, 8), 50 * shade)
    return tmp_path / "photos"


def opened(name, path=None, needs=None, **settings):
    return load_dataset(name, DataRequest(path=path, settings=settings, needs=needs))


def test_a_folder_of_images_with_splits(photos):
    data = opened(str(photos), image_size=6)
    check_dataset(data, max_overlap=0)
    assert data.class_names == ("cat", "dog")
    assert data.sample_shape == (3, 6, 6)
    assert len(data.y["val"]) == 6  # kept
    assert len(data.y["train"]) + len(data.y["test"]) == 16  # test is cut from train
    assert "6 x 6 pixels" in data.notes[0]


def test_without_splits_the_seed_decides(tmp_path):
    for name in ("a", "b"):
        for i in range(10):
            picture(tmp_path / name, f"{i}", (6, 6))
    one, same = opened(str(tmp_path)), opened("image-folder", tmp_path)
    check_dataset(one, max_overlap=0)
    assert one.fingerprint == same.fingerprint
    other = load_dataset(str(tmp_path), DataRequest(seed=1))
    assert other.fingerprint != one.fingerprint


def test_what_the_model_needs_is_applied_and_settings_override_it(tmp_path):
    pixels = {name: picture(tmp_path / name, str(i), (8, 8)) for name in ("a", "b") for i in range(6)}
    assert pixels
    needs = Preparation("mine", size=(8, 8), shorter=10, mean=(0.5, 0.25, 0.1), std=(0.5, 1.0, 2.0))
    data = opened(str(tmp_path), needs=needs)
    # Images of the size are not resized, so each sample is (pixels / 255 - mean) / std.
    wanted = np.moveaxis(pixels["a"], -1, 0).astype(np.float32) / 255
    wanted = (wanted - np.float32([[[0.5]], [[0.25]], [[0.1]]])) / np.float32([[[0.5]], [[1.0]], [[2.0]]])
    assert any(np.array_equal(wanted, row) for x in data.x.values() for row in x.numpy())
    assert "as mine" in data.notes[0]
    plain = opened(str(tmp_path), needs=needs, mean=[0.0], std=[1.0], image_size=4, channels=1)
    assert plain.sample_shape == (1, 4, 4)
    assert float(min(x.min() for x in plain.x.values())) >= 0


def test_cropping_keeps_the_middle(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = np.zeros((4, 8, 3), np.uint8)
            pixels[:, 2:6] = 200 + i  # the middle of a wide image
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    data = opened(str(tmp_path), image_size=4)
    assert float(data.x["train"].min()) > 0.7
    stretched = opened(str(tmp_path), image_size=4, resize="stretch")
    assert float(stretched.x["train"].min()) < 0.2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, DataError, "every sample needs the same: for images, set image_size"),
        ({"image_size": 0}, ConfigError, "image_size"),
        ({"image_siz": 4}, ConfigError, "Did you mean 'image_size'"),
        ({"image_size": 4, "mean": [1.0, 2.0]}, ConfigError, "3 channels"),
        ({"image_size": 4, "std": [0.0]}, ConfigError, "above 0"),
    ],
)
def test_wrong_settings_of_images(photos, settings, error, message):
    with pytest.raises(error, match=message):
        opened(str(photos), **settings)


def test_a_folder_that_is_none_of_images(photos, tmp_path):
    (photos / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        opened(str(photos), image_size=6)
    with pytest.raises(DataError, match="needed is a folder of images per class"):
        opened(str(photos / "train" / "cat"))
    with pytest.raises(DataError, match="there is no folder"):
        opened(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="leave one of them out"):
        opened(str(photos), path=photos)
    with pytest.raises(ConfigError, match="has no settings"):
        opened("digits", image_size=4)


def test_the_limit_of_memory_says_what_to_do(photos):
    with pytest.raises(DataError, match=r"samples = 1000 .* image_size .* memory_map = true .* limit_bytes"):
        load_dataset(str(photos), DataRequest(settings={"image_size": 6}, limit_bytes=1000))


def test_images_larger_than_memory_are_mapped(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path / "cache"))
    request = DataRequest(settings={"image_size": 6, "memory_map": True}, limit_bytes=1000)
    data = load_dataset(str(photos), request)
    check_dataset(data, max_overlap=0)
    assert data.mapped
    memory = opened(str(photos), image_size=6)
    assert torch.equal(data.x["val"], memory.x["val"])
    assert torch.equal(data.y["val"], memory.y["val"])
    files = sorted((tmp_path / "cache" / "mapped").rglob("*.npy"))
    assert [f.name for f in files] == ["test.npy", "train.npy", "val.npy"]
    before = files[0].stat().st_mtime_ns
    assert load_dataset(str(photos), request).fingerprint == data.fingerprint
    assert files[0].stat().st_mtime_ns == before  # written once
    picture(photos / "train" / "cat", "new")
    assert len(load_dataset(str(photos), request).y["train"]) > len(data.y["train"])


def test_arrays_larger_than_memory(tmp_path):
    for split in ("train", "val", "test"):
        np.save(tmp_path / f"x_{split}.npy", RNG.normal(size=(9, 4)).astype(np.float32))
        np.save(tmp_path / f"y_{split}.npy", np.arange(9) % 3)
    data = load_dataset(str(tmp_path), DataRequest(limit_bytes=1))
    check_dataset(data, max_overlap=0)
    assert data.mapped
    assert data.num_classes == 3
    x = np.load(tmp_path / "x_val.npy")
    assert np.array_equal(data.x["val"].numpy(), x)
    # Other processes map the files: what travels is their paths.
    assert b"x_val.npy" in pickle.dumps(data)
    assert pickle.loads(pickle.dumps(data)).fingerprint == data.fingerprint  # noqa: S301
    data.x["val"][0, 0] = 7.0  # stays in memory
    assert np.array_equal(np.load(tmp_path / "x_val.npy"), x)
    np.save(tmp_path / "x_val.npy", x.astype(np.float64))
    with pytest.raises(DataError, match="needed is float32"):
        opened("npy", tmp_path)
    x[1, 2] = np.nan
    np.save(tmp_path / "x_val.npy", x)
    with pytest.raises(DataError, match="not finite in row 1"):
        opened("npy", tmp_path)
    (tmp_path / "y_test.npy").unlink()
    with pytest.raises(DataError, match=r"lacks y_test\.npy"):
        opened("npy", tmp_path)


ROWS = [(f"{i / 7:.4f}", i * i, ("red", "green", "blue")[i % 3], f"id{i}", "yes" if i % 2 else "no") for i in range(40)]
COLUMNS = ("size", "area", "colour", "number", "label")


@pytest.fixture
def table(tmp_path):
    pytest.importorskip("pyarrow")
    file = tmp_path / "things.csv"
    file.write_text("\n".join(",".join(map(str, row)) for row in (COLUMNS, *ROWS)) + "\n")
    return file


def test_a_csv_file(table):
    data = opened(str(table), drop_columns=["number"])
    check_dataset(data, max_overlap=0)
    assert data.class_names == ("no", "yes")
    assert data.feature_names == ("size", "area", "colour=blue", "colour=green", "colour=red")
    assert data.scaler is not None
    assert data.notes[0] == "target: column 'label'"
    raw = opened(str(table), drop_columns=["number"], standardise=False)
    assert sorted(float(v) for x in raw.x.values() for v in x[:, 1]) == [float(i * i) for i in range(40)]


def test_a_parquet_file_and_a_folder_of_splits(table, tmp_path):
    csv, parquet = pytest.importorskip("pyarrow.csv"), pytest.importorskip("pyarrow.parquet")
    content = csv.read_csv(table)
    folder = tmp_path / "parts"
    folder.mkdir()
    parquet.write_table(content.slice(0, 25), folder / "train.parquet")
    parquet.write_table(content.slice(25), folder / "validation.parquet")
    data = opened(str(folder), drop_columns=["number"])
    check_dataset(data, max_overlap=0)
    assert len(data.y["val"]) == 15
    numbers = load_dataset(
        "parquet",
        DataRequest(
            path=folder / "train.parquet",
            targets=NUMBERS,
            settings={"target_column": "area", "drop_columns": ["number", "label"]},
        ),
    )
    assert numbers.targets is NUMBERS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_column": "lable"}, r"no column 'lable'.*Did you mean 'label'"),
        ({"drop_columns": ["label"]}, "name the target: target_column"),
        ({"drop_columns": ["numbr"]}, "Did you mean 'number'"),
    ],
)
def test_wrong_columns(table, settings, message):
    with pytest.raises(ConfigError, match=message):
        opened("csv", table, **settings)


def test_gaps_and_too_many_words_are_named(table, monkeypatch):
    monkeypatch.setattr("bitfront.data.tables.MOST_VALUES", 30)
    with pytest.raises(DataError, match=r"column 'number' has 40 different words"):
        opened("csv", table)
    table.write_text("a,label\n1,0\n,1\n3,0\n")
    with pytest.raises(DataError, match=r"column 'a' has no value in row 1"):
        opened("csv", table)
    table.write_text('a,label\n1,0\n"x,1\n')
    with pytest.raises(DataError, match="cannot be read as CSV"):
        opened("csv", table)


# Libraries


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR10 as torchvision stores it, with 20 images; its checksums are those of these files."""
    from bitfront import libraries

    library = libraries.torchvision("a test", "torchvision.datasets")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        content = {"data": RNG.integers(0, 256, (20, 3072)).astype(np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    kind = library.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    return tmp_path


def test_cifar10_of_torchvision(cifar):
    data = opened("torchvision:CIFAR10", cifar, samples=20)
    assert data.sample_shape == (3, 32, 32)
    assert data.class_names[3] == "class 3"
    assert len(data.y["test"]) == 20
    content = pickle.loads((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())  # noqa: S301
    wanted = content["data"].reshape(20, 3, 32, 32).astype(np.float32) / 255
    assert np.array_equal(data.x["test"].numpy(), wanted)
    assert len(opened("torchvision:CIFAR10", cifar, samples=12, image_size=8).y["test"]) == 12


def test_short_names_of_torchvision(cifar):
    assert (
        opened("cifar10", cifar, samples=20).fingerprint == opened("torchvision:CIFAR10", cifar, samples=20).fingerprint
    )
    raw = cifar / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        images, labels = RNG.integers(0, 256, (20, 28, 28)).astype(np.uint8), np.arange(20, dtype=np.uint8) % 10
        head = np.array([0x803, 20, 28, 28], ">i4").tobytes(), np.array([0x801, 20], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head[0] + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head[1] + labels.tobytes())
    data = opened("mnist", cifar, samples=20)
    assert data.sample_shape == (1, 28, 28)
    assert np.array_equal(data.x["test"][:, 0].numpy(), images.astype(np.float32) / 255)
    assert opened("mnist", cifar, samples=20, channels=3).sample_shape == (3, 28, 28)


def test_what_torchvision_lacks(tmp_path, monkeypatch):
    from bitfront import libraries

    library = libraries.torchvision("a test", "torchvision.datasets")
    with pytest.raises(UnknownNameError, match=r"no dataset 'CIFAR11'.*Near it: CIFAR10"):
        opened("torchvision:CIFAR11")

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(library.cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(DownloadError, match=r"not in .*\(no route to host\). Without a network: .*copy that folder to"):
        opened("torchvision:CIFAR10", tmp_path)


@pytest.fixture
def openml(tmp_path):
    """A table in the layout of scikit-learn's cache of OpenML: what the server answered, compressed."""
    pytest.importorskip("sklearn")
    pytest.importorskip("pandas")
    root = tmp_path / "openml" / "openml.org"
    features = [("size", "numeric"), ("colour", "nominal"), ("kind", "nominal")]
    rows = "\n".join(f"{i / 3},{'red' if i % 3 else 'blue'},{'b' if i % 2 else 'a'}" for i in range(30))
    arff = (
        "@RELATION tiny\n@ATTRIBUTE size NUMERIC\n@ATTRIBUTE colour {red,blue}\n@ATTRIBUTE kind {a,b}\n@DATA\n" + rows
    )
    description = {"description": "made by a test", "id": "77", "name": "tiny", "version": "1", "format": "ARFF", "file_id": "5", "status": "active",
                   "default_target_attribute": "kind", "url": "https://www.openml.org/data/v1/download/5/tiny.arff",
                   "md5_checksum": __import__("hashlib").md5(arff.encode()).hexdigest()}  # fmt: skip
    listed = [
        {"index": str(i), "name": name, "data_type": kind, "is_target": str(name == "kind").lower(),
         "is_ignore": "false", "is_row_identifier": "false", "number_of_missing_values": "0"}
        for i, (name, kind) in enumerate(features)
    ]  # fmt: skip
    answers = {
        "api/v1/json/data/77": {"data_set_description": description},
        "api/v1/json/data/features/77": {"data_features": {"feature": listed}},
        "api/v1/json/data/qualities/77": {"data_qualities": {"quality": [
            {"name": "NumberOfInstances", "value": "30.0"}, {"name": "NumberOfFeatures", "value": "3.0"}]}},
    }  # fmt: skip
    for place, answer in answers.items():
        file = root / f"{place}.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(json.dumps(answer).encode()))
    file = root / "data/v1/download/5/tiny.arff.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(arff.encode()))
    return tmp_path


def test_a_table_of_openml(openml):
    data = opened("openml:77", openml)
    check_dataset(data, max_overlap=0)
    assert data.name == "tiny"
    assert data.class_names == ("a", "b")
    assert data.feature_names == ("size", "colour=blue", "colour=red")
    other = opened("openml:77", openml, target_column="colour")
    assert other.class_names == ("blue", "red")


def test_openml_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    module = pytest.importorskip("sklearn.datasets._openml")

    def unreachable(*args, **kwargs):
        raise module.URLError("no route to host")

    monkeypatch.setattr(module, "urlopen", unreachable)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(DownloadError, match=r"files of openml:77 are not in .*fetch_openml\(data_id=77\)"):
        opened("openml:77", tmp_path)


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def test_images_of_a_folder_of_datasets(tmp_path, datasets):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [Image.fromarray(RNG.integers(0, 256, (6, 6, 3)).astype(np.uint8)) for _ in range(12)]
    rows = {"image": images, "label": [i % 2 for i in range(12)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(str(tmp_path / "saved"))
    data = opened(f"hf:{tmp_path / 'saved'}")
    check_dataset(data, max_overlap=0)
    assert data.class_names == ("cat", "dog")
    wanted = np.moveaxis(np.asarray(images[0]), -1, 0).astype(np.float32) / 255
    assert any(np.array_equal(wanted, row) for x in data.x.values() for row in x.numpy())


def test_arrays_of_arrow_are_mapped(tmp_path, datasets, monkeypatch):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path / "cache"))
    rows = {"x": RNG.normal(size=(20, 5)).tolist(), "label": [i % 2 for i in range(20)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    data = opened(f"hf:{tmp_path / 'saved'}", memory_map=True)
    check_dataset(data, max_overlap=0)
    assert data.mapped
    assert data.sample_shape == (5,)


def test_what_the_hub_lacks(tmp_path, datasets, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DownloadError, match=r"files of hf:ag_news are not in .*save_to_disk.*hf:./FOLDER"):
        opened("hf:ag_news")
    with pytest.raises(DataError, match="there is no folder"):
        opened(f"hf:{tmp_path / 'none'}")
    datasets.Dataset.from_dict({"a": [1.0, 2.0], "b": [0, 1]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="which column is the label is not clear"):
        opened(f"hf:{tmp_path / 'saved'}")


def test_names_and_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "mine").mkdir()
    assert not is_path("digits")  # a registered name; the folder is ./digits
    assert is_path("./digits")
    assert is_path("mine")
    assert is_path("table.csv")
    assert not is_path("mine:make")
    assert not is_path("hf:./mine")
    assert not is_path("unknown")
    # A module called like a prefix is named by its package, or by another spelling.
    (tmp_path / "openml_data.py").write_text("def make():\n    return [[1.0], [2.0]] * 20, [0, 1] * 20\n")
    with pytest.raises(ConfigError, match="has no settings"):
        opened("openml_data:make", image_size=3)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("torchvision:CIFAR10", "torchvision", "torchvision"),
        ("hf:ag_news", "datasets", "hf"),
        ("openml:42468", "sklearn", "openml"),
        ("openml:42468", "pandas", "openml"),
        ("table.csv", "pyarrow", "parquet"),
        ("photos", "PIL", "images"),
    ],
)
def test_the_extra_to_install_is_named(tmp_path, monkeypatch, name, module, extra):
    (tmp_path / "table.csv").write_text("a,label\n1,0\n2,1\n")
    for folder in ("cat", "dog"):
        picture(tmp_path / "photos" / folder, "one")
    monkeypatch.chdir(tmp_path)
    for known in [module, *(m for m in sys.modules if m.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, known, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'bitfront\[{extra}\]'"):
        opened(name)


def test_a_misspelt_folder_is_named_with_the_nearest_one(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=r"There is no folder 'photoz' here either\. Did you mean 'photos'\?"):
        load_dataset("photoz")
