"""How many candidates the conformance suite of operations compares here."""

import os

import pytest


@pytest.fixture(autouse=True)
def fewer_candidates(monkeypatch):
    """A third of them: each is built and evaluated alone, which is nearly all of the time; ``make all`` has every one."""
    if "BITFRONT_ALL" not in os.environ:
        monkeypatch.setattr("bitfront.testing.operations.CANDIDATES", 8)
