"""Callbacks by which long operations report their progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitfront.engine.planning.plan import Plan
    from bitfront.engine.search.loop import Progress
    from bitfront.executors.crew import Status
    from bitfront.learned_bits.course import Moment
    from bitfront.training import EpochRecord, TrainSettings


class Events:
    """Progress of a search, a comparison or a training. Each method does nothing; override those that you need.

    They are called in the process and thread that called Bitfront, and an error in one of them ends the work.
    """

    def note(self, text: str) -> None:
        """A line of information for the user."""

    def downloading(self, done: int, total: int | None) -> None:
        """A download has `done` bytes of `total`; None where the server does not send the total."""

    def training(self, settings: TrainSettings, samples: int) -> None:
        """Training begins, on `samples` samples."""

    def step(self, step: int, loss: Callable[[], float]) -> None:
        """A training step is done; calling `loss` waits for the device."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch of training is done."""

    def planned(self, plan: Plan, seconds: float) -> None:
        """The search begins; one candidate takes `seconds`, as measured."""

    def expected(self, seconds: float) -> None:
        """The first candidate is next; the search takes about `seconds` from now on, the end included."""

    def running(self, what: str) -> None:
        """A run of a comparison begins; `what` names its strategy and its random seed."""

    def ran(self, strategy: str, runs: int, evaluations: int, seconds: float) -> None:
        """All runs of a strategy in a comparison are done; the strategy itself took `seconds`."""

    def learning(self, moment: Moment) -> None:
        """An epoch of a training with learned bits is done. Called in the thread that trains."""

    def progress(self, progress: Progress, plan: Plan) -> None:
        """A block of candidates is evaluated."""

    def workers(self, status: Status) -> None:
        """How the workers of a search stand, some times a second while candidates are evaluated by workers."""

    def finishing(self) -> None:
        """All candidates are evaluated; now the front is measured on the test split, and results are written."""


def several(*listeners: Events) -> Events:
    """Events that call every one of `listeners`, in this order."""
    events = Events()
    for name in (name for name in vars(Events) if not name.startswith("_")):
        setattr(events, name, partial(_call_all, [getattr(listener, name) for listener in listeners]))
    return events


def _call_all(callbacks: Sequence[Callable[..., None]], *arguments: object) -> None:
    for callback in callbacks:
        callback(*arguments)
