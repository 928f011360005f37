"""What several runs share, with an evaluator in closed form: answers, what is kept, clocks and counters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfront.engine.comparison.cached import CachedEvaluator, InMemoryTrials, TimedStrategy
from bitfront.engine.evaluation.fixed import BatchMetrics
from bitfront.engine.storage.store import Store
from bitfront.strategies.base import History, Strategy
from bitfront.testing.strategies import toy_losses, toy_space

SPACE = toy_space(2, 3)  # 10 · 10 candidates


class BlockEvaluator:
    """Blocks of three; some candidates fail."""

    isolated = False

    def __init__(self, patience=1000):
        self.seen, self.patience = [], patience

    def blocks(self, codes):
        for start in range(0, len(codes), 3):
            block = codes[start : start + 3]
            if len(self.seen) + len(block) > self.patience:
                raise KeyboardInterrupt
            self.seen += [c.tobytes() for c in block]
            yield block, measured(block)


def measured(codes):
    losses = toy_losses(SPACE, codes, 2)
    failed = [int(c.sum()) % 3 == 1 for c in codes]
    return BatchMetrics(
        {"a": losses[:, 0], "b": losses[:, 1]}, tuple("no" if f else "" for f in failed), tuple(losses[:, 0] / 100)
    )


def opened(folder):
    return Store.open(folder / "cache.sqlite", ("a", "b"), 6, {"parameters": ["p"] * 6}, SPACE.keys)


def same(measurement, codes):
    expected = measured(codes)
    assert measurement.errors == expected.errors
    assert measurement.seconds == pytest.approx(expected.seconds)
    for name in ("a", "b"):
        assert np.array_equal(measurement.values[name], expected.values[name])


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True), min_size=1, max_size=6))
def test_answers_are_complete_in_order_and_evaluated_once(tmp_path_factory, batches):
    store, dispatcher = opened(tmp_path_factory.mktemp("shared")), BlockEvaluator()
    try:
        shared = CachedEvaluator(dispatcher, store, SPACE.keys)
        every = SPACE.numbered(0, SPACE.size)
        for batch in batches:
            codes = every[batch]
            parts = list(shared.blocks(codes))
            assert np.array_equal(np.concatenate([block for block, _ in parts]), codes)
            for block, measurement in parts:
                same(measurement, block)
        asked = {n for batch in batches for n in batch}
        assert len(dispatcher.seen) == len(set(dispatcher.seen)) == len(shared) == shared.evaluated == len(asked)
        kept = store.trials()
        assert {c.tobytes() for c in kept.code} == {every[n].tobytes() for n in asked}, "durable as the blocks end"
        assert np.array_equal(kept.metrics["a"], measured(kept.code).values["a"])
    finally:
        store.close()


def test_what_was_evaluated_before_an_interruption_is_kept(tmp_path):
    store, codes = opened(tmp_path), SPACE.numbered(20, 40)
    with pytest.raises(KeyboardInterrupt):
        list(CachedEvaluator(BlockEvaluator(patience=8), store, SPACE.keys).blocks(codes))
    store.close()
    store, dispatcher = opened(tmp_path), BlockEvaluator()
    shared = CachedEvaluator(dispatcher, store, SPACE.keys)
    failed = sum(bool(e) for e in measured(codes[:6]).errors)
    assert failed > 0
    assert len(shared) == 6 - failed, "what failed is tried again"
    (*_, last) = shared.blocks(codes)
    assert len(dispatcher.seen) == 14 + failed
    same(last[1], last[0])
    store.close()


def test_a_loop_that_stops_in_the_middle_loses_nothing(tmp_path):
    store = opened(tmp_path)
    blocks = CachedEvaluator(BlockEvaluator(), store, SPACE.keys).blocks(SPACE.numbered(0, 9))
    next(blocks)
    blocks.close()
    assert np.array_equal(store.trials().code, SPACE.numbered(0, 3))
    store.close()


def test_the_trials_of_a_run_in_memory():
    trials = InMemoryTrials(("a", "b"))
    assert [len(column) for column in trials.columns(6)[2:]] == [0, 0]
    codes = SPACE.numbered(0, 7)
    measurement = measured(codes)
    known, values = trials.recall(codes)
    assert not known.any()
    assert np.isnan(values["b"]).all()
    for rows in (slice(0, 3), slice(3, 7)):
        part = {m: v[rows] for m, v in measurement.values.items()}
        trials.add(codes[rows], part, measurement.errors[rows], np.array(measurement.seconds[rows]))
    assert len(trials) == 7
    stored, values, complete, seconds = trials.columns(6)
    assert np.array_equal(stored, codes)
    assert np.array_equal(values["a"], measurement.values["a"])
    assert complete.tolist() == [not e for e in measurement.errors]
    assert seconds.tolist() == list(measurement.seconds)


class Scripted(Strategy):
    """Proposes by a fixed rule: the candidates n, n, n + 1."""

    batch, looks_back = 5, False

    def propose(self, history, n, rng):
        return SPACE.numbered(0, SPACE.size)[[n, n, n + 1]]


def test_proposals_and_repeats_are_counted_and_time_is_that_of_the_strategy(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("bitfront.engine.comparison.cached.time.perf_counter", lambda: next(clock))
    evaluated = [0]
    timed = TimedStrategy(lambda: Scripted(SPACE, 2, 7), lambda: evaluated[0])
    assert (timed.batch, timed.looks_back, timed.objectives, timed.seed, timed.seconds) == (5, False, 2, 7, 1)
    history = History(6, 2, SPACE)
    for n, done in ((3, 2), (3, 4), (9, 4)):
        evaluated[0] = done
        proposed = timed.propose(history, n, np.random.default_rng(0))
        assert np.array_equal(proposed, SPACE.numbered(0, SPACE.size)[[n, n, n + 1]])
        fresh = history.fresh(proposed)
        history.tell(fresh, toy_losses(SPACE, fresh, 2))
    # 3, 3, 4: one twice; again: all known; 9, 9, 10: one twice.
    assert (timed.proposals, timed.repeats) == (9, 1 + 3 + 1)
    # Set up in one second; asked after 2, 4 and 4 evaluations, a second each.
    assert timed.asked(6).tolist() == [1, 1, 2, 2, 4, 4]
    assert timed.seconds == 4
