"""What ``import bitfront`` offers: complete, documented, quick."""

import inspect
import subprocess
import sys

import pytest

import bitfront as bf


def test_dir_is_all():
    assert dir(bf) == bf.__all__ == sorted(set(bf.__all__))
    assert set(bf._HOMES) == set(bf.__all__)


@pytest.mark.parametrize("name", bf.__all__)
def test_every_name_is_there_and_documented(name):
    member = getattr(bf, name)
    assert callable(member)
    assert member.__module__.startswith("bitfront.")
    assert inspect.getdoc(member)
    assert not (inspect.isclass(member) and member.__doc__ is None), "a docstring of its own"


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'bitfront' has no attribute 'serach'"):
        bf.serach  # noqa: B018


def test_the_import_is_quick():
    """It loads nothing that computes; neither do the schema and the command."""
    program = "import sys, bitfront{}; print(sorted({{'torch', 'numpy', 'optuna', 'scipy'}} & set(sys.modules)))"
    for module in ("", ", bitfront.config", ", bitfront.cli", ", bitfront.errors, bitfront.events, bitfront.template"):
        command = [sys.executable, "-c", program.format(module)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n", module
    assert len(bf.__all__) <= 36, "some 30 names are what one can keep in mind; a new verb may bring one"
