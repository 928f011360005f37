"""The kernels: the compiled ones against torch to the last bit, both against float64."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bitfront import kernels
from bitfront.formats.integer import Integer
from bitfront.kernels import native, plain
from properties import max_examples

compiled_only = pytest.mark.skipif(not kernels.compiled(), reason="no C++ compiler here")


@st.composite
def logits(draw):
    """(logits of shape (states, classes, samples), labels): any size of numbers, some equal, some extreme."""
    states, classes, samples = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(states, classes, samples, generator=generator) * 10.0 ** draw(st.integers(-3, 4))
    if draw(st.booleans()):
        z = z.round()  # many equal ones
    extremes = draw(st.lists(st.sampled_from([torch.inf, -torch.inf, torch.nan, 0.0, 3e38, -3e38]), max_size=3))
    for value in extremes:
        z.view(-1)[int(torch.randint(z.numel(), (1,), generator=generator))] = value
    return z, torch.randint(classes, (samples,), generator=generator, dtype=torch.int32)


@compiled_only
@max_examples(150)
@given(logits(), st.booleans())
def test_both_implementations_give_the_same_bits(given_logits, rectify):
    z, y = given_logits
    loss, correct = kernels.score(z, y, rectify=rectify)
    wanted, right = plain.score(z, y, rectify)
    assert torch.allclose(loss, wanted, rtol=0, atol=0, equal_nan=True)
    finite = torch.isfinite(wanted)
    assert torch.equal(correct[finite], right[finite])


@given(logits(), st.booleans())
def test_the_loss_is_the_cross_entropy(given_logits, rectify):
    z, y = given_logits
    z = z.nan_to_num(0.0, 1e4, -1e4).clamp(-1e4, 1e4)
    loss, correct = kernels.score(z, y, rectify=rectify)
    exact = (z.clamp(min=0) if rectify else z).double()
    flat = exact.transpose(1, 2).reshape(-1, z.shape[1])
    reference = F.cross_entropy(flat, y.long().repeat(len(z)), reduction="none").view(len(z), -1)
    # Half a step of the grid, and the rounding of the largest logits in float32.
    step = 2.0**-21 + 4 * 2.0**-24 * (1 + float(exact.abs().max()))
    assert ((loss - reference.sum(1)).abs() <= step * len(y)).all()
    assert torch.equal(correct, (exact.argmax(1) == y).sum(1))


@given(logits(), st.data())
def test_a_sum_does_not_depend_on_its_parts(given_logits, data):
    z, y = given_logits
    whole, right = kernels.score(z, y)
    order = torch.tensor(data.draw(st.permutations(range(len(y)))))
    cut = data.draw(st.integers(0, len(y)))
    parts = [order[:cut], order[cut:]]
    scores = [kernels.score(z[:, :, p].contiguous(), y[p].contiguous()) for p in parts if len(p)]
    assert torch.allclose(sum(loss for loss, _ in scores), whole, rtol=0, atol=0, equal_nan=True)
    finite = torch.isfinite(whole)
    assert torch.equal(sum(r for _, r in scores)[finite], right[finite])


@compiled_only
@given(
    st.integers(1, 22), st.integers(-6, 12), st.booleans(), st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**31)
)
def test_rounding_is_what_the_format_says(width, frac, signed, length, rows, seed):
    number_format = Integer(width, frac, signed)
    fixed = number_format.grid.rounding
    step, low, high = fixed.step, fixed.low, fixed.high
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(3, rows, length + 2, generator=generator) * step * 2.0 ** min(width, 12)
    source[0, 0, 0], source[1, 0, 0], source[2, 0, 0] = torch.nan, torch.inf, -torch.inf
    target = torch.empty(2, rows, length)
    places = np.array([2, 0]) * rows * (length + 2)
    grid = np.array([[1 / step, low, high, step, 0, 0, 0]] * 2, dtype=np.float32)
    shape = (rows, length, length + 2)
    kernels.round_blocks(source, target, places, np.array([0, rows * length]), shape, grid)
    wanted = number_format.round(source[[2, 0], :, :length])
    assert torch.allclose(target, wanted, rtol=0, atol=0, equal_nan=True)


@compiled_only
@given(st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_addition_applies_the_pending_batch_norms(channels, left, right, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 5, channels, generator=generator)
    wide = torch.randn(3, 5, 2 * channels, generator=generator)
    alpha, beta = torch.randn(2, channels, generator=generator)
    result = kernels.add_normalised(a, b, (alpha, beta, 1), None, rectify=(left, right))
    normed = a * alpha + beta
    assert torch.equal(result, (F.relu(normed) if left else normed) + (F.relu(b) if right else b))
    strided = kernels.add_normalised(wide[..., channels:], b, None, None, rectify=(False, False))
    assert torch.equal(strided, wide[..., channels:] + b)


#: Forks for every search, before anything is loaded or computed: that imports torch once.
SEARCHES = """
import json, os, sys
import torch, bitfront as bf
from bitfront import api, kernels

for folder, environment in json.loads(sys.argv[1]):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    os.chdir(folder)
    os.environ.update(environment)
    torch.manual_seed(0)
    data = bf.load_dataset("digits")
    model = bf.build_model("digits-cnn", data.sample_shape, data.num_classes, seed=0)
    space = {"default": {"name": "integer", "data_in_width": [3, 6], "weight_width": 4, "bias_width": 8}}
    run = bf.search(
        model=model, data=data, space=space, metrics={"loss": "minimize"}, strategy="brute_force", project="p"
    )
    print(kernels.compiled(), [t.metrics["loss"] for t in run.trials], flush=True)
    os._exit(0)
"""


def searched(searches):
    """(whether the kernels are compiled, the losses) of searches, each in its folder and with its environment."""
    words = json.dumps([(str(folder), environment) for folder, environment in searches])
    command = [sys.executable, "-c", SEARCHES, words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = [line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("True", "False"))]
    return [(compiled == "True", losses) for compiled, losses in results]


@pytest.mark.long
@pytest.mark.slow
def test_a_machine_without_a_compiler_gives_the_same_losses(tmp_path):
    """Nothing on the PATH, a compiler that fails, compiled kernels switched off: slower, and the same numbers."""
    folders = [tmp_path / name for name in ("with", "none", "broken", "off")]
    for folder in folders:
        folder.mkdir()
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no >&2; exit 1\n")
    broken.chmod(0o755)
    private_cache = {"BITFRONT_CACHE": str(tmp_path / "cache")}
    empty = tmp_path / "empty"
    empty.mkdir()
    machines = [
        {},
        {"PATH": str(empty), "CXX": "", **private_cache},
        {"CXX": str(broken), **private_cache},
        {"BITFRONT_NATIVE": "0"},
    ]
    (_, wanted), *others = searched(zip(folders, machines, strict=True))
    assert others == [(False, wanted)] * 3
    assert not list((tmp_path / "cache").glob("*"))


def test_a_library_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "_native_score", lambda z, y, _: (torch.zeros(len(z)), torch.zeros(len(z))))
    kernels.compiled.cache_clear()
    try:
        assert not kernels.compiled()
    finally:
        monkeypatch.undo()
        kernels.compiled.cache_clear()


@pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler here")
def test_both_libraries_compile_where_there_is_a_compiler():
    # A mistake in the C++ would otherwise look like a machine without a compiler, and skip its tests.
    assert kernels.compiled()
    assert native.training_library() is not None


@compiled_only
def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path))
    compilations = []
    real = native._compile
    monkeypatch.setattr(native, "_compile", lambda *a: (compilations.append(a), real(*a)))
    for _ in range(2):
        native.training_library.cache_clear()
        assert native.training_library() is not None
    native.training_library.cache_clear()
    assert len(compilations) == 1
    assert [f.suffix for f in tmp_path.iterdir()] == [".so"]
