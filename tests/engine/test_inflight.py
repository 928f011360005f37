"""The note of which candidates are being evaluated: what a killed process leaves, and what a finished one does not."""

import numpy as np
import pytest

from bitfront.engine.storage.inflight import IN_FLIGHT, SUSPECTS, InFlight, key_of

#: A session that is killed does not close its file.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CODES = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])


@pytest.fixture
def store(tmp_path):
    return tmp_path / "trials.sqlite"


def suspects(store):
    """Of a session that begins, and is killed at once."""
    return InFlight(store).suspects


def test_what_was_in_flight_is_suspect(store):
    InFlight(store).begin(CODES[:2])
    assert suspects(store) == {key_of(CODES[0]): 0, key_of(CODES[1]): 0}
    assert suspects(store) == {key_of(CODES[0]): 0, key_of(CODES[1]): 0}, (
        "they stay suspects until somebody forgets them"
    )


def test_deaths_alone_are_counted(store):
    InFlight(store).begin(CODES[:2])
    InFlight(store).begin(CODES[1:2])
    InFlight(store).begin(CODES[1:2])
    assert suspects(store) == {key_of(CODES[0]): 0, key_of(CODES[1]): 2}


def test_the_last_block_counts(store):
    first = InFlight(store)
    first.begin(CODES)
    first.begin(CODES[2:])
    assert suspects(store) == {key_of(CODES[2]): 1}


def test_what_ended_is_no_suspect(store):
    first = InFlight(store)
    first.begin(CODES)
    first.end()
    assert suspects(store) == {}


def test_nothing_is_left_where_nothing_is_suspect(store):
    InFlight(store).begin(CODES[:1])
    second = InFlight(store)
    second.forget([key_of(CODES[0])])
    second.close()
    assert list(store.parent.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"something else", bytes(100)], ids=["empty", "short", "text", "zeros"]
)
def test_damaged_notes_are_none(store, content):
    for end in (IN_FLIGHT, SUSPECTS):
        store.with_name(store.name + end).write_bytes(content)
    assert suspects(store) == {}


def test_a_note_that_was_cut_off_is_none(store):
    InFlight(store).begin(CODES)
    path = store.with_name(store.name + IN_FLIGHT)
    path.write_bytes(path.read_bytes()[:-3])
    assert suspects(store) == {}


def test_without_a_store_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nowhere = InFlight()
    nowhere.begin(CODES)
    nowhere.end()
    nowhere.close()
    assert list(tmp_path.iterdir()) == []
