"""What a verb tells while it works, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitfront.engine.planning.plan import Plan
    from bitfront.engine.search.loop import Progress
    from bitfront.training import EpochRecord, TrainSettings


class Events:
    """What a verb tells while it works. Override what you want to hear."""

    def note(self, text: str) -> None:
        """One line that is worth reading."""

    def downloading(self, done: int, total: int | None) -> None:
        """Bytes of a download."""

    def training(self, settings: TrainSettings, samples: int) -> None:
        """Training begins."""

    def step(self, step: int, loss: Callable[[], float]) -> None:
        """A training step; asking for the loss waits for the device."""

    def epoch(self, record: EpochRecord) -> None:
        """A finished epoch of training."""

    def planned(self, plan: Plan, seconds: float) -> None:
        """The search is about to begin; `seconds` is what a candidate costs, measured."""

    def running(self, what: str) -> None:
        """One run of a comparison begins: its strategy and its seed."""

    def ran(self, strategy: str, runs: int, evaluations: int, seconds: float) -> None:
        """All runs of a strategy in a comparison are done; `seconds` were spent in the strategy itself."""

    def progress(self, progress: Progress, plan: Plan) -> None:
        """A block of candidates is done."""

    def finishing(self) -> None:
        """Everything is evaluated; the front goes through the test split and results are written."""


def several(*listeners: Events) -> Events:
    """Events that several listeners hear, one after the other."""
    heard = Events()
    for name in (name for name in vars(Events) if not name.startswith("_")):
        setattr(heard, name, partial(_tell, [getattr(listener, name) for listener in listeners]))
    return heard


def _tell(all_of_them: Sequence[Callable[..., None]], *what: object) -> None:
    for listen in all_of_them:
        listen(*what)
