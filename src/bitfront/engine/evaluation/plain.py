"""Scores candidates as whole models, one by one: the plain path.

It is for models that cannot be traced, and where the tree evaluator must not be used. If formats can be exchanged in
one copy of the model (``transforms/exchange.py``), no model is rebuilt. Candidates are run in the order of the space,
in which neighbours agree on as many leading sites as possible, and outputs of modules before the first difference are
kept (``prefixes.py``). The first candidates are evaluated a second time, each as a new model. If they differ, outputs
are no longer kept, or models are rebuilt for all candidates, and ``PlainScorer.note`` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.engine.evaluation.calibration import Calibration
from bitfront.engine.evaluation.prefixes import Prefixes, UnshareableError
from bitfront.errors import UserError, described
from bitfront.graph import Site
from bitfront.interrupts import contained
from bitfront.metrics.base import Scores
from bitfront.scoring import chunk_score, evaluate
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace
from bitfront.transforms.exchange import Exchange

#: So many candidates for which kept outputs were used, and as many others, are evaluated as new models too.
CHECKED = 2
#: Candidates are run together in groups of so many.
GROUP = 1024

#: Loss and right answers of each candidate, and their errors, each of length (candidates,).
_Results = tuple[NDArray[np.float64], NDArray[np.int64], list[str]]


class PlainScorer:
    """Scores candidates of one space as whole models.

    Args:
        space: of the candidates.
        calibration: which has learned the options that are scored.
        device: where models are run.
        chunk: number of samples that go through a model at a time.
        rebuild: the deployed model of a code.

    Attributes:
        note: why models are rebuilt, or outputs not kept, though they could be; empty if they are not.
    """

    def __init__(
        self,
        space: FormatSpace,
        calibration: Calibration,
        device: str,
        chunk: int,
        rebuild: Callable[[NDArray[np.int64]], nn.Module],
    ) -> None:
        self._space, self._calibration, self._device = space, calibration, device
        self._chunk, self._rebuild = chunk, rebuild
        graph = space.graph
        traced = graph.fx_graph is not None
        self._exchanges = not any((traced and graph.is_rewritten_for(s)) or calibration.norms(s) for s in space.sites)
        self._shares = True
        self._copy: _Copy | None = None
        #: How many candidates are still to be checked, without and with kept outputs.
        self._unchecked = [CHECKED, CHECKED]
        self.note = ""

    def scores(self, codes: Codes, x: Tensor, y: Tensor) -> Scores:
        """Loss and right answers of some candidates.

        Args:
            codes: shape (candidates, parameters).
            x: samples, shape (samples, *features).
            y: labels, int64, shape (samples,).
        """
        groups = [codes[i : i + GROUP] for i in range(0, len(codes), GROUP)]
        results = [self._group(group, x, y) for group in groups]
        if not results:
            return Scores(np.zeros(0), np.zeros(0, dtype=np.int64), len(y), ())
        loss, correct, errors = zip(*results, strict=True)
        return Scores(np.concatenate(loss), np.concatenate(correct), len(y), tuple(e for part in errors for e in part))

    def _group(self, codes: Codes, x: Tensor, y: Tensor) -> _Results:
        while self._exchanges and len(y):
            try:
                results, used = self._exchanged(codes, x, y)
                difference = self._difference(codes, x, y, results, used)
            except UnshareableError as error:
                difference = str(error)
            if not difference:
                return results
            # Without kept outputs formats may still be exchanged.
            self._exchanges, self._shares = self._shares, False
            what = "outputs of layers are not kept" if self._exchanges else "every candidate is rebuilt"
            self.note, self._copy, self._unchecked = f"{what}, because {difference}", None, [CHECKED, CHECKED]
        return self._rebuilt(codes, x, y)

    def _rebuilt(self, codes: Codes, x: Tensor, y: Tensor) -> _Results:
        loss, correct, errors = _nothing(len(codes))
        outputs = self._space.graph.outputs
        for i, code in enumerate(codes):
            try:
                with contained():
                    result = evaluate(self._rebuild(code), x, y, batch_size=self._chunk, outputs=outputs)
            except (UserError, KeyboardInterrupt):
                raise
            except Exception as error:
                errors[i] = described(error)
            else:
                loss[i], correct[i] = result.loss, result.correct
        return loss, correct, errors

    def _exchanged(self, codes: Codes, x: Tensor, y: Tensor) -> tuple[_Results, NDArray[np.bool_]]:
        """The results, and for which candidates kept outputs were used."""
        options = self._space.options(codes)
        if self._copy is None:
            self._copy = _Copy(self._space, self._calibration, self._device, self._shares)
        copy = self._copy
        order = np.lexsort(options.T[::-1]) if options.shape[1] else np.arange(len(codes))
        steps = copy.changes(options[order])
        later = _later(steps)
        loss, correct, errors = _nothing(len(codes))
        loss[:] = 0.0
        used = np.zeros(len(codes), dtype=bool)
        classes = int(y.max()) + 1
        for xs, ys in zip(torch.split(x, self._chunk), torch.split(y, self._chunk), strict=True):
            copy.forget()
            target = ys.to(self._device)
            for place, i in enumerate(order.tolist()):
                if errors[i]:
                    continue
                try:
                    with contained():
                        logits = copy.run(options[i], xs.to(self._device, copy=True), later[place])
                        lost, right = chunk_score(logits, target, classes, self._space.graph.outputs)
                except (UserError, KeyboardInterrupt, UnshareableError):
                    raise
                except Exception as error:
                    errors[i] = described(error)
                    loss[i], correct[i] = np.nan, 0
                else:
                    used[i] |= copy.answered
                    loss[i] += lost
                    correct[i] += right
        return (loss / len(y), correct, errors), used

    def _difference(self, codes: Codes, x: Tensor, y: Tensor, results: _Results, used: NDArray[np.bool_]) -> str:
        """How the first candidates, and those that fail, differ when they are evaluated as new models; empty if they do
        not."""
        loss, correct, errors = results
        failed = [i for i, error in enumerate(errors) if error]
        fine = [np.flatnonzero(used == kept) for kept in (False, True)]
        first = [np.setdiff1d(f, failed)[:number].tolist() for f, number in zip(fine, self._unchecked, strict=True)]
        for i in (*failed, *first[0], *first[1]):
            (one_loss,), (one_correct,), (error,) = self._rebuilt(codes[i : i + 1], x, y)
            if errors[i] and error:
                errors[i] = error
            elif not (np.array_equal(loss[i], one_loss, equal_nan=True) and correct[i] == one_correct):
                here = errors[i] or f"a loss of {loss[i]:.9g}"
                return f"a candidate has {here} then, and as the model that is deployed {error or f'{one_loss:.9g}'}"
        self._unchecked = [n - len(checked) for n, checked in zip(self._unchecked, first, strict=True)]
        return ""


class _Copy:
    """The copy of the model in which formats are exchanged, and what is kept of its runs."""

    def __init__(self, space: FormatSpace, calibration: Calibration, device: str, shares: bool) -> None:
        self._space, self._calibration = space, calibration
        self._bits = {site.name: 1 << g for g, site in enumerate(space.sites)}
        # Functions without formats are called as they are: watching calls takes time.
        changing = [s for s, options in zip(space.sites, space.site_formats, strict=True) if s.path or any(options)]
        self._exchange = Exchange(space.graph, changing, device, self._before)
        self._options = np.full(len(space.sites), -1)
        self._prefixes: Prefixes | None = None
        if shares:
            sites = {site.path: self._bits[site.name] for site in space.sites if site.path}
            self._prefixes = Prefixes(self._exchange.model, sites, sum(self._bits.values()))

    def _before(self, site: Site) -> None:
        if self._prefixes is not None:
            self._prefixes.called |= self._bits[site.name]

    def changes(self, options: Codes) -> list[int]:
        """The sites that differ between each candidate and the one before it, one bit each; 0 for the first one."""
        differs = options[1:] != options[:-1]
        return [0, *(sum(1 << g for g in np.flatnonzero(row).tolist()) for row in differs)][: len(options)]

    def forget(self) -> None:
        """Forget the outputs that are kept; other samples follow."""
        if self._prefixes is not None:
            self._prefixes.forget()

    @property
    def answered(self) -> bool:
        """Whether kept outputs were used in the last run."""
        return self._prefixes is not None and self._prefixes.answered > 0

    def run(self, options: NDArray[np.int64], x: Tensor, later: Sequence[int]) -> object:
        """The output of the model under these options, shape (sites,); `later` as for ``Prefixes.run``."""
        changed = 0
        for g in np.flatnonzero(options != self._options).tolist():
            site, formats = self._space.sites[g], self._space.site_formats[g][options[g]]
            correction = self._calibration.correction(site, formats) if formats else None
            self._exchange.put(site, self._calibration.formats(site, formats), correction)
            self._options[g] = options[g]
            changed |= 1 << g
        if self._prefixes is not None:
            return self._prefixes.run(x, changed, later)
        with torch.no_grad():
            return self._exchange.model(x)


def _later(steps: Sequence[int]) -> list[list[int]]:
    """For each candidate, the sites that will have changed in the following ones, growing; each set once."""
    later: list[list[int]] = []
    rest: list[int] = []
    for step in reversed(steps):
        later.append(rest)
        grown = [step, *(step | changed for changed in rest)]
        rest = [c for i, c in enumerate(grown) if i == 0 or c != grown[i - 1]]
    return later[::-1]


def _nothing(number: int) -> _Results:
    return np.full(number, np.nan), np.zeros(number, dtype=np.int64), [""] * number
