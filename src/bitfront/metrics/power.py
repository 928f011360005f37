"""Energy counters: what a machine says it has used, in joules since some moment.

``Nvml`` reads a GPU's own counter, ``Rapl`` those of the processor's packages; ``Estimated`` is no counter but a share
of a wattage, for machines that have none, and whoever uses it must say so. Readings are only ever subtracted: of one
counter, over a window.
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
#: Where Linux shows the processors' counters (Documentation/power/powercap in the kernel's sources).
POWERCAP = Path("/sys/class/powercap")


class NoCounterError(BitfrontError):
    """A counter cannot be used on this machine; the message says why."""


class Counter(Protocol):
    """Something that counts energy."""

    source: Source

    def read(self) -> float:
        """Joules since some moment; never less than before."""
        ...

    def gpu_utilization(self) -> float:
        """Share of the GPU's recent time in which it was busy, 0 to 1; 0 where no GPU is counted."""
        ...


class Rapl:
    """The processor packages, by Intel's running average power limit (AMD's too, since Linux 5.8).

    A package's counter wraps around after some minutes to hours; one wrap between two readings is made up for, so that
    readings must follow each other faster than that.

    Args:
        root: where the packages are: directories ``intel-rapl:N`` with ``energy_uj`` and ``max_energy_range_uj``.

    Raises:
        NoCounterError: there are none, or they may not be read.
    """

    source: Source = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0:1 and such are parts of a package, and counted in it.
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
        """Joules of all packages since this object was made."""
        for i, package in enumerate(self._packages):
            now = self._number(package / "energy_uj")
            step = now - self._last[i]
            # The counter goes from 0 to its range, inclusive.
            self._total += step if step >= 0 else step + self._ranges[i] + 1
            self._last[i] = now
        return self._total / 1e6

    def gpu_utilization(self) -> float:
        """No GPU is counted."""
        return 0.0

    @staticmethod
    def _number(path: Path) -> int:
        return int(path.read_text(encoding="ascii"))


class Nvml:
    """An NVIDIA GPU's energy counter (Volta and later): millijoules since the driver was loaded.

    Args:
        uuid: which GPU, as torch names it; NVML numbers them in another order, and sees hidden ones too.
        nvml: the module ``pynvml``; default: imported.

    Raises:
        NoCounterError: no package, no driver, no such GPU, or one without the counter.
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
        """Share of the last sampling period (1/6 to 1 s, says NVML) in which a kernel ran."""
        return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100


class Estimated:
    """No counter: this process's share of the processors' time, times what they use at full load.

    Args:
        watts: of the whole processor at full load.
        cores: how many it has.
        busy: seconds of processor time that this process has used.
    """

    source: Source = "estimated"

    def __init__(self, watts: float, cores: int | None = None, busy: Callable[[], float] = time.process_time) -> None:
        self._watts, self._cores, self._busy = watts, cores or os.cpu_count() or 1, busy

    def read(self) -> float:
        """Joules: processor seconds used / cores · watts."""
        return self._busy() / self._cores * self._watts

    def gpu_utilization(self) -> float:
        """Not known without NVML."""
        return 0.0


def counter(
    source: Literal["auto", "nvml", "rapl", "estimated"],
    device: str,
    watts: float,
    *,
    powercap: Path = POWERCAP,
    nvml: Any = None,
) -> tuple[Counter, str]:
    """The counter to use, and why it is none of the real ones (empty where it is).

    ``auto`` takes the counter of what computes: the GPU's on ``cuda``, else the processor's; estimated without it.

    Raises:
        NoCounterError: a counter was asked for by name, and cannot be used.
    """
    if source == "estimated":
        return Estimated(watts), "source = 'estimated'"
    on_gpu = device.startswith("cuda")
    if source == "nvml" and not on_gpu:
        raise NoCounterError(f"NVML: it counts what a GPU uses, and the network runs on {device}")
    if source == "rapl" and on_gpu:
        raise NoCounterError(f"RAPL: it counts what the processor uses, and the network runs on {device}")
    try:
        if on_gpu:
            return Nvml(str(torch.cuda.get_device_properties(device).uuid), nvml), ""
        return Rapl(powercap), ""
    except NoCounterError as error:
        if source != "auto":
            raise
        return Estimated(watts), str(error)
