"""Energy counters: the energy that a machine has used, in joules since an arbitrary moment.

``Nvml`` reads the counter of a GPU, ``Rapl`` those of the processor's packages. ``Estimated`` is for machines without a
counter: processor time times a constant power; results that use it are labelled as estimates. Only differences between
two readings of one counter have a meaning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from bitfront.errors import BitfrontError, MissingExtraError, require

Source = Literal["nvml", "rapl", "estimated"]
#: The folder in which Linux shows the processors' counters (Documentation/power/powercap in the kernel's sources).
POWERCAP = Path("/sys/class/powercap")


class NoCounterError(BitfrontError):
    """A counter cannot be used on this machine; the message says why."""


class Counter(Protocol):
    """A counter of energy."""

    source: Source

    def read(self) -> float:
        """Joules since an arbitrary moment; never less than the reading before."""
        ...

    def gpu_utilization(self) -> float:
        """Fraction of the recent time in which the GPU was busy, 0 to 1; 0 for a counter without a GPU."""
        ...


class Rapl:
    """The counters of the processor packages: Intel's running average power limit (on AMD too, since Linux 5.8).

    The counter of a package wraps around after some minutes to hours. One wrap between two readings is corrected, so
    readings must follow each other faster than that.

    Args:
        root: the folder with the packages: folders ``intel-rapl:N`` with ``energy_uj`` and ``max_energy_range_uj``.

    Raises:
        NoCounterError: there are none, or they cannot be read.
    """

    source: Source = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0:1 and the like are parts of a package, and counted in it.
        self._packages = sorted(p for p in root.glob("intel-rapl:*") if p.name.count(":") == 1)
        if not self._packages:
            raise NoCounterError(f"RAPL: {root} has no intel-rapl:*")
        try:
            self._ranges = [self._number(p / "max_energy_range_uj") for p in self._packages]
            self._last = [self._number(p / "energy_uj") for p in self._packages]
        except (OSError, ValueError) as error:
            raise NoCounterError(
                f"RAPL: {getattr(error, 'filename', None) or root} cannot be read ({type(error).__name__})"
            ) from None
        self._total = 0

    def read(self) -> float:
        """Joules of all packages since this object was created."""
        for i, package in enumerate(self._packages):
            now = self._number(package / "energy_uj")
            step = now - self._last[i]
            # The counter goes from 0 to its range, both included.
            self._total += step if step >= 0 else step + self._ranges[i] + 1
            self._last[i] = now
        return self._total / 1e6

    def gpu_utilization(self) -> float:
        """0: this counter has no GPU."""
        return 0.0

    @staticmethod
    def _number(path: Path) -> int:
        return int(path.read_text(encoding="ascii"))


class Nvml:
    """An NVIDIA GPU's energy counter (Volta and later): millijoules since the driver was loaded.

    Args:
        uuid: of the GPU, as torch gives it; NVML numbers GPUs in another order, and also lists hidden ones.
        nvml: the module ``pynvml``; imported where None.

    Raises:
        NoCounterError: there is no package, no driver, no such GPU, or the GPU has no counter.
    """

    source: Source = "nvml"

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        try:
            self._nvml = nvml or require("pynvml", "power", "NVML's energy counter")
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.read()
        except MissingExtraError as error:
            raise NoCounterError(f"NVML: {error}") from None
        except self._nvml.NVMLError as error:
            raise NoCounterError(f"NVML: {error}") from None

    def read(self) -> float:
        """Joules since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def gpu_utilization(self) -> float:
        """Fraction of NVML's last sampling period (1/6 to 1 s) in which a kernel ran."""
        return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100


class Estimated:
    """An estimate without a counter: this process's fraction of the processors' time, times their power at full load.

    Args:
        watts: power of the whole processor at full load.
        cores: number of cores; those of this machine where None.
        busy: gives the processor time of this process, in seconds.
    """

    source: Source = "estimated"

    def __init__(self, watts: float, cores: int | None = None, busy: Callable[[], float] = time.process_time) -> None:
        self._watts, self._cores, self._busy = watts, cores or os.cpu_count() or 1, busy

    def read(self) -> float:
        """Joules: processor seconds used / cores · watts."""
        return self._busy() / self._cores * self._watts

    def gpu_utilization(self) -> float:
        """0: not known without NVML."""
        return 0.0


def counter(
    source: Literal["auto", "nvml", "rapl", "estimated"],
    device: str,
    watts: float,
    *,
    powercap: Path = POWERCAP,
    nvml: Any = None,
) -> tuple[Counter, str]:
    """The counter to use, and why the energy is estimated (empty where it is counted).

    Args:
        source: the counter; ``auto`` is the GPU's on ``cuda``, else the processor's, and an estimate without one.
        device: where the network runs: ``cpu``, ``cuda`` ...
        watts: power of the processor at full load, for an estimate.
        powercap: the folder with the processors' counters.
        nvml: the module ``pynvml``; imported where None.

    Raises:
        NoCounterError: the counter that `source` names cannot be used.
    """
    if source == "estimated":
        return Estimated(watts), "source = 'estimated'"
    on_gpu = device.startswith("cuda")
    if source == "nvml" and not on_gpu:
        raise NoCounterError(f"NVML: it counts the energy of a GPU, and the network runs on {device}")
    if source == "rapl" and on_gpu:
        raise NoCounterError(f"RAPL: it counts the energy of the processor, and the network runs on {device}")
    try:
        if on_gpu:
            return Nvml(str(torch.cuda.get_device_properties(device).uuid), nvml), ""
        return Rapl(powercap), ""
    except NoCounterError as error:
        if source != "auto":
            raise
        return Estimated(watts), str(error)
