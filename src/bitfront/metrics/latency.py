"""Latency of the deployed network per batch: measured where the backend can run it, modelled where it cannot.

Within a search either all candidates are measured or all are modelled (``metrics.deployed``), so that a column never
compares the two. A measurement is kept for the whole search: candidates of one signature get one value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Kind, Metric, Runner, Side, Values
from bitfront.metrics.deployed import DeployedSettings, Deployment, Signature, check_backend, torch_threads
from bitfront.metrics.timing import TimeSummary, summarise, time_in_turns
from bitfront.spaces.base import Codes


class LatencySettings(DeployedSettings):
    """``[search.strategy.sw_runner.latency]``."""

    seconds: float = Field(0.2, gt=0, description="seconds of timing for each distinct network, after warm-up")
    repeats: int = Field(20, ge=2, description="timed runs of each network, at least")


@RUNNERS.register("latency")
class Latency(Runner):
    """Time of the deployed network per batch: median, 90th percentile, 95 % interval of the median."""

    Settings = LatencySettings
    settings: LatencySettings
    side: ClassVar[Side] = "sw_runner"
    produces = (
        Metric("latency", "ms", "minimize", "measured", "median time per batch of the deployed network"),
        Metric("latency_p90", "ms", "minimize", "measured", "90th percentile of the time per batch"),
        Metric("latency_per_sample", "ms", "minimize", "measured", "latency / batch_size"),
        Metric("latency_low", "ms", "minimize", "measured", "lower end of the median's 95 % bootstrap interval"),
        Metric("latency_high", "ms", "minimize", "measured", "upper end of the median's 95 % bootstrap interval"),
    )

    def __init__(self, settings: LatencySettings) -> None:
        super().__init__(settings)
        self._deployment: Deployment | None = None
        self._measured: dict[Signature, TimeSummary] = {}

    def ready(self, device: str) -> None:  # noqa: ARG002
        """Raises ConfigError where the backend is not installed."""
        check_backend(self.settings)

    def deployment(self, context: EvaluationContext) -> Deployment:
        """How candidates are deployed; the same for the whole search."""
        if self._deployment is None:
            self._deployment = Deployment(self.settings, context)
        return self._deployment

    def kinds(self, context: EvaluationContext) -> Mapping[str, tuple[Kind, str]]:
        """Measured if the backend can run every option of the space, else modelled, and why."""
        reason = self.deployment(context).reason
        kind: Kind = "modelled" if reason else "measured"
        return {m.name: (kind, reason) for m in self.produces}

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """All five metrics, in ms. A modelled latency is one number: percentile and interval are equal to it."""
        deployment = self.deployment(context)
        if deployment.reason:
            seconds = deployment.modelled(context.space, codes)
            return self._metrics(seconds, seconds, seconds, seconds)
        signatures = [deployment.signature(context.space.graph, context.formats(code)) for code in codes]
        self._measure_new(context, codes, signatures)
        summaries = [self._measured[signature] for signature in signatures]
        median, p90, low, high = (
            np.array([getattr(summary, name) for summary in summaries], dtype=np.float64)
            for name in ("median", "p90", "low", "high")
        )
        return self._metrics(median, p90, low, high)

    def _measure_new(self, context: EvaluationContext, codes: Codes, signatures: list[Signature]) -> None:
        """Measure the networks among `codes` that are not measured yet, in turns."""
        new = {s: i for i, s in reversed(list(enumerate(signatures))) if s not in self._measured}
        if not new:
            return
        deployment = self.deployment(context)
        with torch_threads(self.settings.threads):
            networks = [deployment.network(context, codes[i]) for i in new.values()]
            times = time_in_turns([n.timed for n in networks], self.settings.seconds, self.settings.repeats)
        self._measured.update(zip(new, map(summarise, times), strict=True))

    def _metrics(self, median: Values, p90: Values, low: Values, high: Values) -> dict[str, Values]:
        return {
            "latency": median * 1e3,
            "latency_p90": p90 * 1e3,
            "latency_per_sample": median * 1e3 / self.settings.batch_size,
            "latency_low": low * 1e3,
            "latency_high": high * 1e3,
        }
