"""The conformance suite of strategies: what every strategy must do. The tests of each strategy run it.

from bitfront.testing import check_strategy
check_strategy(MyStrategy)
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from bitfront.config import StrategySetup, settings_of
from bitfront.spaces.base import Branch, Choice, Codes, Group, Space
from bitfront.strategies.base import History, Strategy

Make = Callable[[Space, int, int], Strategy]


def toy_space(groups: int = 3, widths: int = 4) -> Space:
    """A small space with branches: `groups` sites, each float or one of `widths` widths for two operands."""
    labels = tuple(str(2 * i + 2) for i in range(widths))
    branch = Branch("integer", (Choice("data_in", labels), Choice("weight", labels)))
    return Space([Group(f"site{g}", (branch, Branch("NA"))) for g in range(groups)])


def toy_losses(space: Space, codes: Codes, objectives: int, failing: int = 0) -> NDArray[np.float64]:
    """Losses of candidates in closed form; every `failing`-th option of the first group fails (NaN)."""
    options = space.options(codes).astype(np.float64)
    columns = [(((options - 3.0 * k) ** 2).sum(axis=1) + 0.1 * options[:, :1].sum(axis=1)) for k in range(objectives)]
    losses = np.stack(columns, axis=1)
    if failing:
        losses[options[:, 0] % failing == 1] = np.nan
    return losses


def check_strategy(make: Make, *, calls: int = 6, n: int = 4, seeded: bool = True, stateless: bool = False) -> None:
    """Assert that the strategies `make` gives keep the contract of :class:`bitfront.strategies.base.Strategy`.

    Args:
        make: ``(space, objectives, seed) -> Strategy``; the class of a strategy is one.
        calls: number of calls of ``propose`` in each check; choose few for a slow strategy.
        n: number of candidates to ask for in each call.
        seeded: whether another seed must give other proposals.
        stateless: whether ``propose`` depends on its arguments alone, so that a new object continues where an earlier
            one stopped; the strategies in Bitfront are.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    _check_settings(type(make(toy_space(), 1, 0)))
    for objectives, failing in ((1, 0), (2, 3)):
        space = toy_space()
        first = _asked(make(space, objectives, 0), space, objectives, calls, n, failing)
        again = _asked(make(space, objectives, 0), space, objectives, calls, n, failing)
        assert len(first) == len(again) == calls, "a strategy gives up long before its space is exhausted"
        for step, (one, two) in enumerate(zip(first, again, strict=True)):
            assert np.array_equal(one, two), f"call {step}: the same history and seed give other proposals"
        if stateless:
            renewed = _asked(make(space, objectives, 0), space, objectives, calls, n, failing, renew=make)
            for step, (one, two) in enumerate(zip(first, renewed, strict=True)):
                assert np.array_equal(one, two), (
                    f"call {step}: a new strategy, given the same history, proposes other candidates"
                )
        if seeded:
            other = _asked(make(space, objectives, 1), space, objectives, calls, n, failing)
            assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=False)), (
                "another seed gives the same proposals"
            )
    _check_foreign_history(make, n)
    _check_exhausted(make, n)
    _check_single_candidate(make)
    _check_all_failed(make, n)
    _check_constrained(make, n)


def _check_settings(kind: type[Strategy]) -> None:
    fields = kind.Settings.model_fields
    shared = sorted({*fields} & {*StrategySetup.model_fields})
    assert not shared, f"{', '.join(shared)}: a key that every search has cannot be a setting of a strategy"
    for name, field in fields.items():
        assert not field.is_required(), f"setting {name} needs a default: a strategy must run with nothing set"
        assert field.description, f"setting {name} needs a description, which the reference shows"
    for what, key in (("variant", kind.variant), ("limit", kind.limit)):
        assert not key or key in fields, f"{what} names {key!r}, which is no setting"
    for variant in kind.variants:
        assert settings_of(kind.Settings, {kind.variant: variant}, ()), f"variant {variant!r} is not possible"


def _global_numpy() -> NDArray[np.uint32]:
    state = np.random.get_state(legacy=False)["state"]
    return np.append(state["key"], np.uint32(state["pos"]))


def _propose(strategy: Strategy, history: History, n: int, rng: np.random.Generator) -> Codes:
    """One call of ``propose``. Checks that everything it must not change is the same before and after."""
    space = strategy.space
    codes, losses = history.codes.copy(), history.losses.copy()
    state = (random.getstate(), _global_numpy(), torch.get_rng_state())
    enough = strategy.enough(history, 0) if strategy.looks_back else ""
    assert isinstance(enough, str), "enough gives something else than a text"
    proposed = strategy.propose(history, n, rng)
    assert random.getstate() == state[0], "propose draws from Python's global generator"
    assert np.array_equal(_global_numpy(), state[1]), "propose draws from NumPy's global generator"
    assert torch.equal(torch.get_rng_state(), state[2]), "propose draws from PyTorch's global generator"
    assert np.array_equal(history.codes, codes), "propose changes the history"
    assert np.array_equal(history.losses, losses, equal_nan=True), "propose changes the history"
    assert proposed.dtype == np.int64, f"proposed codes are {proposed.dtype}, not int64"
    assert len(proposed) <= n, f"{len(proposed)} candidates were proposed, but {n} were asked for"
    space.check(proposed)
    assert np.array_equal(space.canonical(proposed), proposed), "a proposed code is not canonical"
    return proposed


def _tell(space: Space, history: History, codes: Codes, failing: int) -> None:
    fresh = {c.tobytes(): c for c in codes if history.row(c) is None}
    if fresh:
        new = np.array(list(fresh.values()))
        history.tell(new, toy_losses(space, new, history.objectives, failing))


def _asked(
    strategy: Strategy, space: Space, objectives: int, calls: int, n: int, failing: int, renew: Make | None = None
) -> list[Codes]:
    history, proposals = History(len(space.parameters), objectives), []
    for step in range(calls):
        if renew is not None:
            strategy = renew(space, objectives, strategy.seed)
        proposed = _propose(strategy, history, n, np.random.default_rng([strategy.seed, step]))
        if not len(proposed):
            break
        proposals.append(proposed)
        _tell(space, history, proposed, failing)
    return proposals


def _check_foreign_history(make: Make, n: int) -> None:
    space, rng = toy_space(), np.random.default_rng(0)
    strategy, history = make(space, 2, 0), History(len(space.parameters), 2)
    for _ in range(3):
        _tell(space, history, space.sample(5, rng), 3)
        proposed = _propose(strategy, history, n, rng)
        assert len(proposed), "nothing is proposed after candidates that the strategy did not propose"
        # Some proposed candidates may never be told, because others were evaluated in their place.
        _tell(space, history, proposed[1:], 3)


def _check_exhausted(make: Make, n: int) -> None:
    space, rng = toy_space(1, 2), np.random.default_rng(0)
    strategy, history = make(space, 1, 0), History(len(space.parameters), 1)
    _tell(space, history, space.numbered(0, space.size - 1), 0)
    _propose(strategy, history, n, rng)
    _tell(space, history, space.numbered(0, space.size), 0)
    for _ in range(2):
        _propose(strategy, history, n, rng)


def _check_single_candidate(make: Make) -> None:
    space, rng = Space([Group("site", (Branch("NA"),))]), np.random.default_rng(0)
    strategy, history = make(space, 1, 0), History(0, 1)
    proposed = _propose(strategy, history, 1, rng)
    assert proposed.shape == (1, 0), f"the code of the only candidate has shape {proposed.shape}, not (1, 0)"
    _tell(space, history, proposed, 0)
    _propose(strategy, history, 1, rng)


def _check_all_failed(make: Make, n: int) -> None:
    space, rng = toy_space(), np.random.default_rng(0)
    strategy, history = make(space, 2, 0), History(len(space.parameters), 2)
    for _ in range(2):
        codes = space.sample(n, rng)
        fresh = np.array(list({c.tobytes(): c for c in codes if history.row(c) is None}.values()))
        history.tell(fresh, np.full((len(fresh), 2), np.nan))
        assert len(_propose(strategy, history, n, rng)), "nothing is proposed if all candidates failed so far"


def _check_constrained(make: Make, n: int) -> None:
    """Check that a strategy accepts candidates that violate a constraint, also those without losses."""
    space, rng = toy_space(), np.random.default_rng(0)
    for evaluated in (True, False):
        strategy, history = make(space, 2, 0), History(len(space.parameters), 2)
        for _ in range(4):
            fresh = history.fresh(_propose(strategy, history, n, rng))
            losses, violation = toy_losses(space, fresh, 2), np.maximum(0.0, space.options(fresh).sum(axis=1) - 20.0)
            losses[(violation > 0) & (not evaluated)] = np.nan
            history.tell(fresh, losses, violation)
        assert len(_propose(strategy, history, n, rng)), "nothing is proposed if some candidates violate a constraint"
