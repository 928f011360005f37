"""PQuantML on the jets: one training with a rising pressure, its front as plain integers. Runs where it is installed.

    python bench/rivals/install.py pquantml
    OMP_NUM_THREADS=1 build/rivals/envs/pquantml/bin/python bench/rivals/pquantml_jsc.py --data jets.npz --out FILE

``recount.py`` writes the data and runs this.

The network is 16-64-32-32-5 of ``PQDense`` layers on PyTorch, trained by ``pquant.train_model`` with its high
granularity quantization: a width and integer bits for each weight, bias and input of a layer, saturating, all learned.
Its pruning methods are off, since bits that reach 0 prune. Starting bits, pressure, learning rates and batches are
those of ``hgq2_jsc.py``; 500 epochs take longer than 1,500 there. Both ends of a range saturate alike (``SAT_SYM``), so
that a value without bits is 0.

After each epoch the network is kept if none is at most as costly and at least as accurate on val, by what PQuantML
counts: with a bit for each sign. The file needs no PQuantML to be read; ``integer_networks.py`` says what is in it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import math
import os
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import numpy as np
import pquant
import torch
from pquant.layers import PQDense
from torch import Tensor, nn

WIDTHS = (16, 64, 32, 32, 5)
BATCH = 4096
#: Rows of val whose outputs are kept, to be compared with an evaluation in integers.
CHECKED = 1000
#: Learning rates and pressures at both ends.
RATES = (5e-3, 5e-4)
PRESSURES = (5e-7, 5e-5)


def configuration(epochs: int) -> pquant.PQConfig:
    """Quantization with learned bits alone."""
    config = pquant.dst_config()
    config.pruning_parameters.enable_pruning = False
    training = config.training_parameters
    training.pretraining_epochs, training.epochs, training.fine_tuning_epochs = 0, epochs, 0
    quantization = config.quantization_parameters
    quantization.use_high_granularity_quantization = True
    quantization.granularity = "per_weight"
    quantization.overflow_mode_parameters = quantization.overflow_mode_data = "SAT_SYM"
    quantization.default_weight_integer_bits, quantization.default_weight_fractional_bits = 0.0, 3.0
    quantization.default_data_integer_bits, quantization.default_data_fractional_bits = 3.0, 3.0
    quantization.hgq_gamma = 1e-8
    return config


def network(config: pquant.PQConfig) -> nn.Module:
    """The model, with the bits of its quantizers."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        layers += [PQDense(config, inputs, outputs, in_quant_bits=(int(i == 0), 3, 3)), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model(torch.zeros(2, WIDTHS[0]))  # its quantizers have no bits before
    for layer in dense(model):
        layer.weight, layer.bias  # noqa: B018  (nor have those of its parameters)
    return model


def dense(model: nn.Module) -> list[PQDense]:
    return [layer for layer in model if isinstance(layer, PQDense)]


def pressure_at(epoch: int, epochs: int) -> float:
    """5e-7 for a sixth of the epochs, then up to 5e-5 evenly in its logarithm."""
    low, high = PRESSURES
    begin = epochs // 6
    return low * (high / low) ** (max(0, epoch - begin) / (epochs - begin))


def trained(model: nn.Module, config: pquant.PQConfig, data: dict[str, Tensor]) -> list[dict[str, object]]:
    """Train `model`; return the front of its epochs."""
    epochs = config.training_parameters.epochs
    batches = -(-len(data["X_train"]) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATES[0], eps=1e-7)

    def rate(step: int) -> float:
        low = RATES[1] / RATES[0]
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (batches * epochs))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    front: list[dict[str, object]] = []

    def one_epoch(model: nn.Module, *, epoch: Tensor, **_: object) -> None:
        for layer in dense(model):
            layer.hgq_beta = pressure_at(int(epoch), epochs)
        for rows in torch.randperm(len(data["X_train"])).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data["X_train"][rows]), data["y_train"][rows])
            pquant.get_model_losses(model, loss).backward()
            optimizer.step()
            schedule.step()

    def kept(model: nn.Module, *, epoch: Tensor, **_: object) -> None:
        with torch.no_grad():
            right = (model(data["X_val"]).argmax(1) == data["y_val"]).double().mean()
            cost, accuracy = float(pquant.get_ebops(model)), float(right)
        if any(k["ebops_in_training"] <= cost and k["val_in_training"] >= accuracy for k in front):
            return
        front[:] = [k for k in front if not (cost <= k["ebops_in_training"] and accuracy >= k["val_in_training"])]
        about = {"epoch": int(epoch), "beta": pressure_at(int(epoch), epochs), "ebops_in_training": cost}
        front.append({**about, "val_in_training": accuracy, "state": copy.deepcopy(model.state_dict())})
        if int(epoch) % 50 == 0:
            print(f"epoch {int(epoch)}: EBOPs {cost:,.0f}, val {accuracy:.4f}, {len(front)} kept", flush=True)

    pquant.train_model(model, config, one_epoch, kept)
    return front


def bits_of(quantizer: nn.Module, shape: torch.Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(signs, widths without the sign, binary points) of a quantizer, int64, of this shape."""
    assert quantizer.overflow == "SAT_SYM"
    assert quantizer.round_mode == "RND"
    k, i, f = (part.detach().expand(shape).numpy().astype(np.int64) for part in quantizer.get_quantization_bits())
    return k, np.maximum(i + f, 0), f


def as_integers(model: nn.Module) -> dict[str, np.ndarray]:
    """The arrays of one network."""
    arrays: dict[str, np.ndarray] = {}
    for i, layer in enumerate(dense(model)):
        for name, quantizer, values in (
            ("weight", layer.weight_quantizer, layer.weight),
            ("bias", layer.bias_quantizer, layer.bias),
        ):
            _, widths, points = bits_of(quantizer, values.shape)
            codes = np.ldexp(values.detach().numpy().astype(np.float64), points)
            assert (codes == np.rint(codes)).all(), "a value is not on the grid of its quantizer"
            arrays |= {f"{name}_{i}": codes.astype(np.int64)}
            arrays |= {f"{name}_widths_{i}": widths, f"{name}_points_{i}": points}
        signs, widths, points = bits_of(layer.input_quantizer, torch.Size((1, layer.in_features)))
        arrays |= {f"input_widths_{i}": widths[0], f"input_points_{i}": points[0], f"input_signed_{i}": signs[0] > 0}
    return arrays


def main() -> None:
    """Train, then write the front."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="X_train, y_train, X_val, y_val, standardised")
    arguments.add_argument("--out", type=Path, required=True, help="the file to write")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--epochs", type=int, default=500)
    arguments.add_argument("--quick", action="store_true", help="20 epochs: does it run?")
    given = arguments.parse_args()
    torch.manual_seed(given.seed)
    with np.load(given.data) as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    config = configuration(20 if given.quick else given.epochs)
    model = network(config)
    begin = (time.perf_counter(), time.process_time())
    front = sorted(trained(model, config, data), key=lambda k: k["ebops_in_training"])
    seconds = (time.perf_counter() - begin[0], time.process_time() - begin[1])
    networks = []
    for kept in front:
        model.load_state_dict(kept.pop("state"))
        model.eval()
        arrays = as_integers(model)
        with torch.no_grad():
            arrays["outputs"] = model(data["X_val"][:CHECKED]).double().numpy()
        networks.append(arrays)
    record = {
        "rival": "PQuantML",
        "packages": {name: importlib.metadata.version(name) for name in ("pquant-ml", "torch")},
        "seed": given.seed,
        "epochs": config.training_parameters.epochs,
        "wall_s": seconds[0],
        "cpu_s": seconds[1],
        "rounding": "half up",
        "overflow": "saturate",
        "networks": front,
    }
    stacked = {name: np.stack([arrays[name] for arrays in networks]) for name in networks[0]}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(given.out, record=json.dumps(record), **stacked)
    print(f"{len(networks)} networks in {given.out}; trained in {seconds[0]:.0f} s ({seconds[1]:.0f} s of CPU)")


if __name__ == "__main__":
    main()
