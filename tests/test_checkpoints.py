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
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
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


def wrapped(state, *path):
    """`state` below some names, as other tools write it."""
    for name in reversed(path):
        state = {name: state, "epoch": 3, "optimizer": {"state": {}}}
    return state


FORMS = {
    "an average": lambda m, s: wrapped(s, "ema"),
    "an average, timm's": lambda m, s: {"state_dict_ema": s, "state_dict": s},
    "AveragedModel": lambda m, s: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "AveragedModel in a table": lambda m, s: wrapped(torch.optim.swa_utils.AveragedModel(m).state_dict(), "ema"),
    "tables in tables": lambda m, s: wrapped(s, "model", "state_dict"),
    "compile of DDP of a wrapper": lambda m, s: wrapped(prefixed(s, "_orig_mod.module.net."), "model"),
    "DDP of compile": lambda m, s: prefixed(s, "module._orig_mod."),
    "a compiled part": lambda m, s: {k.replace("seq_blocks.", "seq_blocks._orig_mod."): v for k, v in s.items()},
    "a profiler's counters": lambda m, s: {
        **s,
        "total_ops": torch.zeros(1),
        "seq_blocks.0.total_params": torch.ones(1),
    },
    "numbers of a profiler": lambda m, s: {**s, "__flops__": 3},
    "before torch 0.4.1": lambda m, s: {k: v for k, v in s.items() if "num_batches_tracked" not in k},
    "NumPy": lambda m, s: {k: v.numpy() for k, v in s.items()},
    "NumPy of other orders": lambda m, s: {
        k: np.array(v.numpy(), dtype=v.numpy().dtype.newbyteorder(">"), order="F") for k, v in s.items()
    },
    "Parameters": lambda m, s: dict(m.named_parameters()) | dict(m.named_buffers()),
    "double precision": lambda m, s: {k: v.double() for k, v in s.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_that_people_have(model, other, file, form):
    torch.save(FORMS[form](model, model.state_dict()), file)
    assert_equal(checkpoints.load_checkpoint(file, other), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_and_said(model, other, file, dtype):
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(half, file)
    loaded = checkpoints.read_checkpoint(file, other)
    assert_equal(loaded.state, {k: v.to(model.state_dict()[k].dtype) for k, v in half.items()})
    assert loaded.notes == (f"weights are stored as {str(dtype)[6:]}, and converted to the dtype that the model has",)


def test_of_two_sets_the_plain_one_is_taken_and_said(model, other, file):
    torch.save({"ema": other.state_dict(), "state_dict": model.state_dict()}, file)
    loaded = checkpoints.read_checkpoint(file, other)
    assert_equal(loaded.state, model.state_dict())
    assert loaded.notes == ("the weights under 'state_dict' are taken; the file also has ema",)


def test_a_table_that_does_not_fit_is_passed_by(model, other, file):
    torch.save({"model": {"width": torch.zeros(3)}, "ema": model.state_dict()}, file)
    assert_equal(checkpoints.load_checkpoint(file, other), model.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("odd", "word"),
    [
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), r"quantized: save tensor.dequantize\(\)"),
        (lambda v: v.to_sparse(), "sparse or nested"),
        (lambda v: v.to(torch.complex64), "complex"),
        (lambda v: v.to("meta"), "on the meta device"),
        (lambda v: v.double() * 1e300, "not every value of it can be a float32"),
    ],
)
def test_tensors_that_are_no_weights(model, file, odd, word):
    state = dict(model.state_dict())
    name = next(k for k in state if k.endswith("2.weight"))
    state[name] = odd(state[name])
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=rf"(?s){name}.*{word}"):
        checkpoints.load_checkpoint(file, model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is deprecated, and people have its files
def test_files_that_hold_more_than_weights_say_the_two_lines(model, file):
    torch.jit.trace(model.eval(), torch.zeros(2, 16)).save(str(file))
    with pytest.raises(CheckpointError, match=r"(?s)TorchScript archive.*torch\.jit\.load\(.*torch\.save\(model"):
        checkpoints.load_checkpoint(file, model)
    torch.save((model.state_dict(), 3), file)
    with pytest.raises(CheckpointError, match=r"holds a tuple.*Take it out of the tuple: .*weights_only=True\)\[0\]"):
        checkpoints.load_checkpoint(file, model)
    torch.save({"epoch": 3, "model": model}, file)
    with pytest.raises(CheckpointError, match=r"(?s)weights_only=False\)\['model'\]"):
        checkpoints.load_checkpoint(file, model)


def safetensors(state, **changed):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        part = value.numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        header[name] = {"dtype": kind, "shape": [*value.shape], "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(header | changed).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_safetensors(model, other, tmp_path):
    for name in ("weights.safetensors", "weights.bin"):
        (tmp_path / name).write_bytes(safetensors(model.state_dict()))
        assert_equal(checkpoints.load_checkpoint(tmp_path / name, other), model.state_dict())


def one(dtype, shape, *offsets):
    return {"dtype": dtype, "shape": shape, "data_offsets": [*offsets]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff" * 7, "its header would have"),
        ((2**60).to_bytes(8, "little") + b"{}", "its header would have 1,152,921,504,606,846,976 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "no table of tensors"),
        ((2).to_bytes(8, "little") + b"{}x", "its tensors have 0 bytes, and 1 follow"),
        (safetensors({}, a=one("F32", [1 << 40], 0, 1 << 42)), "and 0 follow"),
        (safetensors({}, a=one("F32", [2], 0, 4)), "its shape needs 8"),
        (safetensors({}, a=one("F32", [-1], 0, -4)), "has the shape"),
        (safetensors({}, a=one("Q9", [1], 0, 4)), "has the dtype 'Q9'"),
        (safetensors({}, a=one(["F32"], [1], 0, 4)), "unhashable"),
        (safetensors({}, a=one("F32", [True], 0, 4)), "has the shape"),
        (safetensors({"a": torch.ones(2)}, b=one("F32", [2], 0, 8)), "begins at byte 0"),
        (safetensors({"a": torch.ones(2)}, b=one("F32", [0], 9, 9)), "begins at byte 9"),
        ((14).to_bytes(8, "little") + b'{"a":1,"a": 2}', "a name twice"),
        ((5000).to_bytes(8, "little") + b'{"a":' * 1000, "nested too deeply|Expecting"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "nested too deeply|Expecting"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_safetensors_that_are_not_what_they_say(model, tmp_path, data, message):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"weights.safetensors cannot be read as safetensors: .*({message})"):
        checkpoints.load_checkpoint(path, model)


def test_a_wrong_bit_is_noticed_wherever_it_is_in_the_weights(model, file):
    """By the checksums in the archive, and without those by the one beside it."""
    checkpoints.save_checkpoint(model.state_dict(), file)
    whole = file.read_bytes()
    first = model.state_dict()["seq_blocks.2.weight"].numpy().tobytes()
    wrong = bytearray(whole)
    wrong[whole.index(first) + 1] ^= 1
    file.write_bytes(wrong)
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        checkpoints.load_checkpoint(file, model)
    torch.serialization.set_crc32_options(False)
    try:
        checkpoints.save_checkpoint(model.state_dict(), file, {"epoch": 1})
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(checkpoints.load_checkpoint(file, model), model.state_dict())
    wrong = bytearray(file.read_bytes())
    wrong[wrong.index(first) + 1] ^= 1
    file.write_bytes(wrong)
    with pytest.raises(CheckpointError, match="describes other weights"):
        checkpoints.load_checkpoint(file, model)


def test_a_checkpoint_that_unpacks_to_far_more_than_it_is(model, file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))
    with pytest.raises(CheckpointError, match=r"declares 100,000,000, which no data of that size unpacks to"):
        checkpoints.load_checkpoint(file, model)


def test_a_checkpoint_called_safetensors_is_of_that_format(tmp_path):
    from bitfront.checkpoints.safetensors import read_safetensors

    state = {
        "half": torch.arange(3, dtype=torch.bfloat16),
        "weight": torch.randn(2, 3).t(),  # not contiguous
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    checkpoints.save_checkpoint(state, path, {"epoch": 3})
    assert checkpoints.read_meta(path) == {"epoch": 3}
    read = read_safetensors(path.read_bytes(), path)
    library = pytest.importorskip("safetensors.torch").load_file(path)
    for name, tensor in state.items():
        assert torch.equal(read[name], tensor)
        assert torch.equal(library[name], tensor)
        assert read[name].dtype == tensor.dtype
    model = nn.Linear(3, 2)
    checkpoints.save_checkpoint(model.state_dict(), path)
    assert torch.equal(checkpoints.load_checkpoint(path, nn.Linear(3, 2))["weight"], model.weight)
    with pytest.raises(CheckpointError, match=r"torch\.complex64, which safetensors does not have"):
        checkpoints.save_checkpoint({"w": torch.zeros(1, dtype=torch.complex64)}, path)
    assert torch.equal(checkpoints.load_checkpoint(path, nn.Linear(3, 2))["weight"], model.weight)  # it is as it was
