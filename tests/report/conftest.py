"""What the tests of the report share: a run of six candidates."""

import pytest

from synthetic_runs import full_grid, write


@pytest.fixture(scope="session")
def six(tmp_path_factory):
    """All six candidates of two parameters: bits in, bits of weights; accuracy grows with both, half as fast with the
    first."""
    codes = full_grid()
    accuracy = 0.8 + 0.02 * codes[:, 0] + 0.04 * codes[:, 1]
    return write(
        tmp_path_factory.mktemp("runs") / "six",
        codes,
        {"accuracy": accuracy, "average_bitwidth": 2.0 ** (1 + codes[:, 1])},
    )
