"""The optimizers have the bits of torch's, whichever parameters have a gradient."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from bitfront.errors import EvaluationError
from bitfront.optimizer import Optimizer, Schedule

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_has_the_bits_of_torchs_optimizer(name, fused):
    """Also where parameters differ in type, and where one gets its first gradient later than the others."""
    random = torch.Generator().manual_seed(0)
    shapes = {(3, 4): torch.float32, (5,): torch.float32, (2, 3): torch.float64, (7,): torch.float32}
    parameters = [nn.Parameter(torch.randn(shape, generator=random, dtype=kind)) for shape, kind in shapes.items()]
    theirs = [nn.Parameter(p.detach().clone()) for p in parameters]
    references = [OPTIMIZERS[name]([p], lr=0.1, weight_decay=0.01, fused=fused or None) for p in theirs]
    optimizer = Optimizer(parameters, name, 0.1, 0.01, fused=fused)
    for step in range(6):
        optimizer.rate = 0.1 / (step + 1)
        for i, (p, q, reference) in enumerate(zip(parameters, theirs, references, strict=True)):
            reference.param_groups[0]["lr"] = 0.1 / (step + 1)
            has_gradient = (step > 1 or i != 1) and (step != 4 or i != 2)
            p.grad = torch.randn(p.shape, generator=random, dtype=p.dtype) if has_gradient else None
            q.grad = None if p.grad is None else p.grad.clone()
            reference.step()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(parameters, theirs, strict=True))
        assert all(p.grad is None or not torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_stay_go_on_as_if_the_others_had_not_been_there(name, steps):
    random = torch.Generator().manual_seed(0)
    values, gradients = torch.randn(5, 3, generator=random), torch.randn(6, 5, 3, generator=random)
    rows = torch.tensor([0, 3])
    some, all_of_them = nn.Parameter(values[rows]), nn.Parameter(values.clone())
    alone, optimizer = Optimizer([some], name, 0.1, 0.01), Optimizer([all_of_them], name, 0.1, 0.01)
    moving = all_of_them
    for step, gradient in enumerate(gradients):
        if step == steps:
            moving = nn.Parameter(all_of_them.detach()[rows])
            optimizer = optimizer.of_rows([moving], rows)
        some.grad, moving.grad = gradient[rows], gradient[rows] if step >= steps else gradient.clone()
        alone.step()
        optimizer.step()
    torch.testing.assert_close(moving, some)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = Optimizer([table.weight], "adam", 0.1, 0.0)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(EvaluationError, match="adam cannot be used with sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_rates_of_every_step(name, rates):
    schedule = Schedule(name, 3.0, warmup=2, steps=6)
    assert [schedule.rate_at(step) for step in range(6)] == pytest.approx([3 * rate for rate in rates])
    assert Schedule(name, 3.0, warmup=0, steps=6).rate_at(0) == 3.0
