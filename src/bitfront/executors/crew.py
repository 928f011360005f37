"""A crew has calls carried out by an executor whose workers may die, be late, or be other ones than they should be.

Each piece of work comes back once, as ``Done`` or as ``Lost``. Where a worker died, its piece is cut into smaller ones
and given again, until one is alone that cannot be cut; it is lost for good when ``DEATHS`` workers died with it.
Most executors do not say which call has ended a worker, and lose others with it. Then what was lost twice, or cannot be
cut, is *suspect*: the crew waits until nothing else is out, and gives one suspect at a time. Who is given again has
not failed: a machine may have run out of memory, or somebody has killed the process.

No wait is without a limit. ``status`` says how it stands, for a progress line.
"""

from __future__ import annotations

import concurrent.futures as cf
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from bitfront.errors import BitfrontError, EvaluationError, described
from bitfront.executors.base import Launched, Launcher
from bitfront.executors.calls import Answer, Call, Missing, Prepare, Refused, Shared, carry_out
from bitfront.executors.versions import of_this_process

#: So often workers may die with a piece of work that cannot be cut, and so often of these alone with it. Where a death
#: takes others along, who was to blame before is not known, and all of them must be while nothing else is out.
DEATHS, ALONE = 3, 2
#: So often a worker may die before it begins with a piece of work that is out alone, and the work is not to blame.
STARTS = 5
#: How often an executor may break before any of its workers has answered, and how often in a row it may take no call.
LAUNCHES = 8
#: Seconds between two looks at what goes on, and between two words about it.
TICK, SAYING = 0.5, 0.2
#: To how many workers a piece without an answer is given, and after how many seconds to the next one.
TIMES, OVERDUE = 3, 60.0
#: How often in a row an executor is launched anew because none of its workers answers.
AGAIN = 2
#: Nothing is late before it has taken so many times the seconds of the longest piece so far.
LONGEST = 10.0


class Work(ABC):
    """A piece of work.

    Attributes:
        method: of the shared object.
        argument: of the method; picklable.
    """

    method: str = ""
    argument: Any = None
    #: Whether it is given again as a whole before it is cut, because its result depends on how it is cut.
    whole: bool = False

    @abstractmethod
    def cut(self) -> Sequence[Work]:
        """Smaller pieces, in order; empty if there are none."""

    def limit(self) -> float | None:
        """Seconds that it may take; None: as long as it wants."""
        return None

    def warming(self) -> float:
        """Seconds that the first piece of a worker may take longer."""
        return 0.0


@dataclass(frozen=True)
class Done:
    """A piece of work is done.

    Attributes:
        work: the piece.
        value: what the method returned.
        seconds: how long the method took.
        first: whether it was the first of its worker.
    """

    work: Work
    value: Any
    seconds: float
    first: bool = False


@dataclass(frozen=True)
class Lost:
    """A piece of work cannot be done.

    Attributes:
        why: how the worker ended; empty if it was ended because it was late.
        deaths: how many workers it has ended, with those of larger pieces that it was cut from.
        seconds: for how long it was tried.
    """

    work: Work
    why: str
    deaths: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Status:
    """How a crew stands.

    Attributes:
        executor: its name.
        workers: how many workers there are.
        out: how many pieces of work they have.
        lost: how many were lost so far, and given again or lost for good.
        waited: seconds since the last answer.
    """

    executor: str
    workers: int
    out: int
    lost: int
    waited: float


@dataclass(eq=False)
class _Turn:
    """A piece of work, and what happened to it."""

    work: Work
    deaths: int = 0
    #: Deaths of its worker while nothing else was out.
    alone: int = 0
    #: Deaths of its worker before it began, while nothing else was out.
    starts: int = 0
    #: The file that its worker writes when it begins; None: there is no folder for it, or others are out too.
    mark: Path | None = None
    times: int = 0
    #: When it was given to a worker first, and last.
    first: float = 0.0
    since: float = 0.0
    with_content: bool = False
    #: Whether nothing else is out as long as it is.
    solo: bool = False
    #: Whether its worker was ended because it was late.
    ended: bool = False


@dataclass(eq=False)
class Crew:
    """Workers that share one object.

    Attributes:
        launcher: starts the executor.
        number: how many workers are wanted.
        opener: ``module:function``, which makes the shared object from bytes, in a worker.
        content: gives these bytes; called once, when they are needed.
        folder: where what is shared is written for workers of other machines, and where workers note that they have
            begun with a suspect; None: what is shared travels with calls, and nothing is noted.
        heard: called with the status at every look.
    """

    launcher: Launcher
    number: int
    opener: str
    content: Callable[[], bytes]
    folder: Path | None = None
    heard: Callable[[Status], None] = lambda _: None
    _launched: Launched | None = None
    _small: bool = False
    _shared: Shared | None = None
    _bytes: bytes = b""
    _out: dict[cf.Future[Any], _Turn] = field(default_factory=dict)
    _waiting: deque[_Turn] = field(default_factory=deque)
    _suspects: deque[_Turn] = field(default_factory=deque)
    _lost: int = 0
    _heard: float = 0.0
    _longest: float = 0.0
    _without_workers: float = 0.0
    _launches: int = 0
    _refused: int = 0
    _answered: bool = False
    _last: str = ""
    _said: float = 0.0
    _again: int = 0
    _marks: int = 0

    @property
    def capacity(self) -> int:
        """How many pieces of work can be out at a time."""
        workers = self._launched.workers() if self._launched else self.number
        return max(1, workers) * self.launcher.at_once

    @property
    def status(self) -> Status:
        """How it stands."""
        workers = self._launched.workers() if self._launched else 0
        waited = time.perf_counter() - self._heard if self._heard else 0.0
        return Status(self.launcher.title, workers, len(self._out), self._lost, waited)

    def outcomes(self, following: Callable[[], Work | None]) -> Iterator[Done | Lost]:
        """What becomes of pieces of work, in the order in which that is known.

        When the caller stops iterating, what is not finished is dropped.

        Args:
            following: gives the next piece whenever there is room for one; None: there is none now.

        Raises:
            EvaluationError: workers cannot be started, have other versions, or do not answer.
            BitfrontError: the method raised it.
        """
        self._heard = self._without_workers = time.perf_counter()
        try:
            while True:
                self._give(following)
                if not self._out and not self._waiting and not self._suspects:
                    return
                finished = cf.wait(self._out, self._patience(), cf.FIRST_COMPLETED).done
                for future in finished:
                    if future in self._out:  # it may be a late one whose answer came from another worker
                        yield from self._finished(future)
                self._late()
                self._look()
        finally:
            self._drop()

    def start(self) -> None:
        """Start the executor, and find out whether what is shared can be. Raises like ``outcomes``."""
        self._ready()

    def close(self) -> None:
        """End what was started."""
        launched, self._launched = self._launched, None
        if launched is not None:
            launched.close()

    def _give(self, following: Callable[[], Work | None]) -> None:
        """Give workers what there is room for."""
        while not self._suspects and len(self._out) < self.capacity:
            turn = self._waiting.popleft() if self._waiting else None
            if turn is None:
                work = following()
                if work is None:
                    break
                turn = _Turn(work)
            self._submit(turn)
        if self._suspects and not self._out:
            suspect = self._suspects.popleft()
            suspect.solo = True
            self._submit(suspect)
        elif not self._suspects and self._small and not self._out:
            self.close()  # the next piece starts all workers again

    def _submit(self, turn: _Turn) -> None:
        launched, shared = self._ready(alone=turn.solo)
        if turn.with_content:
            shared = replace(shared, content=self._bytes)
        work, here = turn.work, of_this_process()
        limit = None if self.launcher.ends_late else work.limit()
        turn.mark = self._mark() if turn.solo else None
        mark = str(turn.mark or "")
        call = Call(shared, self.opener, work.method, work.argument, here, os.getpid(), limit, work.warming(), mark)
        turn.since, turn.times = time.perf_counter(), turn.times + 1
        turn.first = turn.first or turn.since
        try:
            future = launched.executor.submit(carry_out, call)
        except self.launcher.lost as error:
            self._broken(error)
            self._refused += 1
            if self._refused >= LAUNCHES:
                self._never()
            turn.times -= 1
            (self._suspects if turn.solo else self._waiting).appendleft(turn)
        except RuntimeError as error:
            raise EvaluationError(f"{self.launcher.title}: it takes no work: {described(error)}") from error
        else:
            self._out[future], self._refused = turn, 0

    def _mark(self) -> Path | None:
        """A file that does not exist yet, for a worker to write when it begins."""
        if self.folder is None:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        self._marks += 1
        mark = self.folder.absolute() / f"{self._marks}.begun"
        mark.unlink(missing_ok=True)
        return mark

    def _ready(self, *, alone: bool = False) -> tuple[Launched, Shared]:
        if self._shared is None:
            self._bytes = self.content()
            try:
                self._shared = Shared.of(self._bytes, None if self.launcher.local else self.folder)
            except OSError as error:
                raise EvaluationError(f"{error.filename}: {error.strerror}, so workers cannot read the model") from None
        if self._launched is None:
            self._launches += 1
            if self._launches > LAUNCHES and not self._answered:
                self._never()
            self._small = alone and not self.launcher.apart
            shared = self._shared if self._shared.path else replace(self._shared, content=self._bytes)
            prepare = Prepare(Call(shared, self.opener, "", None, of_this_process(), os.getpid()))
            self._launched = self.launcher.launch(1 if self._small else self.number, prepare)
            self._without_workers = time.perf_counter()
        return self._launched, self._shared

    def _never(self) -> NoReturn:
        raise EvaluationError(
            f"{self.launcher.title}: it broke {LAUNCHES} times before a worker answered, the last time with: "
            f"{self._last}. Everything so far is stored; {self.launcher.again}"
        )

    def _finished(self, future: cf.Future[Any]) -> Iterator[Done | Lost]:
        turn = self._out.pop(future)
        try:
            answer = future.result()
        except self.launcher.lost as error:
            # A late piece is with several workers; it is lost when the last of them is.
            if turn not in self._out.values():
                yield from self._died(turn, error)
            return
        except BitfrontError:
            raise
        except Exception as error:
            raise EvaluationError(f"{self.launcher.title}: a worker failed: {described(error)}") from error
        self._heard, self._answered, self._again = time.perf_counter(), True, 0
        if isinstance(answer, Refused):
            raise EvaluationError(
                f"{self.launcher.title}: the worker {answer.worker} could compute other bits than this process, so it "
                f"gets no work: {answer.difference}. Install the same versions there, in an environment that was made "
                "from one list of packages"
            )
        if isinstance(answer, Missing):
            turn.with_content, turn.times, turn.first = True, turn.times - 1, 0.0
            (self._suspects if turn.solo else self._waiting).appendleft(turn)
            return
        assert isinstance(answer, Answer)
        if answer.error is not None:
            raise answer.error
        if turn.times > 1:  # it is with other workers too
            for other in [f for f, same in self._out.items() if same is turn]:
                del self._out[other]
                other.cancel()
        self._longest = max(self._longest, self._heard - turn.since)
        yield Done(turn.work, answer.value, answer.seconds, bool(getattr(future, "first", False)))

    def _died(self, turn: _Turn, error: BaseException) -> Iterator[Lost]:
        """A worker was lost with a piece of work."""
        self._lost += 1
        if turn.ended:
            yield from self._too_late(turn)
            return
        if not self.launcher.apart:
            self._broken(error)
        work, apart, seconds = turn.work, self.launcher.apart, time.perf_counter() - turn.since
        if turn.solo and turn.starts < STARTS and turn.mark is not None and not turn.mark.exists():
            # It is not to blame: its worker died of something else, such as a machine that went away.
            self._suspects.appendleft(_Turn(work, turn.deaths, turn.alone, turn.starts + 1))
            return
        deaths, alone = turn.deaths + 1, turn.alone + (apart or turn.solo)
        parts = [] if work.whole and alone < ALONE else work.cut()
        limit = None if self.launcher.ends_late else work.limit()
        if parts:
            suspect = not apart and deaths > 1
            turns = [_Turn(part, deaths=deaths) for part in parts]
            (self._suspects if suspect else self._waiting).extendleft(reversed(turns))
        elif alone and limit is not None and seconds >= limit:
            yield Lost(work, "", deaths, seconds)
        elif alone >= (ALONE if apart else DEATHS) and deaths >= DEATHS:
            yield Lost(work, str(error).strip().split("\n")[0], deaths, seconds)
        else:
            (self._waiting if apart else self._suspects).appendleft(_Turn(work, deaths, alone, turn.starts))

    def _broken(self, error: BaseException) -> None:
        """The executor may be of no use any more; then the next piece of work launches it again.

        Raises:
            EvaluationError: it cannot be launched again.
        """
        launched, self._last = self._launched, described(error)
        if launched is None:
            return
        if gone := launched.gone():
            raise EvaluationError(f"{self.launcher.title}: {gone}. Everything so far is stored; {self.launcher.again}")
        if isinstance(error, self.launcher.breaks):
            self.close()

    def _late(self) -> None:
        """What is late is ended, or given to another worker. Raises EvaluationError if nobody answers."""
        now = time.perf_counter()
        for future, turn in list(self._out.items()):
            limit, began = turn.work.limit(), getattr(future, "began", None)
            if self.launcher.ends_late and limit is not None and began is not None and not turn.ended:
                limit += turn.work.warming() if getattr(future, "first", False) else 0.0
                if now - began >= limit and self._launched is not None:
                    turn.ended = True
                    self._launched.executor.end(future)  # type: ignore[attr-defined]
            elif self.launcher.apart:
                continue  # its deaths are seen, and a call may take as long as it wants
            elif now - turn.first >= max(self.launcher.settings.block_timeout, LONGEST * self._longest):
                raise EvaluationError(
                    f"{self.launcher.title}: a block of candidates has no answer after {now - turn.first:,.0f} s "
                    f"(block_timeout), and was given to {turn.times} workers. Everything so far is stored; "
                    f"{self.launcher.again}"
                )
            elif self._longest and now - turn.since >= max(OVERDUE, LONGEST * self._longest):
                if turn.times < TIMES:
                    self._submit(turn)
                elif self._again < AGAIN and now - self._heard >= OVERDUE:
                    self._start_again()
                    return

    def _start_again(self) -> None:
        """Launch an executor anew of which no worker answers: it may have lost its workers without a word."""
        self._again += 1
        turns = list(dict.fromkeys(self._out.values()))
        for future in self._out:
            future.cancel()
        self._out.clear()
        self._waiting.extendleft(reversed([_Turn(turn.work, turn.deaths, turn.alone) for turn in turns]))
        self.close()

    def _too_late(self, turn: _Turn) -> Iterator[Lost]:
        parts = turn.work.cut()
        if parts:
            self._waiting.extendleft(reversed([_Turn(part) for part in parts]))
        else:
            yield Lost(turn.work, "", turn.deaths, turn.work.limit() or 0.0)

    def _patience(self) -> float:
        """How long to wait for the next answer: until something is late."""
        if not self.launcher.ends_late:
            return TICK
        now, left = time.perf_counter(), [TICK]
        for future, turn in self._out.items():
            limit, began = turn.work.limit(), getattr(future, "began", None)
            if limit is not None:
                warming = turn.work.warming() if getattr(future, "first", False) else 0.0
                left.append(0.05 if began is None else began + limit + warming - now)
        return max(0.0, min(left))

    def _look(self) -> None:
        """See whether there are workers, and whether there will ever be an answer. Raises EvaluationError."""
        launched, now = self._launched, time.perf_counter()
        if launched is None:
            return
        if gone := launched.gone():
            raise EvaluationError(f"{self.launcher.title}: {gone}. Everything so far is stored; {self.launcher.again}")
        if launched.workers():
            self._without_workers = now
        elif now - self._without_workers >= self.launcher.settings.worker_timeout:
            raise EvaluationError(
                f"{self.launcher.title}: there was no worker for {self.launcher.settings.worker_timeout:g} s "
                "(worker_timeout). Everything so far is stored; start workers and give the same command again"
            )
        if now - self._said >= SAYING:
            self._said = now
            self.heard(self.status)

    def _drop(self) -> None:
        """Forget what is out: the caller does not want it any more, or an error has ended the work."""
        for future in self._out:
            future.cancel()
            if self.launcher.ends_late and self._launched is not None:
                self._launched.executor.end(future)  # type: ignore[attr-defined]
        self._out.clear()
        self._waiting.clear()
        self._suspects.clear()
