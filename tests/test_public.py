"""What ``import bitfront`` offers: complete, documented, quick."""

import dataclasses
import inspect
import subprocess
import sys
import types
import typing

import pytest
from torch import nn

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
    assert not (inspect.isclass(member) and member.__doc__ is None), "a docstring that is not inherited"


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'bitfront' has no attribute 'serach'"):
        bf.serach  # noqa: B018


def test_the_import_is_quick():
    """It loads nothing that computes; neither do the schema and the command."""
    program = "import sys, bitfront{}; print(sorted({{'torch', 'numpy', 'optuna', 'scipy'}} & set(sys.modules)))"
    for module in ("", ", bitfront.config", ", bitfront.cli", ", bitfront.errors, bitfront.events, bitfront.template"):
        command = [sys.executable, "-c", program.format(module)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n", module


def test_the_verbs_are_few():
    verbs = [name for name in bf.__all__ if not inspect.isclass(getattr(bf, name))]
    assert len(verbs) <= 23, "some 20 verbs are what one can keep in mind"


def classes(annotation):
    """Bitfront's classes in a type."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return {annotation} if annotation.__module__.startswith("bitfront.") else set()
    return {cls for part in typing.get_args(annotation) for cls in classes(part)}


def test_what_the_verbs_return_is_public():
    verbs = [getattr(bf, name) for name in bf.__all__ if not inspect.isclass(getattr(bf, name))]
    # Who reads a run does not import torch for a type.
    hints = [typing.get_type_hints(verb, localns={"nn": nn}) for verb in verbs]
    returned = {cls for of_verb in hints for cls in classes(of_verb["return"])}
    assert {"Run", "Plan", "Trained", "Analysis", "Comparison"} <= {c.__name__ for c in returned}
    assert {c for c in returned if getattr(bf, c.__name__, None) is not c} == set()


#: What stands in results, and is looked up where it stands: its page in the reference says what it is.
INSIDE = {"Band", "Constraint", "DescribedSpace", "Margins", "OptionCosts", "Quality", "TrainResult"}


#: A package that is imported where it is used.
FOREIGN = types.SimpleNamespace(DataFrame=object)


@pytest.mark.parametrize("result", [bf.Run, bf.Trial, bf.Comparison, bf.Trained, bf.Transformed])
def test_what_results_hold_is_public(result):
    hints = typing.get_type_hints(result)
    held = {cls for field in dataclasses.fields(result) for cls in classes(hints[field.name])}
    for name, member in vars(result).items():
        function = member.fget if isinstance(member, property) else getattr(member, "func", None)
        if function is not None and not name.startswith("_"):
            held |= classes(typing.get_type_hints(function, localns={"pandas": FOREIGN})["return"])
    assert {c.__name__ for c in held if getattr(bf, c.__name__, None) is not c} <= INSIDE
