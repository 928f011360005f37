"""trackio: a run per search in a local project; ``trackio show --project bitfront`` shows it.

``trackio.log`` hands its values to a thread, which drops them where they cannot be written. So they are written with
the function that this thread calls: it writes all of a call or nothing, and leaves out what has an identifier that is
there already. The identifiers are those of the search and the trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bitfront.trackers import TRACKERS
from bitfront.trackers.base import Outcome, Point, Search, Tracker, TrackerSettings, Trials

if TYPE_CHECKING:
    pass


class TrackioSettings(TrackerSettings):
    """``[search.track.trackio]``."""

    project: str = Field("bitfront", min_length=1, description="the project; it is created if there is none")
    trials: Trials = Field("steps", description="trials as steps of one run, or each as a run of a group")


@TRACKERS.register("trackio")
class Trackio(Tracker):
    """A run of trackio on this machine, in its usual folder or in that of TRACKIO_DIR."""

    Settings: ClassVar[type[TrackerSettings]] = TrackioSettings
    settings: TrackioSettings
    module: ClassVar[str] = "trackio"
    extra: ClassVar[str] = "trackio"

    def begin(self, search: Search) -> None:
        """Look up the database, and write nothing yet."""
        from trackio.sqlite_storage import SQLiteStorage

        self._search, self._storage = search, SQLiteStorage
        SQLiteStorage.validate_project_name(self.settings.project)
        self.place = f"trackio show --project {self.settings.project}"
        self._config = _described(search, search.name if self.settings.trials == "runs" else None)

    def add(self, points: Sequence[Point]) -> None:
        """Write all points in one transaction; in `runs`, one per trial."""
        if self.settings.trials == "steps":
            self._log([(p.number, str(p.number), p.metrics) for p in points])
            return
        for point in points:
            if point.trial is not None:
                name = f"{self._search.name} trial {point.number}"
                config = {"_Created": _now(), "_Group": self._search.name, **self._search.choices(point.code)}
                self._write(name, f"{self._search.id}-{point.number}", [(point.number, "", point.of_trial)], config)
        self._log([(p.number, str(p.number), p.front) for p in points])

    def end(self, outcome: Outcome | None) -> None:
        """Write the front and the files, unless an earlier session has done that after the same trial."""
        if outcome is None or outcome.last < 0:
            return
        name = f"front-{outcome.last}"
        logged = self._storage.get_logs(self.settings.project, run_id=self._search.id)
        if any("front" in row for row in logged if row["step"] == outcome.last):
            return
        if outcome.files:
            self._keep_files(outcome.files)
        self._log([(outcome.last, name, self._shown(outcome))])  # last: it says that all of this is done

    def _log(self, entries: Sequence[tuple[int, str, Mapping[str, Any]]]) -> None:
        self._write(self._search.name, self._search.id, entries, self._config)

    def _write(
        self, name: str, identifier: str, entries: Sequence[tuple[int, str, Mapping[str, Any]]], config: dict[str, Any]
    ) -> None:
        """Write (step, name, values) of a run; an entry without values, or whose name it has, is left out."""
        entries = [entry for entry in entries if entry[2]]
        if not entries:
            return
        self._storage.bulk_log(
            project=self.settings.project,
            run=name,
            run_id=identifier,
            steps=[step for step, _, _ in entries],
            log_ids=[f"{identifier}-{entry}" for _, entry, _ in entries],
            metrics_list=[dict(values) for _, _, values in entries],
            config=config,
        )

    def _shown(self, outcome: Outcome) -> dict[str, Any]:
        """The front as a table and as a picture, as trackio stores them."""
        import trackio

        project, name, step = self.settings.project, self._search.name, outcome.last
        table = trackio.Table(columns=list(outcome.columns), data=[list(row) for row in outcome.rows])
        shown = {"front": table._to_dict(project=project, run=name, step=step)}
        for path in outcome.pictures:
            picture = trackio.Image(str(path), caption="the front")
            picture._save(project, name, step)
            shown["front/picture"] = picture._to_dict()
        return shown

    def _keep_files(self, files: Sequence[Path]) -> None:
        """Keep files as a version of an artifact; the same files make no second version."""
        import trackio

        artifact = trackio.Artifact(name=f"report-{self._search.id[:8]}", type="report")
        for path in files:
            artifact.add_file(str(path))
        self._storage.commit_artifact_version(
            project=self.settings.project,
            name=artifact.name,
            type=artifact.type,
            description=artifact.description,
            manifest=artifact._build_manifest(self.settings.project),
            metadata=artifact.metadata,
            aliases=[],
            run_name=self._search.name,
            run_id=self._search.id,
        )


def _described(search: Search, group: str | None) -> dict[str, Any]:
    """The configuration and the tags, with the keys that trackio's pages show."""
    return {"_Created": _now(), "_Group": group, **search.configuration, **search.tags}


def _now() -> str:
    return datetime.now(UTC).isoformat()
