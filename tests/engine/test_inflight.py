"""The note of which candidates are being evaluated: what a killed process leaves, and what a finished one does not."""

import os

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


def test_damage_is_as_if_the_file_were_not_there(store):
    """A wrong code would be evaluated as a candidate, and a wrong number of deaths would condemn one."""
    places = [store.with_name(store.name + end) for end in (IN_FLIGHT, SUSPECTS)]
    InFlight(store).begin(CODES[:1])
    in_flight = places[0].read_bytes()
    assert suspects(store)
    for place, whole in zip(places, (in_flight, places[1].read_bytes()), strict=True):
        bits = [
            whole[: i // 8] + bytes([whole[i // 8] ^ 1 << i % 8]) + whole[i // 8 + 1 :]
            for i in range(0, 8 * len(whole), 7)
        ]
        for wrong in (*bits, *(whole[:length] for length in range(len(whole)))):
            for file in places:
                file.unlink(missing_ok=True)
            place.write_bytes(wrong)
            assert not suspects(store), (place, wrong)


def test_codes_of_another_space_are_not_read(store):
    InFlight(store).begin(CODES)
    assert set(InFlight(store, [9, 9, 6]).suspects) == {key_of(CODES[0]), key_of(CODES[1])}
    assert not InFlight(store, [9, 9]).suspects


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_in_its_place_is_replaced(store):
    for end in (IN_FLIGHT, SUSPECTS):
        os.mkfifo(store.with_name(store.name + end))
    first = InFlight(store)
    first.begin(CODES[:1])
    assert suspects(store) == {key_of(CODES[0]): 1}
