"""What one candidate costs in float forward passes, and how far both are from what the machine can do.

The unit is one forward pass of the float model on the same samples, compiled by ``torch.compile`` (the compilation is
not counted; without a C++ compiler the model runs eagerly, and the table says so), on 1 or 2 threads, whichever is
faster. Six models: ``digits-cnn``, a ResNet-20, a MobileNetV2 and a ViT-Tiny on 32 × 32 × 3, a DS-CNN for keywords, and
a BERT of Hugging Face that cannot be traced (four layers of width 128, 32 tokens). Integers of 3, 4, 6 or 8 bits for
the input and the weights of every convolution and linear layer, so 16 options at each. Two streams of candidates
through ``FixedEvaluator.evaluate``, loss and accuracy for each:

nsga-ii        Generations of 50 new candidates, as a genetic search proposes them (tournaments, crossover, mutation on
               the codes, here against a cheap formula instead of an accuracy, so that the stream is always the same).
brute-force    Consecutive candidates, in the order of the space.

Calibration is done once a search; it is timed apart (``set-up``). A forward pass is timed between blocks of
candidates. FLOPs are those of ``torch.utils.flop_counter`` (a multiply-add is two). GFLOP/s of a stream are effective:
what a loop would have to reach that runs every candidate whole. They are not arithmetic done, and exceed the ceiling
where work is shared. In a large space consecutive candidates differ in the last few layers only, so the brute-force
stream says what sharing can give at best, not what a search of the whole space costs. Nothing is believed unchecked: a
failed candidate ends the benchmark, and one of each block is evaluated whole and must give the same loss and accuracy
(exit status 1). Ceilings: a 1024³ float matrix product, and a copy of 256 MB
(read and written bytes). What does not fit into the time limit is left out: ``candidates`` says how many were run.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from common import make_job, measured, paired, parser, report, spread, timed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import bert, tokens

from bitfront.engine.evaluation.fixed import BatchMetrics, FixedEvaluator
from bitfront.models.base import build_model
from bitfront.scoring import evaluate
from bitfront.spaces.base import Codes, Space
from models import DsCnn, MobileNet, VisionTransformer, resnet20, settled

WIDTHS = [3, 4, 6, 8]
#: Fixed point, and integers with a scale per tensor of the input and per channel of the weight.
FORMATS: dict[str, dict[str, Any]] = {
    "integer": {
        "name": ["integer"],
        "data_in_width": WIDTHS,
        "data_in_frac_width": ["auto"],
        "weight_width": WIDTHS,
        "weight_frac_width": ["auto"],
        "bias_width": [16],
        "bias_frac_width": ["auto"],
    },
    "affine": {"name": ["affine"], "data_in_width": WIDTHS, "weight_width": WIDTHS},
}
GENERATION = 50


# -- streams of candidates


def nsga2(space: Space, generations: int, size: int, seed: int = 0) -> Iterator[Codes]:
    """Generations of new candidates: each differs from all before, as the search drops what it knows."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.2, 1.0, len(space.parameters))
    seen: set[bytes] = set()

    def new(batch: Codes) -> Codes:
        fresh = []
        for code in space.canonical(batch):
            if code.tobytes() not in seen:
                seen.add(code.tobytes())
                fresh.append(code)
        return np.array(fresh, dtype=np.int64).reshape(-1, len(space.parameters))

    def fitness(codes: Codes) -> np.ndarray:
        # The error falls fourfold with each step of a width; the cost rises.
        return np.stack([(weight * 4.0**-codes).sum(1), codes.sum(1, dtype=float)], axis=1)

    parents = new(space.sample(size, rng))
    yield parents
    for _ in range(generations - 1):
        rank = ranked(fitness(parents))
        children = np.zeros((0, len(space.parameters)), dtype=np.int64)
        while len(children) < size:
            one, other = (tournament(parents, rank, size, rng) for _ in range(2))
            child = np.where(rng.random(one.shape) < 0.5, one, other)
            mutates = rng.random(child.shape) < 1 / len(space.parameters)
            child = np.where(mutates, rng.integers(0, space.cardinalities, child.shape), child)
            children = np.concatenate([children, new(child)])[:size]
        yield children
        everyone = np.concatenate([parents, children])
        parents = everyone[np.argsort(ranked(fitness(everyone)), kind="stable")[:size]]


def tournament(parents: Codes, rank: np.ndarray, size: int, rng: np.random.Generator) -> Codes:
    drawn = rng.integers(0, len(parents), (2, size))
    return parents[np.where(rank[drawn[0]] <= rank[drawn[1]], drawn[0], drawn[1])]


def ranked(values: np.ndarray) -> np.ndarray:
    """Fronts in order, the crowded of each front last, as one number."""
    left, rank = np.arange(len(values)), np.zeros(len(values))
    front = 0
    while len(left):
        remaining = values[left]
        beaten = ((remaining[:, None] >= remaining[None]).all(2) & (remaining[:, None] > remaining[None]).any(2)).any(1)
        members = left[~beaten]
        rank[members] = front + crowding(values[members]) / 2
        left, front = left[beaten], front + 1
    return rank


def crowding(values: np.ndarray) -> np.ndarray:
    """0 for the loneliest, towards 1 for the crowded."""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = max(float(np.ptp(column)), 1e-12)
        gaps = np.full(len(values), np.inf)
        gaps[1:-1] = (column[order][2:] - column[order][:-2]) / span
        distance[order] += gaps
    return 1 / (1 + distance)


def consecutive(space: Space, count: int, block: int) -> Iterator[Codes]:
    # From the middle, so that leading layers are not all at their narrowest.
    first = space.size // 2
    for start in range(first, first + count, block):
        yield space.numbered(start, min(start + block, first + count))


# -- the machine and the float model


def ceilings(quick: bool) -> dict[str, float]:
    """GFLOP/s of a matrix product, GB/s of a copy."""
    n = 256 if quick else 1024
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    source, target = torch.randn(2**20 if quick else 2**25), torch.empty(2**20 if quick else 2**25)
    figures = {}
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        repeats = 3 if quick else 12
        product = min(timed(lambda: torch.mm(a, b, out=c)) for _ in range(repeats))
        copy = min(timed(lambda: target.copy_(source)) for _ in range(repeats))
        figures[f"gemm_gflops_{threads}"] = 2 * n**3 / product / 1e9
        figures[f"copy_gbs_{threads}"] = 2 * source.nbytes / copy / 1e9
    torch.set_num_threads(before)
    return figures


def compiled(model: nn.Module, x: Tensor, quick: bool) -> tuple[Callable[[], object], str, float]:
    """(one forward pass, what runs it, seconds of compilation)."""

    def run(module: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def forward() -> Tensor:
            with torch.no_grad():
                return module(x)

        return forward

    if quick:
        return run(model), "eager (--quick)", 0.0
    try:
        forward = run(torch.compile(model))
        seconds = timed(forward)
    except Exception as error:  # whatever the tool chain lacks
        reason = str(error).strip().splitlines() or [""]
        return run(model), f"eager ({type(error).__name__}: {reason[0][:60]})", 0.0
    return forward, "torch.compile", seconds


def flops(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


class Forward:
    """The unit: a float forward pass on its better number of threads, timed whenever it is called."""

    def __init__(self, forward: Callable[[], object]) -> None:
        self._forward = forward
        self.seconds: list[float] = []
        self.threads = 1
        for _ in range(2):
            forward()
        times = paired({"1": lambda: self._on(1), "2": lambda: self._on(2)}, 6)
        self.threads = min((1, 2), key=lambda n: statistics.median(times[str(n)]))

    def _on(self, threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            self._forward()
        finally:
            torch.set_num_threads(before)

    def __call__(self) -> None:
        self._on(self.threads)  # the first pass finds the caches as the candidates left them
        self.seconds.append(timed(lambda: self._on(self.threads)))


# -- the comparison


def stream(
    evaluator: FixedEvaluator, blocks: Iterator[Codes], forward: Forward, limit: float
) -> tuple[int, float, float]:
    """(candidates, their seconds in all, largest difference to running whole); a forward pass between blocks."""
    count, seconds, worst = 0, 0.0, 0.0
    results: list[BatchMetrics] = []
    for codes in blocks:
        measured_in = timed(lambda codes=codes: results.append(measured(evaluator, codes)))
        count, seconds = count + len(codes), seconds + measured_in
        forward()
        worst = max(worst, difference(evaluator, codes[-1], results[-1]))  # finite: whatever is not has failed
        if seconds > limit:
            break
    return count, seconds, worst


def difference(evaluator: FixedEvaluator, code: np.ndarray, block: BatchMetrics) -> float:
    """Between the last candidate of a block and the same one rebuilt and run whole; loss or accuracy, the larger."""
    whole = evaluate(evaluator.model(code), *evaluator.job.splits["val"])
    return max(abs(whole.loss - block.values["loss"][-1]), abs(whole.accuracy - block.values["accuracy"][-1]))


def calibrated(evaluator: FixedEvaluator) -> None:
    """Builds one candidate per option, so that every format has learned its scale."""
    options = max(g.size for g in evaluator.space.groups)
    rows = np.array([[min(i, g.size - 1) for g in evaluator.space.groups] for i in range(options)], dtype=np.int64)
    for code in evaluator.space.codes(rows):
        evaluator.model(code)


def compare(
    name: str, form: str, model: nn.Module, x: Tensor, y: Tensor, limit: float, ceiling: dict[str, float], quick: bool
) -> tuple[list[dict[str, object]], dict[str, float]]:
    widths = {"data_in_width": WIDTHS[::2], "weight_width": WIDTHS[::2]} if quick else {}
    operation = {**FORMATS[form], **widths}
    job = make_job(model, x, y, {"conv2d": operation, "linear": operation})
    work = flops(model, x)
    run, how, compilation = compiled(model, x, quick)
    forward = Forward(run)
    generations, generation, block = (2, 4, 8) if quick else (20, GENERATION, 256)
    streams: dict[str, Callable[[Space], Iterator[Codes]]] = {
        "nsga-ii": lambda space: nsga2(space, generations, generation),
        "brute-force": lambda space: consecutive(space, 8 if quick else 1024, block),
    }
    rows: list[dict[str, Any]] = []
    key = f"{name}_{form}".replace("-", "_")
    summary: dict[str, float] = {f"{key}_compile_s": compilation}

    def row(what: str, count: int, each: float, set_up: float | str, unit: float) -> dict[str, Any]:
        return {
            "model": name,
            "format": form,
            "samples": len(y),
            "what": what,
            "candidates": count,
            "set-up s": set_up,
            "ms": 1e3 * each,
            "float forwards": each / unit,
            "GFLOP": work / 1e9,
            "effective GFLOP/s": work / each / 1e9,
            "of 1-thread GEMM": work / each / 1e9 / ceiling["gemm_gflops_1"],
            "of 2-thread GEMM": work / each / 1e9 / ceiling["gemm_gflops_2"],
        }

    evaluator = FixedEvaluator(job)
    set_up = timed(lambda: calibrated(evaluator))
    for what, make in streams.items():
        forward.seconds.clear()
        count, seconds, worst = stream(evaluator, make(evaluator.space), forward, limit)
        unit = spread(forward.seconds)["median"]
        if not rows:
            threads = f"{forward.threads} thread{'s' * (forward.threads > 1)}"
            rows.append(row(f"float forward, {how}, {threads}", 0, unit, "", unit))
            summary[f"{key}_float_ms"] = 1e3 * unit
        rows.append(row(what, count, seconds / count, set_up, unit))
        summary["max_difference"] = max(worst, summary.get("max_difference", 0.0))
        summary[f"{key}_{what.replace('-', '_')}_forwards"] = seconds / count / unit
    return rows, summary


def seeded_bert() -> nn.Module:
    torch.manual_seed(0)
    return bert()


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="NAMES", default="", help="models, separated by commas")
    options = arguments.parse_args()
    began = time.perf_counter()
    quick = options.quick
    generator = torch.Generator().manual_seed(0)
    ceiling = ceilings(quick)
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int, float]] = [
        ("digits-cnn", lambda: build_model("digits-cnn", (1, 8, 8), 10, seed=0).eval(), (1, 8, 8), 512, 10.0),
        ("resnet-20", lambda: resnet20(blocks=1 if quick else 3), (3, 32, 32), 64, 20.0),
        ("mobilenet", lambda: settled(MobileNet, (3, 32, 32)), (3, 32, 32), 64, 20.0),
        ("ds-cnn", lambda: settled(DsCnn, (1, 49, 10)), (1, 49, 10), 64, 15.0),
        ("vit-tiny", lambda: settled(VisionTransformer, (3, 32, 32)), (3, 32, 32), 32, 25.0),
        ("bert-tiny", seeded_bert, (), 32, 20.0),
    ]
    cases = [case for case in cases if not options.only or case[0] in options.only.split(",")]
    if importlib.util.find_spec("transformers") is None:
        print("bert-tiny is left out: transformers is not installed", file=sys.stderr)
        cases = [case for case in cases if case[0] != "bert-tiny"]
    rows: list[dict[str, object]] = []
    summary: dict[str, float] = dict(ceiling)
    for name, make, shape, most, limit in cases:
        model, samples = make().eval(), most // 32 if quick else most
        x = torch.randn(samples, *shape, generator=generator) if shape else tokens(samples, generator)
        with torch.no_grad():
            classes = min(10, model(x[:2]).shape[1])
        y = torch.randint(classes, (samples,), generator=generator)
        for form in FORMATS:
            case_rows, figures = compare(name, form, model, x, y, 0 if quick else limit, ceiling, quick)
            rows += case_rows
            worst = max(figures.pop("max_difference"), summary.get("max_difference", 0.0))
            summary |= {**figures, "max_difference": worst}
    for what in ("nsga_ii", "brute_force"):
        summary[f"{what}_forwards"] = max(v for k, v in summary.items() if k.endswith(f"_{what}_forwards"))
    summary["seconds_in_all"] = time.perf_counter() - began
    data = "random samples; random weights, batch norms calibrated"
    report("A candidate in float forward passes", rows, summary, options.json, data=data)
    wrong = not summary["max_difference"] <= 1e-6
    if wrong:
        print("candidates of a stream differ from the same ones run whole", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
