"""One trial of a run, several of them in order, and what a search was given from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bitfront.engine.storage.records import Finetuned
from bitfront.spaces.described import CandidateConfig

if TYPE_CHECKING:
    from torch import nn

    from bitfront.engine.storage.run import Run


@dataclass(frozen=True, eq=False)
class FromPython:
    """What a search was given from Python. No file has it, so who wants a network of the run again needs it too.

    Attributes:
        model: the nn.Module; None if the configuration names the model.
        data: the samples, as ``search`` takes them; None if the configuration names the data.
    """

    model: nn.Module | None = None
    data: Any = None


#: Of a run that was read from its folder.
NOTHING = FromPython()


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        number: its number in the run, from 0 on, in the order of evaluation.
        code: its canonical code, one integer per parameter of the space.
        config: the candidate spelled out, as ``[passes.quantize]`` takes it.
        software_metrics, hardware_metrics: metric → value, by the table of its runner.
        scaled_metrics: objective → value times scale.
        values: the scaled values of the objectives, in the order of ``Run.objectives``.
        intervals: metric → 95 % interval, for metrics that have one.
        test_metrics: metric → value on the test split; empty for trials that are not on the front.
        finetuned: the result of fine-tuning; None if it was not fine-tuned.
        state: ``complete`` or ``failed``.
        error: why it failed; empty if it did not.
        duration: time of the evaluation in seconds.
        folder: that of the run; None for a trial that no run has given.
        given: the model and the data of the call that made the run, where it came from Python.
    """

    number: int
    code: tuple[int, ...]
    config: CandidateConfig
    software_metrics: Mapping[str, float]
    hardware_metrics: Mapping[str, float]
    scaled_metrics: Mapping[str, float]
    values: tuple[float, ...]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    finetuned: Finetuned | None = None
    state: str = "complete"
    error: str = ""
    duration: float = 0.0
    folder: Path | None = field(default=None, compare=False)
    given: FromPython = field(default=NOTHING, compare=False, repr=False)

    def __repr__(self) -> str:
        tested = {name: value for name, value in self.test_metrics.items() if name != "loss"}
        shown = {f"test_{name}": value for name, value in list(tested.items())[:1]}
        parts = [f"{name}={value:.6g}" for name, value in {**self.metrics, **shown}.items()]
        return f"Trial({', '.join([str(self.number), *parts])}{', failed' if self.state == 'failed' else ''})"

    @property
    def metrics(self) -> dict[str, float]:
        """Software and hardware metrics together."""
        return {**self.software_metrics, **self.hardware_metrics}


class Trials(tuple[Trial, ...]):
    """Some trials of a run, in order: a tuple that a notebook shows as a table."""

    run: Run | None

    def __new__(cls, trials: Iterable[Trial] = (), run: Run | None = None) -> Self:
        """
        Args:
            trials: the trials.
            run: the run that they are of, which knows their units; without it they are shown as a tuple.
        """
        made = super().__new__(cls, trials)
        made.run = run
        return made

    def _repr_html_(self) -> str | None:
        import bitfront  # loads what draws when it is used

        return None if self.run is None else bitfront._html(self)
