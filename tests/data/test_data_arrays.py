"""From arrays to a dataset: the split, standardisation, labels, and every check."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import SPLITS
from bitfront.data.features import apply_scaler, fit_scaler
from bitfront.data.splitting import SHARES, row_hashes, shared_rows, split_name, stratified_split
from bitfront.errors import DataError
from bitfront.testing.data import check_dataset


def blobs(n=120, classes=3, features=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, features)).astype(np.float32), np.arange(n) % classes


labels = hnp.arrays(np.int64, st.integers(12, 300), elements=st.integers(0, 5))


# -- the split ----------------------------------------------------------------------------------


@given(labels, st.integers(0, 2**40))
def test_every_row_is_in_exactly_one_split_and_every_class_in_all(y, seed):
    assume(np.bincount(y).max() >= 3)
    parts = stratified_split(y, seed=seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(y)))
    for c, n in enumerate(np.bincount(y)):
        per_split = {s: int((y[p] == c).sum()) for s, p in parts.items()}
        if n >= 3:
            assert all(per_split.values()), (c, n, per_split)
            for split, share in SHARES.items():
                assert abs(per_split[split] - share * n) <= 2
        elif n:
            assert per_split["train"]


@given(labels, st.integers(0, 10))
def test_the_split_depends_on_its_arguments_alone(y, seed):
    assume(np.bincount(y).max() >= 3)
    one, two = stratified_split(y, seed=seed), stratified_split(y.copy(), seed=seed)
    assert all(np.array_equal(one[s], two[s]) for s in SPLITS)


def test_another_seed_is_another_split():
    _, y = blobs()
    assert not np.array_equal(stratified_split(y, seed=1)["test"], stratified_split(y, seed=2)["test"])


def test_a_split_is_not_sorted_by_class():
    _, y = blobs(300)
    y = np.sort(y)
    test = y[stratified_split(y)["test"]]
    assert not np.array_equal(test, np.sort(test))


@given(st.integers(0, 1000), st.integers(20, 200))
def test_identical_rows_stay_together(seed, n):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 2**60, size=n).astype(np.uint64)
    rows[: n // 4] = rows[n // 2 : n // 2 + n // 4]
    parts = stratified_split(rng.integers(0, 2, n), seed=seed, rows=rows)
    homes = [set(rows[p].tolist()) for p in parts.values()]
    assert not homes[0] & homes[1]
    assert not homes[0] & homes[2]
    assert not homes[1] & homes[2]


def test_a_truth_table_is_split_by_row():
    x = np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (25, 1))
    dataset = from_arrays(x, x[:, 0] ^ x[:, 1])
    assert {tuple(row) for row in dataset.x["train"].tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_too_few_samples_name_the_split():
    with pytest.raises(DataError, match=r"mine: 2 samples are too few to cut val .* at least 3 different samples"):
        from_arrays(np.arange(6.0).reshape(2, 3), [0, 1], source="mine")


def test_a_negative_seed_is_refused():
    with pytest.raises(DataError, match=r"seed = -1 .*allowed: 0 and above"):
        from_arrays(*blobs(), seed=-1)


# -- standardisation ----------------------------------------------------------------------------

floats = st.floats(-1e6, 1e6, width=32)


@given(hnp.arrays(np.float32, st.tuples(st.integers(2, 60), st.integers(1, 5)), elements=floats))
def test_standardised_features_have_mean_0_and_deviation_1_or_are_0(x):
    scaler = fit_scaler(x)
    z = apply_scaler(scaler, x)
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    assert all(s > 0 for s in scaler.scale)
    for feature in range(x.shape[1]):
        column = z[:, feature].astype(np.float64)
        if (x[:, feature] == x[0, feature]).all():
            assert (column == 0).all()
            assert scaler.scale[feature] == 1
        elif np.ptp(x[:, feature].astype(np.float64)) > 1e-3 * np.abs(x[:, feature]).max():
            assert abs(column.mean()) < 1e-3
            assert abs(column.std() - 1) < 1e-3


def test_the_training_split_alone_sets_the_scale():
    x, y = blobs(300)
    scaled = from_arrays(x * 7 + 3, y, standardise=True)
    train = scaled.x["train"].double()
    assert train.mean(0).abs().max() < 1e-6
    assert (train.std(0, correction=0) - 1).abs().max() < 1e-6
    assert scaled.x["test"].double().mean(0).abs().max() > 1e-6
    plain = from_arrays(x * 7 + 3, y)
    back = scaled.x["test"] * torch.tensor(scaled.scaler.scale) + torch.tensor(scaled.scaler.mean)
    assert torch.allclose(back.float(), plain.x["test"], atol=1e-4)


def test_a_mean_that_dwarfs_the_deviation_survives_when_given_in_float64():
    x, y = blobs(200)
    stamps = x.astype(np.float64) + 1.7e9
    z = from_arrays(stamps, y, standardise=True).x["train"]
    assert (z.std(0, correction=0) - 1).abs().max() < 1e-5


def test_uint8_is_divided_by_255_and_other_numbers_are_kept():
    x = np.random.default_rng(0).integers(0, 256, size=(60, 2, 2)).astype(np.uint8)
    x[0, 0, 0] = 255
    y = np.arange(60) % 3
    assert max(float(t.max()) for t in from_arrays(x, y).x.values()) == 1
    assert max(float(t.max()) for t in from_arrays(x.astype(np.int32), y).x.values()) == 255


def images(dtype, n=60):
    x = np.random.default_rng(0).integers(0, 256, size=(n, 3, 5, 5)).astype(np.uint8)
    y = np.arange(n) % 3
    return (x if dtype == "uint8" else (x / 255).astype(dtype)), y


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        ("uint8", "float32", r"x of train uint8, x of val float32\).*divided by 255.*Give every split the same dtype"),
        ("float64", "uint8", r"x of train float64, x of val uint8\)"),
        ("uint8", "int64", r"x of train uint8, x of val int64\)"),
        ("uint8", "bool", r"x of train uint8, x of val bool\)"),
        ("int64", "float32", r"x of train int64, x of val float32\).*one of them seems to be scaled"),
        ("float16", "int32", r"x of train float16, x of val int32\)"),
    ],
)
def test_splits_of_which_one_is_scaled_are_refused(train, val, expected):
    pairs = {}
    for split, dtype in (("train", train), ("val", val)):
        x, y = images("float64" if dtype.startswith("f") else "uint8")
        pairs[split] = (x.astype(dtype), y)
    with pytest.raises(DataError, match=expected):
        from_splits(pairs)


@pytest.mark.parametrize(
    ("train", "val"),
    [("float64", "float32"), ("float32", "float16"), ("int64", "int32"), ("int16", "float32"), ("bool", "int8")],
)
def test_dtypes_of_one_scale_may_differ(train, val):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 2 if train == "bool" else 90, size=(90, 8)), np.arange(90) % 3
    if train.startswith("float"):
        x = x / 4
    parts = {"train": slice(0, 60), "val": slice(60, 75), "test": slice(75, 90)}
    data = from_splits({s: (x[p].astype(train if s == "train" else val), y[p]) for s, p in parts.items()})
    for split, part in parts.items():
        np.testing.assert_array_equal(data.x[split].numpy(), x[part].astype(np.float32))


def test_two_uint8_splits_are_scaled_alike():
    x, y = images("uint8")
    other = 255 - x
    data = from_splits({"train": (x, y), "test": (torch.from_numpy(other), y)})
    np.testing.assert_allclose(data.x["test"].numpy() * 255, other, atol=1e-4)


@pytest.mark.parametrize(
    ("other", "advice"),
    [((5, 5, 3), r"np.moveaxis\(x, -1, 1\)"), ((75,), "every split needs the same"), ((3, 5, 4), "the same")],
)
def test_splits_of_other_shapes_are_refused_with_the_shapes(other, advice):
    x, y = images("float32")
    moved = np.resize(x, (60, *other))
    with pytest.raises(DataError, match=rf"samples of val have the shape .*\(3, 5, 5\).*{advice}"):
        from_splits({"train": (x, y), "val": (moved, y)})
    with pytest.raises(DataError, match=r"samples of val have the shape \(3, 5, 5\)"):
        from_splits({"train": (moved, y), "val": (x, y)})


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        (np.arange(60) % 3, np.array(["a", "b", "c"] * 20), r"y of train int64, y of val <U1\)"),
        (np.array(["0", "1", "2"] * 20), np.arange(60) % 3, r"y of train <U1, y of val int64\)"),
        (np.eye(3)[np.arange(60) % 3], np.array(["a", "b", "c"] * 20), r"names, those of others are numbers"),
        (np.eye(4)[np.arange(60) % 4], np.eye(3)[np.arange(60) % 3], r"y of train 4, y of val 3\)"),
    ],
)
def test_labels_of_two_kinds_are_refused(train, val, expected):
    x = np.random.default_rng(0).normal(size=(120, 4))
    with pytest.raises(DataError, match=expected):
        from_splits({"train": (x[:60], train), "val": (x[60:], val)})


# -- what is accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch", "lists", "bfloat16", "float labels", "column", "one-hot", "grad"])
def test_arrays_of_many_kinds_give_the_same_dataset(kind):
    x, y = blobs()
    x = np.round(x * 4) / 4 + np.arange(len(x))[:, None]  # exact in bfloat16
    expected = from_arrays(x, y).fingerprint
    given_x, given_y = {
        "numpy": (x, y.astype(np.uint8)),
        "torch": (torch.from_numpy(x), torch.from_numpy(y)),
        "lists": (x.tolist(), y.tolist()),
        "bfloat16": (torch.from_numpy(x), torch.from_numpy(y).bfloat16()),
        "float labels": (x, y.astype(np.float64)),
        "column": (x, y[:, None]),
        "one-hot": (x, np.eye(3)[y]),
        "grad": (torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)),
    }[kind]
    dataset = from_arrays(given_x, given_y)
    check_dataset(dataset)
    assert dataset.fingerprint == expected


def test_class_names_as_labels():
    x, y = blobs()
    dataset = from_arrays(x, np.array(["cat", "ant", "bee"])[y])
    assert dataset.class_names == ("ant", "bee", "cat")
    ordered = from_arrays(x, np.array(["cat", "ant", "bee"])[y], class_names=("cat", "ant", "bee"))
    assert ordered.fingerprint == from_arrays(x, y).fingerprint


def test_given_splits_are_kept_row_for_row():
    x, y = blobs(90)
    dataset = from_splits({"train": (x[:50], y[:50]), "validation": (x[50:70], y[50:70]), "test": (x[70:], y[70:])})
    check_dataset(dataset)
    assert torch.equal(dataset.x["train"], torch.from_numpy(x[:50]))
    assert torch.equal(dataset.y["val"], torch.from_numpy(y[50:70]))
    assert dataset.notes == ()


def test_a_missing_val_is_cut_from_train_and_test_is_untouched():
    x, y = blobs(120)
    dataset = from_splits({"train": (x[:100], y[:100]), "test": (x[100:], y[100:])}, seed=5)
    check_dataset(dataset)
    assert torch.equal(dataset.x["test"], torch.from_numpy(x[100:]))
    rows = torch.cat([dataset.x["train"], dataset.x["val"]])
    order = torch.from_numpy(x[:100]).unsqueeze(1).eq(rows).all(2).int().argmax(1)
    assert sorted(order.tolist()) == list(range(100)), "every row once"
    assert torch.equal(torch.cat([dataset.y["train"], dataset.y["val"]])[order], torch.from_numpy(y[:100]))
    assert dataset.notes == ("val cut from train: train 85, val 15, test 20, stratified, seed 5",)


def test_train_alone_gives_all_three():
    check_dataset(from_splits({"train": blobs()}))


def test_of_a_thousand_classes_that_are_missing_a_few_are_named():
    x, y = blobs(classes=2)
    names = [f"c{i}" for i in range(1000)]
    data = from_splits({"train": (x, y), "val": (x + 1, y), "test": (x - 1, y)}, class_names=names)
    assert data.notes == ("no training sample of class " + ", ".join(names[2:14]) + " and 986 more",)


def test_the_callers_array_stays_the_callers():
    x, y = blobs(90)
    splits = {"train": (x[:50], y[:50]), "val": (x[50:70], y[50:70]), "test": (x[70:], y[70:])}
    dataset = from_splits(splits)
    before, kept = dataset.fingerprint, x.copy()
    x[:] = 0
    assert from_splits(splits).fingerprint != before
    assert torch.equal(dataset.x["train"], torch.from_numpy(kept[:50]))


# -- what is refused ----------------------------------------------------------------------------

X, Y = blobs()


def with_value(value, dtype=np.float64):
    x = X.astype(dtype)
    x[17, 2] = value
    x[90, 0] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, Y[:-1], "x has 120 samples and y has 119"),
        (with_value(np.nan), Y, r"x is nan in row 17, feature 2 \(the first of 2\)"),
        (with_value(-np.inf), Y, "x is -inf in row 17, feature 2"),
        (X[:, 0], Y, r"x has the shape \(120,\); needed is \(samples, \*features\).*reshape"),
        (X[:0], Y[:0], r"x is empty: its shape is \(0, 4\)"),
        (X.astype(complex), Y, "x has the dtype complex128; needed are real numbers"),
        ([[1, 2], [3]], [0, 1], "x cannot be read as an array"),
        (X, Y + 0.5, "y is 0.5 in row 0, which is not a class index: labels of classes are"),
        (
            X,
            np.where(Y == 2, -1, Y),
            "y is -1 in row 2, which is not a class index; allowed: integers from 0",
        ),
        (X, Y + 1, "train split has no sample of class 0, yet the labels go up to 3"),
        (X, np.eye(3)[Y] * 0.5, r"row 0 is not one-hot: \[0.5, 0.0, 0.0\]"),
        (X, np.zeros((120, 3, 2)), r"y has the shape \(120, 3, 2\); needed are class indices"),
        (X, Y.astype(complex), "y has the dtype complex128; needed are integer class indices"),
        (X, Y * 0, "every label is the same"),
        (X, Y * 10**7, "y goes up to 20000000, which would be 20,000,001 classes; .* at most 1,000,000"),
    ],
)
def test_the_message_names_the_fault(x, y, message):
    with pytest.raises(DataError, match=message):
        from_arrays(x, y)


def test_a_value_beyond_float32_is_named():
    with pytest.raises(DataError, match=r"is 1e\+300 in row \d+, feature 2 .*does not fit into float32"):
        from_arrays(with_value(1e300), Y)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": (X, Y)}, r"mine: there is no train split among \['test'\]"),
        (
            {"train": (X, Y), "tset": (X, Y)},
            "no split called 'tset'; allowed: train, val, test. Did you mean 'test'",
        ),
        ({"train": (X, Y), "val": (X, Y), "valid": (X, Y)}, "the val split is given twice"),
        (
            {"train": (X, Y), "test": (X[:, :3], Y)},
            r"samples of test have the shape \(3,\), those of train \(4,\)",
        ),
        ({"train": (X, Y), "test": (X, Y)}, "120 of the 120 test rows are training rows"),
        ({"train": (X, Y), "val": (X, Y)}, "120 of the 120 val rows are training rows"),
        ({"train": (X, Y), "test": (X[::3], Y[::3])}, "40 of the 40 test rows are training rows"),
        ({"train": (X, Y), "test": (X[:0], Y[:0])}, "x of test is empty"),
        ({"train": (X[:60], Y[:60]), "test": (X[60:], Y[60:] + 1)}, "no sample of class 3"),
    ],
)
def test_the_message_names_the_wrong_split(splits, message):
    with pytest.raises(DataError, match=message):
        from_splits(splits, source="mine")


def test_names_that_do_not_fit():
    with pytest.raises(DataError, match="3 feature names for samples of shape"):
        from_arrays(X, Y, feature_names=["a", "b", "c"])
    with pytest.raises(DataError, match="gives a name twice: a, a, b"):
        from_arrays(X, Y, class_names=["a", "a", "b"])
    with pytest.raises(DataError, match="y is 2 in row 2, which is not a class index; allowed: 0 to 1"):
        from_arrays(X, Y, class_names=["a", "b"])
    with pytest.raises(DataError, match="y has the label 'x'; allowed: a, b"):
        from_arrays(X, ["x"] * 120, class_names=["a", "b"])


def test_a_few_shared_rows_are_a_note():
    x, y = blobs(200)
    x[190:] = x[:10]
    dataset = from_splits({"train": (x[:100], y[:100]), "val": (x[100:150], y[100:150]), "test": (x[150:], y[150:])})
    assert dataset.notes == ("10 of 50 test rows also occur in train",)


def test_split_names():
    assert [split_name(n) for n in ("Train", "validation", "valid", "test")] == [
        "train",
        "val",
        "val",
        "test",
    ]


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 50), st.integers(1, 6)),
        elements=st.sampled_from([0, -0.0, 1, 2]),
    )
)
def test_row_hashes_tell_rows_apart_and_nothing_else(x):
    hashes = row_hashes(x)
    assert np.array_equal(hashes[:, None] == hashes, (x[:, None] == x).all(axis=2))
    assert shared_rows(hashes, hashes) == len(x)
    assert shared_rows(hashes, row_hashes(x + 10)) == 0


# -- the dataset itself -------------------------------------------------------------------------


def test_the_conformance_suite_catches_each_fault():
    good = from_arrays(*blobs(300))
    check_dataset(good)

    def altered(**splits):
        import dataclasses

        return dataclasses.replace(good, x={**good.x, **splits})

    n = len(good.x["test"])
    with pytest.raises(AssertionError, match=r"rows of test .* also occur in train"):
        check_dataset(altered(test=good.x["train"][:n].clone()))
    nan = good.x["val"].clone()
    nan[0] = float("nan")
    with pytest.raises(AssertionError, match="x of val has values that are not finite"):
        check_dataset(altered(val=nan))
    with pytest.raises(AssertionError, match="not contiguous"):
        check_dataset(altered(val=good.x["val"].t().contiguous().t()))
    with pytest.raises(AssertionError, match="has the splits"):
        check_dataset(good, test_only=True)


def test_a_dataset_checks_its_tensors():
    import dataclasses

    good = from_arrays(*blobs())
    with pytest.raises(DataError, match=r"x has the splits \['train'\] and y has"):
        dataclasses.replace(good, x={"train": good.x["train"]})
    with pytest.raises(DataError, match=r"x of train is torch.float64"):
        dataclasses.replace(good, x={**good.x, "train": good.x["train"].double()})
    with pytest.raises(DataError, match=r"labels from 0 to 2; needed are labels from 0 to 1"):
        dataclasses.replace(good, class_names=("a", "b"))


def test_a_dataset_travels_to_other_processes():
    good = from_arrays(*blobs(), standardise=True)
    restored = pickle.loads(pickle.dumps(good))  # noqa: S301 (bytes of this process)
    assert restored.fingerprint == good.fingerprint
    assert restored.scaler == good.scaler
    with pytest.raises(TypeError):
        restored.x["train"] = None


@pytest.mark.parametrize(("factor", "said"), [(255.0, True), (1 / 255, True), (4.0, False)])
def test_splits_of_one_dtype_and_other_sizes_are_noted(factor, said):
    x, y = blobs()
    other = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32) * factor
    dataset = from_splits({"train": (x, y), "val": (other, np.arange(30) % 3)})
    notes = [note for note in dataset.notes if "differ in the size of their features" in note]
    assert len(notes) == said
    # Too few values say nothing.
    few = from_splits({"train": (x, y), "val": (other[:3], np.arange(3))})
    assert not [note for note in few.notes if "differ in the size" in note]
