"""From a trial of a run to files for hardware: rebuilds the trial and hands it to a target."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bitfront.data.base import Dataset
from bitfront.data.targets import CLASSES
from bitfront.engine.rebuild import candidate_of, evaluated
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.trial import NOTHING, Trial
from bitfront.errors import RunError
from bitfront.events import Events
from bitfront.exporters.exporting import Exported, target_named
from bitfront.exporters.exporting import export as write
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate
from bitfront.files import shown
from bitfront.transforms.correct import corrected

#: Samples that are compared, if nothing else is said; the split may have fewer.
SAMPLES = 1000


def export(
    trial: Trial | Run | str | Path,
    number: int | None = None,
    *,
    to: str,
    output: str | Path | None = None,
    check: bool = True,
    samples: int = SAMPLES,
    settings: Mapping[str, Any] | None = None,
    data: Any = None,
    model: nn.Module | None = None,
    events: Events | None = None,
) -> Exported:
    """Write a trial for hardware or another runtime; read the files back and compare every number.

    Args:
        trial: a trial of a run, ``run.trial(12)``; or a run or its folder, with `number`.
        number: the number of the trial, if `trial` is a run.
        to: the target; ``bitfront list targets`` shows all.
        output: the folder for the files; default: below the run folder, ``exported/trial-12-c``.
        check: whether the files are run with the target's judge. If not, the name of the folder says so.
        samples: how many samples are compared, from the validation split.
        settings: of the target.
        data, model: the same objects that the search was given from Python, if it was; left out, they are those of the
            call that made the run of `trial`. A folder has none.
        events: receives notes.

    Raises:
        RunError: there is no such run or trial, or its model or data has changed since the search.
        ExportError: the trial cannot be written for this target; the message names the layer.
        ConfigError: there is no such target, or a setting is wrong.
    """
    target = target_named(to, settings)
    folder, number = _place(trial, number)
    given = NOTHING if isinstance(trial, str | Path) else trial.given
    data, model = given.data if data is None else data, given.model if model is None else model
    rebuilt = candidate_of(folder, number, data=data, model=model, events=events)
    evaluator, dataset = rebuilt.evaluator, rebuilt.plan.dataset
    name = re.sub(r"\W+", "_", f"{folder.name}_{number}")
    graph, formats, corrections = evaluator.parts(rebuilt.code)
    candidate = Candidate(
        name if not name[0].isdigit() else f"net_{name}",
        corrected(graph, corrections),
        formats,
        evaluator.model(rebuilt.code, bake=True),
        f"trial {number} of {shown(folder)}",
        rebuilt.trial.metrics,
        dataset.class_names if dataset.targets is CLASSES else (),
        _standardised(dataset),
        dataset.notes,
    )

    def metrics_of(changed: nn.Module) -> dict[str, float]:
        evaluation = evaluated(rebuilt, changed)
        return {} if evaluation is None else evaluation.values

    x = dataset.split("val")[0][:samples].float().cpu()
    place = Path(output) if output else folder / "exported" / f"trial-{number}-{TARGETS.official(to)}"
    return write(candidate, target, place, x, check=check, measure=metrics_of, events=events)


def _standardised(dataset: Dataset) -> list[tuple[str, float, float]]:
    """(name, mean, scale) of each feature; of none where they are taken as they are."""
    if dataset.scaler is None:
        return []
    count = len(dataset.scaler.mean)
    named = len(dataset.feature_names) == count
    names = dataset.feature_names if named else [f"feature {i}" for i in range(count)]
    return list(zip(names, dataset.scaler.mean, dataset.scaler.scale, strict=True))


def _place(trial: Trial | Run | str | Path, number: int | None) -> tuple[Path, int]:
    """(the run folder, the number of the trial)."""
    if isinstance(trial, Trial):
        if trial.folder is None:
            raise RunError("this trial belongs to no run folder; give the folder and the number")
        return trial.folder, trial.number
    if number is None:
        raise RunError("give the number of the trial too: export(run, 12, to=...)")
    return (trial.folder if isinstance(trial, Run) else Path(trial)), number
