"""The conformance suite of reference models: what every model must do. The tests of each model run it.

from bitfront.testing.models import check_model
check_model(my_factory, sample_shape=(16,), num_classes=5)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from bitfront.models.base import build_from_factory


@dataclass(frozen=True)
class ModelReport:
    """Facts about a model, from :func:`check_model`.

    Attributes:
        parameters: number of trainable values.
        sites: names of the torch.fx nodes between input and output; empty if the model cannot be traced.
        not_traceable: why torch.fx cannot trace the model; None if it can. Such a model works, but more slowly.
    """

    parameters: int
    sites: tuple[str, ...]
    not_traceable: str | None


def check_model(
    factory: Callable[[tuple[int, ...], int], nn.Module],
    sample_shape: tuple[int, ...],
    num_classes: int,
) -> ModelReport:
    """Assert that the models of `factory` can be searched.

    Args:
        factory: (sample shape, number of classes) → model.
        sample_shape: shape of a sample, without the batch dimension.
        num_classes: number of classes, 2 or more.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    before = torch.get_rng_state()
    model, twin, other = (build_from_factory(factory, sample_shape, num_classes, seed, "checked") for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before), "building the model changes PyTorch's global random state"
    state = _state(model)
    assert _equal(state, _state(twin)), "two models from one seed differ: the factory draws from another generator"
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable, "the model has no parameter to train"
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)), (
        "the seed does not change the initial weights"
    )
    assert all(t.device.type == "cpu" for t in state.values()), "the model is not on the CPU"

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, *sample_shape, generator=generator)
    y = torch.arange(8) % num_classes

    model.eval()
    before = torch.get_rng_state()
    with torch.inference_mode():
        logits, again, alone = model(x), model(x), model(x[3:4])
    assert isinstance(logits, Tensor), f"the model returns a {type(logits).__name__}, not a tensor"
    assert logits.shape == (8, num_classes), f"logits are {tuple(logits.shape)}, not (8, {num_classes})"
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}, not float32"
    assert bool(logits.isfinite().all()), "logits of standard normal samples are not all finite"
    assert torch.equal(logits, again), "in eval mode two passes over the same samples differ"
    torch.testing.assert_close(alone[0], logits[3], msg="in eval mode a sample's logits depend on its batch")
    assert torch.equal(torch.get_rng_state(), before), "in eval mode the model draws random numbers"
    assert _equal(state, _state(model)), "in eval mode the model changes its state"

    for restored in (copy.deepcopy(model), other.eval()):
        restored.load_state_dict(state, strict=True)
        with torch.inference_mode():
            assert torch.equal(restored(x), logits), "a model with the same state dict gives other logits"

    model.train()
    with torch.random.fork_rng(devices=[]):
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} gets no gradient: the output does not depend on it"
            assert bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite"
    sites, not_traceable = _traced(model.eval())
    return ModelReport(sum(p.numel() for p in trainable), sites, not_traceable)


def _traced(model: nn.Module) -> tuple[tuple[str, ...], str | None]:
    try:
        nodes = fx.Tracer().trace(model).nodes
    except Exception as error:  # a tracer runs the code of the model, which may raise anything
        return (), f"{type(error).__name__}: {error}"
    return tuple(node.name for node in nodes if node.op not in ("placeholder", "output")), None


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
