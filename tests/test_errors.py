"""The tree of errors, and the words they are put in."""

import copy
import inspect

import pytest

from bitfront import errors
from bitfront.errors import BitfrontError, ConfigError, EvaluationError, MissingExtraError, UserError, nearest, require


def tree(cls, depth=0):
    yield depth, cls.__name__
    for sub in sorted(cls.__subclasses__(), key=lambda c: inspect.getsourcelines(c)[1]):
        if sub.__module__ == "bitfront.errors":
            yield from tree(sub, depth + 1)


def test_the_tree_that_is_drawn_is_the_tree_that_is():
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "Error" in line and line.startswith("    ")]
    nodes = [((len(line) - len(line.lstrip(" │├└─"))) // 4 - 1, line.strip(" │├└─").split()[0]) for line in drawn]
    assert sorted(nodes) == sorted(tree(BitfrontError))


def test_what_the_user_did_exits_with_2_and_what_went_wrong_with_1():
    for _, name in tree(BitfrontError):
        kind = getattr(errors, name)
        assert kind.exit_code == (2 if issubclass(kind, UserError) else 1), name
    assert EvaluationError("x").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "wrong"),
        ({"key": ["a", "b"]}, "a.b: wrong"),
        ({"key": ["a"], "file": "f.toml"}, "f.toml: a: wrong"),
        ({"key": ["a"], "file": "f.toml", "line": 3}, "f.toml:3: a: wrong"),
        ({"file": "f.toml", "line": 3}, "f.toml:3: wrong"),
    ],
)
def test_a_config_error_says_where(arguments, text):
    assert str(ConfigError("wrong", **arguments)) == text


def test_a_config_error_is_located_afterwards():
    error = ConfigError("wrong", key=("a",))
    assert str(error.located("f.toml", 7)) == "f.toml:7: a: wrong"
    # Workers send their errors home: by what pickle and copy share.
    assert str(copy.copy(error)) == "f.toml:7: a: wrong"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("weigth", " Did you mean 'weight'?"), ("WEIGHT", " Did you mean 'weight'?"), ("zzz", ""), ("", "")],
)
def test_the_nearest_spelling_is_offered_where_one_is_near(name, hint):
    assert nearest(name, ["weight", "bias", "data_in"]) == hint


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(
        MissingExtraError,
        match=r"reading HDF5 needs no_such_thing, which is not installed: pip install 'bitfront\[hdf5\]'",
    ):
        require("no_such_thing.sub", "hdf5", "reading HDF5")
    assert require("json", "x", "y").loads("1") == 1
    # A dependency that is there and broken is not reported as missing.
    (tmp_path / "broken_thing.py").write_text("import what_it_needs_itself\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs_itself"):
        require("broken_thing", "x", "y")
