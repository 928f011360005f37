"""The JSON files of a run: the same text as ``json.dumps`` writes, and of a long run a part of the trials."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from bitfront.engine.storage import results
from bitfront.engine.storage.results import write_records
from bitfront.errors import RunError

RECORDS = [{"number": 3, "value": [1.5, float("nan")], "sampled_config": {"by": "näme"}}, {}, {"error": "a\nb"}]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_records_are_written_as_one_object(tmp_path, count):
    path = tmp_path / "log.json"
    path.write_text("before")
    write_records(path, iter(RECORDS[:count]))
    expected = {str(i): {**r} for i, r in enumerate(RECORDS[:count])}
    if count:
        expected["0"]["value"] = [1.5, None]
    assert path.read_text(encoding="utf-8") == json.dumps(expected, indent=2, ensure_ascii=False) + "\n"


def test_records_that_cannot_be_written_leave_what_was_there(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("before")

    def failing():
        yield {}
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"log\.json: cannot be written: No space left"):
        write_records(path, failing())
    assert path.read_text() == "before"


class Of(SimpleNamespace):
    """So many trials, and the rows of their front."""

    def __len__(self):
        return self.count


def test_of_a_long_run_the_log_has_the_first_trials_and_the_front(monkeypatch):
    monkeypatch.setattr(results, "LOGGED", 10)
    front = np.array([20, 3, 15])
    assert results._logged(Of(count=10, front_rows=front)) == list(range(10))
    assert results._logged(Of(count=30, front_rows=front)) == [*range(10), 15, 20]
