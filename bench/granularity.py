"""Bits per layer by search, and learned per layer, channel and element: fronts of one network, in the same time.

Per network: a model is trained in float once, and all searches start from it, with the same data, the same seed and one
thread. Time is that of the processor, because machines are shared. A training of learned bits has ``CYCLES`` cycles and
so few epochs that it takes about a quarter of a minute; everything else are defaults. ``evolution`` gets the time of
the slowest of these trainings.

evolution    over formats per layer: bits of the inputs, weights and biases of each layer, a binary point per tensor.
             Every candidate is trained with its formats in place (``basic_train``), with halving.
layer        bits of a layer's weights and of its inputs, learned with the weights (``learned_bits``).
channel      bits per output channel of the weights and per channel of the inputs.
element      bits of each weight and of each input.

Networks are chosen on val; those of the front are tested once. EBOPs are counted as HGQ2 does: no signs, biases
included. At each point of the front of ``evolution`` the best network of the others within the same EBOPs is looked up,
by its accuracy on val. Accuracies are those on test, in percent. ``least gain`` is the smallest difference to
``evolution`` over these points, in percentage points, on test and on val. ``points below all EBOPs`` are points of
``evolution`` that are cheaper than every network of a front; they are in no gain. The processor time of a search is
that of the whole call, with measuring and testing.

The dearest and the cheapest network of each learned front are evaluated in whole numbers, with NumPy alone, on 10,000
samples; their logits must have the same bits as those of the deployed network. Where a data set has fewer samples, they
are repeated, shifted by up to a pixel and with noise.
"""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, images, jets, parser, report
from numpy.typing import NDArray
from torch import Tensor, nn

import bitfront as bf
from bitfront import config as configuration
from bitfront import tomlfile
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.loading import load_dataset
from bitfront.engine.rebuild import transform_trial
from bitfront.engine.search import loop
from bitfront.models.base import build_model
from bitfront.population import train_population
from bitfront.training import TrainSettings

sys.path.insert(0, str(ROOT / "tests" / "learned_bits"))
from by_integers import Layer, relu, windows

#: What the last rows of a network say: key in the summary → text.
ROWS = {
    "test": "least gain on test",
    "val": "least gain on val",
    "unreached": "points below all EBOPs",
}
#: Cycles of a training of learned bits.
CYCLES = 12
#: Samples that a network is evaluated on in whole numbers.
SAMPLES = 10_000
GRANULARITIES = ("layer", "channel", "element")
WAYS = ("evolution", *GRANULARITIES)

Floats = NDArray[np.float32]
Layers = Mapping[str, Layer]
Row = dict[str, Any]


class Plain(nn.Module):
    """Three convolutions with strides, two linear layers; images of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.flat, self.fc1, self.fc2 = nn.Flatten(), nn.LazyLinear(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x))))))
        return self.fc2(torch.relu(self.fc1(self.flat(x))))

    @staticmethod
    def by_integers(layers: Layers, x: Floats) -> Floats:
        x = relu(layers["conv3"](relu(layers["conv2"](relu(layers["conv1"](x))))))
        return layers["fc2"](relu(layers["fc1"](x.reshape(len(x), -1))))


class Residual(nn.Module):
    """A stem, a block that adds its input, one with a stride and a convolution in the shortcut; batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv4, self.norm4 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.short, self.norm5 = nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16)
        self.mean, self.flat, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))
        inner = self.norm4(self.conv4(torch.relu(self.norm3(self.conv3(x)))))
        x = torch.relu(inner + self.norm5(self.short(x)))
        return self.fc(self.flat(self.mean(x)))

    @staticmethod
    def by_integers(layers: Layers, x: Floats) -> Floats:
        x = windows(relu(layers["stem"](x)), 2).max(-1)
        x = relu(x + layers["conv2"](relu(layers["conv1"](x))))
        x = relu(layers["conv4"](relu(layers["conv3"](x))) + layers["short"](x))
        return layers["fc"](mean(x))


class Depthwise(nn.Module):
    """Depthwise and pointwise convolutions with batch norms and ReLU6, as in MobileNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep1, self.norm1 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point1, self.norm2 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.deep2, self.norm3 = nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.point2, self.norm4 = nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.act, self.mean, self.flat = nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.norm2(self.point1(self.act(self.norm1(self.deep1(x))))))
        x = self.act(self.norm4(self.point2(self.act(self.norm3(self.deep2(x))))))
        return self.fc(self.flat(self.mean(x)))

    @staticmethod
    def by_integers(layers: Layers, x: Floats) -> Floats:
        for name in ("stem", "deep1", "point1", "deep2", "point2"):
            x = np.minimum(relu(layers[name](x)), np.float32(6))
        return layers["fc"](mean(x))


def mean(x: Floats) -> Floats:
    """Of all positions: a sum, which is exact here, and one division."""
    total = x.sum((2, 3), dtype=np.float64).astype(np.float32)
    return total / np.float32(x.shape[2] * x.shape[3])


def digits_by_integers(layers: Layers, x: Floats) -> Floats:
    """digits-cnn."""
    x = windows(relu(layers["conv1"](x)), 2).max(-1)
    x = windows(relu(layers["conv2"](x)), 2).max(-1)
    return layers["fc2"](relu(layers["fc1"](x.reshape(len(x), -1))))


def jets_by_integers(layers: Layers, x: Floats) -> Floats:
    """jsc-mlp."""
    names = [f"seq_blocks_{i}" for i in (0, 2, 4, 6)]
    for name in names[:-1]:
        x = relu(layers[name](x))
    return layers[names[-1]](x)


@dataclass(frozen=True)
class Case:
    """A network and its data.

    Attributes:
        title: in the table.
        make: the network before it is trained, for some data.
        by_integers: its evaluation in whole numbers.
        data: loads the data.
        epochs: of the training in float.
        turn: epochs of a cycle of learned bits while all weights are alive.
        signed: whether the network's input may be negative.
    """

    title: str
    make: Callable[[Dataset], nn.Module]
    by_integers: Callable[[Layers, Floats], Floats]
    data: Callable[[], Dataset]
    epochs: int
    turn: float
    signed: bool = False


def registered(name: str) -> Callable[[Dataset], nn.Module]:
    return lambda data: build_model(name, data.sample_shape, data.num_classes, 0)


def drawn(network: Callable[[], nn.Module]) -> Callable[[Dataset], nn.Module]:
    def make(data: Dataset) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = network()
            model(data.x["train"][:2])
        return model

    return make


def digits() -> Dataset:
    return load_dataset("digits", DataRequest())


CASES: Mapping[str, Case] = {
    "jets": Case("jets, 16-64-32-32-5", registered("jsc-mlp"), jets_by_integers, lambda: jets()[0], 10, 8, True),
    "digits": Case("digits, digits-cnn", registered("digits-cnn"), digits_by_integers, digits, 40, 36),
    "convolutions": Case("MNIST-10k, convolutions", drawn(Plain), Plain.by_integers, lambda: images()[0], 20, 6),
    "residual": Case("MNIST-10k, residual", drawn(Residual), Residual.by_integers, lambda: images()[0], 20, 6),
    "depthwise": Case("MNIST-10k, depthwise", drawn(Depthwise), Depthwise.by_integers, lambda: images()[0], 20, 8),
}


def in_float(case: Case, data: Dataset, quick: bool) -> nn.Module:
    """The network, trained."""
    model = case.make(data)
    settings = TrainSettings(max_epochs=1 if quick else case.epochs, batch_size=batch(data), learning_rate=3e-3, seed=0)
    (member,) = train_population([model], data, settings)
    model.load_state_dict(member.state)
    return model.eval()


def batch(data: Dataset) -> int:
    """Samples per step of the float training and of candidates."""
    return 512 if len(data.y["train"]) > 100_000 else 64


def space(model: nn.Module, signed: bool) -> dict[str, Any]:
    """Formats per layer. Every layer but the first one follows a ReLU."""
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    seeds = {}
    for place, name in enumerate(names):
        first = signed and not place
        seeds[name.replace(".", "_")] = {
            "config": {
                "name": "integer",
                "data_in_width": [4, 6, 8, 10] if first else [1, 2, 3, 4, 6, 8],
                "data_in_frac_width": "auto",
                "data_in_signed": first,
                "weight_width": [2, 3, 4, 5, 6, 8],
                "weight_frac_width": "auto",
                "bias_width": 6,
                "bias_frac_width": "auto",
            }
        }
    return {"setup": {"by": "name"}, "seed": seeds}


def searched(
    model: nn.Module, data: Dataset, folder: Path, strategy: Mapping[str, Any], formats: Mapping[str, Any]
) -> bf.Run:
    """A search as a file would say it."""
    metrics = {"accuracy": {"direction": "maximize"}, "ebops": {"direction": "minimize"}}
    runners = {"sw_runner": {"basic_evaluation": {}, **strategy.get("sw_runner", {})}, "hw_runner": {"ebops": {}}}
    values = {
        "accelerator": "cpu",
        "seed": 0,
        "batch_size": batch(data),
        "project": "run",
        "project_dir": str(folder),
        "search": {"search_space": dict(formats), "strategy": {**strategy, **runners, "metrics": metrics}},
    }
    return bf.search(configuration.from_document(tomlfile.Document("granularity.py", values)), model=model, data=data)


def by_evolution(seconds: float, quick: bool) -> dict[str, Any]:
    """Evolution for some time."""
    training: dict[str, Any] = {"max_epochs": 1 if quick else 5, "learning_rate": 3e-3}
    if not quick:
        training["halving"] = {"rungs": [1], "keep": 0.5}
    setup = {"n_trials": 4} if quick else {"n_trials": 100_000, "timeout": seconds}
    return {"name": "evolution", "setup": setup, "sw_runner": {"basic_train": training}}


def by_learning(granularity: str, case: Case, quick: bool) -> dict[str, Any]:
    """Learned bits."""
    setup = {"epochs": 1, "cycles": 2, "networks": 2} if quick else {"epochs": case.turn, "cycles": CYCLES}
    return {"name": "learned_bits", "setup": {"weight": granularity, **setup}}


# -- bits of single values, in whole numbers


def many(data: Dataset, count: int) -> Tensor:
    """`count` samples of all splits; if there are fewer, shifted and noised copies too."""
    x = torch.cat([data.x[split] for split in ("test", "val", "train")]).float()
    copies, generator = [x], torch.Generator().manual_seed(0)
    for shift in itertools.cycle((-1, 1)):
        if sum(map(len, copies)) >= count:
            break
        noise = 0.1 * torch.rand(x.shape, generator=generator)
        copies.append((torch.roll(x, shift, -1) + noise).clamp(0, 1))
    return torch.cat(copies)[:count].contiguous()


def differing(run: bf.Run, numbers: Sequence[int], case: Case, model: nn.Module, data: Dataset, count: int) -> int:
    """How many of some networks have other logits than their evaluation in whole numbers."""
    x, wrong = many(data, count), 0
    for number in numbers:
        rebuilt = transform_trial(run.folder, number, data=data, model=model)
        layers = {
            site: Layer(rebuilt.model.get_submodule(path(rebuilt.model, site)), formats)
            for site, formats in rebuilt.formats.items()
        }
        with torch.no_grad():
            logits = torch.cat([rebuilt.model(part) for part in x.split(1000)])
        wrong += not np.array_equal(logits.numpy(), case.by_integers(layers, x.numpy()))
    return wrong


def path(model: nn.Module, site: str) -> str:
    """The path of the module of a site."""
    return next(name for name, _ in model.named_modules() if name.replace(".", "_") == site)


# -- fronts beside each other


@dataclass(frozen=True)
class Point:
    """A network of a front: EBOPs, accuracy on val and on test."""

    cost: float
    val: float
    test: float


def front(run: bf.Run) -> list[Point]:
    return [
        Point(t.metrics["ebops"], t.metrics["accuracy"], t.test_metrics["accuracy"])
        for t in run.front
        if t.test_metrics
    ]


def within(points: Sequence[Point], cost: float) -> Point | None:
    """The network with at most so many EBOPs that is best on val; None if there is none."""
    return max((p for p in points if p.cost <= cost), key=lambda p: p.val, default=None)


def row(network: str, what: str, cost: float | str = "", **columns: Any) -> Row:
    """A row of the table; accuracies as text, so that they keep two digits."""
    filled = {way: columns.get(way, "") for way in WAYS}
    return {"network": network, "what": what, "EBOPs": cost, **filled}


def percent(point: Point | None) -> str:
    return "" if point is None else f"{100 * point.test:.2f}"


def compared(network: str, fronts: Mapping[str, Sequence[Point]]) -> tuple[list[Row], dict[str, float]]:
    """(the fronts, and what the others have at each point of evolution's; least gains)."""
    rows = [
        row(network, f"front of {way}", p.cost, **{way: percent(p)})
        for way, points in fronts.items()
        for p in sorted(points, key=lambda p: p.cost)
    ]
    best: dict[str, list[tuple[Point, Point | None]]] = {way: [] for way in GRANULARITIES}
    for p in sorted(fronts["evolution"], key=lambda p: p.cost):
        others = {way: within(fronts[way], p.cost) for way in GRANULARITIES}
        accuracies = {way: percent(other) for way, other in others.items()}
        rows.append(row(network, "at equal EBOPs", p.cost, evolution=percent(p), **accuracies))
        for way, other in others.items():
            best[way].append((p, other))
    summary: dict[str, float] = {}
    for way, pairs in best.items():
        both = [(p, other) for p, other in pairs if other is not None]
        summary[f"{way}_test"] = 100 * min((o.test - p.test for p, o in both), default=-1)
        summary[f"{way}_val"] = 100 * min((o.val - p.val for p, o in both), default=-1)
        summary[f"{way}_unreached"] = len(pairs) - len(both)
    for name, text in ROWS.items():
        cells = {way: f"{summary[f'{way}_{name}']:{'.0f' if name == 'unreached' else '.2f'}}" for way in GRANULARITIES}
        rows.append(row(network, text, **cells))
    return rows, summary


def measured(case: Case, quick: bool) -> tuple[list[Row], dict[str, float], int]:
    """(rows, least gains, number of networks that differ from their evaluation in whole numbers)."""
    data, network = case.data(), case.title
    if quick:
        data = bf.from_splits({split: tuple(t[:300] for t in data.split(split)) for split in ("train", "val", "test")})
    model = in_float(case, data, quick)
    fronts: dict[str, list[Point]] = {}
    cpu: dict[str, str] = {}
    networks: dict[str, str] = {}
    longest, unequal = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for way in reversed(WAYS):
            evolves = way == "evolution"
            strategy = by_evolution(longest, quick) if evolves else by_learning(way, case, quick)
            before = time.process_time()
            run = searched(model, data, Path(folder) / way, strategy, space(model, case.signed) if evolves else {})
            seconds = time.process_time() - before
            cpu[way], longest = f"{seconds:.0f}", max(longest, seconds)
            fronts[way], networks[way] = front(run), str(len(run))
            if way != "evolution":
                ends = sorted(run.front, key=lambda t: t.metrics["ebops"])
                numbers = list(dict.fromkeys((ends[0].number, ends[-1].number)))
                unequal += differing(run, numbers, case, model, data, 200 if quick else SAMPLES)
            print(f"{network}, {way}: {cpu[way]} s of processor time, {networks[way]} networks", flush=True)
    rows, summary = compared(network, {way: fronts[way] for way in WAYS})
    rows += [row(network, "processor time, s", **cpu), row(network, "networks measured", **networks)]
    return rows, summary, unequal


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--only", choices=list(CASES), action="append", help="only this network")
    given = options.parse_args()
    torch.set_num_threads(1)
    # Timeouts are times of the processor.
    loop.Limits = functools.partial(loop.Limits, clock=time.process_time)  # type: ignore[assignment, misc]
    rows: list[Row] = []
    summary: dict[str, float] = {}
    unequal = 0
    for network in given.only or (("digits", "residual") if given.quick else CASES):
        more, gains, wrong = measured(CASES[network], given.quick)
        rows, unequal = [*rows, *more], unequal + wrong
        summary |= {f"{network}_{name}": gain for name, gain in gains.items()}
    summary["differing_networks"] = unequal
    data = f"{jets()[1]}; {images()[1]}; scikit-learn's digits"
    report("Bits per layer, channel and element", rows, summary, given.json, data=data)


if __name__ == "__main__":
    main()
