"""What would be deployed of a candidate, and whether it can be run here: what `latency` and `energy` measure.

A candidate's *simulation* in floating point takes longer the more is quantized, which is the contrary of the truth. So
what is run is made anew for a backend: a site is deployed in float, or in bytes where the backend has a kernel that
takes its formats. If a single option in the space has none, nothing in that search is measured: every value of the
column is *modelled*, and ``Deployment.reason`` says why.

Which kernels run, on which shapes, is all that the time depends on: the same instructions take as long whatever the
weights are. That is a candidate's *signature*; candidates with the same one are measured once, as one network.
(Denormal numbers, which are slow, are the exception; a quantized network has none.)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from bitfront.errors import ConfigError, ExportError, MissingExtraError, require
from bitfront.export import integer, onnx
from bitfront.export.packing import packing
from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph import Graph, Site
from bitfront.metrics.base import EvaluationContext, RunnerSettings, Values, table_sum
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace

Backend = Literal["torch", "onnxruntime", "modelled"]
SiteFormats = Mapping[Operand, Format]
Signature = tuple[object, ...]


class DeployedSettings(RunnerSettings):
    """What every runner that runs deployed networks can be told."""

    backend: Backend = Field(
        "torch",
        description="what runs the network: PyTorch (8-bit sites with oneDNN's kernels), ONNX Runtime (with its "
        "integer operators), or nothing: a roofline model",
    )
    onnx_form: Literal["integer", "qdq"] = Field(
        "integer",
        description="of a quantized site in ONNX Runtime: its integer operators, which compute what the search "
        "computed; or QuantizeLinear and DequantizeLinear, which ONNX Runtime may fuse, and round differently",
    )
    batch_size: int = Field(1, ge=1, description="samples per run")
    threads: int = Field(1, ge=1, description="threads that may share a run on the CPU")
    operations_per_second: float = Field(
        1e10, gt=0, description="of the model: operations on 32-bit operands; on 8-bit ones four times as many"
    )
    bytes_per_second: float = Field(1e10, gt=0, description="of the model: to and from memory")


def check_backend(settings: DeployedSettings) -> None:
    """Raises ConfigError where the backend is not installed."""
    if settings.backend != "onnxruntime":
        return
    try:
        require("onnx", "onnx", "backend = 'onnxruntime'")
        require("onnxruntime", "onnx", "backend = 'onnxruntime'")
    except MissingExtraError as error:
        raise ConfigError(str(error), key=("backend",)) from None


@dataclass(frozen=True, eq=False)
class Running:
    """A deployed network, ready to run.

    Attributes:
        once: runs one batch, and returns when the result is there.
        timed: the same; seconds it took.
    """

    once: Callable[[], None]
    timed: Callable[[], float]


class Deployment:
    """How the candidates of one search are deployed on one backend.

    Attributes:
        reason: why nothing is run and the numbers are modelled; empty where they are measured.
    """

    def __init__(self, settings: DeployedSettings, subject: EvaluationContext) -> None:
        self.settings = settings
        self.reason = _reason(settings, subject)

    def signature(self, graph: Graph, formats: Mapping[str, SiteFormats]) -> Signature:
        """What the time of a network in these formats depends on. Networks of other widths have other shapes."""
        narrow = self.settings.backend == "onnxruntime"  # one more operator; torch clamps in any case
        kernels = tuple(
            (name, operand, held.signed, held.symmetric, held.axis is not None, narrow and held.narrow)
            for name, own in sorted(formats.items())
            for operand, f in sorted(own.items())
            if operand != "bias" and (held := packing(f, activation=operand == "data_in")) is not None
        )
        return tuple(node.output for node in graph.nodes), kernels

    def running(self, subject: EvaluationContext, code: NDArray[np.int64]) -> Running:
        """The candidate on the backend, with a batch of inputs."""
        graph, formats = subject.space.graph, subject.formats(code)
        batch = self.settings.batch_size
        x = subject.sample[torch.arange(batch) % len(subject.sample)].contiguous()
        if self.settings.backend == "onnxruntime":
            return _on_onnxruntime(graph, formats, x, self.settings)
        return _on_torch(graph, formats, x, subject.device)

    def modelled(self, space: FormatSpace, codes: Codes) -> Values:
        """Seconds per batch of each candidate, by the roofline model (Williams et al. 2009): per node the larger of

        - operations · batch · (bits of its widest operand / 32) / operations_per_second,
        - bytes of weights, inputs and outputs (each input in its format, outputs as float32) / bytes_per_second.
        """
        s = self.settings
        tables = []
        for site, data, weight in zip(space.sites, space.bits("data_in"), space.bits("weight"), strict=True):
            # A weight that is an activation is among the inputs.
            stored = float(np.prod(site.weight_shape)) if site.weight else 0.0
            widest = np.maximum(data, weight) if "weight" in site.operands else data
            inputs = sum(float(np.prod(shape)) for shape in site.inputs)
            moved = stored * weight / 8 + s.batch_size * (inputs * data / 8 + float(np.prod(site.output)) * 4)
            work = (site.operations or 0) * s.batch_size * widest / FLOAT_BITS
            tables.append(np.maximum(work / s.operations_per_second, moved / s.bytes_per_second))
        fixed = 0.0
        sizes = {name: p.numel() for name, p in space.graph.model.named_parameters()}
        for node in space.graph.nodes:
            if not isinstance(node, Site):
                values = s.batch_size * sum(float(np.prod(shape)) for shape in (*node.inputs, node.output))
                touched = 4 * (values + sum(sizes.get(p, 0) for p in node.parameters))
                done = (node.operations or 0) * s.batch_size
                # What computes nothing is renamed, not moved.
                fixed += max(done / s.operations_per_second, touched / s.bytes_per_second) if done else 0.0
        return table_sum(space, tables, codes) + fixed


def _reason(settings: DeployedSettings, subject: EvaluationContext) -> str:
    if settings.backend == "modelled":
        return "backend = 'modelled'"
    if settings.backend == "onnxruntime" and subject.device != "cpu":
        return f"the search computes on {subject.device}, and ONNX Runtime is used on the CPU alone"
    space = subject.searched
    for site, options in zip(space.sites, space.site_formats, strict=True):
        for own in options:
            why = _obstacle(settings, subject, site, own)
            if why:
                return f"{site.title}: {why}"
    if settings.backend == "onnxruntime":
        try:
            onnx.onnx_model(space.graph, {})
        except ExportError as error:
            return str(error)
    return ""


def _obstacle(settings: DeployedSettings, subject: EvaluationContext, site: Site, formats: SiteFormats) -> str:
    """Why an option has no kernel. Asked before any calibration: a zero point that is not fixed counts as not 0."""
    if subject.device != "cpu":
        wanted = [f.label for o, f in formats.items() if o != "bias"]
        return f"{wanted[0]} has no kernel on {subject.device}" if wanted else ""
    own = {o: f.calibrated(torch.linspace(-1, 1, 64).reshape(8, 8)) if f.calibrates else f for o, f in formats.items()}
    if settings.backend == "onnxruntime":
        return onnx.obstacle(site, own)
    return integer.obstacle(subject.space.graph, site, own)


def _on_torch(graph: Graph, formats: Mapping[str, SiteFormats], x: Tensor, device: str) -> Running:
    model = integer.integer_model(graph, formats).to(device)
    x = x.to(device)

    @torch.inference_mode()
    def once() -> None:
        model(x)
        if device == "cuda":
            torch.cuda.synchronize()
        elif device == "mps":
            torch.mps.synchronize()

    if device != "cuda":
        return Running(once, lambda: _clocked(once))

    @torch.inference_mode()
    def timed() -> float:
        # Kernels are only queued by the call: the device's own clock says when they ran.
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        model(x)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return Running(once, timed)


def _on_onnxruntime(graph: Graph, formats: Mapping[str, SiteFormats], x: Tensor, settings: DeployedSettings) -> Running:
    runtime: Any = require("onnxruntime", "onnx", "backend = 'onnxruntime'")
    sites = [s.name for s in graph.sites if "data_in" in formats.get(s.name, {})]
    model = onnx.onnx_model(graph, formats, integer=sites if settings.onnx_form == "integer" else ())
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {onnx.INPUT: x.numpy()}

    def once() -> None:
        session.run(None, given)

    return Running(once, lambda: _clocked(once))


def _clocked(once: Callable[[], None]) -> float:
    begin = time.perf_counter()
    once()
    return time.perf_counter() - begin


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Lets torch use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
