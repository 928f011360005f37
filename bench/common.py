"""What the benchmarks share: options, the machine, timing in turns, data, and the table and JSON at the end.

Timings of this project are ratios of things measured in turns (a, b, a, b, ...) in one process, because machines are
shared and clocks move; the median of the paired ratios is what is reported, and ``spread`` says how far to trust it.
A script ends by calling ``report``, which prints a plain table and, with ``--json FILE``, writes
``{"machine", "rows", "summary"}`` for ``bench/plots.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfront.data import jsc  # noqa: F401  (registers the dataset)
from bitfront.data.arrays import from_arrays
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.loading import load_dataset
from bitfront.engine.evaluation.fixed import BatchMetrics, EvaluationJob, FixedEvaluator
from bitfront.errors import DataError
from bitfront.metrics.configured import ConfiguredRunner, configured_runner
from bitfront.spaces.base import Codes
from bitfront.spaces.request import Choices
from bitfront.training import TrainSettings, train

ROOT = Path(__file__).parents[1]
SPACE = "graph/quantize/mixed_precision_ptq"
#: Loss and accuracy on all samples of the job, and one closed-form cost.
RUNNERS = (configured_runner("basic_evaluation"), configured_runner("average_bitwidth"))
#: As it was before the benchmark itself loaded the machine.
LOAD_AT_START = os.getloadavg()[0]

Row = Mapping[str, object]


def source_now() -> str:
    """Which code is measured: a digest of all of Bitfront's files, committed or not."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "src" / "bitfront").rglob("*")):
        if file.is_file() and file.suffix in (".py", ".c", ".cpp", ".h"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


#: As the modules were imported from, unless somebody edits between these lines and the last import.
SOURCE_AT_START = source_now()


# -- options, machine, table


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has. Give it the module's docstring."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", metavar="FILE", type=Path, help="also write machine, rows and summary to this file")
    options.add_argument("--quick", action="store_true", help="tiny sizes: does it run? The numbers mean nothing")
    return options


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "bitfront": importlib.metadata.version("bitfront"),
        "commit": _said(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "source": SOURCE_AT_START,
        "source_changed": source_now() != SOURCE_AT_START,
        "compiler": _said([compiler, "--version"]) if compiler else "none",
        "load_at_start": round(LOAD_AT_START, 2),
    }


def report(
    title: str,
    rows: Sequence[Row],
    summary: Mapping[str, float],
    json_path: Path | None,
    *,
    data: str = "",
) -> None:
    """Print header, table and summary; write them as JSON where `json_path` is given.

    Args:
        rows: all with the same keys, which are the columns.
        summary: the numbers that are compared with targets.
        data: what was evaluated on, for the header.
    """
    header = {**machine(), **({"data": data} if data else {})}
    print(title)
    for key, value in header.items():
        print(f"  {key}: {value}")
    print()
    print(table(rows))
    print()
    for key, value in summary.items():
        print(f"{key} = {cell(value)}")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": header, "rows": [dict(r) for r in rows], "summary": dict(summary)}
        json_path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """`rows` as aligned text, or as a table of Markdown; numbers to the right."""
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [[cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    right = [all(isinstance(row[c], (int, float)) or row[c] in ("", None) for row in rows) for c in columns]

    def line(texts: Sequence[str]) -> str:
        padded = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(columns), line(rule) if markdown else line(["-" * w for w in widths]), *map(line, cells)])


def cell(value: object) -> str:
    """A value as it stands in a table: three significant digits, thousands separated."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits <= 6 else f"{value:.2e}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _said(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:
        return "unknown"
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


# -- measuring, and not believing it too soon


def measured(evaluator: FixedEvaluator, codes: Codes) -> BatchMetrics:
    """``evaluator.evaluate(codes)``; raises where a candidate failed."""
    return succeeded(evaluator.evaluate(codes))


def succeeded(batch: BatchMetrics) -> BatchMetrics:
    """Raises where a candidate failed, because failing is fast."""
    failed = [error for error in batch.errors if error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(batch)} candidates failed, the first with: {failed[0]}")
    return batch


# -- timing


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(
    functions: Mapping[str, Callable[[], object]], repeats: int, *, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns: entry i of all lists was measured in round i.

    Nothing is warmed up here; the caller does what fairness asks for. The order turns round from round to round, so
    that nobody always runs after the same neighbour.

    Args:
        repeats: rounds, at most.
        seconds: no new round begins after that long; the first always runs.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    end = time.perf_counter() + seconds
    for i in range(repeats):
        if i and time.perf_counter() > end:
            break
        for name in order if i % 2 == 0 else reversed(order):
            times[name].append(timed(functions[name]))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """``{"median", "q1", "q3"}`` of some measurements."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the paired ratios: how many times as long the first one takes."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


# -- data and models


def jets() -> tuple[Dataset, str]:
    """(data, what it is) for the jet models.

    The real jets, where a file is in ``BITFRONT_DATA`` or beside the checkout; else clusters of the same shape.
    """
    folders = [Path(f) for f in (os.environ.get("BITFRONT_DATA"), ROOT.parent / "shared" / "data") if f]
    for file in (folder / "jsc.npz" for folder in folders):
        if file.is_file():
            try:
                data = load_dataset("jsc", DataRequest(path=file))
                return data, f"{data.name}, {sum(len(y) for y in data.y.values()):,} jets, from {file.name}"
            except DataError as error:
                print(f"{file}: {error}")
    return clusters(), "synthetic clusters of the shape of the jets (16 features, 5 classes): there is no jsc.npz"


def images() -> tuple[Dataset, str]:
    """(data, what it is): MNIST images, where the file is in ``BITFRONT_DATA`` or beside the checkout; else digits."""
    folders = [Path(f) for f in (os.environ.get("BITFRONT_DATA"), ROOT.parent / "shared" / "data") if f]
    for file in (folder / "mnist_t10k.npz" for folder in folders):
        if file.is_file():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "mnist.npz"
                with np.load(file) as held:
                    arrays = {name: held[name] for name in held.files}
                for name in ("X_train", "X_test"):
                    arrays[name] = arrays[name].reshape(-1, 1, 28, 28)
                np.savez(path, **arrays)
                data = load_dataset("npz", DataRequest(path=path))
            return data, f"MNIST-10k, {len(data.y['test']):,} test images, from {file.name}"
    return load_dataset("digits", DataRequest()), "scikit-learn's digits: there is no mnist_t10k.npz"


def clusters(samples: int = 120_000, features: int = 16, classes: int = 5, seed: int = 0) -> Dataset:
    """Overlapping Gaussian clusters, three per class: about as hard as the jets."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3 * classes, features, generator=generator)
    which = torch.randint(3 * classes, (samples,), generator=generator)
    x = centres[which] + torch.randn(samples, features, generator=generator)
    return from_arrays(x, which % classes, standardise=True, seed=seed, name="clusters")


def trained(model: nn.Module, data: Dataset, *, steps: int = 300, seed: int = 0) -> nn.Module:
    """`model` after a short training, on one thread: enough to have weights worth quantizing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = TrainSettings(max_epochs=100, max_steps=steps, batch_size=512, learning_rate=5e-3, seed=seed)
        small = Dataset(
            data.name,
            {"train": data.x["train"], "val": data.x["val"][:1000]},
            {"train": data.y["train"], "val": data.y["val"][:1000]},
            data.class_names,
            data.source,
        )
        result = train(model, small, settings)
    finally:
        torch.set_num_threads(threads)
    model.load_state_dict(result.last_state)
    return model.eval()


def make_job(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    choices: Choices,
    *,
    by: str = "type",
    calibration: Tensor | None = None,
    runners: Sequence[ConfiguredRunner] = RUNNERS,
) -> EvaluationJob:
    """The job of evaluating candidates of `model` on exactly these samples.

    Args:
        choices: site, type or "default" → choices, as below ``[search.search_space.seed]`` in the TOML.
        calibration: what formats learn from; default: the first 512 of the samples.
    """
    return EvaluationJob(
        model=model,
        sample=x[:2],
        space=SPACE,
        by=by,
        choices=choices,
        runners=tuple(runners),
        splits={"val": (x, y)},
        calibration=x[:512] if calibration is None else calibration,
    )
