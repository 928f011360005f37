"""MLflow: a run per search in an experiment, with its trials as steps or as child runs.

Without ``MLFLOW_TRACKING_URI`` and without a ``uri``, everything is beside the run folder: ``mlflow.db`` and
``mlartifacts/``. The run has the search's id as a tag, by which a later session finds it. What it has is asked from the
server: the steps of every metric, and the child runs with their states.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from bitfront.files import shown
from bitfront.trackers import TRACKERS
from bitfront.trackers.base import Outcome, Point, Search, Tracker, TrackerSettings, Trials

if TYPE_CHECKING:
    from mlflow.entities import Run as MLflowRun

#: Tags by which runs are looked up.
SEARCH, PARENT, TRIAL = "bitfront.search", "bitfront.parent", "bitfront.trial"
#: The largest numbers of metrics, and of parameters or tags, that a server takes at once.
METRICS, PARAMETERS = 1000, 100
#: Characters of the longest value of a parameter or a tag.
LONGEST = 6000
#: Where nothing else is said. MLflow would report its use to its makers, and would wait minutes for a lost server.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


class MLflowSettings(TrackerSettings):
    """``[search.track.mlflow]``."""

    uri: str | None = Field(
        None, description="where to log; default: `MLFLOW_TRACKING_URI`, or `mlflow.db` beside the run folder"
    )
    experiment: str = Field("bitfront", min_length=1, description="the experiment; it is created if there is none")
    trials: Trials = Field("steps", description="trials as steps of one run, or each as a child run with its choices")


@TRACKERS.register("mlflow")
class MLflow(Tracker):
    """A run of MLflow, on this machine unless MLFLOW_TRACKING_URI or a setting names a server."""

    Settings: ClassVar[type[TrackerSettings]] = MLflowSettings
    settings: MLflowSettings
    module: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    @classmethod
    def require(cls, purpose: str, arguments: Sequence[str] = ()) -> None:
        """As of every tracker, but the environment of MLflow comes first, because it is read by the import."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        super().require(purpose, arguments)

    def begin(self, search: Search) -> None:
        """Find or make the run, and ask what it has."""
        from mlflow.tracking import MlflowClient

        self._search = search
        with _quiet():
            beside = search.run.folder.resolve().parent
            local = self.settings.uri is None and not os.environ.get("MLFLOW_TRACKING_URI")
            uri = f"sqlite:///{beside / 'mlflow.db'}" if local else self.settings.uri
            self._client = MlflowClient(tracking_uri=uri)
            self._experiment = self._experiment_id((beside / "mlartifacts").as_uri() if local else None)
        found = self._runs(SEARCH)
        run = found[0] if found else self._create(search.name, {SEARCH: search.id})
        self._run = run.info.run_id
        uri = f"sqlite:///{shown(beside / 'mlflow.db')}" if local else self._client.tracking_uri
        self.place = f"mlflow ui --backend-store-uri {uri}, experiment {self.settings.experiment}"
        self._client.update_run(self._run, status="RUNNING")
        self._parametrise(run)
        self._known = {
            (key, metric.step) for key in run.data.metrics for metric in self._client.get_metric_history(self._run, key)
        }
        self._children = self._runs(PARENT) if self.settings.trials == "runs" else []
        self._of_trial = {int(child.data.tags[TRIAL]): child for child in self._children}

    def add(self, points: Sequence[Point]) -> None:
        """Send what the server lacks; a step is sent in one request."""
        if self.settings.trials == "runs":
            for point in points:
                if point.trial is not None:
                    self._add_child(point)
        batch: list[tuple[str, float, int]] = []
        for point in points:
            shown = point.front if self.settings.trials == "runs" else point.metrics
            entries = [(_key(name), value, point.number) for name, value in shown.items()]
            new = [entry for entry in entries if (entry[0], entry[2]) not in self._known]
            if len(batch) + len(new) > METRICS:  # a point is not divided
                self._send(batch)
                batch = []
            batch += new
        self._send(batch)

    def end(self, outcome: Outcome | None) -> None:
        """Send the front and the files, and end the run."""
        if outcome is None:
            self._client.set_terminated(self._run, "FAILED")
            return
        rows = [list(row) for row in outcome.rows]
        self._client.log_dict(self._run, {"columns": list(outcome.columns), "data": rows}, "front.json")
        self._client.set_tag(self._run, "mlflow.loggedArtifacts", '[{"path": "front.json", "type": "table"}]')
        for path in outcome.files:
            self._client.log_artifact(self._run, str(path))
        self._client.set_tag(self._run, "bitfront.stopped", outcome.run.stopped)
        self._client.set_terminated(self._run, "KILLED" if outcome.interrupted else "FINISHED")

    def _experiment_id(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(self.settings.experiment)
        if found is None:
            return str(self._client.create_experiment(self.settings.experiment, artifact_location=artifacts))
        return str(found.experiment_id)

    def _runs(self, tag: str) -> list[MLflowRun]:
        """The runs whose `tag` is the id of the search, the first one first."""
        runs: list[MLflowRun] = []
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment],
                filter_string=f"tags.`{tag}` = '{self._search.id}'",
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _create(self, name: str, tags: Mapping[str, str]) -> MLflowRun:
        tags = {"mlflow.source.name": "bitfront", **tags}
        return self._client.create_run(self._experiment, run_name=name, tags=tags)

    def _parametrise(self, run: MLflowRun) -> None:
        """Keep the configuration and the tags. A parameter cannot be changed: a new value is kept as a tag."""
        from mlflow.entities import RunTag

        given = {_key(key): value for key, value in self._search.configuration.items()}
        first = run.data.params
        self._send_parameters(self._run, {key: value for key, value in given.items() if key not in first})
        tags = self._search.tags
        tags |= {f"bitfront.now.{k}": v for k, v in given.items() if k in first and v[:LONGEST] != first[k]}
        for some in _parts(list(tags.items())):
            self._client.log_batch(self._run, tags=[RunTag(_key(key), value[:LONGEST]) for key, value in some])

    def _send_parameters(self, run: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        for some in _parts(list(values.items())):
            self._client.log_batch(run, params=[Param(_key(key), value[:LONGEST]) for key, value in some])

    def _send(self, entries: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        if entries:
            now = int(time.time() * 1000)
            self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value, step in entries])
            self._known.update((name, step) for name, _, step in entries)

    def _add_child(self, point: Point) -> None:
        """Keep a trial as a child run. It is ended last, so that one that a kill has cut short is known."""
        child = self._of_trial.get(point.number)
        if child is not None and child.info.status != "RUNNING":
            return
        from mlflow.entities import Metric

        if child is None:
            tags = {"mlflow.parentRunId": self._run, PARENT: self._search.id, TRIAL: str(point.number)}
            child = self._create(f"trial {point.number}", tags)
            self._of_trial[point.number] = child
        identifier = child.info.run_id
        self._send_parameters(identifier, self._search.choices(point.code))
        # With the time at which it began, what an earlier session has sent is the same metric, and not a second one.
        metrics = [Metric(_key(k), v, child.info.start_time, point.number) for k, v in point.of_trial.items()]
        known = child.data.metrics
        self._client.log_batch(identifier, metrics=[m for m in metrics if m.key not in known])
        self._client.set_terminated(identifier, "FAILED" if point.failed else "FINISHED")
        self._of_trial[point.number] = self._client.get_run(identifier)


def _parts(items: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    for start in range(0, len(items), PARAMETERS):
        yield items[start : start + PARAMETERS]


def _key(name: str) -> str:
    """`name` in the letters that MLflow takes."""
    return re.sub(r"[^\w\-./ :]", "_", name, flags=re.ASCII)[:250]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that MLflow prints when it makes its database."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
