"""How the size of a space is written."""

import pytest

from bitfront.spaces.base import counted


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1296, "1,296"),
        (10**15 - 1, "999,999,999,999,999"),
        (10**15, "about 1e15"),
        (5**64, "about 5.42e44"),
        (10**400, "about 1e400"),
        (10**400 - 1, "about 10e399"),
    ],
)
def test_a_large_number_is_written_shortly(size, text):
    assert counted(size) == text
