"""Energy of the deployed network: per sample and above idle, read from a counter where the machine has one.

A network runs repeatedly for a whole window, because counters are coarse (RAPL is updated every millisecond, NVML every
20 to 100 ms). The energy of a window in which this process is idle is subtracted, and reported. As for latency,
networks of one signature are measured once per search.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from bitfront.errors import ConfigError
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Kind, Metric, Runner, Side, Values
from bitfront.metrics.deployed import DeployedSettings, Deployment, Signature, check_backend, torch_threads
from bitfront.metrics.power import Counter, NoCounterError, counter
from bitfront.metrics.timing import warm_up
from bitfront.spaces.base import Codes


class EnergySettings(DeployedSettings):
    """``[search.strategy.sw_runner.energy]``."""

    source: Literal["auto", "nvml", "rapl", "estimated"] = Field(
        "auto", description="the counter; `auto`: that of the GPU or of the processor, an estimate without one"
    )
    window: float = Field(
        1.0, gt=0, description="seconds that each distinct network runs, and seconds that idle is measured"
    )
    tdp: float = Field(15.0, gt=0, description="watts of the processor at full load, for estimates")


@dataclass(frozen=True)
class MeteredWindow:
    """The readings of a window.

    Attributes:
        seconds: its length.
        joules: the energy that the counter counted.
        busy: processor time of this process, in seconds.
        runs: how often the network ran.
    """

    seconds: float
    joules: float
    busy: float
    runs: int


@dataclass(frozen=True)
class Clocks:
    """The clocks of a window, in seconds: wall time, processor time of this process, and a function that waits."""

    wall: Callable[[], float] = time.perf_counter
    busy: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep


def metered(meter: Counter, seconds: float, run: Callable[[], object] | None, clocks: Clocks) -> MeteredWindow:
    """The readings of a window in which `run` is repeated for `seconds`, at least once; without `run` it waits."""
    joules, begin, busy = meter.read(), clocks.wall(), clocks.busy()
    runs = 0
    if run is None:
        clocks.sleep(seconds)
    else:
        while runs == 0 or clocks.wall() - begin < seconds:
            run()
            runs += 1
    return MeteredWindow(clocks.wall() - begin, meter.read() - joules, clocks.busy() - busy, runs)


@RUNNERS.register("energy")
class Energy(Runner):
    """Energy per sample and power above idle of the deployed network; measured, or estimated and labelled so."""

    Settings = EnergySettings
    settings: EnergySettings
    side: ClassVar[Side] = "sw_runner"
    produces = (
        Metric("energy", "mJ", "minimize", "measured", "energy per sample above idle"),
        Metric("power", "W", "minimize", "measured", "mean power above idle while the network runs"),
        Metric(
            "idle_power", "W", "minimize", "measured", "the idle power that is subtracted, measured once per search"
        ),
        Metric("cpu_utilization", "", "minimize", "measured", "share of the processors' time that this process used"),
        Metric("gpu_utilization", "", "minimize", "measured", "share of time in which the GPU was busy"),
    )

    def __init__(self, settings: EnergySettings, meter: Counter | None = None, clocks: Clocks | None = None) -> None:
        super().__init__(settings)
        self._meter, self._clocks = meter, clocks or Clocks()
        self._why_estimated = ""
        self._deployment: Deployment | None = None
        self._idle_watts: float | None = None
        self._measured: dict[Signature, tuple[float, ...]] = {}

    def ready(self, device: str) -> None:
        """Raises ConfigError where the backend is not installed, or a counter that `source` names cannot be used."""
        check_backend(self.settings)
        try:
            counter(self.settings.source, device, self.settings.tdp)
        except NoCounterError as error:
            raise ConfigError(
                f"{error}. source = 'auto' estimates where there is no counter", key=("source",)
            ) from None

    def kinds(self, context: EvaluationContext) -> Mapping[str, tuple[Kind, str]]:
        """Measured if there is a counter and the backend can run every option of the space, else estimated; and why."""
        deployment, meter = self._prepared(context)
        if deployment.reason:
            why = f"modelled latency × {self.settings.tdp:g} W, the processor fully busy: {deployment.reason}"
            return {m.name: ("estimated", why) for m in self.produces}
        kinds: dict[str, tuple[Kind, str]] = {m.name: (m.kind, "") for m in self.produces}
        if meter.source == "estimated":
            why = f"share of the processors' time × {self.settings.tdp:g} W: {self._why_estimated}"
            kinds["energy"] = kinds["power"] = ("estimated", why)
            kinds["idle_power"] = ("estimated", "unknown without a counter, and counted as 0")
        if meter.source != "nvml":
            on_cpu = context.device == "cpu"
            kinds["gpu_utilization"] = ("estimated", "the network uses no GPU" if on_cpu else "unknown without NVML: 0")
        return kinds

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """All five metrics of each candidate."""
        deployment, meter = self._prepared(context)
        names = [m.name for m in self.produces]
        if deployment.reason:
            seconds = deployment.modelled(context.space, codes)
            ones = np.ones(len(codes))
            energy = seconds * self.settings.tdp / self.settings.batch_size * 1e3
            return dict(zip(names, (energy, ones * self.settings.tdp, ones * 0, ones, ones * 0), strict=True))
        if self._idle_watts is None:
            idle = metered(meter, self.settings.window, None, self._clocks)
            self._idle_watts = 0.0 if meter.source == "estimated" else idle.joules / idle.seconds
        rows = []
        for code in codes:
            signature = deployment.signature(context.space.graph, context.formats(code))
            if signature not in self._measured:
                with torch_threads(self.settings.threads):
                    network = deployment.network(context, code)
                    warm_up(network.timed, self.settings.window)
                    window = metered(meter, self.settings.window, network.once, self._clocks)
                self._measured[signature] = self._values(window, self._idle_watts, meter)
            rows.append(self._measured[signature])
        table: Any = np.array(rows, dtype=np.float64).reshape(len(codes), len(names))
        return {name: table[:, i].copy() for i, name in enumerate(names)}

    def _values(self, window: MeteredWindow, idle_watts: float, meter: Counter) -> tuple[float, ...]:
        """The metrics of a window, in the order of `produces`."""
        above_idle = window.joules - idle_watts * window.seconds
        return (
            above_idle / (window.runs * self.settings.batch_size) * 1e3,
            above_idle / window.seconds,
            idle_watts,
            window.busy / window.seconds / (os.cpu_count() or 1),
            meter.gpu_utilization(),
        )

    def _prepared(self, context: EvaluationContext) -> tuple[Deployment, Counter]:
        if self._deployment is None:
            self._deployment = Deployment(self.settings, context)
        if self._meter is None:
            self._meter, self._why_estimated = counter(self.settings.source, context.device, self.settings.tdp)
        return self._deployment, self._meter
