"""Scores candidates as whole models, one by one: the plain path.

It is for models that cannot be traced, and where the tree evaluator must not be used. If formats can be exchanged in
one copy of the model (``transforms/exchange.py``), no model is rebuilt. Candidates are run in the order of the space,
in which neighbours agree on as many leading sites as possible, and outputs of modules before the first difference are
kept (``prefixes.py``). The first candidates are evaluated a second time, each as a new model. If they differ, outputs
are no longer kept, or models are rebuilt for all candidates, and ``PlainScorer.note`` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.engine.evaluation import prefixes
from bitfront.engine.evaluation.calibration import Calibration
from bitfront.engine.evaluation.prefixes import Prefixes, UnshareableError
from bitfront.errors import UserError, described
from bitfront.graph import Site
from bitfront.interrupts import contained
from bitfront.metrics.base import Scores
from bitfront.scoring import Evaluation, Tally, TaskEvaluation, measure
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace
from bitfront.tasks.base import Task
from bitfront.transforms import exchange
from bitfront.transforms.exchange import Exchange

#: So many candidates for which kept outputs were used, and as many others, are evaluated as new models too.
CHECKED = 2
#: Candidates are run together in groups of so many; fewer where the results of every sample are kept meanwhile.
GROUP, GROUP_WITH_RESULTS = 1024, 64

#: What each candidate gives: its evaluation, or why it failed.
_Results = list[Evaluation | TaskEvaluation | str]


def as_scores(results: Sequence[Evaluation | TaskEvaluation | str], task: Task, samples: int) -> Scores:
    """What candidates gave, as arrays.

    Args:
        results: of each candidate its evaluation for the task, or why it failed.
        samples: number of samples, the same for all.
    """
    errors = tuple(r if isinstance(r, str) else "" for r in results)
    loss = np.array([np.nan if isinstance(r, str) else r.loss for r in results])
    correct = np.array([r.correct if isinstance(r, Evaluation) else 0 for r in results], dtype=np.int64)
    if task.classifies:
        return Scores(loss, correct, samples, errors)
    others = {
        m.name: np.array([r.metrics[m.name] if isinstance(r, TaskEvaluation) else np.nan for r in results])
        for m in task.measured
    }
    return Scores(loss, correct, samples, errors, others)


class PlainScorer:
    """Scores candidates of one space as whole models.

    Args:
        space: of the candidates.
        calibration: which has learned the options that are scored.
        device: where models are run.
        chunk: number of samples that go through a model at a time.
        rebuild: the deployed model of a code.
        task: what the samples are.
        room: how many bytes weights and outputs that are kept may take, each; None: as many as usual.
        folder: where outputs that do not fit into memory are written; None: where temporary files are.

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
        task: Task,
        room: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self._task, self._room, self._folder = task, room, folder
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
        """Loss and metrics of some candidates.

        Args:
            codes: shape (candidates, parameters).
            x: samples, shape (samples, *features).
            y: targets of the task, one per sample.
        """
        size = GROUP if self._task.classifies else GROUP_WITH_RESULTS
        results = [r for i in range(0, len(codes), size) for r in self._group(codes[i : i + size], x, y)]
        return as_scores(results, self._task, len(y))

    def forget(self) -> None:
        """Forget the copy of the model, and the weights and outputs that are kept with it."""
        self._copy = None

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
        results: _Results = []
        outputs = self._space.graph.outputs
        for code in codes:
            try:
                with contained():
                    model = self._rebuild(code)
                    results.append(measure(self._task, model, x, y, batch_size=self._chunk, outputs=outputs))
            except (UserError, KeyboardInterrupt):
                raise
            except Exception as error:
                results.append(described(error))
        return results

    def _exchanged(self, codes: Codes, x: Tensor, y: Tensor) -> tuple[_Results, NDArray[np.bool_]]:
        """The results, and for which candidates kept outputs were used."""
        options = self._space.options(codes)
        if self._copy is None:
            how = self._device, self._shares, self._room, self._folder
            self._copy = _Copy(self._space, self._calibration, *how)
        copy = self._copy
        order = np.lexsort(options.T[::-1]) if options.shape[1] else np.arange(len(codes))
        steps = copy.changes(options[order])
        later = _later(steps)
        outputs, classes = self._space.graph.outputs, int(y.max()) + 1 if self._task.classifies else 0
        tallies, errors = [Tally(self._task, outputs, classes) for _ in codes], [""] * len(codes)
        used = np.zeros(len(codes), dtype=bool)
        for xs, ys in zip(torch.split(x, self._chunk), torch.split(y, self._chunk), strict=True):
            copy.forget()
            target = ys.to(self._device)
            for place, i in enumerate(order.tolist()):
                if errors[i]:
                    continue
                try:
                    with contained():
                        given = copy.run(options[i], xs.to(self._device, copy=True), later[place])
                        tallies[i].add(given, target)
                except (UserError, KeyboardInterrupt, UnshareableError):
                    raise
                except Exception as error:
                    errors[i] = described(error)
                else:
                    used[i] |= copy.answered
        return [error or tally.evaluation() for error, tally in zip(errors, tallies, strict=True)], used

    def _difference(self, codes: Codes, x: Tensor, y: Tensor, results: _Results, used: NDArray[np.bool_]) -> str:
        """How the first candidates, and those that fail, differ when they are evaluated as new models; empty if they do
        not."""
        failed = [i for i, result in enumerate(results) if isinstance(result, str)]
        fine = [np.flatnonzero(used == kept) for kept in (False, True)]
        first = [np.setdiff1d(f, failed)[:number].tolist() for f, number in zip(fine, self._unchecked, strict=True)]
        for i in (*failed, *first[0], *first[1]):
            here, (there,) = results[i], self._rebuilt(codes[i : i + 1], x, y)
            if isinstance(here, str) and isinstance(there, str):
                results[i] = there
            elif isinstance(here, str) or isinstance(there, str) or not _equal(here, there):
                words = [r if isinstance(r, str) else _words(r) for r in (here, there)]
                return f"a candidate has {words[0]} then, and as the model that is deployed {words[1]}"
        self._unchecked = [n - len(checked) for n, checked in zip(self._unchecked, first, strict=True)]
        return ""


class _Copy:
    """The copy of the model in which formats are exchanged, and what is kept of its runs."""

    def __init__(
        self,
        space: FormatSpace,
        calibration: Calibration,
        device: str,
        shares: bool,
        room: int | None,
        folder: Path | None,
    ) -> None:
        self._space, self._calibration = space, calibration
        self._bits = {site.name: 1 << g for g, site in enumerate(space.sites)}
        # Functions without formats are called as they are: watching calls takes time.
        changing = [s for s, options in zip(space.sites, space.site_formats, strict=True) if s.path or any(options)]
        usual = exchange.KEPT_BYTES, prefixes.PREFIX_BYTES
        weights, outputs = (most if room is None else min(most, room // 2) for most in usual)
        self._exchange = Exchange(space.graph, changing, device, self._before, weights)
        self._options = np.full(len(space.sites), -1)
        self._prefixes: Prefixes | None = None
        if shares:
            sites = {site.path: self._bits[site.name] for site in space.sites if site.path}
            self._prefixes = Prefixes(self._exchange.model, sites, sum(self._bits.values()), outputs, folder)

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


def _equal(one: Evaluation | TaskEvaluation, other: Evaluation | TaskEvaluation) -> bool:
    """Whether two evaluations have the same bits."""
    return bool(np.array_equal([*one.values.values()], [*other.values.values()], equal_nan=True))


def _words(evaluation: Evaluation | TaskEvaluation) -> str:
    return f"a loss of {evaluation.loss:.9g}"
