"""Outputs of modules, kept from one run of a model to the next, where the next one would compute the same.

A model that torch.fx cannot trace has no graph that says what depends on what. But it is run for one candidate after
the other on the same samples, and what a run does until a certain moment depends only on the sites that were called
until then. So a call of a module gives the same output in the next run, if all sites that were called before its end
have the same formats there. Then the kept output is returned, and the module is not run. It does not matter how modules
are nested, how often they are called, or whether the order of calls depends on the samples: the calls of a run are
numbered, and until the first site that differs two runs have the same calls.

What a module does beside returning its output would be missing. A call is therefore run again in each case if it
changes its inputs in place or returns a part of them, and an output that was changed afterwards is computed again, and
copied from then on. What does not fit into memory is written to disk, if that is faster than to compute it again. What
else a module may do (set attributes that other modules read) is left to ``plain.py``, which compares candidates with
whole models.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.engine.evaluation.spilling import Spill, Spilled
from bitfront.operations.lookup import tensors_in

#: Kept outputs may take this much memory.
PREFIX_BYTES = 256 << 20


class UnshareableError(Exception):
    """Two runs that should have the same calls have others."""


@dataclass(frozen=True, eq=False)
class _Output:
    """What a call returned.

    Attributes:
        module: that was called.
        value: its output; read only.
        versions: how often the tensors of `value` had been written to.
        sites: those that were called before its end, one bit each.
        end: the number of the first call after it.
        inside: the numbers of the calls inside it whose outputs are kept too.
        bytes: the memory that it takes; 0 of one on disk.
    """

    module: nn.Module
    value: Any
    versions: tuple[int, ...]
    sites: int
    end: int
    inside: tuple[int, ...]
    bytes: int


class Prefixes:
    """Watches the calls of a model's modules, and answers those that would compute what they computed before.

    Args:
        model: the calls of its modules are watched from now on, whoever calls them. No gradients may be computed.
        sites: path of a module → its site, as a bit.
        every: the bits of all sites. Those that are no modules are put into `called` by who runs the model.
        room: kept outputs may take this much memory, in bytes.
        folder: where outputs that do not fit are written; None: where temporary files are.

    Attributes:
        called: the sites that were called in this run so far, one bit each.
        answered: number of calls that were answered in the last run.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, int],
        every: int,
        room: int = PREFIX_BYTES,
        folder: Path | None = None,
    ) -> None:
        self.model, self.answered, self._every, self._room = model, 0, every, room
        self.spill, self._kept = Spill(folder), dict[int, _Output]()
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            # What ``nn.Module.compile`` sets. A torch without it would run every module, and nothing would be kept.
            vars(module)["_compiled_call_impl"] = partial(self._call, module, path)
            if path in sites:
                vars(module)["forward"] = _Noting(self, module, sites[path])
        self._copied: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Forget all outputs, because other samples follow."""
        for number in list(self._kept):
            self._drop(number)
        self._bytes, self._silent, self._watching = 0, 0, False
        self._begin(())

    def run(self, x: Tensor, changed: int, later: Sequence[int]) -> Any:
        """The output of the model.

        Args:
            x: the samples of the last run, since ``forget``; the model may write into them.
            changed: the sites whose formats differ from those of the last run, one bit each.
            later: for each following run the sites whose formats will have changed between this one and that one; each
                contains those before it.

        Raises:
            UnshareableError: two runs that should have the same calls have others.
        """
        # A site without a call of its module has another way into the model, such as a function that reads its weight.
        if changed & self._silent:
            self.forget()
        for number in [n for n, output in self._kept.items() if output.sites & changed]:
            self._drop(number)
        self._begin(later)
        self._watching = True
        try:
            with torch.no_grad():
                result = self.model(x)
        except BaseException:
            self.forget()
            raise
        finally:
            self._watching = False
        self._silent = self._every & ~self.called
        return result

    def _begin(self, later: Sequence[int]) -> None:
        self._later = later
        self._number = self.called = self.answered = 0
        #: For each module that is being run, the kept outputs inside it.
        self._open: list[list[int]] = [[]]

    def _drop(self, number: int) -> None:
        output = self._kept.pop(number, None)
        if output is None:
            return
        self._bytes -= output.bytes
        if isinstance(output.value, Spilled):
            self.spill.forget(output.value)

    def _runs(self, sites: int) -> int:
        """In how many of the later runs an output that depends on these sites is the same."""
        return next((i for i, changed in enumerate(self._later) if changed & sites), len(self._later))

    def _call(self, module: nn.Module, path: str, *args: Any, **kwargs: Any) -> Any:
        if not self._watching:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        number = self._number
        self._number += 1
        known = self._known(number, module, path)
        if known is not None:
            return known
        before = list(tensors_in((args, kwargs)))
        versions = _versions(before)
        self._open.append([])
        began = time.perf_counter()
        result = module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - began
        inside = self._open.pop()
        runs = self._runs(self.called)
        if runs and _plain(result) and versions == _versions(before):
            outputs = list(tensors_in(result))
            if not _overlap(before, outputs):
                inside = self._keep(number, module, path, (result, outputs), inside, (runs, seconds))
        self._open[-1] += inside
        return result

    def _known(self, number: int, module: nn.Module, path: str) -> Any:
        """The kept output of a call; None if there is none."""
        output = self._kept.get(number)
        if output is None:
            return None
        if output.module is not module:
            raise UnshareableError(f"call {number} is one of {path} now, and was another one before")
        value = output.value
        if isinstance(value, Spilled):
            value = self.spill.read(value)
        elif _versions(list(tensors_in(value))) != output.versions:
            self._copied.add(path)
            self._drop(number)
            return None
        self._number = output.end
        self.called |= output.sites
        self.answered += 1
        if self._runs(output.sites):
            self._open[-1] += [number, *output.inside]
        else:
            self._drop(number)
            self._open[-1] += output.inside
        return _copy(value) if path in self._copied and value is output.value else value

    def _keep(
        self,
        number: int,
        module: nn.Module,
        path: str,
        output: tuple[Any, list[Tensor]],
        inside: list[int],
        later: tuple[int, float],
    ) -> list[int]:
        """Keep an output. Returns the numbers that are kept then, of it and the calls inside.

        Args:
            later: (number of later runs that need it, how long it took to compute).
        """
        (value, tensors), (runs, seconds) = output, later
        size = sum(t.numel() * t.element_size() for t in tensors)
        if not tensors:
            return inside
        if self._bytes + size > self._room:
            spilled = self.spill.write(value) if self.spill.pays(size, runs, seconds) else None
            if spilled is None:
                return inside
            value, size = spilled, 0
        longer = [n for n in inside if n in self._kept and self._runs(self._kept[n].sites) > runs]
        for n in set(inside) - set(longer):
            self._drop(n)
        if not isinstance(value, Spilled):
            value = _copy(value) if path in self._copied else value
        versions = _versions(list(tensors_in(value)))
        self._kept[number] = _Output(module, value, versions, self.called, self._number, tuple(longer), size)
        self._bytes += size
        return [number, *longer]


class _Noting:
    """In place of a module's ``forward``: notes that its site is called."""

    def __init__(self, prefixes: Prefixes, module: nn.Module, site: int) -> None:
        self._prefixes, self._module, self._site = prefixes, module, site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._prefixes.called |= self._site
        return type(self._module).forward(self._module, *args, **kwargs)


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often some tensors have been written to."""
    return tuple(t._version for t in tensors)


def _overlap(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether an output shares memory with an input: what is written into one is then seen in the other."""
    places = {t.untyped_storage().data_ptr() for t in inputs}
    return any(t.untyped_storage().data_ptr() in places for t in outputs)


def _plain(value: object) -> bool:
    """Whether a value is made of tensors, tuples, and what cannot be changed: no other object."""
    if type(value) is tuple:
        return all(_plain(v) for v in value)
    return type(value) is Tensor or value is None or isinstance(value, bool | int | float | str)


def _copy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_copy(v) for v in value)
    return value.clone() if isinstance(value, Tensor) else value
