"""Members of a training with learned bits that are trained by workers: each cycle of each member is a call.

What all calls share is the course without its members: the network, the schedule, the samples, the teacher's answers.
What travels with a call is one member, where it is.
"""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitfront.engine.evaluation.fixed import one_thread
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.engine.evaluation.learned_bits import LearnedBitsEvaluator
from bitfront.engine.evaluation.workers import opened as evaluator_of
from bitfront.engine.evaluation.workers import payload_of
from bitfront.errors import EvaluationError
from bitfront.executors.base import Launcher
from bitfront.executors.crew import Crew, Lost, Status, Work
from bitfront.learned_bits.course import Course, Moment, Network, Position

#: What of a course its members depend on, beside the program, which is made anew from the job.
SHARED = ("schedule", "cost", "train", "val", "starting_cost", "target", "scale")


@dataclass(eq=False)
class _Cycle(Work):
    """A cycle of a member."""

    member: int
    argument: tuple[Position, Moment, float]
    method: str = "train"

    def cut(self) -> Sequence[_Cycle]:
        """Nothing: a cycle is the smallest piece."""
        return ()


@dataclass(eq=False)
class MembersElsewhere:
    """Has the members of a course trained by workers; called by the course.

    Attributes:
        job: of the search.
        launcher: starts the workers.
        number: how many there are at most.
        folder: where the job is written, and workers note what they begin; None: nowhere.
        heard: called with how the workers stand.
    """

    job: EvaluationJob
    launcher: Launcher
    number: int
    folder: Path | None
    heard: Callable[[Status], None] = lambda _: None
    _crew: Crew | None = field(default=None, repr=False)

    def __call__(
        self, course: Course, start: Moment, length: float, on_epoch: Callable[[Moment], None]
    ) -> tuple[list[Position], list[list[Network]]]:
        """Train every member for one cycle.

        Raises:
            EvaluationError: a member cannot be trained: its worker ended again and again.
        """
        count = len(course.positions)
        waiting = deque(_Cycle(m, (position, start, length)) for m, position in enumerate(course.positions))
        positions: list[Any] = [None] * count
        networks: list[list[Network]] = [[] for _ in range(count)]
        crew = self._crew = self._crew or self._opened(course)
        for outcome in crew.outcomes(lambda: waiting.popleft() if waiting else None):
            assert isinstance(outcome.work, _Cycle)
            member = outcome.work.member
            if isinstance(outcome, Lost):
                raise EvaluationError(
                    f"member {member + 1} of the training with learned bits ended its worker, {outcome.deaths} times "
                    f"({outcome.why}). Everything so far is stored; the same command goes on"
                )
            positions[member], networks[member], last = outcome.value
            positions[member].member.bind(course.program)
            if member == 0:
                on_epoch(last)
        return positions, networks

    def close(self) -> None:
        """End the workers."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def _opened(self, course: Course) -> Crew:
        def content() -> bytes:
            shared = {name: getattr(course, name) for name in SHARED}
            return pickle.dumps((payload_of(self.job, self.launcher, self.number), shared))

        return Crew(self.launcher, self.number, f"{__name__}:opened", content, self.folder, self.heard)


@dataclass(frozen=True, eq=False)
class RemoteCourse:
    """A course in a worker, without its members."""

    course: Course

    def train(self, argument: tuple[Position, Moment, float]) -> tuple[Position, list[Network], Moment]:
        """(where a member is after a cycle, the networks that it gave, its last epoch)."""
        # A worker that is a thread has the caller's object, which stays as it is: the call may be lost, and repeated.
        position, start, length = copy.deepcopy(argument)
        last = [start]

        def keep(moment: Moment) -> None:
            last[0] = moment

        position.member.bind(self.course.program)
        with one_thread():
            networks = self.course.train_member(position, start, length, keep)
        return position, networks, last[0]


def opened(content: bytes) -> RemoteCourse:
    """A course, in a worker.

    Args:
        content: from the process that gives out the work, so that unpickling it is safe.

    Raises:
        EvaluationError: the worker cannot be prepared.
    """
    job, shared = pickle.loads(content)  # noqa: S301
    evaluator = evaluator_of(job)
    assert isinstance(evaluator, LearnedBitsEvaluator)
    with one_thread():
        return RemoteCourse(Course(program=evaluator.program, positions=[], **shared))
