"""Weights & Biases: a run per search, in files until ``wandb sync``, or on the server where the user is logged in.

A run in files cannot be asked what it has. So it is written whole when a session ends, and takes the place of the one
that an earlier session has left, as long as that has not been sent to the server. A server is asked for its last step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bitfront.files import shown
from bitfront.trackers import TRACKERS
from bitfront.trackers.base import Outcome, Point, Search, Tracker, TrackerSettings

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

#: Seconds that a server may take to answer.
TIMEOUT = 10


class WandbSettings(TrackerSettings):
    """``[search.track.wandb]``."""

    project: str = Field("bitfront", min_length=1, description="the project; it is created if there is none")
    entity: str | None = Field(None, description="user or team on the server; default: that of the login")
    mode: Literal["offline", "online"] | None = Field(
        None, description="default: `WANDB_MODE`; without it online where the user is logged in, and else offline"
    )


@TRACKERS.register("wandb")
class Wandb(Tracker):
    """A run of Weights & Biases; in files in the run folder unless you are logged in."""

    Settings: ClassVar[type[TrackerSettings]] = WandbSettings
    settings: WandbSettings
    module: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"
    _run: Run | None = None

    def begin(self, search: Search) -> None:
        """Open the run on a server; files are written at the end."""
        self._search = search
        self._mode = self.settings.mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        self._points: list[Point] = []
        self._next = 0
        if self._mode != "offline":
            self._run = self._opened()
            self._next = int(self._run.step)

    def add(self, points: Sequence[Point]) -> None:
        """Log what comes after the last step on the server, or remember it for the end."""
        if self._run is None:
            self._points += points
            return
        for point in points:
            if point.number >= self._next and point.metrics:
                self._run.log(point.metrics, step=point.number)
                self._next = point.number + 1

    def end(self, outcome: Outcome | None) -> None:
        """Write the files, or finish the run on the server."""
        if self._mode == "offline" and outcome is not None:
            self._write(outcome)
        elif self._run is not None:
            run, self._run = self._run, None
            self.place = str(run.url or "")
            if outcome is not None:
                _log_outcome(run, outcome)
            run.finish(exit_code=1 if outcome is None else 0)

    def _write(self, outcome: Outcome) -> None:
        """Write the run as files, without what was sent from files of an earlier session."""
        kept = self._search.kept("wandb")
        sent = -1
        for folder in (self._search.run.folder / "wandb").glob(f"offline-run-*-{self._search.id}"):
            if list(folder.glob("*.wandb.synced")):
                sent = max(sent, int(kept.get(folder.name, -1)))
            else:
                shutil.rmtree(folder)
        run = self._opened()
        for point in self._points:
            if point.number > sent and point.metrics:
                run.log(point.metrics, step=point.number)
        _log_outcome(run, outcome)
        folder = Path(run.settings.sync_dir)
        run.finish()
        self.place = f"wandb sync {shown(folder)}"
        self._search.keep("wandb", {**kept, folder.name: outcome.last})

    def _opened(self) -> Run:
        import wandb

        settings: dict[str, Any] = {
            "root_dir": str(self._search.run.folder),
            "silent": True,
            "console": "off",
            "init_timeout": TIMEOUT,
            "x_disable_stats": True,
            "x_disable_meta": True,
            "disable_git": True,
            "disable_code": True,
        }
        return wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            id=self._search.id,
            name=self._search.name,
            resume="allow",
            mode=self._mode,
            config={**self._search.configuration, **self._search.tags},
            settings=wandb.Settings(**settings),
        )


def _log_outcome(run: Run, outcome: Outcome) -> None:
    """Log the front with the last step, and the files as an artifact."""
    import wandb

    shown: dict[str, Any] = {"front": wandb.Table(columns=list(outcome.columns), data=[list(r) for r in outcome.rows])}
    for path in outcome.pictures:
        shown["front/picture"] = wandb.Image(str(path))
    run.log(shown, step=max(outcome.last, 0))
    artifact = wandb.Artifact(f"report-{run.id[:8]}", type="report")
    for path in outcome.files:
        artifact.add_file(str(path))
    run.log_artifact(artifact)


def _logged_in() -> bool:
    """Whether the user has a key of the server on this machine; nothing is asked, of the user or the server."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
