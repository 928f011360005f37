"""What is expected of a candidate from its options alone, as a number from 0 to 1: the places on a trend.

A model of main effects and pairs (``anova.py``) has to learn from results what each option does. Some of that is known
beforehand, and how the options act together is not a sum: ``NoiseTrend`` adds up the noise of the options, and
``MarginTrend`` what they do to the outputs for each sample. The result is modelled as a smooth function of the place on
each trend, beside the effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitfront.spaces.margins import Margins, Singles

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

#: The length of the kernel along a trend, as a share of its extent; and the factor by which it varies with the seed, up
#: and down. Of lengths from 0.2 to 0.42 none was seen to be better.
LENGTH, VARIED = 0.3, 1.42
#: Its multiples are spread evenly over the numbers from 0 to 1, whole parts left out.
GOLDEN = (5.0**0.5 - 1.0) / 2.0
#: The variance of the slope of a line along a trend: what is expected where nothing is known yet.
LINE = 4.0
#: Where places may be. Below 0 are candidates that are expected to be better than the one with the least noise.
LOWEST, HIGHEST = -0.25, 1.0
#: Shares of errors that differ by less than this lie close together on a trend.
RESOLVED = 0.005
#: Candidates whose margins are computed together, and places that are kept.
BLOCK, KEPT = 32, 2**17


class Trend(Protocol):
    """Places of candidates, given by their options, int64, shape (candidates, groups)."""

    def places(self, options: Codes) -> Floats:
        """Their places, shape (candidates,)."""
        ...

    def changed(self, options: Codes) -> list[Floats]:
        """Per group, their places if it takes another option: shape (candidates, options of the group)."""
        ...


def length_of(seed: int) -> float:
    """The length of the kernel for a random seed, 0 or more: ``LENGTH`` for 0, and a length near it for any other one.

    Where the first candidates of a search are fixed, nothing else depends on its seed. All seeds would repeat one run,
    and not show how much of a result is luck.
    """
    place = (0.5 + seed % 2**32 * GOLDEN) % 1.0
    return LENGTH * float(VARIED ** (2.0 * place - 1.0))


def similarities(places: Floats, others: Floats, length: float = LENGTH) -> Floats:
    """A Matérn kernel of smoothness 3/2 and a line, shape (places, others)."""
    distance = np.sqrt(3.0) / length * np.abs(places[:, None] - others)
    result: Floats = (1.0 + distance) * np.exp(-distance) + LINE * places[:, None] * others
    return result


def prior(places: Floats) -> Floats:
    """The kernel of each place and itself, shape (places,)."""
    result: Floats = 1.0 + LINE * places * places
    return result


class NoiseTrend:
    """The logarithm of the total noise of a candidate, from 0 for the least to 1 for the most noise in the space.

    Args:
        noise: per group the noise of each option, shape (options,).
    """

    def __init__(self, noise: Sequence[Floats]) -> None:
        least, most = sum(float(n.min()) for n in noise), sum(float(n.max()) for n in noise)
        self._floor = max(least, 1e-9 * most, 1e-300)
        self._noise = [np.asarray(n, dtype=np.float64) for n in noise]
        self._range = np.log((most + self._floor) / (least + self._floor))

    def places(self, options: Codes) -> Floats:
        """The places of candidates, shape (candidates,)."""
        return self._place(self._total(options))

    def changed(self, options: Codes) -> list[Floats]:
        """Per group, the places under its options, shape (candidates, options)."""
        total = self._total(options)[:, None]
        return [self._place(total - n[options[:, g]][:, None] + n) for g, n in enumerate(self._noise)]

    def _total(self, options: Codes) -> Floats:
        total = np.zeros(len(options))
        for g, noise in enumerate(self._noise):
            total += noise[options[:, g]]
        return total

    def _place(self, total: Floats) -> Floats:
        if self._range <= 0:
            return np.zeros_like(total)
        places: Floats = np.log((total + self._floor) / (2 * self._floor)) / self._range
        return np.clip(places, 0.0, 1.0)


class MarginTrend:
    """The share of wrong samples, if what options do to the margins adds up: near 0 for few, 1 for all.

    Args:
        margins: of some samples.
    """

    def __init__(self, margins: Margins) -> None:
        self._margins = margins
        self._least = float(self._wrong(margins.base[None])[0])
        #: Places by the options of a candidate, and the last answer of ``changed``: models ask for the same ones.
        self._kept: dict[bytes, float] = {}
        self._changed: tuple[bytes, list[Floats]] = (b"", [])

    def places(self, options: Codes) -> Floats:
        """The places of candidates, shape (candidates,)."""
        keys = [row.tobytes() for row in np.ascontiguousarray(options)]
        unknown = [i for i, key in enumerate(keys) if key not in self._kept]
        if len(self._kept) + len(unknown) > KEPT:
            self._kept, unknown = {}, list(range(len(keys)))
        for start in range(0, len(unknown), BLOCK):
            rows = unknown[start : start + BLOCK]
            for i, place in zip(rows, self._place(self._wrong(self._sums(options[rows]))).tolist(), strict=True):
                self._kept[keys[i]] = place
        return np.array([self._kept[key] for key in keys])

    def changed(self, options: Codes) -> list[Floats]:
        """Per group, the places under its options, shape (candidates, options)."""
        key = options.tobytes()
        if self._changed[0] != key or not self._changed[1]:
            effects = self._margins.effects
            wrong = [np.empty((len(options), len(effect))) for effect in effects]
            for start in range(0, len(options), BLOCK):
                block = options[start : start + BLOCK]
                sums = self._sums(block)
                for g, effect in enumerate(effects):
                    without = sums - effect[block[:, g]]
                    for option, added in enumerate(effect):
                        wrong[g][start : start + BLOCK, option] = self._wrong(without + added)
            self._changed = key, [self._place(shares) for shares in wrong]
        return self._changed[1]

    def _sums(self, options: Codes) -> Singles:
        """The margins of candidates, shape (candidates, classes, samples)."""
        sums = np.repeat(self._margins.base[None], len(options), axis=0)
        for g, effect in enumerate(self._margins.effects):
            sums += effect[options[:, g]]
        return sums

    def _wrong(self, margins: Singles) -> Floats:
        """The share of wrong samples of candidates, shape (candidates,)."""
        wrong = np.where(margins.max(axis=1) > 0, self._margins.weights, np.float32(0.0))
        result: Floats = wrong.sum(axis=1, dtype=np.float64)
        return result

    def _place(self, wrong: Floats) -> Floats:
        # Where the float model has all samples wrong, there is no extent.
        extent = max(1.0 - self._least, RESOLVED)
        along = np.arcsinh((wrong - self._least) / RESOLVED) / np.arcsinh(extent / RESOLVED)
        places: Floats = np.clip(along, LOWEST, HIGHEST)
        return places


def known_trends(noise: Sequence[Floats] | None, margins: Margins | None) -> list[Trend]:
    """The trends of what is known of the options; none where nothing is."""
    of_noise: list[Trend] = [] if noise is None else [NoiseTrend(noise)]
    return of_noise if margins is None else [*of_noise, MarginTrend(margins)]
