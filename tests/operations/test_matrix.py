"""Every number format at every kind of site: together as alone, and docs/matrix.md says how it is computed."""

import matrix
import pytest


@pytest.mark.sampled(14)
@pytest.mark.slow
@pytest.mark.parametrize("operation", list(matrix.names_with_examples()))
def test_row(operation):
    assert matrix.row(operation) in matrix.PAGE.read_text().splitlines(), (
        "docs/matrix.md is not up to date: python tests/operations/matrix.py writes it"
    )


def test_the_page_has_every_format():
    lines = matrix.PAGE.read_text().splitlines()
    assert all(f"`{name}`" in next(line for line in lines if line.startswith("| site")) for name in matrix.columns())
