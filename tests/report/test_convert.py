"""A run as a table, and as a study of Optuna's: what other tools then read."""

import contextlib
import csv
import shutil
import sqlite3
import sys
import warnings

import numpy as np
import optuna
import pytest

import bitfront as bf
from bitfront.cli import completing
from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.store import Store
from bitfront.errors import ConfigError, MissingExtraError, RunError
from bitfront.report import study
from bitfront.report.columns import kept
from bitfront.report.convert import FORMATS, FileFormat
from synthetic_runs import choice, site, write

pytestmark = pytest.mark.slow
BUDGET = ({"text": "average_bitwidth <= 4", "metric": "average_bitwidth", "comparison": "<=", "bound": 4.0},)


@pytest.fixture
def run(six, tmp_path):
    """A copy of the run of six candidates, to write into."""
    return bf.Run.load(shutil.copytree(six.folder, tmp_path / "six"))


@pytest.fixture
def troubled(tmp_path):
    """A site that may stay in float; a failed trial, one without a value, and a budget."""
    space = (site("fc1", choice("weight", 2, 4, 8), optional=True), site("fc2", choice("weight", 4, 8)))
    codes = [[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 2, 1]]
    metrics = {
        "accuracy": [0.9, np.nan, 0.7, np.nan],
        "average_bitwidth": [8.0, 2.0, 4.0, 3.0],
        "loss": [0.1, 0.2, 0.3, 0.4],
    }
    return write(
        tmp_path / "troubled",
        codes,
        metrics,
        space=space,
        errors=["", "no memory", "", ""],
        durations=[1.0, 2.0, 3.0, 4.0],
        constraints=BUDGET,
    )


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def loaded(path, name):
    return optuna.load_study(study_name=name, storage=study.address(path))


def test_csv_has_a_row_per_trial_with_all_digits(run):
    done = bf.convert(run, "csv")
    assert done.path == run.folder / "trials.csv"
    assert done.trials == done.total == 6
    rows = rows_of(done.path)
    assert [row["number"] for row in rows] == [*"012345"]
    assert rows[5]["fc1/data_in"] == "int8.auto"
    assert rows[5]["fc1/weight"] == "int8.auto"
    assert {row["state"] for row in rows} == {"complete"}
    for row in rows:
        trial = run.trial(int(row["number"]))
        assert float(row["accuracy"]) == trial.metrics["accuracy"]
        assert float(row["scaled:average_bitwidth"]) == trial.values[1]
        assert row["front"] == ("true" if trial.number in {t.number for t in run.front} else "false")
        assert float(row["duration"]) == 0.001
        assert row["error"] == ""


def test_what_had_no_effect_or_no_value_is_an_empty_cell(troubled):
    rows = rows_of(bf.convert(troubled.folder, "csv").path)
    assert [row["fc1/name"] for row in rows] == ["NA", "integer", "integer", "integer"]
    assert [row["fc1/weight"] for row in rows] == ["", "int2.auto", "int4.auto", "int8.auto"]
    assert [row["accuracy"] for row in rows] == ["0.9", "", "0.7", ""]
    assert [row["state"] for row in rows] == ["complete", "failed", "complete", "complete"]
    assert [row["fulfils"] for row in rows] == ["false", "false", "true", "true"]
    assert [row["error"] for row in rows] == ["", "no memory", "", ""]


def test_parquet_is_the_same_table(troubled):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.read_table(bf.convert(troubled, "parquet").path)
    assert table.column_names == list(rows_of(bf.convert(troubled, "csv").path)[0])
    assert table["fc1/weight"].to_pylist() == [None, "int2.auto", "int4.auto", "int8.auto"]
    assert table["accuracy"].to_pylist() == [0.9, None, 0.7, None]
    assert table["fulfils"].to_pylist() == [False, False, True, True]
    assert table.schema.field("average_bitwidth").metadata == {b"unit": b"bits"}


def test_optuna_reads_the_study(run):
    optuna_study = loaded(bf.convert(run, "optuna").path, "six")
    assert [d.name for d in optuna_study.directions] == ["MAXIMIZE", "MINIMIZE"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert optuna_study.metric_names == ["accuracy", "average_bitwidth [bits]"]
    assert [t.number for t in optuna_study.trials] == list(range(6))
    assert optuna_study.trials[1].params == {"fc1/data_in": "int4.auto", "fc1/weight": "int4.auto"}
    assert optuna_study.trials[1].distributions["fc1/weight"].choices == ("int2.auto", "int4.auto", "int8.auto")
    assert {t.number for t in optuna_study.best_trials} == {t.number for t in run.front}
    for trial in optuna_study.trials:
        assert trial.values == list(run.trial(trial.number).values)
        assert trial.duration.total_seconds() == pytest.approx(0.001, abs=1e-5)
    assert optuna_study.user_attrs["float model: accuracy"] == 0.97


def test_optuna_reads_what_failed_and_what_is_over_budget(troubled):
    optuna_study = loaded(bf.convert(troubled, "optuna").path, "troubled")
    assert [t.state.name for t in optuna_study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "FAIL"]
    assert [t.user_attrs.get("error") for t in optuna_study.trials] == [
        None,
        "no memory",
        None,
        "an objective has no value",
    ]
    assert [t.constraints["0"] for t in optuna_study.trials] == [1.0, 0.0, 0.0, 0.0]
    assert [t.number for t in optuna_study.best_trials] == [t.number for t in troubled.front] == [2]
    assert optuna_study.trials[0].params == {"fc1/name": "NA", "fc2/weight": "int4.auto"}
    assert optuna_study.trials[2].user_attrs["loss"] == 0.3
    assert [t.duration.total_seconds() for t in optuna_study.trials] == [1.0, 2.0, 3.0, 4.0]
    assert optuna_study.trials[3].datetime_start == optuna_study.trials[2].datetime_complete


def test_optuna_minimises_one_sum(tmp_path):
    metrics = {"accuracy": [0.5, 0.7], "average_bitwidth": [4.0, np.inf]}
    run = write(tmp_path / "sum", [[0, 0], [1, 1]], metrics, summed="minimize")
    optuna_study = loaded(bf.convert(run, "optuna").path, "sum")
    assert [t.value for t in optuna_study.trials] == [4.5, np.inf]
    assert optuna_study.best_trial.number == 0
    assert optuna_study.trials[0].user_attrs == {"accuracy": 0.5, "average_bitwidth": 4.0}


def test_numbers_that_are_missing_stay_missing(tmp_path):
    folder = tmp_path / "again"
    write(folder, [[0, 0], [0, 1]], {"accuracy": [0.1, 0.2], "average_bitwidth": [2, 4]}, errors=["lost", ""])
    # The run went on: what failed was tried again, under a new number.
    store = Store.open(folder / STORE, ["accuracy", "average_bitwidth"], 2, {"parameters": [0, 1]})
    store.add(np.array([[0, 0]]), {"accuracy": np.array([0.3]), "average_bitwidth": np.array([2.0])}, [""], [0.1])
    store.close()
    optuna_study = loaded(bf.convert(folder, "optuna").path, "again")
    assert [t.number for t in optuna_study.trials] == [1, 2]
    assert [t.values[0] for t in optuna_study.trials] == [0.2, 0.3]


def test_of_a_longer_run_the_front_and_an_even_sample(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, 2, 1000), rng.integers(0, 3, 1000)], axis=1)
    run = write(tmp_path / "long", codes, {"accuracy": rng.random(1000), "average_bitwidth": rng.random(1000)})
    rows = kept(run, 100)
    assert rows.tolist() == sorted({*range(0, 1000, 10), *run.front_rows.tolist()})
    assert kept(run, None).tolist() == kept(run, 1000).tolist() == list(range(1000))
    done = bf.convert(run, "optuna", trials=100)
    assert (done.trials, done.total) == (len(rows), 1000)
    assert [t.number for t in loaded(done.path, "long").trials] == rows.tolist()
    assert [int(row["number"]) for row in rows_of(bf.convert(run, "csv").path)] == list(range(1000))


def test_a_run_without_trials_is_a_table_without_rows(tmp_path):
    run = write(tmp_path / "none", np.zeros((0, 2)), {"accuracy": [], "average_bitwidth": []}, stopped="")
    assert rows_of(bf.convert(run, "csv").path) == []
    assert loaded(bf.convert(run, "optuna").path, "none").trials == []
    assert run.trials == ()
    frame = run.frame
    assert len(frame) == 0
    assert {"state", "accuracy", "average_bitwidth", "duration", "error"} <= set(frame.columns)


def test_mistakes_are_reported_before_anything_is_written(run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no format 'cvs' to convert to; allowed: csv, parquet, optuna\. Did you"):
        bf.convert(run, "cvs")
    with pytest.raises(ConfigError, match="trials: 0 is not possible"):
        bf.convert(run, "csv", trials=0)
    with pytest.raises(RunError, match=r"nowhere: there is no such run folder; runs in .*: six"):
        bf.convert(tmp_path / "nowhere", "csv")
    with pytest.raises(RunError, match=r"trials\.sqlite: this belongs to the run; output=\.\.\. names another file"):
        bf.convert(run, "csv", run.folder / STORE, force=True)
    for to in FORMATS:
        with pytest.raises(RunError, match=r"missing/x: there is no folder .*missing to write it in"):
            bf.convert(run, to, tmp_path / "missing" / "x")
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(RunError, match=r"mine\.csv exists; force=True overwrites it"):
        bf.convert(run, "csv", tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "mine"
    bf.convert(run, "csv", tmp_path / "mine.csv", force=True)
    assert [row["number"] for row in rows_of(tmp_path / "mine.csv")] == [*"012345"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"to='parquet' needs pyarrow.*pip install 'bitfront\[parquet\]'"):
        bf.convert(run, "parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.csv", "six"]


def test_what_goes_wrong_halfway_leaves_what_was_there(run, monkeypatch):
    path = bf.convert(run, "optuna").path
    before = path.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(study, "_tables", full)
    with pytest.raises(RunError, match=r"optuna\.db.*: cannot be written: database or disk is full"):
        bf.convert(run, "optuna", force=True)
    monkeypatch.setattr(study, "append", broken)
    with pytest.raises(RunError, match=r"optuna\.db: cannot be written: No space left on device"):
        bf.convert(run, "optuna", force=True)
    assert path.read_bytes() == before
    assert not [p for p in run.folder.iterdir() if p.name.endswith(".part")]


def test_in_tables_of_another_layout_optuna_writes_the_same_trials(troubled, tmp_path, monkeypatch):
    metrics = {"accuracy": [0.5, 0.7], "average_bitwidth": [4.0, np.inf]}
    for run in (troubled, write(tmp_path / "sum", [[0, 0], [1, 1]], metrics, summed="minimize")):
        name = run.folder.name
        wanted = loaded(bf.convert(run, "optuna").path, name)
        with monkeypatch.context() as patch:
            patch.setattr(study, "SCHEMA", 11)
            written = loaded(bf.convert(run, "optuna", tmp_path / f"{name}.db").path, name)
        assert written.user_attrs == wanted.user_attrs
        assert len(written.trials) == len(wanted.trials) == len(run)
        for one, other in zip(written.trials, wanted.trials, strict=True):
            assert one.user_attrs == {**other.user_attrs, "trial": other.number}
            for part in ("number", "state", "values", "params", "distributions", "datetime_start", "datetime_complete"):
                assert getattr(one, part) == getattr(other, part), part
            assert one.system_attrs == other.system_attrs


def test_numbers_that_optuna_gives_do_not_hide_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SCHEMA", 11)
    codes = np.stack([np.arange(20) % 2, np.arange(20) % 3], axis=1)
    run = write(tmp_path / "long", codes, {"accuracy": 1 - np.arange(20) / 20, "average_bitwidth": np.arange(20.0)})
    written = loaded(bf.convert(run, "optuna", trials=5).path, "long").trials
    numbers = run.columns.number[kept(run, 5)].tolist()
    assert numbers != list(range(len(numbers)))
    assert [t.number for t in written] == list(range(len(numbers)))
    assert [t.user_attrs["trial"] for t in written] == numbers
    assert [t.values for t in written] == [list(run.trial(n).values) for n in numbers]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE version_info SET schema_version = 13",
        "DELETE FROM version_info",
        "DROP TABLE version_info",
        "ALTER TABLE trial_params RENAME COLUMN param_value TO value",
        "DROP TABLE trial_user_attributes",
    ],
)
def test_another_layout_of_optunas_tables_is_seen(run, change):
    with contextlib.closing(sqlite3.connect(bf.convert(run, "optuna").path)) as db:
        assert study.known_layout(db)
        db.execute(change)
        assert not study.known_layout(db)


def test_what_optuna_cannot_write_is_an_error(run, monkeypatch):
    def broken(*_):
        raise optuna.exceptions.StorageInternalError("no room")

    monkeypatch.setattr(study, "SCHEMA", 11)
    monkeypatch.setattr(optuna.Study, "add_trials", broken)
    with pytest.raises(RunError, match=r"optuna\.db.*: cannot be written by Optuna \d.*: no room"):
        bf.convert(run, "optuna")


def test_the_shell_completes_the_formats_there_are():
    assert tuple(FORMATS) == completing.FORMATS


def test_a_library_that_cannot_write_its_file(troubled, tmp_path, monkeypatch):
    """SQLAlchemy raises errors of its own where the disk is full."""

    def full(*_):
        raise RuntimeError("disk I/O error")

    monkeypatch.setitem(FORMATS, "csv", FileFormat("trials.csv", full))
    with pytest.raises(RunError, match=r"x.csv: cannot be written: .*disk I/O error; free disk space"):
        bf.convert(troubled, "csv", tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()
