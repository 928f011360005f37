"""TensorBoard: ``tensorboard --logdir RUN/tensorboard`` shows the search while it runs.

A step is one record of the log, so a kill leaves all of its scalars or none. The log is written in ascending order of
steps, and continued after the last one that is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bitfront.trackers import TRACKERS
from bitfront.trackers.base import Outcome, Point, Search, Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import FileWriter

FOLDER = "tensorboard"


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Scalars per trial in tensorboard/ in the run folder."""

    module: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"
    takes_files: ClassVar[bool] = False
    _writer: FileWriter | None = None

    def begin(self, search: Search) -> None:
        """Continue the log after its last step."""
        from torch.utils.tensorboard import FileWriter

        folder = search.run.folder / FOLDER
        self._logged = last_step(folder)
        self._writer = FileWriter(str(folder))

    def add(self, points: Sequence[Point]) -> None:
        """Write a record per step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self._writer is not None
        for point in points:
            known = {tag: value for tag, value in point.metrics.items() if tag != "failed"}
            if known and point.number > self._logged:
                values = [Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
                self._writer.add_summary(Summary(value=values), point.number)
                self._logged = point.number
        self._writer.flush()

    def end(self, outcome: Outcome | None) -> None:  # noqa: ARG002
        """Close the log."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def last_step(folder: Path) -> int:
    """The last step in the logs of a folder; -1 if there are none. Incomplete records do not count."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    last = -1
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("summary"):
                last = max(last, event.step)
    return last
