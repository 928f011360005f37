"""Runs of any shape, written through the store as a search writes them."""

from pathlib import Path

import numpy as np

from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.store import Store

CONFIG = """\
model = "digits-mlp"
dataset = "digits"
project = '{project}'

[search.search_space.seed.default.config]
name = ["NA"]

[search.strategy]
name = "brute_force"
"""
UNITS = {"accuracy": "", "average_bitwidth": "bits", "loss": "nats", "model_size": "bytes"}


def choice(operand, *widths):
    """An operand with these widths to choose from; a width of None is float, one of text a multiplier."""
    settings = []
    for width in widths:
        if width is None:
            settings.append({"label": "float", "set": {}, "bits": 32})
        elif isinstance(width, str):
            settings.append({"label": width, "set": {"multiplier": float(width[1:])}, "width": 8})
        else:
            values = {"width": width, "frac_width": "auto"}
            settings.append({"label": f"int{width}.auto", "set": values, "bits": width})
    return {"operand": operand, "settings": settings}


def site(name, *operands, optional=False):
    """A site with one format, and the choice to stay in float if `optional`."""
    alternatives = [{"name": "integer", "operands": list(operands)}]
    return {"site": name, "alternatives": ([{"name": "NA", "operands": []}] if optional else []) + alternatives}


TWO = (site("fc1", choice("data_in", 4, 8), choice("weight", 2, 4, 8)),)


def write(
    folder: Path,
    codes,
    metrics,
    *,
    space=TWO,
    objectives=(("accuracy", "maximize"), ("average_bitwidth", "minimize")),
    errors=None,
    samples=1000,
    summed=None,
    project="synthetic",
    stopped="space exhausted",
    durations=None,
    reference=None,
    constraints=(),
) -> Run:
    """Write the run folder of a search with these trials, and load it; codes of shape (trials, parameters)."""
    codes = np.asarray(codes, dtype=np.int64)
    values = {m: np.asarray(v, dtype=np.float64) for m, v in metrics.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(project=project), encoding="utf-8")
    store = Store.open(folder / STORE, list(values), codes.shape[1], {"parameters": list(range(codes.shape[1]))})
    store.set_meta("space", list(space))
    store.set_meta("stopped", stopped)
    hardware = {"average_bitwidth", "model_size"}
    store.set_meta(
        "summary",
        {
            "objectives": [{"metric": m, "scale": 1.0, "direction": d} for m, d in objectives],
            "summed": summed,
            "sides": {m: "hw_runner" if m in hardware else "sw_runner" for m in values},
            "units": {m: UNITS.get(m, "") for m in values},
            "kinds": {m: ["measured", ""] for m in values},
            "samples": samples,
            "reference": {"accuracy": 0.97, "average_bitwidth": 32.0} if reference is None else reference,
            "sites": len(space),
            "size": "0",
            "constraints": list(constraints),
        },
    )
    durations = np.full(len(codes), 0.001) if durations is None else durations
    store.add(codes, values, errors or [""] * len(codes), durations)
    store.close()
    return Run.load(folder)


def drawn(count, seed=0):
    """Random results of `count` trials of a space of two parameters, as ``write`` takes them."""
    rng = np.random.default_rng(seed)
    return np.zeros((count, 2), dtype=np.int64), {
        m: rng.random(count) for m in ("accuracy", "average_bitwidth", "loss")
    }


def full_grid(space=TWO):
    """Every code of a space of one format per site."""
    counts = [len(o["settings"]) for s in space for o in s["alternatives"][0]["operands"] if len(o["settings"]) > 1]
    return np.stack(np.meshgrid(*(np.arange(c) for c in counts), indexing="ij"), axis=-1).reshape(-1, len(counts))
