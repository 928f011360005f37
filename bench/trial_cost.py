"""What one candidate costs, in Bitfront and in the loops that people write without it.

Two jet classifiers, on 512 and on 16,384 samples: ``jsc-mlp`` (16-64-32-32-5; 15 settings at each of 4 Linear layers,
50,625 candidates) and ``jsc-tiny`` (16-5 with batch norm and two ReLUs; 375 candidates). Four ways to the loss and
accuracy of a candidate:

bitfront       A new ``FixedEvaluator`` per round, so capture, calibration and tables are paid for in every round; then
               the search's ``Dispatcher`` in its blocks: the whole space where the time allows it, else its first
               candidates. As shipped: Bitfront decides how many threads it uses.
plain          The loop of a good PyTorch user: a deepcopy of the model, its layers swapped for fake-quantized ones with
               torch's fused fake-quantize, resident tensors, inference mode. On 1 or 2 threads, whichever is faster.
dataloader     The loop of a framework: the model traced and rebuilt as a graph module for each candidate, a new
               ``DataLoader`` over the validation split (batches of 512, 2 workers), running metrics.
dataloader-0   The same at its best: no workers, one thread.

The loops run random candidates of the same space on the same samples, and take turns with Bitfront in one process;
they get the calibrated formats for nothing. A time per candidate is the median over rounds, a ratio is the median of
the rounds' ratios. On the plain loop's candidates Bitfront must give the same accuracy: exit status 1 where it does
not.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from common import clusters, jets, make_job, measured, paired, parser, ratio, report, spread, succeeded, timed, trained
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator
from bitfront.formats.integer import Integer
from bitfront.models.base import build_model
from bitfront.spaces.base import Codes

WIDE_BIAS = {"bias_width": [16], "bias_frac_width": ["auto"]}
LINEAR = {
    "name": ["integer"],
    "data_in_width": [4, 6, 8],
    "data_in_frac_width": ["auto"],
    "weight_width": [2, 3, 4, 6, 8],
    "weight_frac_width": ["auto"],
    **WIDE_BIAS,
}
RELU = {"name": ["integer"], "data_in_width": [2, 3, 4, 6, 8], "data_in_frac_width": ["auto"]}
SPACES = {"jsc-mlp": {"linear": LINEAR}, "jsc-tiny": {"linear": LINEAR, "relu": RELU}}
#: Candidates that tell how long the others will take.
PROBE = 128

Formats = Mapping[str, Mapping[str, Integer]]
"""Path of a layer → operand → format: a candidate as the loops get it."""
Metrics = tuple[float, float]
"""Loss and accuracy."""


# -- the plain loop


def rounded(x: Tensor, form: Integer | None) -> Tensor:
    if form is None:
        return x
    assert isinstance(form.frac_width, int)
    return torch.fake_quantize_per_tensor_affine(x, 2.0**-form.frac_width, 0, *form.codes)


class FakeQuantLinear(nn.Module):
    """A linear layer; its weights are quantized once, before the first batch."""

    def __init__(self, layer: nn.Linear, formats: Mapping[str, Integer]) -> None:
        super().__init__()
        self.formats = formats
        self.weight = rounded(layer.weight.detach(), formats.get("weight"))
        self.bias = rounded(layer.bias.detach(), formats.get("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded(x, self.formats.get("data_in")), self.weight, self.bias)


class FakeQuantReLU(nn.Module):
    def __init__(self, formats: Mapping[str, Integer]) -> None:
        super().__init__()
        self.formats = formats

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(rounded(x, self.formats.get("data_in")))


def swap(model: nn.Module, formats: Formats) -> nn.Module:
    for path, operands in formats.items():
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(path)
        twin = FakeQuantLinear(layer, operands) if isinstance(layer, nn.Linear) else FakeQuantReLU(operands)
        setattr(model.get_submodule(parent), name, twin)
    return model


def plain(model: nn.Module, formats: Formats, x: Tensor, y: Tensor) -> Metrics:
    candidate = swap(copy.deepcopy(model), formats).eval()
    with torch.inference_mode():
        logits = candidate(x)
        return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


# -- the loop with a DataLoader


class RunningMean:
    """A metric as frameworks keep them: state that each batch updates and the end reads."""

    def __init__(self) -> None:
        self.total, self.weight = torch.tensor(0.0), torch.tensor(0.0)

    def update(self, value: Tensor, weight: int) -> None:
        self.total += value * weight
        self.weight += weight

    def compute(self) -> float:
        return (self.total / self.weight).item()


def through_loader(model: nn.Module, formats: Formats, data: TensorDataset, samples: int, workers: int) -> Metrics:
    traced = fx.GraphModule(swap(copy.deepcopy(model), formats), fx.symbolic_trace(model).graph).eval()
    traced.recompile()
    loader = DataLoader(data, batch_size=512, num_workers=workers)
    loss, accuracy, seen = RunningMean(), RunningMean(), 0
    with torch.no_grad():
        for x, y in loader:
            logits = traced(x)
            loss.update(F.cross_entropy(logits, y), len(y))
            accuracy.update((logits.argmax(1) == y).float().mean(), len(y))
            seen += len(y)
            if seen >= samples:
                break
    return loss.compute(), accuracy.compute()


# -- the comparison


@dataclass(frozen=True)
class Case:
    """One model on one number of samples. `seconds`: what its rounds may take; the counts are candidates a round."""

    name: str
    model: nn.Module
    job: EvaluationJob
    split: TensorDataset
    samples: int
    seconds: float
    plain: int
    loader: int
    bitfront: int
    rounds: int


def formats_of(evaluator: FixedEvaluator, code: np.ndarray) -> Formats:
    return {
        path: dict(operands)
        for path, m in evaluator.model(code).named_modules()
        if (operands := getattr(m, "formats", None))
    }


def run_bitfront(job: EvaluationJob, codes: Codes) -> None:
    for _, batch in Dispatcher(FixedEvaluator(job)).blocks(codes):
        succeeded(batch)


def on_threads(threads: int, function: Callable[[], object]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        function()
    finally:
        torch.set_num_threads(before)


def best_threads(function: Callable[[], object]) -> int:
    """1 or 2, in short turns."""
    times = paired({str(n): lambda n=n: on_threads(n, function) for n in (1, 2)}, 4)
    return min((1, 2), key=lambda n: statistics.median(times[str(n)][1:]))


def compare(case: Case) -> tuple[list[dict[str, object]], dict[str, float], tuple[float, float]]:
    """(rows, figure → value, largest difference of accuracy and loss between Bitfront and the plain loop)."""
    evaluator = FixedEvaluator(case.job)
    space = evaluator.space
    picked = np.random.default_rng(0).choice(space.size, min(case.plain, space.size), replace=False)
    codes = np.concatenate([space.numbered(int(i), int(i) + 1) for i in picked])
    candidates = [formats_of(evaluator, code) for code in codes]
    x, y = case.job.splits["val"]

    def plain_loop() -> list[Metrics]:
        return [plain(case.model, formats, x, y) for formats in candidates]

    def loader_loop(workers: int) -> list[Metrics]:
        wanted = candidates[: case.loader]
        return [through_loader(case.model, formats, case.split, case.samples, workers) for formats in wanted]

    ours, theirs = measured(evaluator, codes), np.array(plain_loop())
    differences = (
        float(np.abs(ours.values["accuracy"] - theirs[:, 1]).max()),
        float(np.abs(ours.values["loss"] - theirs[:, 0]).max()),
    )
    loader_loop(0)  # its first call, unlike Bitfront's, is not counted

    # As much of the space as fits into half of the time; all of it where Bitfront is as fast as it should be.
    probe = space.numbered(0, min(PROBE, case.bitfront))
    each = timed(lambda: measured(evaluator, probe)) / len(probe)
    wanted = min(case.bitfront, space.size)
    if each * wanted > case.seconds / 2:
        wanted = min(wanted, max(len(probe), int(case.seconds / 2 / each)))
    whole = space.numbered(0, wanted)
    threads = best_threads(lambda: [plain(case.model, f, x, y) for f in candidates[:10]])
    times = paired(
        {
            "bitfront": lambda: run_bitfront(case.job, whole),
            f"plain, {threads} thread{'s' * (threads > 1)}": lambda: on_threads(threads, plain_loop),
            "dataloader, 2 workers": lambda: loader_loop(2),
            "dataloader, 0 workers": lambda: on_threads(1, lambda: loader_loop(0)),
        },
        case.rounds,
        seconds=case.seconds,
    )
    counts = dict(zip(times, (len(whole), len(candidates), case.loader, case.loader), strict=True))
    each_of = {name: [1e3 * t / counts[name] for t in values] for name, values in times.items()}
    bitfront_ms = each_of["bitfront"]
    rows = [
        {
            "model": case.name,
            "samples": case.samples,
            "loop": name,
            "candidates": counts[name],
            "rounds": len(values),
            "ms/candidate": spread(values)["median"],
            "q1": spread(values)["q1"],
            "q3": spread(values)["q3"],
            "times bitfront": ratio(values, bitfront_ms),
        }
        for name, values in each_of.items()
    ]
    plain_ms, loader_ms, tuned_ms = (v for name, v in each_of.items() if name != "bitfront")
    figures = {
        "ms_per_candidate": statistics.median(bitfront_ms),
        "vs_plain": ratio(plain_ms, bitfront_ms),
        "vs_dataloader": ratio(loader_ms, bitfront_ms),
        "vs_dataloader_tuned": ratio(tuned_ms, bitfront_ms),
    }
    return rows, figures, differences


def main() -> int:
    options = parser(__doc__).parse_args()
    began = time.perf_counter()
    quick = options.quick
    data, described = (clusters(3000), "synthetic clusters, 3,000") if quick else jets()
    x, y = data.split("val")
    rows: list[dict[str, object]] = []
    summary: dict[str, float] = {}
    differences = []
    for name, prefix in (("jsc-mlp", ""), ("jsc-tiny", "tiny_")):
        model = trained(
            build_model(name, data.sample_shape, data.num_classes, seed=0), data, steps=20 if quick else 300
        )
        for samples in (512, 16_384):
            n = min(samples, len(y))
            job = make_job(model, x[:n], y[:n], SPACES[name], calibration=data.split("train")[0][:512])
            large = samples > 512
            case = Case(
                name=name,
                model=model,
                job=job,
                split=TensorDataset(x, y),
                samples=n,
                seconds=0 if quick else {("jsc-mlp", 512): 12, ("jsc-mlp", 16_384): 12}.get((name, samples), 3),
                plain=4 if quick else 40 if large else 200,
                loader=1 if quick else 3 if large else 5,
                bitfront=8 if quick else 15**3 if large else 15**4,
                rounds=1 if quick else 7,
            )
            case_rows, figures, difference = compare(case)
            rows += case_rows
            summary.update({f"{prefix}{key}_{samples}": value for key, value in figures.items()})
            differences.append(difference)
    summary["max_accuracy_difference"] = max(d[0] for d in differences)
    summary["max_loss_difference"] = max(d[1] for d in differences)
    summary["seconds_in_all"] = time.perf_counter() - began
    report("What one candidate costs", rows, summary, options.json, data=described)
    # Accuracies are counts over samples; the plain loop's mean is float32.
    # Written so that NaN is wrong too.
    wrong = not summary["max_accuracy_difference"] <= 1e-6
    if wrong:
        print("Bitfront and the plain loop disagree on accuracy", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
