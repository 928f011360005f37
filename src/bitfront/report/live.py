"""The messages of a command while it works: notes, and bars for downloads, training and search, on standard error."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from bitfront.events import Events
from bitfront.report import plans, tables

if TYPE_CHECKING:
    from bitfront.engine.planning.plan import Plan
    from bitfront.engine.search.loop import Progress as Searched
    from bitfront.executors.crew import Status
    from bitfront.learned_bits.course import Moment
    from bitfront.training import EpochRecord, TrainSettings

#: A time that is left is said from here on, in seconds.
LONG_SECONDS = 60.0
#: In a notebook, the seconds from one line of progress to the next.
EVERY = 5.0
#: Width of a terminal, in characters, that has room for more than numbers.
ROOM = 100
#: Seconds without an answer of any worker that are shown.
WAITED = 10.0


def shown_events() -> Events:
    """The progress for who has given no events: lines in a notebook, and nothing elsewhere."""
    if "IPython" not in sys.modules or not Console().is_jupyter:
        return Events()
    # rich would show every line as a document of its kind, which a notebook keeps apart from what else is printed.
    console = Console(force_jupyter=False, force_terminal=False, highlight=False, markup=False, emoji=False)
    console.width = 10_000  # the notebook breaks lines
    return Live(console, every=EVERY)


class Live(Events):
    """Shows the events of a command: as bars on a terminal, and as single lines elsewhere.

    A context manager: leaving it ends the bar.
    """

    def __init__(self, console: Console, *, quiet: bool = False, every: float = math.inf) -> None:
        """
        Args:
            console: where to show them.
            quiet: show nothing.
            every: where there is no terminal, the seconds from one line of progress to the next.
        """
        self.console, self.quiet, self.every = console, quiet, every
        self._said = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = 0.0
        self._settings: TrainSettings | None = None
        self._loss = ""
        self._noted: set[str] = set()
        self._bytes_shown = 0.0
        self._searching = "searching"
        self._front, self._learns = 0, False
        self._timeout: float | None = None
        self._workers = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def note(self, text: str) -> None:
        """Print one line; the same line only once."""
        if not self.quiet and text not in self._noted:
            self._noted.add(text)
            self.console.print(Text(text), soft_wrap=True)

    def downloading(self, done: int, total: int | None) -> None:
        """Show a bar of megabytes."""
        if self._bar is None:
            self._start("downloading", total)
        self._update(done, f"{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f} MB" if total else ""))
        if total is not None and done >= total:
            self._end()

    def training(self, settings: TrainSettings, samples: int) -> None:
        """Show a bar of epochs."""
        self._settings = settings
        self._began = time.perf_counter()
        self._start("training", settings.max_epochs)
        self.note(f"training: {_epochs(settings.max_epochs)} on {samples:,} samples, {settings.optimizer}")

    def step(self, step: int, loss: Callable[[], float]) -> None:  # noqa: ARG002
        """Show the loss of a step beside the bar. Without a terminal it is not computed."""
        if self._bar is not None and self.console.is_terminal:
            self._bar.update(self._task_id, loss=f"step loss {loss():.4f}")

    def epoch(self, record: EpochRecord) -> None:
        """Show loss and accuracy of an epoch."""
        name, value = record.leading
        self._loss = f"val loss {record.val_loss:.4f}, val {name} {value:.4f}"
        self._update(record.epoch, f"loss {record.train_loss:.4f}, {self._loss}", f"epoch {record.epoch}, ")
        if self._settings is not None and record.epoch == self._settings.max_epochs:
            self._end()
            took = tables.duration(time.perf_counter() - self._began)
            self.note(f"trained: {_epochs(record.epoch)} in {took}, last {self._loss}")

    def planned(self, plan: Plan, seconds: float) -> None:
        """Print the size of the space and the expected time, before the search starts."""
        self._end()
        self._timeout = plan.settings.strategy.setup.timeout
        if seconds:
            for line in plans.plan_summary(plan, seconds):
                self.note(line)
        self._began = time.perf_counter()

    def expected(self, seconds: float) -> None:
        """Print the time that is left, where it is long."""
        if seconds >= LONG_SECONDS:
            self.note(f"about {tables.duration(seconds)} from now on, with the checks of the front at the end")

    def running(self, what: str) -> None:
        """End the bar of the last run. The next bar says `what` runs now."""
        self._end()
        self._searching, self._learns, self._front = what, False, 0

    def ran(self, strategy: str, runs: int, evaluations: int, seconds: float) -> None:
        """Print one line for a strategy whose runs are over."""
        self._end()
        count = f"{runs} {'run' if runs == 1 else 'runs'}"
        time_in_strategy = tables.duration(seconds)
        self.note(f"{strategy}: {count}, {evaluations:,} evaluations, {time_in_strategy} in the strategy")

    def learning(self, moment: Moment) -> None:
        """Show a bar of cycles, with the pressure, the network as it is, and the front so far."""
        self._learns = True
        if self._bar is None:
            self._start("learning", None)
        bar, task = self._bar, self._task
        if bar is None or task is None:
            return  # nothing is shown
        parts = [f"cycle {moment.cycle}/{moment.cycles}, epoch {moment.epoch}/{moment.epochs}"]
        parts.append(f"pressure {moment.pressure:.1e}")
        if moment.quality is not None and moment.cost is not None:
            parts.append(f"{moment.metric} {moment.quality:.4f}, cost {tables.number(moment.cost)}")
        parts += [f"front {self._front}"] if self._front else []
        if self._timeout and self.console.width >= ROOM:
            parts.append(f"timeout {tables.duration(self._timeout)}")
        text = ", ".join(parts)
        done = moment.cycle - 1 + moment.epoch / moment.epochs
        bar.update(task, description="learning", total=moment.cycles, completed=done, text=text, loss="")
        self._say(text)

    def progress(self, progress: Searched, plan: Plan) -> None:
        """Show a bar of candidates, with the best so far and the timeout."""
        if self._bar is None:
            self._start(self._searching, progress.total)
        best = _best(progress, plan)
        self._front = len(progress.front)
        if self._learns:
            # The bar counts cycles.
            self._loss = f"searched: {progress.new:,} networks in {tables.duration(progress.seconds)}"
            return
        timeout = plan.settings.strategy.setup.timeout
        limit = f"  timeout {tables.duration(timeout)}" if timeout and self.console.width >= ROOM else ""
        failed = f", {progress.failed} failed" if progress.failed else ""
        rate = f", {progress.new / progress.seconds:.3g}/s" if self._workers and progress.seconds else ""
        text = f"{progress.done:,}/{progress.total:,}{failed}{rate}  {best}{limit}"
        self._update(progress.done, text)
        self._loss = f"searched: {progress.new:,} candidates in {tables.duration(progress.seconds)}"

    def workers(self, status: Status) -> None:
        """Show how the workers stand, beside the bar."""
        lost = f", {status.lost:,} lost" if status.lost else ""
        waited = f", waiting for {tables.duration(status.waited)}" if status.waited >= WAITED else ""
        self._workers = f"{status.workers:,} workers, {status.out:,} blocks out{lost}{waited}"
        if self._bar is not None and self._task is not None and self.console.width >= ROOM:
            self._bar.update(self._task, loss=self._workers)

    def finishing(self) -> None:
        """Print how long the search took."""
        self._end()
        if self._loss.startswith("searched"):
            self.note(self._loss)

    @property
    def _task_id(self) -> TaskID:
        assert self._task is not None
        return self._task

    def _start(self, what: str, total: int | None) -> None:
        self._end()
        if self.quiet:
            return
        # On a narrow terminal the text beside the bar is more useful than the bar.
        bar = (TextColumn("{task.description}", markup=False), BarColumn(20)) if self.console.width >= ROOM else ()
        self._bar = Progress(
            SpinnerColumn(),
            *bar,
            TextColumn("{task.fields[text]} {task.fields[loss]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            refresh_per_second=5,
        )
        self._bar.start()
        self._said = time.perf_counter()
        self._task = self._bar.add_task(what, total=total, text="", loss="")

    def _update(self, done: int, text: str, before: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task_id, completed=done, text=text)
            self._say(before + text)

    def _say(self, text: str) -> None:
        """Print a line of progress where there is no bar, if the last one is long ago."""
        bar, now = self._bar, time.perf_counter()
        if bar is not None and not self.console.is_terminal and now - self._said >= self.every:
            self._said = now
            self.console.print(Text(f"{bar.tasks[-1].description}: {text}"), soft_wrap=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


def _best(progress: Searched, plan: Plan) -> str:
    if not len(progress.front):
        return ""
    # The front is short and has the best value of each objective.
    best = progress.front.losses.min(axis=0)
    parts = []
    for value, name, direction in zip(best, plan.objectives.names, plan.objectives.directions, strict=True):
        shown = -value if direction == "maximize" else value
        parts.append(f"{name} {tables.number(float(shown))}" if math.isfinite(value) else "")
    return "best " + ", ".join(parts)
