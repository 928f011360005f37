"""What torch and Optuna keep private is not relied on, but in one file each that has a way out."""

import ast
import functools
from pathlib import Path

import pytest

import bitfront

SOURCE = Path(bitfront.__file__).parent


def dotted(node):
    """``torch.ops.onednn`` as a tuple of names; empty for anything else than names with dots."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else ()


@functools.cache
def named(text):
    """All names with dots in a program's `text`."""
    return {dotted(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}


def users(text, wanted):
    """Which of the names with dots in a program's `text` are `wanted`."""
    return {names for names in named(text) if wanted(names)}


def private(names):
    known = names[:1] in (("torch",), ("optuna",))
    return known and any(name.startswith("_") and not name.startswith("__") for name in names)


def onednn(names):
    return names[:3] == ("torch", "ops", "onednn")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize(
    ("text", "is_private", "is_onednn"),
    [
        ("torch._fused_adam_(p)", True, False),
        ("x = optuna.study._tell(1)", True, False),
        ("torch.ops.onednn.qconv_prepack(w)", False, True),
        ("torch.__version__; torch.ops.aten.add; self._torch", False, False),
    ],
)
def test_both_are_recognised(text, is_private, is_onednn):
    assert bool(users(text, private)) is is_private
    assert bool(users(text, onednn)) is is_onednn


def test_no_private_function_of_torch_or_optuna_is_called():
    users_by_file = {str(f.relative_to(SOURCE)): users(f.read_text(encoding="utf-8"), private) for f in FILES}
    assert {f: names for f, names in users_by_file.items() if names} == {}


def test_operators_of_onednn_are_called_in_one_file():
    files = [str(f.relative_to(SOURCE)) for f in FILES if users(f.read_text(encoding="utf-8"), onednn)]
    assert files == ["kernels/onednn.py"]


def test_tables_of_optuna_are_written_in_one_file():
    files = [str(f.relative_to(SOURCE)) for f in FILES if "version_info" in f.read_text(encoding="utf-8")]
    assert files == ["report/study.py"]
