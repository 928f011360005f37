"""The compiled step against torch: every group of gradients against autograd, and the step of Adam."""

import numpy as np
import pytest
import torch
from learning_by_hand import Reference, Values
from learning_networks import Cnn, Mlp, SignedMlp

from bitfront.graph import capture
from bitfront.kernels import bits as compiled
from bitfront.learned_bits.member import BitsMember
from bitfront.learned_bits.program import Granularities, with_learned_bits

pytestmark = pytest.mark.skipif(not compiled.available(), reason="needs a compiler")
SAMPLES, PRESSURE = 45, 3e-4
GROUPS = ("weight", "bias", "weight_bits", "bias_bits", "fractions", "integers")


def member_of(model, shared, seed):
    """A member whose weights and bits are drawn, some bits without room for a value, and its program."""
    draw = np.random.default_rng(seed)
    graph = capture(model.eval(), torch.zeros(2, *model.shape))
    _, program = with_learned_bits(graph, model.shape, shared, {})
    member = BitsMember.of(program, graph.model, [np.ones(layer.source, np.float32) for layer in program.layers], 5)
    values = member.values.numpy()
    for layer, place in zip(program.layers, member.places, strict=True):
        fan = np.prod(layer.weight_shape[1:])
        for part, low, high in (
            (place.weight, -2.5 / np.sqrt(fan), 2.5 / np.sqrt(fan)),
            (place.bias, -1, 1),
            (place.weight_bits, 0.6, 5.4),
            (place.bias_bits, 0.6, 5.4),
            (place.fractions, 0.6, 5.4),
            (place.integers, -1.4, 1.4),
        ):
            values[part] = draw.uniform(low, high, part.stop - part.start)
        if layer.shared.data_in == "element":
            values[place.integers][:2], values[place.fractions][:2] = -2, (2, 1)  # 0 bits, and fewer
    return program, member


def shape_of_bits(granularity, shape, axis):
    """The shape in which bits spread over values of `shape`, whose channels are along `axis`."""
    if granularity == "element":
        return shape
    return tuple(size if granularity == "channel" and i == axis else 1 for i, size in enumerate(shape))


def leaves_of(program, numbers, places):
    """path → the parameters of its layer, from an array like that of a member."""
    values = {}
    for layer, place in zip(program.layers, places, strict=True):
        shapes = {
            "weight": layer.weight_shape,
            "weight_bits": shape_of_bits(layer.shared.weight, layer.weight_shape, 0),
            "fractions": shape_of_bits(layer.shared.data_in, layer.source, 0),
            "integers": shape_of_bits(layer.shared.data_in, layer.source, 0),
        }
        if layer.bias:
            shapes |= {"bias": layer.target[:1], "bias_bits": layer.target[:1]}
        tensors = {n: torch.tensor(numbers[getattr(place, n)]).double().reshape(s) for n, s in shapes.items()}
        values[layer.path] = Values(**{"bias": None, "bias_bits": None} | tensors, supported=magnitudes(layer))
    return values


def magnitudes(layer):
    """Operand → its supported widths without signs; whole channels may always be removed."""
    shared = layer.shared
    widths = {
        "weight": {w - 1 for w in shared.weight_width if w},
        "data_in": {w - layer.signed for w in shared.data_in_width if w},
        "bias": {w - 1 for w in shared.bias_width},
    }
    for operand in ("weight", "data_in"):
        if widths[operand] and getattr(shared, operand) == "channel":
            widths[operand].add(0)
    return widths


def gradients_of(member, cost, x, y, targets, pressure):
    """What the compiled step takes as gradients, of the members' values: Adam's first moment after one step is a tenth
    of them. The member is as before."""
    before = member.values.clone()
    for moment in member.moments:
        moment.zero_()
    order = torch.arange(len(y), dtype=torch.int32)
    numbers = np.array([1e-3]), np.array([pressure])
    loss = compiled.learn(
        member.native, member.workspace, cost, x, y, targets, order, len(y), *numbers, 0, member.first_bits, 2.0
    )
    gradients = member.moments[0].double() / 0.1
    member.values.copy_(before)
    return loss, gradients


COSTS = [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.3, 0.0)]
CASES = [
    *((Mlp, weight, data) for weight in ("element", "channel", "layer") for data in ("element", "channel", "layer")),
    *((Cnn, weight, data) for weight in ("element", "channel", "layer") for data in ("element", "channel", "layer")),
    (SignedMlp, "element", "element"),
    (SignedMlp, "layer", "channel"),
]
WIDTHS = [((3, 5), (3,), (4, 7)), ((2, 4, 8), (4, 8), ()), ((8,), (), (16,)), ((), (2, 6), (2,))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize(("kind", "weight", "data"), CASES, ids=lambda c: getattr(c, "__name__", c))
def test_all_gradients_are_those_of_autograd(kind, weight, data, soft):
    check_gradients(kind, Granularities(weight, data), soft, CASES.index((kind, weight, data)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("shared", ["channel", "layer"])
@pytest.mark.parametrize("kind", [Mlp, Cnn, SignedMlp])
def test_gradients_of_supported_widths_are_those_of_autograd(kind, shared, widths):
    check_gradients(kind, Granularities(shared, shared, *widths), False, 100 + WIDTHS.index(widths))


def check_gradients(kind, shared, soft, seed):
    torch.manual_seed(seed)
    model = kind()
    program, member = member_of(model, shared, seed)
    x, y = torch.randn(SAMPLES, *kind.shape), torch.randint(0, kind.classes, (SAMPLES,))
    targets = torch.softmax(torch.randn(SAMPLES, kind.classes), 1) if soft else None
    costs = COSTS[seed % len(COSTS)]
    values = leaves_of(program, member.values.numpy(), member.places)
    for leaf in (leaf for v in values.values() for leaf in v.leaves().values()):
        leaf.requires_grad_()
    reference = Reference(model, values, {layer.path: layer.signed for layer in program.layers}, costs)
    wanted = torch.nn.functional.one_hot(y, kind.classes).double() if targets is None else targets.double()
    loss = reference.loss(kind.reference, x.double(), wanted, PRESSURE)
    loss.backward()

    pressure = compiled.NativePressure(*costs)
    flat = x.flatten(1).contiguous()
    mean, gradients = gradients_of(member, pressure, flat, y.int(), targets, PRESSURE)
    cost = reference.cost.item()
    assert mean + PRESSURE * cost == pytest.approx(loss.item(), rel=1e-6)
    order = torch.arange(SAMPLES, dtype=torch.int32)
    assert compiled.logits(member.native, member.workspace, pressure, flat, order)[1] == pytest.approx(cost, rel=1e-12)
    # Sums over a whole input cancel, so an error is seen beside the largest gradient of its group in any layer.
    leaves = [each.leaves() for each in values.values()]
    largest = {name: max(g[name].grad.abs().max() for g in leaves if name in g) for name in GROUPS}
    for layer, place in zip(program.layers, member.places, strict=True):
        for name, leaf in values[layer.path].leaves().items():
            ours = gradients[getattr(place, name)].reshape(leaf.shape)
            error = (ours - leaf.grad).abs().max() / largest[name]
            assert error <= 1e-5, f"{layer.path}.{name}: {error}"
    assert all(value > 0 for value in largest.values())


def test_the_step_is_adams():
    """Several steps with two learning rates, against torch.optim.Adam with the gradients of the compiled step."""
    torch.manual_seed(0)
    program, member = member_of(Mlp(), Granularities(), 0)
    cost = compiled.NativePressure(1.0, 0.0, 1.0)
    x, y = torch.randn(SAMPLES, 6), torch.randint(0, 3, (SAMPLES,)).int()
    weights, bits = (part.double().clone() for part in member.values.tensor_split([member.first_bits]))
    optimizer = torch.optim.Adam([{"params": [weights]}, {"params": [bits]}])
    order = torch.arange(SAMPLES, dtype=torch.int32)
    moments = tuple(moment.clone() for moment in member.moments)
    for step, rate in enumerate((3e-3, 2e-3, 5e-3, 1e-3, 4e-3)):
        kept = [moment.clone() for moment in moments]
        _, gradients = gradients_of(member, cost, x, y, None, PRESSURE)
        for mine, moment in zip(member.moments, kept, strict=True):
            mine.copy_(moment)
        before = member.values.clone()
        numbers = np.array([rate]), np.array([PRESSURE])
        compiled.learn(
            member.native, member.workspace, cost, x, y, None, order, SAMPLES, *numbers, step, member.first_bits, 2.5
        )
        moments = tuple(moment.clone() for moment in member.moments)
        weights.grad, bits.grad = gradients.tensor_split([member.first_bits])
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 2.5 * rate
        optimizer.step()
        change = (member.values - before).abs().max()
        assert change > 0.5 * rate
        expected = torch.cat([weights, bits])
        assert (member.values - expected).abs().max() < 1e-5 * rate + 3e-7 * expected.abs().max()
    assert member.first_bits == sum(layer.weights + layer.target[0] for layer in program.layers)
