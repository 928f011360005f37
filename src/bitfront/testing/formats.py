"""The conformance suite of number formats: what every format must do. The tests of each format run it.

from bitfront.testing import check_format
check_format("integer", {"width": 8, "frac_width": 4})
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping

import torch
from torch import Tensor

from bitfront.formats import FORMATS
from bitfront.formats.base import WEIGHT, Format, FormatError, OperandKind, dimension
from bitfront.formats.spelling import as_json, from_json

#: Channels of the tensors that are quantized here.
CHANNELS = 3
#: Values up to this size are tried, and then some that are huge. The smaller one is for formats with infinities: it is
#: beyond the largest finite value of half precision.
FARTHEST, FARTHEST_OF_INFINITE = 2.0**80, 2.0**17
#: Shapes of weights, with the axes of their output channels and of the sums: transposed convolutions, and factors.
OTHER_AXES = (((70, 5), 1, 0), ((70, 5), -1, -2), ((40, 6, 3, 2), 1, 0))


def check_format(
    name: str,
    settings: Mapping[str, object],
    *,
    kind: OperandKind = WEIGHT,
    signed: bool = True,
    elementwise: bool = True,
    nearest: bool = True,
    mirrored: bool = True,
    grouped: bool = False,
    positional: bool = False,
    spread: float = 1.0,
    seed: int = 0,
) -> Format:
    """Assert that the format called `name`, with `settings`, keeps the contract of ``bitfront.formats.base.Format``.

    Args:
        settings: as in the TOML, without the operand's prefix.
        kind: what is quantized.
        signed: whether the tensor can be negative.
        elementwise: whether, after calibration, the rounding of a value depends on this value alone; false for
            formats whose values share something within a block that depends on them.
        nearest: whether a value becomes the nearest of the format's values; false for formats with a threshold by
            definition, and for those that round exponents.
        mirrored: whether −x becomes −y wherever x becomes y and both can be held.
        grouped: whether the format keeps something per group of the tensor that it was calibrated on, and so takes
            tensors of that shape only; then the rounding of single values is not looked at.
        positional: whether the format looks at fixed dimensions of the tensor, e.g. because a setting names one.
            Otherwise weights whose output channels lie along other dimensions must be quantized like those where they
            are dimension 0.
        spread: standard deviation of the values that it is calibrated on.
        seed: random seed of these values.

    Returns:
        The calibrated format, for further tests.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    family = FORMATS.get(name)
    sample = _sample(kind, signed, spread, seed)
    parsed = family.parse(settings, kind, signed=signed)
    _check_value(parsed, family.parse(dict(settings), kind, signed=signed))
    _check_parameters(family, settings, kind)
    form = _check_calibration(parsed, sample)
    for each in (parsed, form):
        _check_storage(each, FORMATS.official(name))
    _check_facts(parsed, form, settings, tuple(sample.shape), kind)
    for dtype in (torch.float32, torch.float64):
        points = _tried(form, sample.to(dtype), kind, elementwise, grouped)
        for x in points:
            _check_purity(form, x)
            _check_gradients(form, x)
            if grouped:
                _check_stable(form, x)
            elif elementwise:
                _check_numbers(form, x, kind, nearest=nearest, mirrored=mirrored)
            else:
                _check_blocks(form, x, kind)
            _check_memory_order(form, x)
            _check_grid(form, x)
            if dtype == torch.float32:
                _check_learned_range(form, x)
    if kind == WEIGHT and not positional:
        _check_axes(family, settings, signed, seed)
    return form


def _tried(form: Format, sample: Tensor, kind: OperandKind, elementwise: bool, grouped: bool) -> list[Tensor]:
    """The tensors that are rounded."""
    if grouped:
        return list(_points_of_groups(form, sample))
    return [_points(form, sample, kind) if elementwise else _shared(sample)]


def _sample(kind: OperandKind, signed: bool, spread: float, seed: int) -> Tensor:
    """Random values of an operand whose channels differ in size."""
    sample = torch.randn(CHANNELS, 257, generator=torch.Generator().manual_seed(seed)) * spread
    sample *= torch.tensor([1.0, 0.25, 3.0])[:, None]
    sample = sample if signed else sample.relu()
    return _turned(sample, kind).contiguous()


def _turned(x: Tensor, kind: OperandKind) -> Tensor:
    """Rows, one per channel, as they lie in the operand, a matrix; or such a matrix as rows."""
    return x.T if dimension(kind.channel_axis, 2) == 1 else x


def _check_value(one: Format, other: Format) -> None:
    called = repr(one)
    assert one == other, f"{called}: equal settings give unequal formats"
    assert hash(one) == hash(other), f"{called}: equal formats have two hashes"
    assert pickle.loads(pickle.dumps(one)) == one, f"{called}: pickling changes it"  # noqa: S301 (bytes of this process)
    first = next((f.name for f in dataclasses.fields(one)), "label")
    try:
        setattr(one, first, getattr(one, first))
    except dataclasses.FrozenInstanceError:
        return
    raise AssertionError(f"{called} can be changed")


def _check_parameters(family: type[Format], settings: Mapping[str, object], kind: OperandKind) -> None:
    assert (family.__doc__ or "").strip(), f"{family.__name__} needs a docstring: `bitfront list` shows its first line"
    for name, parameter in family.parameters.items():
        assert parameter.meaning, f"{family.__name__}: parameter {name} needs a meaning"
        assert parameter.allowed(), f"{family.__name__}: parameter {name} must say what is allowed"
    for bad in ({**settings, "no_such": 1}, *([dict.fromkeys(settings, object())] if settings else [])):
        try:
            family.parse(bad, kind)
        except FormatError as error:
            assert error.parameter in bad, f"{family.__name__}: the error for {bad} does not name the parameter"
        else:
            raise AssertionError(f"{family.__name__} accepts {bad}")


def _check_calibration(parsed: Format, sample: Tensor) -> Format:
    before = sample.clone()
    form = parsed.calibrated(sample)
    called = repr(parsed)
    assert torch.equal(sample, before), f"{called}: calibration changes its sample"
    assert type(form) is type(parsed), f"{called}: calibration gives another type"
    assert not form.calibrates, f"{called}: must be calibrated again after calibration"
    assert form == parsed.calibrated(sample.clone()), f"{called}: two calibrations on one sample differ"
    assert form.calibrated(sample * 7) == form, f"{called}: a calibrated format is changed by another calibration"
    assert parsed.calibrates or form == parsed, f"{called}: has nothing to calibrate, but calibration changes it"
    _check_value(form, parsed.calibrated(sample))
    return form


def _check_storage(form: Format, name: str) -> None:
    """Check that the format is the same after it was stored in a run folder (as JSON) and read again."""
    called, entry = repr(form), as_json(form)
    assert entry["format"] == name, f"{called}: is stored as {entry['format']!r}, but registered as {name!r}"
    try:
        text = json.dumps(entry)
    except TypeError as error:
        raise AssertionError(f"{called}: has a field that JSON cannot hold: {error}") from None
    back = from_json(json.loads(text))
    assert back == form, f"{called}: read from a run folder it is {back!r}"


def _check_facts(
    parsed: Format, form: Format, settings: Mapping[str, object], shape: tuple[int, ...], kind: OperandKind
) -> None:
    called = repr(form)
    assert isinstance(form.bits, int), f"{called}: bits must be an int"
    assert 1 <= form.bits <= 32, f"{called}: {form.bits} bits"
    expected = settings.get(form.bits_parameter or "", form.bits)
    assert form.bits == expected, f"{called}: {form.bits} bits are not its {form.bits_parameter}"
    assert form.bits == parsed.bits, f"{called}: calibration changes its bits"
    for each in (parsed, form):
        assert each.label, f"{called}: needs a label"
        assert len(each.label) <= 20, f"{called}: the label {each.label!r} is too long for a table"
        assert not set(each.label) & set(" \t\n"), f"{called}: the label {each.label!r} has blanks"
    for shape_ in (shape, (1,), (5, 4, 3, 3)):
        overhead = form.overhead_bits(shape_)
        assert isinstance(overhead, int), f"{called}: overhead_bits must be an int"
        assert overhead >= 0, f"{called}: overhead of {overhead} bits"
        # An axis that is counted from the end may be settled by calibration, for tensors of this rank.
        if len(shape_) == len(shape) or min(kind.channel_axis or 0, kind.sums or 0) >= 0:
            assert overhead == parsed.overhead_bits(shape_), f"{called}: calibration changes its overhead"


def _check_axes(family: type[Format], settings: Mapping[str, object], signed: bool, seed: int) -> None:
    """Check that a weight whose output channels do not come first is quantized as if they did."""
    for shape, channels, sums in OTHER_AXES:
        kind = dataclasses.replace(WEIGHT, channel_axis=channels, summed_axis=sums)
        # Whole 64ths: their sums do not depend on the order.
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(64).round() / 64
        x = x if signed else x.relu()
        first = x.transpose(channels, sums).contiguous()
        form = family.parse(settings, kind, signed=signed).calibrated(x)
        plain = family.parse(settings, WEIGHT, signed=signed).calibrated(first)
        called = f"{form!r}, with channels along {channels} of {shape}"
        back = plain.round(first).transpose(channels, sums).contiguous()
        assert torch.equal(_bits(form.round(x)), _bits(back)), f"{called}: rounds as if they lay elsewhere"
        for mine, other in zip(form.bounds(x), plain.bounds(first), strict=True):
            expected = torch.as_tensor(other).expand_as(first).transpose(channels, sums)
            assert torch.equal(torch.as_tensor(mine).expand_as(x), expected), f"{called}: has other bounds"
        assert form.overhead_bits(shape) == plain.overhead_bits(tuple(first.shape)), f"{called}: has another overhead"
        assert (form.bits, form.label) == (plain.bits, plain.label), f"{called}: has other bits or another label"
        for each in (form, family.parse(settings, kind, signed=signed)):
            _check_storage(each, FORMATS.name_of(family))
        _check_grid(form, x)
        _check_gradients(form, x)
        _check_learned_range(form, x)


def _points(form: Format, sample: Tensor, kind: OperandKind) -> Tensor:
    """Values to try: typical ones, an even grid over the range and beyond, ties, both zeros, tiny and infinite ones."""
    channels = _turned(sample, kind)
    low, high = (b.reshape(-1, 1) for b in _bounds(form, sample))
    low, high = (
        b.expand(CHANNELS, 1).nan_to_num(posinf=FARTHEST_OF_INFINITE, neginf=-FARTHEST_OF_INFINITE) for b in (low, high)
    )
    low, high = low.clamp(min=-FARTHEST), high.clamp(max=FARTHEST)
    grid = low + (high - low) * torch.linspace(-0.25, 1.25, 301, dtype=sample.dtype)
    levels = _turned(form.round(_turned(grid, kind)), kind).sort(dim=1).values
    ties = (levels[:, 1:] + levels[:, :-1]) / 2
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, torch.inf, -torch.inf], dtype=sample.dtype)
    special = special.expand(CHANNELS, -1)
    x = torch.cat([channels, grid, levels, ties, special], dim=1)
    return _turned(x, kind).contiguous()


def _points_of_groups(form: Format, sample: Tensor) -> list[Tensor]:
    """As ``_points``, in tensors of the shape of `sample`: of each group the same parts of its range."""
    low, high = (b.expand_as(sample) for b in _bounds(form, sample))
    places = torch.linspace(-0.25, 1.25, sample.shape[1], dtype=sample.dtype)
    # In another order for each row, so that a group sees all parts of its range.
    orders = [torch.randperm(len(places), generator=torch.Generator().manual_seed(row)) for row in range(len(sample))]
    spread = low + (high - low) * torch.stack([places[order] for order in orders])
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30], dtype=sample.dtype)
    special = special.repeat(-(-sample.numel() // 6))[: sample.numel()].reshape(sample.shape)
    return [sample, spread, form.round(spread), special]


def _bounds(form: Format, x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = form.bounds(x)
    return torch.as_tensor(low, dtype=x.dtype), torch.as_tensor(high, dtype=x.dtype)


def _bits(x: Tensor) -> Tensor:
    """The bit patterns: unlike ``==``, this tells −0 from 0."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def _check_purity(form: Format, x: Tensor) -> None:
    called, before = repr(form), x.clone()
    out = form.quantize(x)
    assert torch.equal(_bits(x), _bits(before)), f"{called}: changes its input"
    assert out.data_ptr() != x.data_ptr(), f"{called}: the result shares memory with its input"
    assert torch.equal(_bits(out), _bits(form.quantize(x))), f"{called}: two calls differ"
    shapes = [x]
    if _bounds(form, x)[0].numel() == 1:
        shapes += [x[0, 0], x[0], x[:, :0], x[None, :, :, None]]
    for tensor in shapes:
        out = form.quantize(tensor)
        assert out.shape == tensor.shape, f"{called}: shape {tuple(tensor.shape)} becomes {tuple(out.shape)}"
        assert out.dtype == tensor.dtype, f"{called}: {tensor.dtype} becomes {out.dtype}"


def _check_gradients(form: Format, x: Tensor) -> None:
    called, plain = repr(form), form.quantize(x)
    leaf = x.clone().requires_grad_()
    out = form.quantize(leaf)
    assert torch.equal(_bits(out.detach()), _bits(plain)), f"{called}: the value differs when gradients are on"
    weights = torch.arange(1, x.numel() + 1, dtype=x.dtype).reshape(x.shape)
    (gradient,) = torch.autograd.grad((out * weights).sum(), leaf)
    low, high = _bounds(form, x)
    inside = (x >= low) & (x <= high) if form.saturates else x.isfinite()
    expected = torch.where(inside, weights, torch.zeros_like(weights))
    assert torch.equal(gradient, expected), f"{called}: the gradient is not 1 inside the range and 0 outside"
    with torch.no_grad():
        assert not form.quantize(leaf).requires_grad, f"{called}: a gradient although gradients are off"


def _check_stable(form: Format, x: Tensor) -> None:
    called, out = repr(form), form.round(x)
    assert torch.equal(_bits(form.round(out)), _bits(out)), f"{called}: rounding a second time changes a value"
    low, high = _bounds(form, x)
    assert bool(((out >= low) & (out <= high)).all()), f"{called}: a value is out of its bounds"


def _check_memory_order(form: Format, x: Tensor) -> None:
    if form.any_memory_order and x.dim() > 1:
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)
        same = torch.equal(_bits(form.round(turned)), _bits(form.round(x)))
        assert same, f"{form!r}: round depends on the order in memory"


def _check_grid(form: Format, x: Tensor) -> None:
    called, out = repr(form), form.round(x)
    for grid in (form.grid, form.grid_of(x)):
        if grid is None:
            continue
        assert torch.equal(grid.round(out), out), f"{called}: a value is not on its grid, {grid}"
        if grid.complete:
            assert torch.equal(_bits(grid.round(x)), _bits(out)), f"{called}: rounds differently from its grid, {grid}"
            for bound, end in zip(_bounds(form, x), grid.ends(x), strict=True):
                assert torch.equal(bound.expand_as(x), end.expand_as(x)), (
                    f"{called}: its bounds are not those of its grid, {grid}"
                )


def _shared(sample: Tensor) -> Tensor:
    """Values to try where blocks of values share something: rows of many sizes, powers of two, ties, zeros, and large
    and tiny values side by side."""
    ties = torch.arange(-300, 301, dtype=sample.dtype) / 2
    sizes = 2.0 ** torch.arange(-98, 96, 7, dtype=sample.dtype)[:, None]
    rows = torch.cat([sample.flatten()[: len(ties) - 40], ties.new_zeros(40)])
    mixed = torch.where(torch.arange(len(ties)) % 9 == 0, rows * 1e30, rows * 1e-30)
    return torch.cat([ties * sizes, rows * sizes, torch.exp2(torch.round(ties / 4))[None], mixed[None], ties[None] * 0])


def _check_blocks(form: Format, x: Tensor, kind: OperandKind) -> None:
    """Check what holds although values depend on their neighbours."""
    called, out = repr(form), form.round(x)
    assert torch.equal(_bits(form.round(out)), _bits(out)), f"{called}: rounding a second time changes a value"
    low, high = form.bounds(x)
    assert bool((out >= low).all() and (out <= high).all()), f"{called}: a value is out of its bounds"
    assert torch.equal(form.round(-x), -out), f"{called}: −x does not become −y"
    for tensor in (x[0], x[0, 0], x[:, :0], x[:0], x[None, :, :, None]):
        rounded = form.quantize(tensor)
        assert rounded.shape == tensor.shape, f"{called}: {tuple(tensor.shape)} becomes {tuple(rounded.shape)}"
    if kind.samples:
        for several in (x, x.reshape(len(x), 1, -1), x[:, :600].reshape(len(x), 4, 10, 15)):
            alone = torch.cat([form.round(one) for one in torch.split(several, 1)])
            assert torch.equal(_bits(form.round(several)), _bits(alone)), f"{called}: a sample depends on the others"


def _check_numbers(form: Format, x: Tensor, kind: OperandKind, *, nearest: bool, mirrored: bool) -> None:
    rows = _turned(x, kind)
    called = repr(form)
    out = form.round(x)
    assert torch.equal(_bits(form.round(out)), _bits(out)), f"{called}: rounding a second time changes a value"
    low, high = (b.reshape(-1, 1) for b in _bounds(form, x))
    rounded = _turned(out, kind)
    assert bool((rounded >= low).all() and (rounded <= high).all()), f"{called}: a value is out of its bounds"
    huge = (rows.abs() >= 1e30) & ((rows <= low) | (rows >= high))
    ends = torch.where(rows > 0, high.expand_as(rows), low.expand_as(rows))
    same = torch.equal(rounded[huge], ends[huge])
    assert same or not form.saturates, f"{called}: a huge value does not become the largest one"
    for values, result in zip(rows.contiguous(), rounded, strict=True):
        order = values.argsort()
        monotone = bool((result[order][1:] >= result[order][:-1]).all())
        assert monotone or not form.saturates, f"{called}: is not monotone"
        levels = result.unique()
        assert len(levels) <= 2**form.bits, f"{called}: {len(levels)} values in {form.bits} bits"
        if not nearest:
            continue
        # Nearest of all finite values seen: on an even grid, an error of at most half a step.
        levels = levels[levels.isfinite()]
        exact = values.double()
        inside = (exact.abs() < 1e20) & (exact >= levels[0]) & (exact <= levels[-1])
        place = torch.searchsorted(levels.double(), exact).clamp(1, max(1, len(levels) - 1))
        below, above = levels.double()[place - 1], levels.double()[place.clamp(max=len(levels) - 1)]
        near = torch.minimum((exact - below).abs(), (exact - above).abs())
        slack = torch.finfo(x.dtype).eps * (exact.abs() + levels.abs().max().double()) * 4
        error = (result.double() - exact).abs()
        assert not nearest or bool((error <= near + slack)[inside].all()), (
            f"{called}: a value does not become the nearest one"
        )
    if not mirrored:
        return
    reach = torch.minimum(-low, high)
    opposite = _turned(form.round(-x), kind)
    both = rows.abs() <= reach
    assert torch.equal(opposite[both], -rounded[both]), f"{called}: −x does not become −y where both can be held"


def _check_learned_range(form: Format, x: Tensor) -> None:
    called, learned = repr(form), form.learned_range()
    if learned is None:
        return
    assert list(learned.parameters()), f"{called}: its learned range has no parameter"
    # Rounded values are far from the points where rounding changes to the next value.
    levels = form.round(x)
    leaf = levels.clone().requires_grad_()
    out = learned.quantize(leaf)
    assert out.shape == x.shape, f"{called}: its learned range changes the shape {tuple(x.shape)} to {tuple(out.shape)}"
    assert out.dtype == x.dtype, f"{called}: its learned range changes {x.dtype} to {out.dtype}"
    assert torch.allclose(out, levels, rtol=1e-4), f"{called}: its learned range rounds differently before training"
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    for name, part in (("its input", leaf), *learned.named_parameters()):
        assert part.grad is not None, f"{called}: its learned range gives no gradient to {name}"
    for settled in (False, True):
        if settled:
            learned.settle()
        frozen = learned.frozen()
        assert type(frozen) is type(form), f"{called}: its learned range becomes {frozen!r}"
        assert (frozen.bits, frozen.calibrates) == (form.bits, False), f"{called}: its learned range becomes {frozen!r}"
        assert torch.allclose(frozen.round(levels), levels, rtol=1e-4), (
            f"{called}: its learned range becomes {frozen!r}"
        )
