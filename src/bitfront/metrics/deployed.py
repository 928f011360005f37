"""Deployed candidates, and whether this machine can run them: what `latency` and `energy` measure.

The *simulation* of a candidate in floating point becomes slower with every quantized site, although the deployed
network becomes faster. So a separate network is built for a backend: each site is deployed in float, or in 8-bit
integers where the backend has a kernel for its formats. If the backend has no kernel for a single option of the space,
nothing in that search is measured: every value of the column is *modelled*, and ``Deployment.reason`` says why.

The time depends only on which kernels run, on which shapes: the same instructions take the same time for all weights.
Kernels and shapes are a candidate's *signature*; candidates with the same signature are measured once. (Denormal
numbers, which are slow, are an exception; a quantized network has none.)
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
from bitfront.exporters import integer, onnx
from bitfront.exporters.packing import packing
from bitfront.exporters.sessions import session_options
from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph import Graph, Site
from bitfront.metrics.base import EvaluationContext, RunnerSettings, Values, table_sum
from bitfront.operations.base import DATA_OUT
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace

Backend = Literal["torch", "onnxruntime", "modelled"]
SiteFormats = Mapping[Operand, Format]
Signature = tuple[object, ...]


class DeployedSettings(RunnerSettings):
    """Settings of every runner that runs deployed networks."""

    backend: Backend = Field(
        "torch",
        description="what runs the network: PyTorch (8-bit sites with oneDNN's kernels) or ONNX Runtime (with its "
        "integer operators); `modelled`: nothing is run, a roofline model gives the time",
    )
    onnx_form: onnx.Form = Field(
        "integer",
        description="a quantized site in ONNX Runtime: `integer` operators, which compute the same as the search; or "
        "`qdq`: QuantizeLinear and DequantizeLinear, which ONNX Runtime may fuse and round differently",
    )
    batch_size: int = Field(1, ge=1, description="samples per run")
    threads: int = Field(1, ge=1, description="threads for a run on the CPU")
    operations_per_second: float = Field(
        1e10, gt=0, description="of the roofline model, with 32-bit operands; with 8-bit operands it is four times that"
    )
    bytes_per_second: float = Field(1e10, gt=0, description="of the roofline model: bytes to and from memory")


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
class DeployedNetwork:
    """A network on a backend, with a batch of inputs, ready to run.

    Attributes:
        once: runs one batch, and returns when the result is complete.
        timed: does the same and returns the seconds that it took.
    """

    once: Callable[[], None]
    timed: Callable[[], float]


class Deployment:
    """How the candidates of one search are deployed on one backend.

    Attributes:
        settings: of the runner.
        reason: why the values are modelled; empty where they are measured.
    """

    def __init__(self, settings: DeployedSettings, context: EvaluationContext) -> None:
        self.settings = settings
        self.reason = _why_modelled(settings, context)

    def signature(self, graph: Graph, formats: Mapping[str, SiteFormats]) -> Signature:
        """Everything that the time of a network depends on: the shapes of its tensors, and the kernels of its sites."""
        narrow = self.settings.backend == "onnxruntime"  # a narrow range is one more operator; torch always clamps
        kernels = tuple(
            (name, operand, packed.signed, packed.symmetric, packed.axis is not None, narrow and packed.narrow)
            for name, site_formats in sorted(formats.items())
            for operand, number_format in sorted(site_formats.items())
            if operand != "bias"
            and (packed := packing(number_format, activation=operand.startswith("data_"))) is not None
        )
        return tuple((node.op, node.output) for node in graph.nodes), kernels

    def network(self, context: EvaluationContext, code: NDArray[np.int64]) -> DeployedNetwork:
        """The candidate `code` on the backend, with a batch of inputs."""
        graph, formats = context.graph(code), context.formats(code)
        batch = self.settings.batch_size
        x = context.sample[torch.arange(batch) % len(context.sample)].contiguous()
        if self.settings.backend == "onnxruntime":
            return _on_onnxruntime(graph, formats, x, self.settings)
        return _on_torch(graph, formats, x, context.device)

    def modelled(self, space: FormatSpace, codes: Codes) -> Values:
        """Seconds per batch of each candidate, shape (candidates,), by the roofline model (Williams et al. 2009).

        The time of a node is the larger of

        - operations · batch · (bits of its widest operand / 32) / operations_per_second,
        - bytes of weights, inputs and outputs (each input and output in its format) / bytes_per_second.
        """
        settings = self.settings
        tables = []
        for g, (site, data) in enumerate(zip(space.sites, space.input_bits(), strict=True)):
            widest, stored = data, np.zeros(len(data))
            for spec in (s for s in site.specs if s.role == "weight"):
                weight = space.bits_at(g, spec.name)
                widest = np.maximum(widest, weight)
                # A weight that is an activation is among the inputs.
                if site.parameter(spec.name) or site.computed_from:
                    stored += float(np.prod(dict(site.shapes)[spec.name])) * weight / 8
            inputs = sum(float(np.prod(shape)) for shape in site.inputs)
            outputs = float(np.prod(site.output)) * space.bits_at(g, DATA_OUT)
            activations = settings.batch_size * (inputs * data / 8 + outputs / 8)
            operations = (site.operations or 0) * settings.batch_size * widest / FLOAT_BITS
            tables.append(self._roofline(operations, stored + activations))
        fixed = 0.0
        sizes = {name: p.numel() for name, p in space.graph.model.named_parameters()}
        for node in space.graph.nodes:
            # A node without operations is a view: it moves no bytes.
            if not isinstance(node, Site) and node.operations:
                values = settings.batch_size * sum(float(np.prod(shape)) for shape in (*node.inputs, node.output))
                moved = 4 * (values + sum(sizes.get(p, 0) for p in node.parameters))
                fixed += float(self._roofline(np.float64(node.operations * settings.batch_size), np.float64(moved)))
        return table_sum(space, tables, codes) + fixed

    def _roofline(self, operations: Any, moved_bytes: Any) -> Any:
        """Seconds for so many operations on 32-bit operands and so many bytes."""
        return np.maximum(
            operations / self.settings.operations_per_second, moved_bytes / self.settings.bytes_per_second
        )


def _why_modelled(settings: DeployedSettings, context: EvaluationContext) -> str:
    """Why the values of a search are modelled; empty where they are measured."""
    if settings.backend == "modelled":
        return "backend = 'modelled'"
    if settings.backend == "onnxruntime" and context.device != "cpu":
        return f"the search computes on {context.device}, and ONNX Runtime is used on the CPU only"
    space = context.searched
    for site, options in zip(space.sites, space.site_formats, strict=True):
        for formats in options:
            obstacle = _obstacle(settings, context, site, formats)
            if obstacle:
                return f"{site.title}: {obstacle}"
    if settings.backend == "onnxruntime":
        try:
            onnx.onnx_model(space.graph, {})
        except ExportError as error:
            return str(error)
    return ""


def _obstacle(settings: DeployedSettings, context: EvaluationContext, site: Site, formats: SiteFormats) -> str:
    """Why an option has no kernel; empty where it has one.

    Called before calibration, so a zero point that calibration sets counts as not 0.
    """
    if context.device != "cpu":
        labels = [number_format.label for operand, number_format in formats.items() if operand != "bias"]
        return f"{labels[0]} has no kernel on {context.device}" if labels else ""
    sample = torch.linspace(-1, 1, 64).reshape(8, 8)
    calibrated = {operand: f.calibrated(sample) if f.calibrates else f for operand, f in formats.items()}
    if settings.backend == "onnxruntime" and settings.onnx_form == "qdq":
        # It has no operators of its own for sites: bytes are made of their operands, whatever the operation.
        wide = {o: f for o, f in calibrated.items() if o != "bias" and packing(f, activation=False) is None}
        return next((f"{o} is {f.label}, which no kernel of bytes takes" for o, f in wide.items()), "")
    if settings.backend == "onnxruntime":
        return onnx.obstacle(site, calibrated)
    return integer.obstacle(context.space.graph, site, calibrated)


def _on_torch(graph: Graph, formats: Mapping[str, SiteFormats], x: Tensor, device: str) -> DeployedNetwork:
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
        return DeployedNetwork(once, lambda: _clocked(once))

    @torch.inference_mode()
    def timed() -> float:
        # The call only queues the kernels, so the clock of the device measures when they run.
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        model(x)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return DeployedNetwork(once, timed)


def _on_onnxruntime(
    graph: Graph, formats: Mapping[str, SiteFormats], x: Tensor, settings: DeployedSettings
) -> DeployedNetwork:
    runtime: Any = require("onnxruntime", "onnx", "backend = 'onnxruntime'")
    model = onnx.onnx_model(graph, formats, settings.onnx_form)
    options = session_options(runtime, settings.onnx_form)
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {onnx.INPUT: x.numpy()}

    def once() -> None:
        session.run(None, inputs)

    return DeployedNetwork(once, lambda: _clocked(once))


def _clocked(once: Callable[[], None]) -> float:
    begin = time.perf_counter()
    once()
    return time.perf_counter() - begin


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Sets the number of threads of torch, and restores it at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
