"""build_model(): seeded initial weights, and the user's models by package.module:factory."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from torch import nn

from bitfront.errors import ConfigError
from bitfront.models.base import build_model
from bitfront.registry import import_object


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module into the working directory, and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write_file(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    yield write_file
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(5)
    a = build_model("jsc-toy", (16,), 5, seed=1)
    torch.manual_seed(6)
    b, c = build_model("jsc-toy", (16,), 5, seed=1), build_model("jsc-toy", (16,), 5, seed=2)
    assert torch.equal(weights(a), weights(b))
    assert not torch.equal(weights(a), weights(c))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    build_model("digits-cnn", (1, 8, 8), 10, seed=3)
    assert torch.equal(torch.randn(3), expected)


def test_a_model_is_float32_on_the_cpu_whatever_the_factory_does(write_module):
    write_module("user_double", "from torch import nn\ndef make(): return nn.Linear(16, 5).double()")
    assert weights(build_model("user_double:make", (16,), 5, seed=0)).dtype == torch.float32


@pytest.mark.parametrize(
    "source",
    [
        "def make(): return nn.Linear(16, 5)",
        "def make(sample_shape, num_classes): return nn.Linear(sample_shape[0], num_classes)",
        "def make(num_classes): return nn.Linear(16, num_classes)",
        "def make(*, num_classes, sample_shape): return nn.Linear(*sample_shape, num_classes)",
        "def make(shape, classes, bias=True): return nn.Linear(shape[0], classes)",
        "def make(hidden=16, dropout=0.1): return nn.Linear(hidden, 5)",
        "class make(nn.Linear):\n    def __init__(self, sample_shape, num_classes=2):\n"
        "        super().__init__(sample_shape[0], num_classes)",
        "class Outer:\n    class make(nn.Linear):\n        def __init__(self): super().__init__(16, 5)\n"
        "make = Outer.make",
    ],
)
def test_factories_of_every_signature(write_module, source):
    write_module("user_model", f"from torch import nn\n{source}\n")
    model = build_model("user_model:make", (16,), 5, seed=0)
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (5, 16)


def test_a_factory_in_a_package_may_import_its_neighbours_late(write_module, tmp_path):
    (tmp_path / "user_package").mkdir()
    write_module("user_package/nets", "def make():\n    from user_package.layers import layer\n    return layer()")
    write_module("user_package/layers", "from torch import nn\ndef layer(): return nn.Linear(16, 5)")
    assert isinstance(build_model("user_package.nets:make", (16,), 5, seed=0), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such_module:make",
            r"'no_such_module:make': there is no module 'no_such_module'.*working directory",
        ),
        ("user_model:mkae", r"user_model has no 'mkae'.*Did you mean 'make'"),
        ("user_model.py:make", r"names a file; write the module: 'user_model:make'"),
        ("./nets/user_model.py:make", r"names a file; write the module: 'nets.user_model:make'"),
        ("user_model:", r"is not of the form 'package.module:name'"),
        (":make", r"is not of the form"),
        ("user_model:number", r"is a int; name an nn.Module class"),
        ("user_model:instance", r"is a finished model.*seed"),
        ("user_model:three", r"requires \(a, b, c\), but Bitfront calls it with \(sample_shape, num_classes\)"),
        ("user_model:nothing", r"the factory returned a NoneType.*does it return"),
        ("user_model:broken", r"\(16,\) and 5 classes: it raised ZeroDivisionError"),
        (
            "user_broken:make",
            r"importing user_broken failed: ModuleNotFoundError: No module named 'absent_thing'",
        ),
        ("user_syntax:make", r"importing user_syntax failed: SyntaxError"),
    ],
)
def test_mistakes_are_config_errors_that_quote_the_request(write_module, spec, message):
    write_module(
        "user_model",
        """
        from torch import nn
        number, instance = 3, nn.Linear(16, 5)
        def make(): return nn.Linear(16, 5)
        def three(a, b, c): return nn.Linear(16, 5)
        def nothing(): nn.Linear(16, 5)
        def broken(): return 1 / 0
        """,
    )
    write_module("user_broken", "import absent_thing")
    write_module("user_syntax", "def make(:")
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(spec, (16,), 5, seed=0)
    assert spec in str(caught.value)
    assert caught.value.key == ("model",)


def test_import_object_follows_dots(write_module):
    write_module("user_nested", "class A:\n    class B:\n        value = 3")
    assert import_object("user_nested:A.B.value", "model") == 3
