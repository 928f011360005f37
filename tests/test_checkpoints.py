"""Checkpoints: written whole, read without running them, and explained where they do not fit."""

from __future__ import annotations

import argparse
import builtins
import enum
import functools
import json
import os
import pathlib
import pickle
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import nn

from bitfront import checkpoints
from bitfront.errors import CheckpointError
from bitfront.models.base import build_model


@pytest.fixture
def model():
    return build_model("jsc-toy", (16,), 5, seed=0)


@pytest.fixture
def other():
    return build_model("jsc-toy", (16,), 5, seed=1)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pt"


def assert_equal(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def lightning(state, prefix="model.", **more):
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.1.4",
        "state_dict": OrderedDict(prefixed(state, prefix)),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss_epoch'}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [],
        "lr_schedulers": [],
        **more,
    }


# What Lightning users keep in hyper_parameters. weights_only refuses every one of these.
class AttributeDict(dict):
    pass


class Settings:
    def __init__(self):
        self.width = 3


class Stateful:
    def __getstate__(self):
        return ("a", 3)

    def __setstate__(self, state):
        raise AssertionError("the class named in the file was used")


class Mode(enum.Enum):
    FAST = 1


def test_round_trip(model, other, file):
    checkpoints.save_checkpoint(model.state_dict(), file, meta={"epoch": 3, "val_accuracy": 0.7})
    assert_equal(checkpoints.load_checkpoint(file, other), model.state_dict())
    assert checkpoints.read_meta(file) == {"epoch": 3, "val_accuracy": 0.7}
    assert type(torch.load(file, weights_only=True)) is dict


def test_loading_does_not_touch_the_model(model, other, file):
    before = {key: value.clone() for key, value in other.state_dict().items()}
    checkpoints.save_checkpoint(model.state_dict(), file)
    state = checkpoints.load_checkpoint(file, other)
    assert_equal(other.state_dict(), before)
    other.load_state_dict(state)
    assert_equal(other.state_dict(), model.state_dict())


def test_a_file_is_replaced_whole_or_not_at_all(model, other, file, monkeypatch):
    checkpoints.save_checkpoint(model.state_dict(), file, meta={"epoch": 1})
    content = file.read_bytes()

    def full(obj, target):
        target.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"weights\.pt: cannot be written: No space left"):
        checkpoints.save_checkpoint(other.state_dict(), file, meta={"epoch": 2})
    assert file.read_bytes() == content
    assert checkpoints.read_meta(file) == {"epoch": 1}
    assert sorted(p.name for p in file.parent.iterdir()) == ["weights.pt", "weights.pt.json"]


def test_meta_that_is_not_json_is_refused_before_anything_is_written(model, file):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save_checkpoint(model.state_dict(), file, meta={"x": object()})
    assert list(file.parent.iterdir()) == []


def test_saving_makes_the_folder_and_drops_stale_meta(model, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    checkpoints.save_checkpoint(model.state_dict(), path, meta={"epoch": 1})
    checkpoints.save_checkpoint(model.state_dict(), path)
    assert checkpoints.read_meta(path) == {}
    assert [p.name for p in path.parent.iterdir()] == ["best.pt"]


def test_a_view_does_not_take_its_base_along(file):
    checkpoints.save_checkpoint({"weight": torch.zeros(1_000_000)[:4]}, file)
    assert file.stat().st_size < 10_000


def test_meta_of_other_weights_is_refused(model, other, file):
    checkpoints.save_checkpoint(model.state_dict(), file, meta={"epoch": 1})
    torch.save(dict(other.state_dict()), file)
    with pytest.raises(CheckpointError, match="describes other weights than"):
        checkpoints.read_meta(file)
    (file.parent / "weights.pt.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"weights\.pt\.json is damaged"):
        checkpoints.read_meta(file)


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_state_dicts_as_people_save_them(model, other, file, container, prefix):
    state = prefixed(model.state_dict(), prefix)
    torch.save(state if container is None else {container: state, "epoch": 3, "optimizer": {"lr": 0.1}}, file)
    assert_equal(checkpoints.load_checkpoint(file, other), model.state_dict())


def test_the_format_before_torch_1_6(model, other, file):
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    assert_equal(checkpoints.load_checkpoint(file, other), model.state_dict())


@pytest.mark.parametrize("prefix", ["model.", "net.", "model._orig_mod.", "a.b.", ""])
def test_lightning_checkpoints(model, other, file, prefix):
    torch.save(lightning(model.state_dict(), prefix), file)
    assert_equal(checkpoints.load_checkpoint(file, other, "pl"), model.state_dict())


def test_lightning_entries_outside_the_model_are_left(model, other, file):
    content = lightning(model.state_dict())
    content["state_dict"]["train_acc.tp"] = torch.zeros(3)
    content["state_dict"]["criterion.weight"] = torch.ones(5)
    torch.save(content, file)
    assert_equal(checkpoints.load_checkpoint(file, other, "pl"), model.state_dict())


def test_lightning_with_two_models_is_not_guessed_at(model, other, file):
    content = lightning(model.state_dict(), "student.")
    content["state_dict"].update(prefixed(other.state_dict(), "teacher."))
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"holds 2 sets of weights.*student\., teacher\.; save the one"):
        checkpoints.load_checkpoint(file, other, "pl")
    content["state_dict"].update(prefixed(other.state_dict(), "model."))
    torch.save(content, file)
    assert_equal(checkpoints.load_checkpoint(file, model, "pl"), other.state_dict())


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=0.1, layers=[1, 2]),
        pathlib.PurePosixPath("/data/jsc"),
        AttributeDict(lr=0.1, nested=AttributeDict(a=1)),
        defaultdict(list, a=[1]),
        Settings(),
        Stateful(),
        Mode.FAST,
        functools.partial(torch.optim.Adam, lr=0.1),
        nn.CrossEntropyLoss(),
        {"cls": Settings, "items": [Settings(), Settings()]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_lightning_hyper_parameters_of_any_class_do_not_stand_in_the_way(model, other, file, value):
    torch.save(lightning(model.state_dict(), hyper_parameters={"value": value, "lr": 0.1}), file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    allowed = set(torch.serialization.get_safe_globals())
    assert_equal(checkpoints.load_checkpoint(file, other, "pl"), model.state_dict())
    assert set(torch.serialization.get_safe_globals()) == allowed


class Payload:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("load_type", ["pt", "pl"])
@pytest.mark.parametrize("where", ["top", "weight", "beside"])
@pytest.mark.parametrize("how", ["system", "exec", "mkdir"])
def test_malicious_pickles_are_not_executed(model, other, tmp_path, file, how, where, load_type, zipped):
    trace = tmp_path / "pwned"
    payload = {
        "system": Payload(os.system, f"touch {trace}"),
        "exec": Payload(builtins.exec, f"open({str(trace)!r}, 'w').close()"),
        "mkdir": Payload(pathlib.Path.mkdir, pathlib.Path(trace)),
    }[how]
    state = dict(model.state_dict())
    if where == "top":
        content = payload
    elif where == "weight":
        content = lightning({**state, "seq_blocks.2.weight": payload})
    else:
        content = lightning(state, callbacks=payload)
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    if where == "beside" and zipped and how == "exec":
        # Not code, only names and values that nobody uses: the weights beside them are sound.
        assert_equal(checkpoints.load_checkpoint(file, other, load_type), state)
    else:
        with pytest.raises(CheckpointError, match=r"torch\.save\(model\.state_dict\(\)"):
            checkpoints.load_checkpoint(file, other, load_type)
    assert not trace.exists()
    with file.open("rb") as stream:  # the payload is a real one: plain unpickling does run it
        torch.load(stream, weights_only=False)
    assert trace.exists()


def test_a_pickled_model_is_refused(model, file):
    torch.save(model, file)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)holds a pickled bitfront\.models\.jsc\.JSCModel.*torch\.save\(model\.state_dict\(\)",
    ):
        checkpoints.load_checkpoint(file, model)
    torch.save({"state_dict": model}, file)
    with pytest.raises(CheckpointError, match=r"not everything in it is a tensor: state_dict \(bitfront"):
        checkpoints.load_checkpoint(file, model)


def test_missing_files_and_directories(model, tmp_path):
    checkpoints.save_checkpoint(model.state_dict(), tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*bset\.pt\. Did you mean 'best\.pt'"):
        checkpoints.load_checkpoint(tmp_path / "bset.pt", model)
    with pytest.raises(CheckpointError, match=r"nor a directory .*nowhere"):
        checkpoints.load_checkpoint(tmp_path / "nowhere" / "best.pt", model)
    with pytest.raises(CheckpointError, match=r"is a directory; name the checkpoint file.*It holds best\.pt"):
        checkpoints.load_checkpoint(tmp_path, model)


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 20, b"PK\x03\x04 not a zip", pickle.dumps({"a": 1})])
@pytest.mark.parametrize("load_type", ["pt", "pl"])
def test_files_that_are_no_checkpoints(model, file, content, load_type):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pt "):
        checkpoints.load_checkpoint(file, model, load_type)


def test_damaged_checkpoints(model, file):
    checkpoints.save_checkpoint(model.state_dict(), file)
    whole = file.read_bytes()
    for length in (10, 200, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is not a PyTorch checkpoint that can be read safely"):
            checkpoints.load_checkpoint(file, model)


@pytest.mark.parametrize(
    ("content", "load_type", "message"),
    [
        ([1, 2], "pt", "holds a list, but a state dict"),
        (torch.zeros(3), "pt", "holds a Tensor, but a state dict"),
        ({"epoch": 3, "lr": 0.1}, "pt", r"not everything in it is a tensor: epoch \(int\), lr \(float\)"),
        ({"a.weight": torch.zeros(3)}, "pl", "not a Lightning checkpoint.*use load_type = 'pt'"),
    ],
)
def test_other_contents(model, file, content, load_type, message):
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_checkpoint(file, model, load_type)


def test_what_does_not_fit_is_listed(file):
    tiny = build_model("jsc-tiny", (16,), 5, seed=0)
    state = dict(build_model("jsc-tiny", (12,), 5, seed=0).state_dict())
    del state["seq_blocks.2.bias"]
    state["seq_blocks.9.bias"] = torch.zeros(5)
    torch.save(state, file)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_checkpoint(file, tiny)
    assert str(caught.value) == (
        f"{file} does not fit the model (JSCModel; 7 entries, the file has 7):\n"
        "  1 missing from the file: seq_blocks.2.bias\n"
        "  1 in the file, not in the model: seq_blocks.9.bias\n"
        "  5 of another shape in the file: seq_blocks.0.weight (12,) instead of (16,), "
        "seq_blocks.0.bias (12,) instead of (16,), seq_blocks.0.running_mean (12,) instead of (16,), "
        "seq_blocks.0.running_var (12,) instead of (16,), seq_blocks.2.weight (5, 12) instead of (5, 16)\n"
        "Is it a checkpoint of this model, with the same number of features and classes? "
        "If Lightning wrote the file, use load_type = 'pl'."
    )


def test_long_lists_are_cut(model, file):
    torch.save(lightning(build_model("digits-cnn", (1, 8, 8), 10, seed=0).state_dict()), file)
    with pytest.raises(CheckpointError, match=r"26 missing from the file: .* and 18 more\n  8 in the file"):
        checkpoints.load_checkpoint(file, model, "pl")


@pytest.mark.parametrize(
    ("load_type", "message"),
    [
        ("mz", r"'mz' is not possible; allowed: pt, pl\. A \.mz .* state_dict\.pt"),
        ("hf", "allowed: pt, pl.$"),
    ],
)
def test_load_types(model, file, load_type, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_checkpoint(file, model, load_type)


def test_the_sidecar_is_plain_json(model, file):
    checkpoints.save_checkpoint(model.state_dict(), file, meta={"epoch": 3})
    document = json.loads((file.parent / "weights.pt.json").read_text())
    assert document["version"] == 1
    assert document["meta"] == {"epoch": 3}
