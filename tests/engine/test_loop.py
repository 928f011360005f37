"""The loop, with an evaluator that computes in closed form: budgets, duplicates, failures, and resuming by replaying."""

import contextlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from bitfront.engine.evaluation.fixed import BatchMetrics
from bitfront.engine.search.loop import MAX_FAILURES, Limits, run
from bitfront.engine.storage.records import ENOUGH
from bitfront.engine.storage.store import Store
from bitfront.errors import EvaluationError
from bitfront.pareto import non_dominated
from bitfront.strategies.base import Strategy
from bitfront.strategies.brute_force import BruteForce
from bitfront.strategies.evolution import Evolution
from bitfront.strategies.optuna import OptunaSettings, OptunaStrategy
from bitfront.testing.strategies import toy_losses, toy_space

SPACE = toy_space(2, 3)  # 10 · 10 candidates
NONE = SPACE.numbered(0, 0)


class BlockEvaluator:
    """Stands in for ``engine.evaluator.Dispatcher``: blocks of `size`, interrupted after `patience` candidates."""

    isolated = False

    def __init__(self, size=3, patience=None, failing=0, after_block=lambda: None):
        self.size, self.patience, self.failing, self.after_block = size, patience, failing, after_block
        self.evaluated = []

    def blocks(self, codes):
        for start in range(0, len(codes), self.size):
            block = codes[start : start + self.size]
            if self.patience is not None and len(self.evaluated) + len(block) > self.patience:
                raise KeyboardInterrupt
            self.evaluated += [c.tobytes() for c in block]
            losses = toy_losses(SPACE, block, 2, self.failing)
            errors = tuple("RuntimeError: no" if np.isnan(row).any() else "" for row in losses)
            yield block, BatchMetrics({"a": losses[:, 0], "b": losses[:, 1]}, errors, (0.001,) * len(block))
            self.after_block()


class TwoLosses:
    def losses(self, values):
        return np.stack([values["a"], values["b"]], axis=1)


class Stubborn(Strategy):
    """Proposes the same candidate for ever."""

    def propose(self, history, n, rng):
        return self.space.numbered(7, 8)


class Empty(Strategy):
    """Has nothing to propose."""

    def propose(self, history, n, rng):
        return self.space.numbered(0, 0)


class Content(Evolution):
    """Has had enough when one of the losses is small: a function of the history."""

    def enough(self, history, initial):
        assert initial == 5, "the initial candidates, whatever is replayed"
        small = np.nanmin(history.losses[:, 0]) < 3.0 and len(history) >= 14
        return f"{len(history)} are enough" if small else ""


STRATEGIES = {
    "brute_force": BruteForce,
    "tpe": lambda s, o, seed: OptunaStrategy(s, o, seed, OptunaSettings(sampler="tpe")),
    "nsgaii": lambda s, o, seed: OptunaStrategy(s, o, seed, OptunaSettings(sampler="nsgaii")),
    "qmc": lambda s, o, seed: OptunaStrategy(s, o, seed, OptunaSettings(sampler="qmc")),
    "evolution": Evolution,
    "stubborn": Stubborn,
    "empty": Empty,
}


def opened(folder):
    return Store.open(folder / "trials.sqlite", ("a", "b"), len(SPACE.parameters), {"parameters": ["p"] * 6})


def search(
    folder,
    name,
    dispatcher,
    n_trials=40,
    initial=NONE,
    timeout=None,
    space=SPACE,
    on_progress=lambda _: None,
    bounds=None,
):
    """(why it stopped, its trials)"""
    store, strategy = opened(folder), {**STRATEGIES, "content": Content}[name](space, 2, 3)
    limits = Limits(n_trials, timeout)
    try:
        reason = run(space, strategy, initial, TwoLosses(), store, dispatcher, limits, 3, on_progress, bounds)
        return reason, store.trials()
    finally:
        store.close()


@pytest.mark.parametrize("n_trials", [1, 17, 40])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_budget_counts_distinct_candidates_and_none_is_evaluated_twice(tmp_path, name, n_trials):
    dispatcher = BlockEvaluator()
    reason, trials = search(tmp_path, name, dispatcher, n_trials)
    assert reason == "n_trials reached"
    assert len(trials) == len(set(dispatcher.evaluated)) == len(dispatcher.evaluated) == n_trials
    assert [c.tobytes() for c in trials.code] == dispatcher.evaluated
    assert trials.number.tolist() == list(range(n_trials))
    np.testing.assert_array_equal(trials.metrics["a"], toy_losses(SPACE, trials.code, 2)[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_space_with_nothing_unseen_left_ends_the_search(tmp_path, name):
    dispatcher = BlockEvaluator(size=16)
    reason, trials = search(tmp_path, name, dispatcher, n_trials=10_000)
    assert reason == "space exhausted"
    assert [c.tobytes() for c in trials.code] == dispatcher.evaluated
    assert sorted(dispatcher.evaluated) == sorted(c.tobytes() for c in SPACE.numbered(0, SPACE.size))


def test_a_space_of_one_candidate_is_searched(tmp_path):
    space = toy_space(0)
    for name in ("tpe", "brute_force", "empty"):
        store = Store.open(tmp_path / f"{name}.sqlite", ("a", "b"), 0, {"parameters": []})
        strategy = STRATEGIES[name](space, 2, 0)

        class One(BlockEvaluator):
            def blocks(self, codes):
                yield codes, BatchMetrics({"a": np.zeros(1), "b": np.zeros(1)}, ("",), (0.0,))

        assert run(space, strategy, space.numbered(0, 0), TwoLosses(), store, One(), Limits(5), 0) == "space exhausted"
        assert len(store) == 1
        store.close()


def test_brute_force_finds_candidates_in_the_order_of_the_space(tmp_path):
    _, trials = search(tmp_path, "brute_force", BlockEvaluator(), n_trials=SPACE.size)
    assert np.array_equal(trials.code, SPACE.numbered(0, SPACE.size))


def test_initial_candidates_come_first_each_once_and_count(tmp_path):
    initial = SPACE.numbered(50, 55)
    _, trials = search(tmp_path, "tpe", BlockEvaluator(), 12, initial=np.concatenate([initial, initial]))
    assert np.array_equal(trials.code[:5], initial)
    assert len(np.unique(trials.code, axis=0)) == len(trials) == 12


def test_more_initial_candidates_than_the_budget_are_cut(tmp_path):
    reason, trials = search(tmp_path, "tpe", BlockEvaluator(), 4, initial=SPACE.numbered(0, 9))
    assert reason == "n_trials reached"
    assert np.array_equal(trials.code, SPACE.numbered(0, 4))


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tmp_path, name, failing):
    initial = SPACE.numbered(90, 95)
    (tmp_path / "whole").mkdir()
    _, expected = search(tmp_path / "whole", name, BlockEvaluator(failing=failing), 30, initial)
    for patience in (0, 4, 7, 13, 29):
        folder = tmp_path / str(patience)
        reason, before = search(folder, name, BlockEvaluator(size=1, patience=patience, failing=failing), 30, initial)
        assert reason == "interrupted"
        assert len(before) == patience, "what was evaluated is stored"
        # In other blocks, too: neither the machine nor the number of workers decides what is proposed.
        reason, trials = search(folder, name, BlockEvaluator(size=5, failing=failing), 30, initial)
        assert reason == "n_trials reached"
        assert {c.tobytes() for c in trials.code} == {c.tobytes() for c in expected.code}
        # Failed ones are tried again, under new numbers; all others keep their place.
        kept = before.complete
        assert np.array_equal(trials.code[: kept.sum()], before.code[kept])
        if not failing:
            assert np.array_equal(trials.code, expected.code)


def test_a_strategy_ends_a_search_at_the_same_place_whatever_interrupts_it(tmp_path):
    initial = SPACE.numbered(90, 95)
    (tmp_path / "whole").mkdir()
    reason, expected = search(tmp_path / "whole", "content", BlockEvaluator(), 60, initial)
    assert reason == f"{ENOUGH}: {len(expected)} are enough"
    assert 14 <= len(expected) < 60
    for patience in (4, len(expected) - 3, len(expected) - 1):
        folder = tmp_path / str(patience)
        assert search(folder, "content", BlockEvaluator(1, patience), 60, initial)[0] == "interrupted"
        for _ in range(2):
            again, trials = search(folder, "content", BlockEvaluator(5), 60, initial)
            assert again == reason
            assert np.array_equal(trials.code, expected.code)
    # Trials from beyond that point are replayed, and the strategy is asked again behind their last batch.
    _, more = search(folder, "evolution", BlockEvaluator(), len(expected) + 9, initial)
    again, trials = search(folder, "content", BlockEvaluator(), 60, initial)
    assert np.array_equal(trials.code[: len(more)], more.code)
    assert again == f"{ENOUGH}: {len(trials)} are enough"
    assert len(trials) < len(more) + Evolution.batch


@pytest.mark.parametrize("name", ["tpe", "brute_force"])
def test_a_search_interrupted_again_and_again_arrives_at_the_same_trials(tmp_path, name):
    (tmp_path / "whole").mkdir()
    _, expected = search(tmp_path / "whole", name, BlockEvaluator())
    for _ in range(40):
        reason, trials = search(tmp_path / "parts", name, BlockEvaluator(size=1, patience=9))
        if reason != "interrupted":
            break
    assert reason == "n_trials reached"
    assert np.array_equal(trials.code, expected.code)


def test_a_finished_search_given_again_evaluates_nothing_and_a_larger_budget_goes_on(tmp_path):
    _, first = search(tmp_path, "tpe", BlockEvaluator(), 20)
    again = BlockEvaluator()
    assert search(tmp_path, "tpe", again, 20)[0] == "n_trials reached"
    assert again.evaluated == []
    _, more = search(tmp_path, "tpe", again, 30)
    assert np.array_equal(more.code[:20], first.code)
    assert len(again.evaluated) == 10


def test_failing_candidates_are_recorded_and_the_others_unaffected(tmp_path):
    reason, trials = search(tmp_path, "brute_force", BlockEvaluator(failing=3), SPACE.size)
    assert reason == "space exhausted"
    losses = toy_losses(SPACE, trials.code, 2, 3)
    np.testing.assert_array_equal(trials.metrics["a"], losses[:, 0])
    failed = np.isnan(losses).any(axis=1)
    assert 0 < failed.sum() < len(trials)
    assert np.array_equal(trials.complete, ~failed)
    assert [bool(trials.errors.get(n)) for n in trials.number.tolist()] == failed.tolist()


def test_a_search_in_which_everything_fails_stops_and_says_why(tmp_path):
    class Broken(BlockEvaluator):
        def blocks(self, codes):
            for block, _ in super().blocks(codes):
                nan = np.full(len(block), np.nan)
                yield (
                    block,
                    BatchMetrics({"a": nan, "b": nan}, ("ValueError: wrong shape",) * len(block), (0.0,) * len(block)),
                )

    broken = Broken(size=1)
    with pytest.raises(
        EvaluationError,
        match=f"the first {MAX_FAILURES} candidates all failed; the last one with: ValueError: wrong shape",
    ):
        search(tmp_path, "tpe", broken)
    assert len(broken.evaluated) == MAX_FAILURES
    store = opened(tmp_path)  # what fails is tried again
    assert len(store) == 0
    store.close()


def test_time_that_is_up_stops_after_the_block_at_hand(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bitfront.engine.search.loop.time.perf_counter", lambda: clock[0])

    def tick():
        clock[0] += 1

    dispatcher = BlockEvaluator(size=2, after_block=tick)
    reason, trials = search(tmp_path, "brute_force", dispatcher, 40, timeout=2.5)
    assert reason == "timeout"
    assert np.array_equal(trials.code, SPACE.numbered(0, 8)), "the fourth block is at hand when 3 seconds are over"
    # A session that goes on counts only its time, and it ends where an uninterrupted search would.
    clock[0] = 0.0
    _, trials = search(tmp_path, "brute_force", BlockEvaluator(), 40, timeout=2.5)
    assert np.array_equal(trials.code, SPACE.numbered(0, 40))


def test_progress_is_reported_from_start_to_end(tmp_path):
    seen = []
    _, trials = search(
        tmp_path, "tpe", BlockEvaluator(failing=4), 20, on_progress=lambda p: seen.append((p.done, p.total, p.failed))
    )
    done = [d for d, _, _ in seen]
    assert done == sorted(done)
    failed = len(trials) - int(trials.complete.sum())
    assert failed > 0
    assert seen[-1] == (20, 20, failed)


def test_an_evaluator_that_stops_the_search_leaves_what_was_stored(tmp_path):
    class Dies(BlockEvaluator):
        def blocks(self, codes):
            for i, part in enumerate(super().blocks(codes)):
                if i == 2:
                    raise EvaluationError("a worker process died")
                yield part

    with pytest.raises(EvaluationError, match="worker"):
        search(tmp_path, "brute_force", Dies())
    store = opened(tmp_path)
    assert np.array_equal(store.trials().code, SPACE.numbered(0, 6))
    store.close()


# --- many candidates -------------------------------------------------------------------------------------------------

#: Brute force over 83,521 candidates, in blocks of 1,500; killed after so many, if any are given.
MANY = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from bitfront.engine.search.loop import Limits, run
from bitfront.engine.storage.store import Store
from bitfront.spaces.base import Branch, Choice, Group, Space
from bitfront.strategies.brute_force import BruteForce
from bitfront.strategies.evolution import Evolution

folder, patience = Path(sys.argv[1]), int(sys.argv[2])
branch = Branch("integer", (Choice("data_in", tuple("2468")), Choice("weight", tuple("2468"))))
space = Space([Group(f"site{g}", (branch, Branch("NA"))) for g in range(4)])
assert space.size == 83521

def losses(codes):
    options = space.options(codes).astype(float)
    return {"a": (options**2).sum(axis=1) + 0.1 * options[:, 0], "b": ((options - 3) ** 2).sum(axis=1)}

class Evaluates:
    isolated = True  # so that small blocks are written together
    done = 0

    def blocks(self, codes):
        for start in range(0, len(codes), 1500):
            block = codes[start : start + 1500]
            if Evaluates.done % 15000 == 0:
                time.sleep(0.11)  # long enough for what was evaluated to be written
            nothing = {"errors": ("",) * len(block), "seconds": (0.0,) * len(block)}
            yield block, SimpleNamespace(values=losses(block), **nothing)
            Evaluates.done += len(block)
            if patience and Evaluates.done >= patience:
                os.kill(os.getpid(), signal.SIGKILL)

class TwoLosses:
    def losses(self, values):
        return np.stack([values["a"], values["b"]], axis=1)

identity = {"parameters": [p.name for p in space.parameters]}
store = Store.open(folder / "trials.sqlite", ("a", "b"), len(space.parameters), identity, space.keys)
before, seen = len(store), []
reason = run(space, BruteForce(space, 2, 0), space.numbered(0, 0), TwoLosses(), store, Evaluates(), Limits(10**6), 0,
             seen.append)
print(reason, before, Evaluates.done, *seen[-1].front.rows.tolist())
"""


@pytest.mark.slow
def test_a_long_search_killed_on_its_way_ends_with_the_same_trials_and_front(tmp_path):
    def go(folder, patience=0):
        words = [sys.executable, "-c", MANY, str(tmp_path / folder), str(patience)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode, done.stdout.strip()

    def trials(folder):
        store = Store.open(tmp_path / folder / "trials.sqlite", ("a", "b"), 12, identity)
        with contextlib.closing(store):
            return store.trials()

    space = toy_space(4, 4)
    identity = {"parameters": [p.name for p in space.parameters]}
    _, whole = go("whole")
    assert whole.startswith("space exhausted 0 83521 ")
    for patience in (20_000, 40_000):
        assert go("parts", patience) == (-signal.SIGKILL, "")
    before = len(trials("parts"))
    assert 40_000 < before < space.size
    _, parts = go("parts")
    assert parts.split()[2:4] == [str(before), str(space.size - before)]
    assert parts.split()[4:] == whole.split()[4:]
    expected, resumed = trials("whole"), trials("parts")
    assert np.array_equal(resumed.number, np.arange(space.size))
    assert np.array_equal(resumed.packed, expected.packed)
    assert np.array_equal(resumed.packed, space.numbered(0, space.size))
    for metric in ("a", "b"):
        np.testing.assert_array_equal(resumed.metrics[metric], expected.metrics[metric])
    front = non_dominated(np.stack([expected.metrics["a"], expected.metrics["b"]], axis=1))
    assert parts.split()[4:] == list(map(str, front))


# --- constraints


class Small:
    """The sum of the options may be `most` (known before), and the first loss `worst` (known after)."""

    def __init__(self, most=8.0, worst=np.inf):
        self.most, self.worst = most, worst

    def __bool__(self):
        return True

    def before(self, codes):
        return np.maximum(0.0, SPACE.options(codes).sum(axis=1) - self.most)

    def after(self, values):
        return np.nan_to_num(np.maximum(0.0, values["a"] - self.worst), nan=0.0)

    def margins(self, values):
        return (values["a"] - self.worst)[:, None]


def allowed(trials, bounds):
    losses = np.stack([trials.metrics["a"], trials.metrics["b"]], axis=1)
    losses[bounds.after(trials.metrics) > 0] = np.nan
    return trials.code[non_dominated(losses)]


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in ("stubborn", "empty")])
def test_what_cannot_fulfil_the_constraints_is_never_evaluated(tmp_path, name):
    bounds = Small(most=5)
    fine = int((bounds.before(SPACE.numbered(0, SPACE.size)) == 0).sum())
    seen = []
    reason, trials = search(tmp_path, name, BlockEvaluator(), 10_000, bounds=bounds, on_progress=seen.append)
    assert reason == "space exhausted"
    assert len(trials) == fine < SPACE.size
    assert (bounds.before(trials.code) == 0).all()
    assert seen[-1].skipped == SPACE.size - fine


@pytest.mark.parametrize("name", ["tpe", "nsgaii", "evolution"])
def test_strategies_look_where_the_constraints_allow(tmp_path, name):
    """Under a constraint that one candidate in twelve fulfils, and that only an evaluation can tell, a strategy that
    learns of violations finds more of the allowed candidates than chance does."""
    bounds = Small(most=np.inf, worst=6.0)
    codes = SPACE.numbered(0, SPACE.size)
    share = (bounds.after({"a": toy_losses(SPACE, codes, 2)[:, 0]}) == 0).mean()
    _, trials = search(tmp_path, name, BlockEvaluator(size=8), 50, bounds=bounds)
    hits = int((bounds.after(trials.metrics) == 0).sum())
    assert hits > 1.2 * share * 50, f"{hits} of 50, and chance finds {share * 50:.1f}"


@pytest.mark.parametrize("name", ["brute_force", "tpe", "evolution"])
def test_the_front_of_a_search_holds_only_what_is_allowed(tmp_path, name):
    bounds, fronts = Small(most=12, worst=9.0), []
    _, trials = search(
        tmp_path, name, BlockEvaluator(), 10_000, bounds=bounds, on_progress=lambda p: fronts.append(p.front)
    )
    expected = allowed(trials, bounds)
    assert 0 < len(expected) < len(trials)
    assert np.array_equal(np.unique(fronts[-1].losses, axis=0), np.unique(toy_losses(SPACE, expected, 2), axis=0))


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["brute_force", "tpe", "nsgaii", "evolution"])
@pytest.mark.parametrize("patience", [0, 7, 25])
def test_a_constrained_search_goes_on_exactly(tmp_path, name, patience):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    bounds = Small(most=7, worst=12.0)
    _, whole = search(tmp_path / "whole", name, BlockEvaluator(), 30, bounds=bounds)
    with contextlib.suppress(KeyboardInterrupt):
        search(tmp_path / "parts", name, BlockEvaluator(patience=patience), 30, bounds=bounds)
    _, parts = search(tmp_path / "parts", name, BlockEvaluator(), 30, bounds=bounds)
    np.testing.assert_array_equal(whole.code, parts.code)


def test_a_search_that_finds_nothing_allowed_ends(tmp_path, monkeypatch):
    from bitfront.engine.search import loop

    monkeypatch.setattr(loop, "MAX_INFEASIBLE", 20)
    for name, expected in (("tpe", "nothing feasible found"), ("brute_force", "space exhausted")):
        (tmp_path / name).mkdir()
        dispatcher = BlockEvaluator()
        reason, trials = search(tmp_path / name, name, dispatcher, 40, bounds=Small(most=-1))
        assert (reason, len(trials), dispatcher.evaluated) == (expected, 0, [])
