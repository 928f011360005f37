"""Damaged files of every kind: an error of Bitfront that names the file, or the same content, and never anything else."""

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfront.errors import UserError
from damage import KINDS, damage
from properties import max_examples


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """(kind, a folder with whole files, what they hold, a folder to damage them in)."""
    kind = KINDS[request.param]
    if request.param.startswith("HDF5"):
        pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFRONT_CACHE", str(tmp_path_factory.mktemp("cache")))
        kind.make(folder)
        yield kind, folder, kind.read(folder), tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("whole", KINDS, indirect=True)
@given(seed=st.integers(0, 2**32 - 1))
@max_examples(120, suite=30)
def test_damage_is_an_error_or_changes_nothing(whole, seed):
    kind, folder, held, work = whole
    path = damage(kind, folder, work, seed)
    try:
        found = kind.read(work)
    except UserError as error:
        assert path.name in str(error)
        assert len(str(error)) < 3000
    else:
        assert found == held or not kind.checked


@pytest.mark.parametrize("whole", ["run folder"], indirect=True)
def test_every_single_bit_of_a_result_is_checked(whole):
    """Not drawn: the bits of one block of metrics, each of them."""
    kind, folder, _, work = whole
    store = folder / "run" / "trials.sqlite"
    data = store.read_bytes()
    db = sqlite3.connect(store)
    (metrics,) = db.execute("SELECT metrics FROM blocks ORDER BY first LIMIT 1").fetchone()
    db.close()
    at = data.index(metrics[:24])
    damage(kind, folder, work, 0)
    (work / "run" / "config.toml").write_bytes((folder / "run" / "config.toml").read_bytes())
    for bit in range(8 * 24):
        wrong = bytearray(data)
        wrong[at + bit // 8] ^= 1 << bit % 8
        (work / "run" / "trials.sqlite").write_bytes(wrong)
        with pytest.raises(UserError, match=r"trials.sqlite is damaged: a row of its table 'blocks' differs"):
            kind.read(work)
