"""build(): seeded initial weights, and models of the user's own by package.module:factory."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from torch import nn

from bitfront.errors import ConfigError
from bitfront.models.base import build
from bitfront.registry import import_object


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module into the working directory, and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    yield write
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(5)
    a = build("jsc-toy", (16,), 5, seed=1)
    torch.manual_seed(6)
    b, c = build("jsc-toy", (16,), 5, seed=1), build("jsc-toy", (16,), 5, seed=2)
    assert torch.equal(weights(a), weights(b))
    assert not torch.equal(weights(a), weights(c))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    build("digits-cnn", (1, 8, 8), 10, seed=3)
    assert torch.equal(torch.randn(3), expected)


def test_a_model_is_float32_on_the_cpu_whatever_the_factory_does(own):
    own("own_double", "from torch import nn\ndef make(): return nn.Linear(16, 5).double()")
    assert weights(build("own_double:make", (16,), 5, seed=0)).dtype == torch.float32


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
def test_factories_of_every_signature(own, source):
    own("own_model", f"from torch import nn\n{source}\n")
    model = build("own_model:make", (16,), 5, seed=0)
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (5, 16)


def test_a_factory_in_a_package_may_import_its_neighbours_late(own, tmp_path):
    (tmp_path / "own_package").mkdir()
    own("own_package/nets", "def make():\n    from own_package.layers import layer\n    return layer()")
    own("own_package/layers", "from torch import nn\ndef layer(): return nn.Linear(16, 5)")
    assert isinstance(build("own_package.nets:make", (16,), 5, seed=0), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such_module:make",
            r"'no_such_module:make': there is no module 'no_such_module'.*working directory",
        ),
        ("own_model:mkae", r"own_model has no 'mkae'.*Did you mean 'make'"),
        ("own_model.py:make", r"names a file; write the module: 'own_model:make'"),
        ("./nets/own_model.py:make", r"names a file; write the module: 'nets.own_model:make'"),
        ("own_model:", r"is not of the form 'package.module:name'"),
        (":make", r"is not of the form"),
        ("own_model:number", r"is a int; name an nn.Module class"),
        ("own_model:instance", r"is a finished model.*seed"),
        ("own_model:three", r"requires \(a, b, c\); Bitfront gives it \(sample_shape, num_classes\)"),
        ("own_model:nothing", r"made a NoneType.*does the factory return"),
        ("own_model:broken", r"\(16,\) and 5 classes: it raised ZeroDivisionError"),
        (
            "own_broken:make",
            r"importing own_broken failed: ModuleNotFoundError: No module named 'absent_thing'",
        ),
        ("own_syntax:make", r"importing own_syntax failed: SyntaxError"),
    ],
)
def test_mistakes_are_config_errors_that_quote_the_request(own, spec, message):
    own(
        "own_model",
        """
        from torch import nn
        number, instance = 3, nn.Linear(16, 5)
        def make(): return nn.Linear(16, 5)
        def three(a, b, c): return nn.Linear(16, 5)
        def nothing(): nn.Linear(16, 5)
        def broken(): return 1 / 0
        """,
    )
    own("own_broken", "import absent_thing")
    own("own_syntax", "def make(:")
    with pytest.raises(ConfigError, match=message) as caught:
        build(spec, (16,), 5, seed=0)
    assert spec in str(caught.value)
    assert caught.value.key == ("model",)


def test_import_object_follows_dots(own):
    own("own_nested", "class A:\n    class B:\n        value = 3")
    assert import_object("own_nested:A.B.value", "model") == 3
