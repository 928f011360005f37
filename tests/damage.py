"""Files of every kind that Bitfront reads, small and whole, and ways to damage them.

Of each kind there is what makes the files in an empty folder, and what reads them again: it gives a text that tells any
two contents apart. Where a kind has checksums, a damaged file must give the same text, or an error of Bitfront.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import bitfront as bf
from bitfront import checkpoints, config
from bitfront.data.base import DataRequest
from bitfront.data.jsc_columns import CLASSES, FEATURES
from bitfront.data.loading import load_dataset

CONFIGURATION = """model = "digits-mlp"  # a comment
dataset = "digits"
max_epochs = 1
project = "damaged"
[search.search_space]
setup.by = "type"
seed.linear.config = {name = "integer", data_in_width = [8], data_in_frac_width = "auto", weight_width = [2, 8]}
[search.strategy]
name = "brute_force"
sw_runner.basic_evaluation = {}
metrics.accuracy = {scale = 1.0, direction = "maximize"}
"""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: writes whole files into an empty folder.
        read: what they hold, as text.
        files: which of them are damaged, as patterns.
        checked: whether a checksum shows every damage.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], str]
    files: tuple[str, ...] = ("*",)
    checked: bool = False


def digest(*values) -> str:
    """A text that tells arrays, tensors and plain values apart."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray | torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def samples(count=60, features=6, classes=3):
    draw = np.random.default_rng(0)
    return draw.normal(size=(count, features)).astype(np.float32), np.arange(count) % classes


def of_dataset(data) -> str:
    return digest(data.class_names, *(t for split in data.splits for t in data.split(split)))


def read_data(name: str, file: str) -> Callable[[Path], str]:
    return lambda folder: of_dataset(load_dataset(name, DataRequest(path=folder / file)))


def write_npz(save) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        x, y = samples()
        save(folder / "data.npz", X=x, y=y, class_names=np.array(["a", "b", "c"]))

    return write


def jets():
    draw = np.random.default_rng(1)
    return draw.normal(size=(200, len(FEATURES))), draw.permutation(np.arange(200) % len(CLASSES))


def write_hdf5(folder: Path, **options) -> None:
    import h5py

    x, y = jets()
    columns = [(f"j_{name}", "<f4") for name in FEATURES] + [(f"j_{name}", "<i4") for name in CLASSES]
    table = np.zeros(len(x), dtype=columns)
    for i, name in enumerate(FEATURES):
        table[f"j_{name}"] = x[:, i]
    for i, name in enumerate(CLASSES):
        table[f"j_{name}"] = y == i
    with h5py.File(folder / "jets.h5", "w") as file:
        file.create_dataset("t_allpar_new", data=table, **options)


def write_arff(folder: Path) -> None:
    x, y = jets()
    lines = ["% a comment", "@RELATION jets", *(f"@ATTRIBUTE {name} REAL" for name in FEATURES)]
    lines += ["@ATTRIBUTE class {g,q,w,z,t}", "@DATA"]
    lines += [",".join([*(f"{value:.5f}" for value in row), CLASSES[label]]) for row, label in zip(x, y, strict=True)]
    (folder / "jets.arff").write_text("\n".join(lines) + "\n")


def write_checkpoint(folder: Path) -> None:
    torch.save(network().state_dict(), folder / "weights.pt")


def write_own_checkpoint(folder: Path) -> None:
    checkpoints.save_checkpoint(network().state_dict(), folder / "weights.pt", {"epoch": 1})


def write_lightning(folder: Path) -> None:
    state = {f"model.{key}": value for key, value in network().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, folder / "weights.pt")


def write_numpy(folder: Path) -> None:
    torch.save({key: value.numpy() for key, value in network().state_dict().items()}, folder / "weights.pt")


def write_legacy(folder: Path) -> None:
    torch.save(network().state_dict(), folder / "weights.pt", _use_new_zipfile_serialization=False)


def write_safetensors(folder: Path) -> None:
    import json

    header, body = {}, b""
    for name, value in network().state_dict().items():
        part = value.numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        header[name] = {"dtype": kind, "shape": [*value.shape], "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(header).encode()
    (folder / "weights.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


def read_weights(file: str, load_type="pt") -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        state = checkpoints.load_checkpoint(folder / file, network(), load_type)
        return digest(*(item for pair in state.items() for item in pair))

    return read


def write_configuration(folder: Path) -> None:
    (folder / "search.toml").write_text(CONFIGURATION)


def read_configuration(folder: Path) -> str:
    return repr(config.load_config(folder / "search.toml").effective())


def write_run(folder: Path) -> None:
    """A finished search, with a trial that failed and what a store may hold beside trials."""
    bf.search(
        model=network().eval(),
        data=samples(),
        space={"linear": {"name": "integer", "data_in_width": [8], "weight_width": [2, 4, 8]}},
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
        strategy="brute_force",
        project_dir=str(folder),
        project="run",
    )


def read_run(folder: Path) -> str:
    run = bf.Run.load(folder / "run")
    own = run.columns
    return digest(
        own.number, own.packed, *own.metrics.values(), own.complete, own.errors, own.duration, run.reference,
        run.reference_test, run.test_results, run.stopped, run.kinds, run.units, run.sides, run.samples, run.constraints,
        run.compared, run.optimism, run.finetuned, run.config.effective(), [t.config for t in run.front], run.objectives.names,
    )  # fmt: skip


KINDS = {
    "TOML": Kind(write_configuration, read_configuration),
    "npz": Kind(write_npz(np.savez), read_data("npz", "data.npz"), checked=True),
    "npz, compressed": Kind(write_npz(np.savez_compressed), read_data("npz", "data.npz"), checked=True),
    "HDF5": Kind(write_hdf5, read_data("jsc", "jets.h5")),
    "HDF5, compressed": Kind(lambda f: write_hdf5(f, compression="gzip", fletcher32=True), read_data("jsc", "jets.h5")),
    "ARFF": Kind(write_arff, read_data("jsc", "jets.arff")),
    "checkpoint": Kind(write_checkpoint, read_weights("weights.pt"), checked=True),
    "checkpoint of Bitfront": Kind(write_own_checkpoint, read_weights("weights.pt"), ("weights.pt",), checked=True),
    "checkpoint of Lightning": Kind(write_lightning, read_weights("weights.pt", "pl"), checked=True),
    "checkpoint of NumPy arrays": Kind(write_numpy, read_weights("weights.pt"), checked=True),
    "checkpoint before torch 1.6": Kind(write_legacy, read_weights("weights.pt")),
    "safetensors": Kind(write_safetensors, read_weights("weights.safetensors")),
    "run folder": Kind(write_run, read_run, ("run/trials.sqlite", "run/config.toml"), checked=True),
}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """`data` with one or a few wrong bits, a wrong part, or cut short."""
    parts, at = bytearray(data), draw.randrange(len(data))
    how = draw.choice(["bit"] * 4 + ["bits", "cut", "zeros", "noise", "lost", "twice", "extreme"])
    length = min(1 << draw.randrange(8), len(data) - at)
    if how in ("bit", "bits"):
        for _ in range(1 if how == "bit" else draw.randrange(2, 9)):
            parts[draw.randrange(len(parts))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del parts[at:]
    elif how == "zeros":
        parts[at : at + length] = bytes(length)
    elif how == "noise":
        parts[at : at + length] = draw.randbytes(length)
    elif how == "lost":
        del parts[at : at + length]
    elif how == "twice":
        parts[at:at] = parts[at : at + length]
    else:
        parts[at : at + length] = b"\xff" * length
    return bytes(parts)


def copied(source: Path, target: Path) -> None:
    """The whole files of `source` in `target`, whatever lay there."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            other = target / path.relative_to(source)
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(path.read_bytes())
    for stale in target.rglob("trials.sqlite-*"):
        stale.unlink()


def damage(kind: Kind, whole: Path, folder: Path, seed: int) -> Path:
    """Fill `folder` with the files of `whole`, one of them damaged; gives that one."""
    draw = random.Random(seed)
    copied(whole, folder)
    files = sorted(path for pattern in kind.files for path in folder.rglob(pattern) if path.is_file())
    path = draw.choice(files)
    path.write_bytes(damaged(path.read_bytes(), draw))
    return path
