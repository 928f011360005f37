"""The result of a search, read from its run folder: its trials, its front, its best trial. Nothing is measured here.

The folder contains ``config.toml`` (with all values that took effect), ``trials.sqlite``, ``best.json`` (the front, or
the single best trial), ``log.json`` (every trial; if there are more than 10,000, the first 10,000 and the front) and
``checkpoints/``. The JSON files are objects with the keys "0", "1", ..., as pandas writes with ``orient="index"``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfront import config as configuration
from bitfront.config import Config
from bitfront.constraints import Constraint, fulfilled, parse_constraint
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.database import REMEDY
from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.records import Finetuned, InFloat, Optimism, OptionCosts, PairedComparison, Quality
from bitfront.engine.storage.store import Store
from bitfront.engine.storage.trial import NOTHING, FromPython, Trial, Trials
from bitfront.engine.storage.trials import TrialColumns
from bitfront.errors import ConfigError, RunError, nearest, one_of, parsing, require
from bitfront.metrics.intervals import wilson
from bitfront.objectives import Objective, Objectives
from bitfront.pareto import non_dominated
from bitfront.spaces.described import DescribedSpace
from bitfront.spaces.margins import Margins

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from torch import nn

    from bitfront.engine.explanation.results import Explanation

#: If a run has more trials than this, log.json has only the first ones and the front, and a table of trials has no
#: configs: a million of them spelled out would take gigabytes. The store has all trials.
LOGGED = 10_000
#: What a user should know of a run folder of an earlier version.
UNCHECKED = (
    "an earlier version of Bitfront wrote this run folder, without checksums: damage to its numbers would not be "
    "noticed; the search, given again, adds them"
)
#: The metrics of a classification that say how good the answers are.
CLASSIFIES = {"loss": Quality("minimize"), "accuracy": Quality("maximize", share=True)}
SIDES = {"sw_runner": "software_metrics", "hw_runner": "hardware_metrics"}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished or running search.

    Attributes:
        folder: the run folder.
        config: the configuration of the search.
        columns: the trials as arrays; faster and smaller than ``trials`` if there are many.
        objectives: what was optimised.
        space: the space as text, which spells out candidates.
        sides: metric → the table of its runner, ``sw_runner`` or ``hw_runner``.
        units: metric → unit.
        kinds: metric → (``measured``, ``modelled`` or ``estimated``; the reason if that is not the usual kind).
        samples: number of samples that accuracy, or what leads, was measured on; None if it was not measured.
        reference: metric → value of the float model.
        reference_test: metric → value of the float model on the test split; empty if there is none.
        test_results: trial number → metric → value on the test split.
        stopped: why the search ended; empty while it runs.
        constraints: what every trial of the front fulfils. Bounds relative to the float model are resolved.
        compared: paired comparisons of the trials of the front, the most accurate first.
        optimism: by how much the front looks better on the samples of the search than on the test split; None where
            that was not measured.
        finetuned: trial number → the result of fine-tuning.
        in_float: what stays in float in every candidate.
        float_shares: number of a trial of the front → the shares of the weights and of the multiply-accumulates that
            it leaves in float, 0 to 1.
        notes: remarks for the user.
        leading: the metric of the task that leads: it is on the axes of figures, and trials are compared in it.
        qualities: the metrics that say how good the answers are, for constraints.
        stored_intervals: number of a trial of the front, or "float" → metric → 95 % interval; of other tasks than
            classification.
        option_costs: metric → what each option of each group adds to it, for metrics in closed form that are sums over
            the groups; empty where the search was of an earlier version.
        noise: per group the estimate of how much each option disturbs the outputs; empty where none was made.
        margins: what each option alone does to the outputs for some samples of a classification; None where that was
            not measured.
        given: the model and the data of the call that made the run, where it came from Python; nothing of a run that
            was read from its folder.
    """

    folder: Path
    config: Config
    columns: TrialColumns
    objectives: Objectives
    space: DescribedSpace
    sides: Mapping[str, str]
    units: Mapping[str, str]
    kinds: Mapping[str, tuple[str, str]]
    samples: int | None
    reference: Mapping[str, float]
    reference_test: Mapping[str, float]
    test_results: Mapping[int, Mapping[str, float]]
    stopped: str
    constraints: tuple[Constraint, ...] = ()
    compared: tuple[PairedComparison, ...] = ()
    optimism: Optimism | None = None
    finetuned: Mapping[int, Finetuned] = field(default_factory=dict)
    in_float: InFloat = field(default_factory=InFloat)
    float_shares: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    leading: str = "accuracy"
    qualities: Mapping[str, Quality] = field(default_factory=lambda: CLASSIFIES)
    stored_intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    option_costs: Mapping[str, OptionCosts] = field(default_factory=dict)
    noise: tuple[tuple[float, ...], ...] = ()
    margins: Margins | None = None
    given: FromPython = NOTHING

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read the run in `folder`.

        Raises:
            RunError: there is none, it is damaged, or of another version.
        """
        folder = Path(folder)
        remedy = "give another path"
        with parsing(RunError, f"{str(folder)!r} cannot be read as a run folder", remedy):
            if not folder.is_dir():
                raise RunError(f"{folder}: there is no such run folder{_runs_beside(folder)}")
            if not (folder / STORE).is_file():
                raise RunError(f"{folder}: this folder has no {STORE}; a search writes it{_runs_beside(folder)}")
        with contextlib.closing(stores.read(folder / STORE)) as store:
            if store.meta("summary") is None:
                raise RunError(f"{folder / STORE}: the search stopped before its first trial; start it again")
            config = _config(folder, store.meta("config"))
            with parsing(RunError, f"{folder / STORE} is damaged", REMEDY):
                return cls._of(folder, config, store, store.meta("summary"))

    @classmethod
    def _of(cls, folder: Path, config: Config, store: Store, summary: Mapping[str, Any]) -> Run:
        """The run in a store. What a store without checksums holds may be anything, and raises anything."""
        space, columns = DescribedSpace(store.meta("space")), store.trials()
        for codes in np.array_split(columns.packed, max(1, len(columns) >> 16)):
            space.check(codes.astype(np.int64))
        if set(summary["sides"]) != set(columns.metrics) or not set(summary["sides"].values()) <= set(SIDES):
            raise ValueError("its summary is of other metrics than its trials")
        task = summary.get("task", {})
        return cls(
            folder=folder,
            config=config,
            columns=columns,
            objectives=Objectives(tuple(Objective(**p) for p in summary["objectives"]), summary["summed"]),
            space=space,
            sides=summary["sides"],
            units=summary.get("units", {}),
            kinds={m: (kind, why) for m, (kind, why) in summary.get("kinds", {}).items()},
            samples=summary["samples"],
            reference=summary["reference"],
            reference_test=store.meta("reference_test") or {},
            test_results=store.test_results(),
            stopped=store.meta("stopped") or "",
            constraints=tuple(Constraint(**c) for c in summary.get("constraints", ())),
            compared=tuple(PairedComparison(**c) for c in store.meta("compared") or ()),
            optimism=Optimism(**found) if (found := store.meta("optimism")) else None,
            finetuned={f["number"]: Finetuned(**f) for f in (store.meta("finetuned") or {}).get("trials", ())},
            in_float=InFloat(**{**found, "largest": tuple(found["largest"])})
            if (found := summary.get("in_float"))
            else InFloat(),
            float_shares={int(n): (w, m) for n, (w, m) in (store.meta("float_shares") or {}).items()},
            notes=() if store.has_checksums else (UNCHECKED,),
            leading=task.get("leading", "accuracy"),
            qualities={q["name"]: Quality(q["direction"], q["share"]) for q in task["qualities"]}
            if task
            else CLASSIFIES,
            stored_intervals={
                str(name): {metric: (float(low), float(high)) for metric, (low, high) in of.items()}
                for name, of in (store.meta("intervals") or {}).items()
            },
            option_costs={
                m: OptionCosts(kept["first"], tuple(map(tuple, kept["options"])))
                for m, kept in (store.meta("option_costs") or {}).items()
            },
            noise=tuple(map(tuple, kept)) if isinstance(kept := store.meta("noise"), list) else (),
            margins=Margins.from_json(store.meta("margins")),
        )

    def __len__(self) -> int:
        return len(self.columns)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}: {len(self)} trials, {len(self.front)} on the front, {self.stopped})"

    def _repr_html_(self) -> str:
        import bitfront  # loads what draws when it is used

        return bitfront._html(self)

    def plot(self) -> Figure:
        """The front as a matplotlib figure: what leads over each cost, as ``figures/front.png`` of the report has it.

        A notebook shows it; ``run.plot().savefig("front.pdf")`` writes it.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        import bitfront  # loads what draws when it is used

        return bitfront._plot(self)

    def model(self, number: int, *, model: nn.Module | None = None, data: Any = None) -> nn.Module:
        """The network of a trial, in evaluation mode, with the quantized weights in its parameters.

        Nothing is written; ``bitfront.transform_trial`` saves the network and knows its formats too.

        Args:
            number: the number of the trial.
            model, data: what the search was given from Python, if it was; left out, they are those of the call that
                made this run. A run that was read from its folder has none, and is given them here.

        Raises:
            RunError: there is no such trial, its model or data is missing, or has changed since the search.
        """
        import bitfront  # loads what rebuilds when it is used

        return bitfront.transform_trial(self, number, model=model, data=data, save=False).model

    @cached_property
    def trials(self) -> Trials:
        """Every evaluated candidate, by number, spelled out. ``columns`` is faster and smaller for a million trials."""
        return Trials((self.row(row) for row in range(len(self.columns))), self)

    @property
    def frame(self) -> pandas.DataFrame:
        """The trials as a pandas DataFrame, one row per trial.

        The index is the number. The columns are ``state`` (``complete`` or ``failed``), one per metric, one per
        objective (``scaled:`` and its name), ``duration`` (seconds), ``error`` and ``config``. With more than 10,000
        trials there is no ``config``; ``run.trial(number).config`` spells out one trial.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        frame = require("pandas", "pandas", "run.frame")
        columns = self.columns
        table = {
            "state": np.where(columns.complete, "complete", "failed").astype(object),
            **columns.metrics,
            **{f"scaled:{m}": v for m, v in self.objectives.scaled(columns.metrics).items()},
            "duration": columns.duration,
            "error": [columns.errors.get(n, "") for n in columns.number.tolist()],
        }
        if len(columns) <= LOGGED:
            table["config"] = [self.space.decode(code) for code in columns.code]
        return frame.DataFrame(table, index=frame.Index(columns.number, name="number"))

    @cached_property
    def front(self) -> Trials:
        """The trials that fulfil the constraints and that no other such trial dominates. With one objective it is a
        single trial, the first one with the best value."""
        return Trials((self.row(int(row)) for row in self.front_rows), self)

    @cached_property
    def front_rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows of the front in ``columns``."""
        rows = non_dominated(self._losses)
        return rows[:1] if len(self.objectives.directions) == 1 else rows

    @property
    def ranked_rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows in ``columns`` of the trials that fulfil the constraints, sorted by the first objective, best first."""
        first = self._losses[:, 0]
        order: np.ndarray[Any, np.dtype[np.int64]] = np.argsort(first, kind="stable")
        return order[: int((~np.isnan(first)).sum())]

    @property
    def _losses(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Objectives to be minimised; NaN for trials that failed or violate a constraint."""
        losses = self.objectives.losses(self.columns.metrics)
        losses[~self.columns.complete] = np.nan  # a failed trial may still have values of the objectives
        if self.constraints and len(self):
            losses[~fulfilled(self.constraints, self.columns.metrics)] = np.nan
        return losses

    def trial(self, number: int) -> Trial:
        """The trial with that number.

        Raises:
            RunError: there is no such trial.
        """
        row = self.columns.position(number)
        if row is None:
            count = len(self)
            span = f"it has {count:,} trials, 0 to {int(self.columns.number[-1])}" if count else "it has no trials yet"
            raise RunError(f"{self.folder}: there is no trial {number}; {span}")
        return self.row(row)

    def best(self, *constraints: str, minimize: str | None = None, maximize: str | None = None) -> Trial:
        """The best stored trial under constraints. Nothing is evaluated.

        Args:
            constraints: e.g. ``"average_bitwidth <= 4"``, ``"accuracy_drop <= 1 %"``, ``"model_size <= 2 kB"``; any
                metric of the run, with units as in ``[search.constraints]``. The constraints of the search apply too.
            minimize, maximize: the metric to choose by; by default the first objective.

        Raises:
            ConfigError: a constraint cannot be read or names a metric that the run does not have, or both `minimize`
                and `maximize` are given.
            RunError: no trial fulfils the constraints; the message gives the range of the metric that fails.
        """
        if minimize and maximize:
            raise ConfigError("give either minimize or maximize, not both")
        metrics = self.columns.metrics
        allowed = self.columns.complete.copy()
        added = [self.constraint(text) for text in constraints]
        for constraint in (*self.constraints, *added):
            fine = constraint.excess(metrics[constraint.metric]) == 0
            if not (allowed & fine).any():
                near = metrics[constraint.metric][allowed]
                span = (
                    f"the range of {constraint.metric} is {np.nanmin(near):g} to {np.nanmax(near):g}"
                    if len(near)
                    else ""
                )
                reached = span or "none is left"
                raise RunError(f"no trial fulfils {constraint.text!r} (with the constraints before it {reached})")
            allowed &= fine
        if not allowed.any():
            raise RunError(f"{self.folder}: no trial is complete")
        if minimize or maximize:
            loss = self._column(minimize or maximize or "") * (1 if minimize else -1)
        else:
            loss = self.objectives.losses(metrics)[:, 0]
        rows = np.flatnonzero(allowed & ~np.isnan(loss))
        # Among equally good trials: the one that is better in the other objectives, then the first one.
        others = self.objectives.losses(metrics)
        order = np.lexsort([rows, *others[rows].T[::-1], loss[rows]])
        return self.row(int(rows[order[0]]))

    def constraint(self, text: str) -> Constraint:
        """The constraint in a statement on a metric of this run, with a bound relative to the float model resolved.

        Raises:
            ConfigError: the statement cannot be read, or names a metric that the run does not have.
        """
        metrics = self.columns.metrics
        known = {name: _RunMetric(name, self.units.get(name, ""), self.qualities.get(name)) for name in metrics}
        return parse_constraint(text, known).resolved(self.reference)

    def explain(
        self, trial: int | None = None, *, budgets: Sequence[str] = (), metric: str | None = None
    ) -> Explanation:
        """What the stored trials tell of the layers; nothing is evaluated. See ``bitfront.explain``.

        Args:
            trial: the number of a trial whose options are explained.
            budgets: e.g. ``"model_size <= 2 kB"``; for each the best candidate, as far as the trials tell.
            metric: the measured metric that is explained; None: the first measured objective.
        """
        import bitfront  # loads what explains when it is used

        return bitfront.explain(self, trial, budgets=budgets, metric=metric)

    def _column(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        if name not in self.columns.metrics:
            known = list(self.columns.metrics)
            raise ConfigError(f"this run has no metric {name!r}; {one_of(known)}.{nearest(name, known)}")
        return self.columns.metrics[name]

    def row(self, row: int) -> Trial:
        """The trial in a row of ``columns``."""
        columns = self.columns
        values = {m: float(v[row]) for m, v in columns.metrics.items()}
        code = columns.codes([row])[0]
        single = {m: v[row : row + 1] for m, v in columns.metrics.items()}
        number = int(columns.number[row])
        return Trial(
            number=number,
            code=tuple(code.tolist()),
            config=self.space.decode(code),
            software_metrics={m: v for m, v in values.items() if self.sides[m] == "sw_runner"},
            hardware_metrics={m: v for m, v in values.items() if self.sides[m] == "hw_runner"},
            scaled_metrics={m: float(v[0]) for m, v in self.objectives.scaled(single).items()},
            values=tuple(float(v) for v in self.objectives.values(single)[0]),
            intervals=self.intervals(values, str(number)),
            test_metrics=dict(self.test_results.get(number, {})),
            finetuned=self.finetuned.get(number),
            state="complete" if columns.complete[row] else "failed",
            error=columns.errors.get(number, ""),
            duration=float(columns.duration[row]),
            folder=self.folder,
            given=self.given,
        )

    def intervals(self, values: Mapping[str, float], of: str = "") -> dict[str, tuple[float, float]]:
        """Metric → 95 % interval (low, high), for the metrics that have one.

        Args:
            values: metric → value of one trial.
            of: the number of the trial, or "float" for the float model; empty for other values.
        """
        intervals = {
            name: (values[f"{name}_low"], values[f"{name}_high"])
            for name in values
            # A modelled value has no spread: its low and high are equal.
            if values.get(f"{name}_low", 0.0) < values.get(f"{name}_high", 0.0)
        }
        accuracy = values.get("accuracy", float("nan"))
        if self.samples is not None and not np.isnan(accuracy):
            intervals["accuracy"] = wilson(accuracy, self.samples)
        return intervals | {m: ends for m, ends in self.stored_intervals.get(of, {}).items() if m in values}


@dataclass(frozen=True)
class _RunMetric:
    """What the parser of constraints asks of a metric."""

    name: str
    unit: str
    of_quality: Quality | None

    @property
    def direction(self) -> str:
        return self.of_quality.direction if self.of_quality else ""

    @property
    def quality(self) -> bool:
        return self.of_quality is not None

    @property
    def share(self) -> bool:
        return self.of_quality is not None and self.of_quality.share


def _config(folder: Path, digest: str | None) -> Config:
    """The configuration in a run folder; `digest` is the checksum that the search stored of it, None in older ones."""
    path = folder / "config.toml"
    with parsing(RunError, f"{path} cannot be read", REMEDY):
        if path.exists() and not path.is_file():
            raise RunError(f"{path} cannot be read: it is no regular file; {REMEDY}", arguments=["restart=True"])
        if digest is not None and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise RunError(
                f"{path} is not what the search wrote: it is damaged, or was edited; the same search command, given "
                "again, writes it again"
            )
    return configuration.load_config(path)


def _runs_beside(folder: Path) -> str:
    runs = sorted(p.parent.name for p in folder.parent.glob(f"*/{STORE}")) if folder.parent.is_dir() else []
    return f"; runs in {folder.parent}: {', '.join(runs)}" if runs else ""
