"""How much memory a search takes at least, and what a limit leaves for the weights of options that are kept.

What a search takes beside these weights is estimated from the captured model: copies of it, activations, gradients. It
is all there whatever is kept, so a limit below it cannot be held, and is an error before any work.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitfront.config import StrategySetup
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import Evaluator
from bitfront.engine.evaluation.keeping import bytes_of, resident
from bitfront.engine.evaluation.sensitivity import BATCH
from bitfront.engine.evaluation.tree.scorer import RESULT_BYTES
from bitfront.errors import ConfigError
from bitfront.graph import Graph
from bitfront.graph.capture import parameter
from bitfront.strategies.configured import SETUP
from bitfront.transforms.observe import SAMPLES_BYTES

#: Where no limit is given, the share of the free memory that a search may take.
USED_SHARE = 0.75
#: Bytes per value of a weight that is kept: rounded, and as the numbers that are multiplied, each in float32.
KEPT_BYTES = 8
#: Bytes per value of a weight while it is rounded and its sums are bounded: float32, float64, and parts of sums.
WORKING_BYTES = 32
#: Activations of a step are held while pieces of its candidates are computed: in so many steps at a time.
HELD_STEPS = 8
#: Memory that is free, but in pieces, as a share of what is in use.
PIECES = 0.1
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B\s*")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
GB = 10**9
#: Where the system does not say it: what a process takes before it works, and what is free.
BEFORE, UNKNOWN = GB // 2, 1 << 62


@dataclass(frozen=True)
class Needs:
    """What one process of a search takes, in bytes.

    Attributes:
        now: what this process takes already.
        candidates: what it takes beside that while it evaluates candidates, without weights that are kept.
        before: what it takes beside that before it does: gradients, calibration. No weights are kept meanwhile.
        layer: the weights of the largest layer, which are in use while it is computed.
        options: the weights of all options.
    """

    now: int
    candidates: int
    before: int
    layer: int
    options: int

    @property
    def least(self) -> int:
        """The smallest limit that can be held."""
        return int((self.now + max(self.candidates + self.layer, self.before)) * (1 + PIECES))

    def kept(self, limit: int) -> int:
        """How many bytes of weights can be kept with a limit."""
        return max(self.layer, int(limit / (1 + PIECES)) - self.now - self.candidates)


def size_in_bytes(text: str) -> int:
    """A size such as ``"8 GB"`` or ``"512 MiB"`` in bytes. Raises ConfigError without a key."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is no size of memory; write a number and a unit: '8 GB', '500 MB' or '4 GiB'")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix])


def memory_now() -> int:
    """The memory that this process takes, in bytes: its resident set."""
    if (now := resident()) is not None:
        return now
    try:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most that it ever took
    except ImportError:
        return BEFORE
    return most if sys.platform == "darwin" else most * 1024


def memory_free() -> int:
    """The memory that a process can still take on this machine, in bytes."""
    free = [UNKNOWN]
    try:
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free.append(int(limit) - int(used))
    except (OSError, KeyError, ValueError, AttributeError):  # not Linux, or no limit for this process's group
        pass
    return max(0, min(free))


def needs(evaluator: FixedEvaluator, *, trains_first: bool, noise: bool) -> Needs:
    """What a search takes.

    Args:
        evaluator: of its candidates.
        trains_first: whether the float model is trained or loaded before, which leaves more copies of it.
        noise: whether the strategy asks for the noise of options, which takes gradients.
    """
    graph = evaluator.space.graph
    model = bytes_of(graph.model)
    sizes = [sum(int(np.prod(s)) for s in (*n.inputs, n.output)) for n in graph.nodes]
    largest, outputs = 4 * max(sizes, default=0), 4 * sum(int(np.prod(n.output)) for n in graph.nodes)
    limits, chunk = evaluator.limits, evaluator.chunk
    together = limits.threads * (HELD_STEPS * max(limits.bytes, chunk * largest // 2) + chunk * largest)
    together += 0 if evaluator.job.task.classifies else RESULT_BYTES
    calibration = 2 * max(SAMPLES_BYTES, largest)
    check = 2 * model + 3 * chunk * largest
    gradients = 4 * model + int(2.5 * BATCH * outputs) if noise else 0
    layer, options = _weights(graph, evaluator)
    copies = 3 * model if trains_first else 0
    candidates, before = max(together, check) + copies, max(calibration, gradients) + copies
    return Needs(memory_now(), candidates, before, layer, options)


def _weights(graph: Graph, evaluator: FixedEvaluator) -> tuple[int, int]:
    """(bytes of the weights of the largest layer while it is computed, of those of all options)."""
    layer = options = 0
    for site, formats in zip(evaluator.space.sites, evaluator.space.site_formats, strict=True):
        held = site.parameter("weight")
        if held is None:
            continue
        values = parameter(graph.model, held[0]).numel()
        distinct = len({form.get("weight") for form in formats})
        layer, options = max(layer, values * WORKING_BYTES), options + values * KEPT_BYTES * distinct
    return layer, options


def limit_memory(
    evaluator: Evaluator, setup: StrategySetup, workers: int, *, trains_first: bool, noise: bool
) -> list[str]:
    """Let an evaluator keep no more than the memory limit allows. Returns notes.

    Args:
        evaluator: of the search.
        setup: has the limit.
        workers: how many worker processes there are on this machine beside this process.
        trains_first, noise: as for ``needs``.

    Raises:
        ConfigError: a limit that is given cannot be held; says what the least is.
    """
    if not isinstance(evaluator, FixedEvaluator):
        if setup.memory_limit is None:
            return []
        raise ConfigError(
            "it is for candidates that all have the weights of one model. Here each has others, and how much their "
            "training takes is not known before; remove it",
            key=(*SETUP, "memory_limit"),
        )
    need = needs(evaluator, trains_first=trains_first, noise=noise)
    # With several processes, this one checks what they compute, so it takes as much as each of them.
    processes = workers + 1
    if setup.memory_limit is None:
        share = int(USED_SHARE * memory_free() / processes) + need.now
        kept = need.kept(share)
        if need.options <= kept:
            return []  # whatever is kept, it fits
        evaluator.job.weights.limit = kept
        return [
            f"memory: {_words(share)} are free for {_each(processes)}, and all options of all weights take "
            f"{_words(need.options)}: what was not used for long is computed again. memory_limit sets another limit"
        ]
    with_key = (*SETUP, "memory_limit")
    try:
        limit = size_in_bytes(setup.memory_limit)
    except ConfigError as error:
        error.key = with_key
        raise
    if limit // processes < need.least:
        raise ConfigError(
            f"a limit of {setup.memory_limit} cannot be held: this search takes {_words(need.least * processes)} at "
            f"least{f', in {processes} processes' if processes > 1 else ''}: {_words(need.now)} are taken already, and "
            "copies of the model, its activations and the weights of a layer take the rest. Raise it"
            + (", or lower n_jobs" if processes > 1 else ""),
            key=with_key,
        )
    kept = need.kept(limit // processes)
    weights = evaluator.job.weights
    weights.limit, weights.process, weights.least = kept, limit // processes, need.layer
    return [
        f"memory_limit = {setup.memory_limit}: {_words(need.least * processes)} are needed at least, and "
        f"{_words(kept)} {'' if processes == 1 else 'in each process '}keep weights of options, which take "
        f"{_words(need.options)} all together"
    ]


def _each(processes: int) -> str:
    return "this search" if processes == 1 else f"each of {processes} processes"


def _words(size: int) -> str:
    """A size for people: never less than it is."""
    unit, name = (GB, "GB") if size >= GB else (10**6, "MB")
    return f"{np.ceil(10 * size / unit) / 10:.1f} {name}" if unit == GB else f"{int(np.ceil(size / unit)):,} {name}"
