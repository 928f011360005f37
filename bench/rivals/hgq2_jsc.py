"""HGQ2 on the jets: one training with a rising pressure, and its front as plain integers. Runs where HGQ2 is installed.

    python bench/rivals/install.py hgq2
    NPROC=1 build/rivals/envs/hgq2/bin/python bench/rivals/hgq2_jsc.py --data jets.npz --out hgq2.npz

``NPROC`` is the number of threads. ``recount.py`` writes the data and runs this.

The network is 16-64-32-32-5 with the quantizers of HGQ2's example ``small_jet_tagger.ipynb``: weights with learned
widths and integer bits, saturating; inputs of layers with learned fractional bits, wrapping. The output is not rounded,
since nothing counts it. The pressure rises from 5e-7 to 5e-5, evenly in its logarithm, after a sixth of the epochs;
Adam, 5e-3 to 5e-4 by a cosine, batches of 4,096, 1,500 epochs.

After each epoch the network is kept if none is at most as costly and at least as accurate on val, by what HGQ2 logs. At
the end HGQ2's pass over the training samples fixes the integer bits of the inputs, as its users do before they deploy.
The file needs no HGQ2 to be read; ``bench/rivals/integer_networks.py`` says what is in it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"

import keras
import numpy as np
from hgq.config import QuantizerConfig, QuantizerConfigScope
from hgq.layers import QDense
from hgq.utils import trace_minmax
from hgq.utils.sugar import BetaScheduler, FreeEBOPs, PieceWiseSchedule

WIDTHS = (64, 32, 32, 5)
BATCH = 4096
#: Rows of val whose outputs are kept, to be compared with an evaluation in integers.
CHECKED = 1000


def network() -> keras.Model:
    """The model of the example, without a quantizer of its output."""
    weights = QuantizerConfigScope(place="all", k0=1, b0=3, i0=0, default_q_type="kbi", overflow_mode="sat_sym")
    inputs = QuantizerConfigScope(place="datalane", k0=0, default_q_type="kif", overflow_mode="wrap", f0=3, i0=3)
    with weights, inputs:
        first = QuantizerConfig(place="datalane", k0=1)
        layers = [
            QDense(
                width,
                activation="relu" if i + 1 < len(WIDTHS) else None,
                iq_conf=first if i == 0 else None,
                name=f"dense_{i}",
            )
            for i, width in enumerate(WIDTHS)
        ]
    return keras.models.Sequential([keras.Input((16,)), *layers])


class Front(keras.callbacks.Callback):
    """Keeps the networks that are not dominated: (EBOPs, accuracy on val, epoch, pressure, weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[float, float, int, float, list[np.ndarray]]] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        cost, accuracy, beta = (logs or {})["ebops"], (logs or {})["val_accuracy"], (logs or {})["beta"]
        if any(c <= cost and a >= accuracy for c, a, *_ in self.kept):
            return
        self.kept = [k for k in self.kept if not (cost <= k[0] and accuracy >= k[1])]
        self.kept.append((cost, accuracy, epoch, beta, self.model.get_weights()))
        if epoch % 50 == 0:
            print(f"epoch {epoch}: EBOPs {cost:,.0f}, val {accuracy:.4f}, {len(self.kept)} kept", flush=True)


def trained(model: keras.Model, x: dict[str, np.ndarray], y: dict[str, np.ndarray], epochs: int) -> Front:
    """Train `model` and return the front of its epochs."""
    steps = -(-len(x["train"]) // BATCH) * epochs
    rate = keras.optimizers.schedules.CosineDecay(5e-3, steps, alpha=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"], jit_compile=True)
    pressure = PieceWiseSchedule([(0, 5e-7, "constant"), (epochs // 6, 5e-7, "log"), (epochs, 5e-5, "constant")])
    front = Front()
    model.fit(
        x["train"],
        y["train"],
        batch_size=BATCH,
        epochs=epochs,
        validation_data=(x["val"], y["val"]),
        validation_batch_size=30_000,
        callbacks=[BetaScheduler(pressure), FreeEBOPs(), keras.callbacks.TerminateOnNaN(), front],
        verbose=0,
    )
    return front


def fixed_point(quantizer: object, values: object, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Codes, widths without the sign, and binary points of a quantized parameter."""
    inner = quantizer.quantizer
    points = np.broadcast_to(np.asarray(inner.f), shape).astype(np.int64)
    widths = np.broadcast_to(np.asarray(inner.bits), shape).astype(np.int64)
    codes = np.ldexp(np.asarray(values, dtype=np.float64), points)
    assert (codes == np.rint(codes)).all(), "a value is not on the grid of its quantizer"
    return {"": codes.astype(np.int64), "_widths": widths, "_points": points}


def as_integers(model: keras.Model) -> dict[str, np.ndarray]:
    """The arrays of one network; weights have shape (outputs, inputs)."""
    arrays: dict[str, np.ndarray] = {}
    for i, layer in enumerate(model.layers):
        for name, quantizer, values, shape in (
            ("weight", layer.kq, layer.qkernel, tuple(layer.kernel.shape)),
            ("bias", layer.bq, layer.qbias, tuple(layer.bias.shape)),
        ):
            assert quantizer.quantizer.overflow_mode == "SAT_SYM"
            for suffix, array in fixed_point(quantizer, values, shape).items():
                arrays[f"{name}{suffix}_{i}"] = array.T
        inner = layer.iq.quantizer
        assert (inner.round_mode, inner.overflow_mode) == ("RND", "WRAP")
        k, integers, fractions = (np.asarray(part)[0].astype(np.int64) for part in inner.kif)
        widths = np.maximum(integers + fractions, 0)
        arrays |= {f"input_widths_{i}": widths, f"input_points_{i}": fractions, f"input_signed_{i}": k > 0}
    return arrays


def main() -> None:
    """Train, then write the front."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="X_train, y_train, X_val, y_val, standardised")
    arguments.add_argument("--out", type=Path, required=True, help="the file to write")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--epochs", type=int, default=1500)
    arguments.add_argument("--quick", action="store_true", help="20 epochs: does it run?")
    given = arguments.parse_args()
    keras.utils.set_random_seed(given.seed)
    with np.load(given.data) as file:
        x = {split: file[f"X_{split}"].astype(np.float32) for split in ("train", "val")}
        y = {split: file[f"y_{split}"].astype(np.int32) for split in ("train", "val")}
    epochs = 20 if given.quick else given.epochs
    model = network()
    begin = (time.perf_counter(), time.process_time())
    front = trained(model, x, y, epochs)
    seconds = (time.perf_counter() - begin[0], time.process_time() - begin[1])
    networks, about = [], []
    for cost, accuracy, epoch, beta, weights in sorted(front.kept, key=lambda k: k[0]):
        model.set_weights(weights)
        deployed = trace_minmax(model, x["train"], batch_size=len(x["train"]))
        arrays = as_integers(model)
        arrays["outputs"] = np.asarray(model(x["val"][:CHECKED], training=False), dtype=np.float64)
        networks.append(arrays)
        about.append({"epoch": epoch, "beta": beta, "ebops_in_training": cost, "val_in_training": accuracy})
        about[-1]["ebops_deployed"] = deployed
    record = {
        "rival": "HGQ2",
        "packages": {name: importlib.metadata.version(name) for name in ("hgq2", "keras", "jax")},
        "seed": given.seed,
        "epochs": epochs,
        "wall_s": seconds[0],
        "cpu_s": seconds[1],
        "rounding": "half up",
        "overflow": "wrap",
        "networks": about,
    }
    stacked = {name: np.stack([arrays[name] for arrays in networks]) for name in networks[0]}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(given.out, record=json.dumps(record), **stacked)
    print(f"{len(networks)} networks in {given.out}; trained in {seconds[0]:.0f} s ({seconds[1]:.0f} s of CPU)")


if __name__ == "__main__":
    main()
