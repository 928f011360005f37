"""The store: what was added is safe, what belongs to another run is refused."""

import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from bitfront.engine.storage.store import FORMAT, Store, check_identity, locked, read
from bitfront.errors import EvaluationError, RunError

METRICS = ("accuracy", "model_size")
IDENTITY = {"model": "m", "data": "d", "training": {"lr": 0.1, "epochs": 3}, "parameters": ["a", "b", "c"]}


def opened(folder, **identity):
    return Store.open(folder / "trials.sqlite", METRICS, 3, {**IDENTITY, **identity})


def codes(*numbers):
    return np.array([[n, n + 1, 2**40 + n] for n in numbers], dtype=np.int64)


def add(store, *numbers, errors=None):
    values = {"accuracy": np.array([n / 10 for n in numbers]), "model_size": np.array([float(n) for n in numbers])}
    errors = errors or [""] * len(numbers)
    for i, error in enumerate(errors):
        if error:
            values["accuracy"][i] = np.nan
    return store.add(codes(*numbers), values, errors, [0.5] * len(numbers))


def test_what_was_added_can_be_read_by_others_at_once(tmp_path):
    store = opened(tmp_path)
    assert add(store, 5, 7).tolist() == [0, 1]
    assert add(store, 6, errors=["RuntimeError: no"]).tolist() == [2]
    # Another connection, while the first one is open and nothing was closed or flushed.
    other = read(tmp_path / "trials.sqlite")
    for stored in (store.trials(), other.trials()):
        assert stored.number.tolist() == [0, 1, 2]
        assert np.array_equal(stored.code, codes(5, 7, 6))
        np.testing.assert_array_equal(stored.metrics["accuracy"], [0.5, 0.7, np.nan])
        np.testing.assert_array_equal(stored.metrics["model_size"], [5, 7, 6])
        assert stored.complete.tolist() == [True, True, False]
        assert stored.errors == {2: "RuntimeError: no"}
        assert stored.first_error == "RuntimeError: no"
        assert stored.duration.tolist() == [0.5] * 3
        assert (stored.position(2), stored.position(3), len(stored)) == (2, None, 3)
    other.close()
    store.close()


def test_trials_from_a_number_on(tmp_path):
    """Whether it is the first of a block, lies within one or between two, was forgotten, or is yet to come."""
    store = opened(tmp_path)
    add(store, 0, 1, 2, errors=["", "lost", ""])
    add(store, 3, 4)
    store.close()
    store = opened(tmp_path)  # what failed is forgotten
    add(store, 1, 5, errors=["", "RuntimeError: no"])
    for start in range(9):
        later, everything = store.trials(start), store.trials()
        kept = everything.number >= start
        assert later.number.tolist() == everything.number[kept].tolist()
        assert np.array_equal(later.code, everything.code[kept])
        np.testing.assert_array_equal(later.metrics["model_size"], everything.metrics["model_size"][kept])
        assert later.complete.tolist() == everything.complete[kept].tolist()
        assert later.errors == {n: e for n, e in everything.errors.items() if n >= start}
    assert store.trials().number.tolist() == [0, 2, 3, 4, 5, 6]
    store.close()


def test_what_a_killed_process_added_is_there(tmp_path):
    script = (
        "import os, sys, numpy as np; from pathlib import Path; from bitfront.engine.storage.store import Store\n"
        f"s = Store.open(Path(sys.argv[1]), {METRICS!r}, 3, {IDENTITY!r})\n"
        "s.add(np.array([[1, 2, 3]]), {m: np.array([0.25]) for m in s.metrics}, [''], [0.1]); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "trials.sqlite")], check=False)
    assert done.returncode == 9
    with_it = opened(tmp_path)
    known, values = with_it.recall(np.array([[1, 2, 3]]))
    assert (known.tolist(), values["accuracy"].tolist()) == ([True], [0.25])
    with_it.close()


def test_a_store_opened_again_knows_what_it_knew_and_numbers_on(tmp_path):
    store = opened(tmp_path)
    add(store, 5, 7)
    store.set_meta("note", {"x": [1, "zwei"]})
    store.close()
    store = opened(tmp_path)
    assert len(store) == 2
    known, values = store.recall(codes(7, 8, 5))
    assert known.tolist() == [True, False, True]
    np.testing.assert_array_equal(values["accuracy"], [0.7, np.nan, 0.5])
    assert store.recall(codes())[1]["accuracy"].shape == (0,)
    assert store.meta("note") == {"x": [1, "zwei"]}
    assert store.meta("nothing") is None
    assert add(store, 8).tolist() == [2]
    store.close()


def test_failed_trials_are_forgotten_when_a_run_goes_on_and_kept_when_it_is_read(tmp_path):
    store = opened(tmp_path)
    add(store, 1, 2, 3, errors=["", "boom", ""])
    assert len(store) == 3
    store.close()
    kept = read(tmp_path / "trials.sqlite")
    assert kept.trials().errors == {1: "boom"}
    kept.close()
    store = opened(tmp_path)
    assert len(store) == 2
    assert store.recall(codes(1, 2, 3))[0].tolist() == [True, False, True]
    assert add(store, 2).tolist() == [3]
    assert store.trials().number.tolist() == [0, 2, 3]
    assert store.trials().complete.all()
    store.close()


def test_what_was_measured_is_recalled_in_any_order_and_once(tmp_path):
    store = opened(tmp_path)
    add(store, *range(10), errors=["boom" if n in (3, 7) else "" for n in range(10)])
    for n in range(10, 20):  # added one by one
        add(store, n)
    store.close()
    for order in (range(20), [*range(4), *range(12, 20), *range(4, 12)], range(19, -1, -1)):
        store = opened(tmp_path)
        assert len(store) == 18
        for part in np.array_split(np.array(order), 5):
            known, values = store.recall(codes(*part))
            assert known.tolist() == [n not in (3, 7) for n in part]
            np.testing.assert_array_equal(values["model_size"], np.where(known, part, np.nan))
        assert not store.recall(codes(*range(20)))[0].any()
        assert len(store) == 18
        store.close()


def test_codes_take_as_many_bytes_as_they_need(tmp_path):
    store = opened(tmp_path)
    for largest in (1, 255, 256, 2**16, 2**40):
        store.add(np.array([[0, 1, largest]]), {m: np.zeros(1) for m in METRICS}, [""], [0.0])
    sizes = [row[0] for row in store._db.execute("SELECT length(codes) FROM blocks ORDER BY first")]
    assert sizes == [3, 3, 6, 12, 24]
    assert store.trials().code[:, 2].tolist() == [1, 255, 256, 2**16, 2**40]
    store.close()


def test_another_identity_is_refused_and_the_differences_are_listed(tmp_path):
    opened(tmp_path).close()
    opened(tmp_path).close()  # the same one is welcome
    with pytest.raises(RunError) as caught:
        opened(tmp_path, model="n", training={"lr": 0.2, "epochs": 3})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: this run folder holds trials of another configuration:")
    assert 'model: it has "m", requested is "n"' in message
    assert "training.lr: it has 0.1, requested is 0.2" in message
    assert "epochs" not in message
    assert "restart=True" in message
    assert "project=..." in message
    check_identity(tmp_path / "trials.sqlite", {**IDENTITY, "model": "n"}, ignore=["model"])
    # Nothing was changed by being refused.
    opened(tmp_path).close()


def test_many_and_long_differences_are_cut_short(tmp_path):
    opened(tmp_path, training={str(i): i for i in range(10)}, model="x" * 200).close()
    with pytest.raises(RunError) as caught:
        opened(tmp_path, training={}, model="y")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 6 + 1 + 1
    assert lines[-2].strip() == "..."
    assert max(map(len, lines[1:-1])) < 200


def test_a_full_disk_keeps_what_was_stored_and_says_what_to_do(tmp_path):
    store = opened(tmp_path)
    add(store, 1)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(
        EvaluationError, match=r"trials.sqlite: cannot be written: .*full.*All trials written before are safe"
    ):
        add(store, *range(100, 5000))
    stored = store.trials()
    # What the store says it knows is what is in the file: the batch that did not fit is in neither.
    assert len(store) == len(stored) == 1
    store._db.execute("PRAGMA max_page_count = 1000000")
    add(store, 50)
    store.close()
    store = opened(tmp_path)
    assert store.recall(codes(1, 50))[0].all()
    store.close()


def test_a_file_that_may_not_be_written_says_so_and_keeps_what_it_has(tmp_path):
    store = opened(tmp_path)
    add(store, 1)
    store._db.execute("PRAGMA query_only = 1")  # as on a read-only disk, also where the tests run as root
    with pytest.raises(EvaluationError, match=r"trials.sqlite: cannot be written: .*readonly"):
        add(store, 2)
    assert store.trials().number.tolist() == [0]
    store.close()


def test_a_write_while_another_process_writes_does_not_lose_anything(tmp_path):
    store = opened(tmp_path)
    other = sqlite3.connect(tmp_path / "trials.sqlite", isolation_level=None, timeout=0)
    store._db.execute("PRAGMA busy_timeout = 0")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(EvaluationError, match="locked"):
        add(store, 1)
    other.execute("ROLLBACK")
    other.close()
    assert add(store, 1).tolist() == [0]
    store.close()


def test_results_on_the_test_split_are_kept_by_number(tmp_path):
    store = opened(tmp_path)
    add(store, 1, 2)
    store.add_test_results({0: {"accuracy": 0.9}, 1: {"accuracy": 0.8, "loss": 1.5}})
    store.add_test_results({1: {"accuracy": 0.7}})
    store.close()
    store = read(tmp_path / "trials.sqlite")
    assert store.test_results() == {0: {"accuracy": 0.9}, 1: {"accuracy": 0.7, "loss": 1.5}}
    assert store.metrics == METRICS
    assert store.parameters == 3
    store.close()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "there is no such file; a search writes it"),
        (lambda path: path.write_bytes(b"no database at all" * 100), "not a store of trials"),
        (lambda path: sqlite3.connect(path).close(), "the search stopped before its first trial"),
        (
            lambda path: of_format(path, FORMAT + 1),
            rf"its format is {FORMAT + 1}, and this version of Bitfront reads {FORMAT}",
        ),
    ],
)
def test_what_is_no_store_of_this_version_is_refused(tmp_path, prepare, message):
    path = tmp_path / "trials.sqlite"
    prepare(path)
    with pytest.raises(RunError, match=message):
        read(path)


def of_format(path, number):
    store = Store.open(path, METRICS, 3, IDENTITY)
    store.set_meta("format", number)
    store.close()


def test_a_run_folder_is_held_by_one_process_at_a_time(tmp_path):
    script = (
        "import sys; from pathlib import Path; from bitfront.engine.storage.store import locked\n"
        "from bitfront.errors import RunError\n"
        "try:\n"
        "    with locked(Path(sys.argv[1])): print('held')\n"
        "except RunError as error: print(error)"
    )

    def other():
        return subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout

    with locked(tmp_path):
        assert f"{tmp_path}: another search is running in this folder" in other()
    assert other().strip() == "held"


def test_a_run_folder_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "new"):
            raise ZeroDivisionError
