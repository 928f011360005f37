"""The JSON files of a run folder: ``best.json`` and ``log.json``, each written completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitfront.checkpoints.cycles import learned_network
from bitfront.engine.storage.records import ENOUGH
from bitfront.engine.storage.run import LOGGED, Run
from bitfront.engine.storage.trial import Trial
from bitfront.files import whole


def write_results(folder: Path, run: Run) -> None:
    """Write best.json and log.json into a run folder, each completely or not at all.

    Raises:
        RunError: a file cannot be written.
    """
    write_records(folder / "best.json", (_record(run, t) for t in run.front))
    write_records(folder / "log.json", (_record(run, run.row(r), timed=True) for r in _logged(run)))


def _logged(run: Run) -> list[int]:
    """Rows of the trials in log.json: all, or in a very long run the first ones and the front."""
    if len(run) <= LOGGED:
        return list(range(len(run)))
    return sorted({*range(LOGGED), *run.front_rows.tolist()})


def _record(run: Run, trial: Trial, *, timed: bool = False) -> dict[str, Any]:
    # best.json contains no times, so that the same search writes the same bytes.
    record: dict[str, Any] = {
        "number": trial.number,
        "value": trial.values[0] if len(trial.values) == 1 else list(trial.values),
        "software_metrics": dict(trial.software_metrics),
        "hardware_metrics": dict(trial.hardware_metrics),
        "scaled_metrics": dict(trial.scaled_metrics),
        "sampled_config": trial.config,
        "intervals": {m: list(i) for m, i in trial.intervals.items()},
    }
    learned = learned_network(run.folder, trial.config)
    if learned is not None:
        record["learned_bits"] = learned.summary
    if trial.test_metrics:
        record["test_metrics"] = dict(trial.test_metrics)
    if trial.finetuned is not None:
        record["finetuned"] = {k: v for k, v in vars(trial.finetuned).items() if k != "number"}
    if run.stopped.startswith(ENOUGH):
        record["stopped"] = run.stopped
    if timed:
        record |= {"state": trial.state.upper(), "duration": trial.duration}
        if trial.error:
            record["error"] = trial.error
    return record


def write_json(path: Path, document: object) -> None:
    """Write `document` as JSON, completely or not at all; NaN becomes null.

    Raises:
        RunError: the file cannot be written.
    """
    _write(path, [json.dumps(_finite(document), indent=2, ensure_ascii=False)])


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records with the keys "0", "1", ..., as pandas does with ``orient="index"``, one after the other.

    Raises:
        RunError: the file cannot be written.
    """
    _write(path, _texts(records))


def _texts(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The text that ``json.dumps`` would give for all records together, in pieces."""
    end = "{}"
    for i, record in enumerate(records):
        text = json.dumps({str(i): _finite(record)}, indent=2, ensure_ascii=False)
        yield ("," if i else "{") + text[1:-2]
        end = "\n}"
    yield end


def _write(path: Path, texts: Iterable[str]) -> None:
    with whole(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(texts)
        file.write("\n")


def _finite(value: object) -> object:
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value
