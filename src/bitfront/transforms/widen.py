"""Widening and narrowing: from a captured model and new layer widths to a new model with the weights of the old one.

A wider model computes the same function: each new channel is a copy of an old one, and a layer that sums over the
copies gives each a share of the old weight (Net2WiderNet; Chen, Goodfellow, Shlens: Net2Net, 2016, arXiv:1511.05641). A
narrower layer keeps its most important channels, those whose filters have the largest L1 norm (Li et al.: Pruning
Filters for Efficient ConvNets, 2017, arXiv:1608.08710). Widths belong to channel groups (``bitfront.graph.channels``),
so layers that share a group change together, and the layers behind them follow.

Every call starts from the captured model, which is never changed, so multipliers do not accumulate. To get the costs of
new widths, capture the new model: ``capture(widen(graph, widths), sample)``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitfront.errors import ConfigError
from bitfront.graph import Channels, Graph, channels
from bitfront.graph.channels import Axis, ChannelGroup, TensorChannels

#: Index of a channel group, or node name or module path of a layer → number of (output) channels.
Widths = Mapping[int | str, int]


def widen(
    graph: Graph,
    widths: Widths,
    *,
    init: Literal["inherit", "fresh"] = "inherit",
    seed: int = 0,
    noise: float = 0.0,
) -> nn.Module:
    """A new model of the same class as `graph.model`, in evaluation mode, with other layer widths.

    With ``init="inherit"`` a wider model computes the same as the original, up to rounding. There is one exception: the
    channels that a LayerNorm or GroupNorm normalises together (``ChannelGroup.mixed_by``) must all grow by the same
    whole factor; otherwise the output is only close to that of the original. A narrower model computes the same as the
    original with the weights for removed channels at 0; such norms are an exception here too.

    Args:
        graph: the captured model; it must be traced.
        widths: the new widths; other channel groups keep theirs. The name of a layer stands for its output. {} gives a
            copy.
        init: ``inherit`` (as above), or ``fresh``: the parameters of every module with a method ``reset_parameters``
            are initialised by it, all others are inherited.
        seed: random seed of the noise and of fresh parameters. PyTorch's global random state is not changed.
        noise: standard deviation of the noise on the filters of copied channels, as a share of the standard deviation
            of the layer's weights, 0 or more. Equal copies get equal gradients and stay equal in training; with about
            0.01 they become different, and the output changes slightly.

    Raises:
        CaptureError: the model is not traced.
        ConfigError: a width is not possible; the message says why and names the layers.
    """
    if init not in ("inherit", "fresh"):
        raise ConfigError(f"init is {init!r}; allowed: inherit, fresh")
    structure = channels(graph)
    wanted = group_widths(structure, widths)
    picks = {g: _pick(structure, g, width, graph.model) for g, width in wanted.items()}
    model = copy.deepcopy(graph.model)
    _replace_tensors(model, structure, picks, noise, torch.Generator().manual_seed(seed))
    _update_sizes(model, structure, wanted)
    if init == "fresh":
        fresh(model, seed)
    return model


def narrowed(graph: Graph, structure: Channels, kept: Mapping[int, Tensor]) -> nn.Module:
    """A new model with these channels of some groups; ``widen`` gives one with the most important ones.

    Args:
        graph: the captured model.
        structure: its channel groups.
        kept: index of a channel group → its channels that stay, ascending, int64; as many in each block.
    """
    model = copy.deepcopy(graph.model)
    _replace_tensors(model, structure, _kept(kept), 0.0, torch.Generator())
    _update_sizes(model, structure, {index: len(which) for index, which in kept.items()})
    return model


def selected(
    structure: Channels, values: Tensor, kept: Mapping[int, Tensor], weight: str, axis: Axis | None = None
) -> Tensor:
    """What is left of a tensor with a number for each weight of a layer, or each element of an axis, if channels leave.

    Args:
        structure, kept: as for ``narrowed``.
        values: of the shape of the weight; with an axis, its first dimension is along it.
        weight: name of the weight.
        axis: the axis; None: the tensor is like the weight.
    """
    described = structure.tensors[weight] if axis is None else TensorChannels((axis,))
    return _resized(values, structure, described, _kept(kept))


def _kept(kept: Mapping[int, Tensor]) -> dict[int, _Pick]:
    return {
        index: _Pick(which, torch.ones(len(which)).double(), torch.zeros(len(which), dtype=torch.bool))
        for index, which in kept.items()
    }


def group_widths(structure: Channels, widths: Widths) -> dict[int, int]:
    """Check new widths, and give them by channel group.

    Args:
        structure: the channel groups of the model.
        widths: the new widths.

    Returns:
        Index of a channel group → new width, for those whose width changes.

    Raises:
        ConfigError: a name or index does not exist, a width is below 1 or one that its group cannot have, or a group
            gets two different widths.
    """
    result: dict[int, int] = {}
    keys: dict[int, int | str] = {}
    for key, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ConfigError(f"the width of {key!r} is {width!r}; allowed: whole numbers from 1")
        index, group_width = _group_of(structure, key, width)
        if result.setdefault(index, group_width) != group_width:
            raise ConfigError(
                f"{keys[index]!r} and {key!r} share their channels, but are given different widths: "
                f"{widths[keys[index]]} and {width}; give one of them only"
            )
        keys.setdefault(index, key)
        _check_possible(structure.groups[index], key, group_width)
    return {g: width for g, width in result.items() if width != structure.groups[g].width}


def multiplied(graph: Graph, multipliers: Mapping[str, float], divisor: int = 1) -> dict[int, int]:
    """From multipliers of layers to widths of channel groups, as ``widen`` takes them.

    If several layers share a group, a multiplier of 1 (or none) does not count beside another one. A width is rounded
    to the nearest multiple of `divisor` and of the group's ``multiple``, half up, and is at least one such multiple.

    Args:
        graph: the captured model.
        multipliers: layer (node name or module path) → multiplier of its number of output channels, above 0. If the
            output of a layer consists of several groups, it applies to all of them.
        divisor: widths are a multiple of it, 1 or more; 8, for example, for hardware that needs that.

    Returns:
        Index of a channel group → new width, for the groups with a multiplier other than 1.

    Raises:
        ConfigError: a layer does not exist, a multiplier is not above 0 or belongs to a layer whose width is fixed, or
            a group gets two different multipliers.
    """
    return multiplied_groups(channels(graph), multipliers, divisor)


def multiplied_groups(structure: Channels, multipliers: Mapping[str, float], divisor: int = 1) -> dict[int, int]:
    """Like ``multiplied``, from the channel groups of a model."""
    if divisor < 1:
        raise ConfigError(f"divisor is {divisor}; allowed: whole numbers from 1")
    factors: dict[int, tuple[str, float]] = {}
    for name, factor in multipliers.items():
        if not (factor > 0 and math.isfinite(factor)):
            raise ConfigError(f"the multiplier of {name!r} is {factor!r}; allowed: numbers above 0")
        layer = structure.layer(name)
        for segment in layer.outputs if factor != 1 else ():
            group = structure.groups[segment.group]
            if group.fixed:
                raise ConfigError(
                    f"the width of {name!r} cannot be multiplied by {factor}: it is fixed ({group.fixed})"
                )
            other, before = factors.setdefault(group.index, (name, factor))
            if before != factor:
                raise ConfigError(
                    f"{other!r} and {name!r} share their channels, but have different multipliers: "
                    f"{before} and {factor}; give both the same"
                )
    result = {}
    for index, (_, factor) in factors.items():
        group = structure.groups[index]
        step = math.lcm(divisor, group.multiple)
        result[index] = max(step, math.floor(group.width * factor / step + 0.5) * step)
    return result


def _group_of(structure: Channels, key: int | str, width: int) -> tuple[int, int]:
    """(index of the channel group of `key`, the width it needs if `key` is `width` channels wide)."""
    if isinstance(key, int):
        if not 0 <= key < len(structure.groups):
            raise ConfigError(f"there is no channel group {key}; allowed: 0 to {len(structure.groups) - 1}")
        return key, width
    outputs = structure.layer(key).outputs
    if len(outputs) != 1:
        indices = ", ".join(str(s.group) for s in outputs)
        raise ConfigError(
            f"the output of {key!r} is part of a concatenation, so its width is the sum of several channel groups: "
            f"{indices}. Give the widths of these groups, by their indices"
        )
    (segment,) = outputs
    if width % segment.repeat:
        raise ConfigError(f"the width of {key!r} is {width}, but must be a multiple of {segment.repeat}")
    return segment.group, width // segment.repeat


def _check_possible(group: ChannelGroup, key: int | str, width: int) -> None:
    if width == group.width:
        return
    if group.fixed:
        raise ConfigError(f"the width of {key!r} is {group.width} and cannot be {width}: it is fixed ({group.fixed})")
    if width % group.multiple:
        raise ConfigError(
            f"the width of {key!r} cannot be {width}: {', '.join(group.blocked_by)} must cut it into equal groups, so "
            f"it must be a multiple of {group.multiple}"
        )


# --- which channels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pick:
    """Where the new channels of a group, or the new elements of an axis, come from; tensors of shape (new width,).

    Attributes:
        source: index of the old channel, int64.
        share: its share of the weights that take in the old channel, float64, above 0, at most 1.
        copied: whether it is a copy beside the original, bool.
    """

    source: Tensor
    share: Tensor
    copied: Tensor


def _pick(structure: Channels, index: int, width: int, model: nn.Module) -> _Pick:
    """The new channels of a group. They stay in their blocks, since a grouped convolution has one set of filters per
    block."""
    group = structure.groups[index]
    old, new = group.width // group.multiple, width // group.multiple
    starts = torch.arange(0, group.width, old)[:, None]
    if new > old:
        # First the originals, then copies of all in turn: the most even numbers of copies, which norms need.
        within = torch.arange(new) % old
        source = (starts + within).flatten()
        share = 1 / torch.bincount(within)[within].double()
        copied = torch.arange(new) >= old
        return _Pick(source, share.repeat(group.multiple), copied.repeat(group.multiple))
    importance = _importance(structure, group, model).view(group.multiple, old)
    # A stable sort keeps the first ones of equally important channels.
    kept = importance.sort(dim=1, descending=True, stable=True).indices[:, :new].sort(dim=1).values
    return _Pick((starts + kept).flatten(), torch.ones(width).double(), torch.zeros(width, dtype=torch.bool))


def _importance(structure: Channels, group: ChannelGroup, model: nn.Module) -> Tensor:
    """L1 norm of each channel's filters, summed over all layers that produce it; float64, shape (width,).

    Channels that no layer produces belong to a parameter; then it is the norm of that parameter.
    """
    state = _state(model)
    weights = [layer.weight for layer in structure.layers if layer.name in group.producers]
    total = torch.zeros(group.width, dtype=torch.float64)
    seen: set[int] = set()
    for name in weights or structure.tensors:
        tensor, described = state[name], structure.tensors[name]
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for d, axis in enumerate(described.axes):
            if d == described.contracted:
                continue
            norms = tensor.detach().cpu().double().abs().movedim(d, 0).reshape(tensor.shape[d], -1).sum(1)
            position = 0
            for segment in axis:
                length = structure.size((segment,))
                if segment.group == group.index:
                    total += norms[position : position + length].view(group.width, segment.repeat).sum(1)
                position += length
    return total


def _along(structure: Channels, axis: Axis, picks: Mapping[int, _Pick]) -> _Pick:
    """The new elements of an axis, from the new channels of its groups."""
    parts: list[_Pick] = []
    position = 0
    for segment in axis:
        width, repeat = structure.groups[segment.group].width, segment.repeat
        pick = picks.get(segment.group)
        if pick is None:
            pick = _Pick(torch.arange(width), torch.ones(width).double(), torch.zeros(width, dtype=torch.bool))
        source = pick.source[:, None] * repeat + torch.arange(repeat)
        parts.append(
            _Pick(
                position + source.flatten(), pick.share.repeat_interleave(repeat), pick.copied.repeat_interleave(repeat)
            )
        )
        position += width * repeat
    return _Pick(*(torch.cat([getattr(p, f) for p in parts]) for f in ("source", "share", "copied")))


# --- the new model -----------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, under all of its names."""
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def _replace_tensors(
    model: nn.Module, structure: Channels, picks: Mapping[int, _Pick], noise: float, generator: torch.Generator
) -> None:
    weights = {layer.weight for layer in structure.layers}
    #: id of an old tensor → the new one.
    replacements: dict[int, Tensor] = {}
    for name, tensor in _state(model).items():
        described = structure.tensors.get(name)
        if described is None or not any(s.group in picks for axis in described.axes for s in axis):
            continue
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        # A tensor with two names stays one tensor with two names.
        if id(tensor) not in replacements:
            resized = _resized(tensor.detach(), structure, described, picks)
            if noise and name in weights:
                resized = _with_noise(resized, structure, described, picks, noise * tensor.detach().std(), generator)
            parameter = isinstance(tensor, nn.Parameter)
            replacements[id(tensor)] = nn.Parameter(resized, tensor.requires_grad) if parameter else resized
        if isinstance(tensor, nn.Parameter):
            module._parameters[key] = replacements[id(tensor)]  # type: ignore[assignment]
        else:
            module._buffers[key] = replacements[id(tensor)]


def _resized(tensor: Tensor, structure: Channels, described: TensorChannels, picks: Mapping[int, _Pick]) -> Tensor:
    for d, axis in enumerate(described.axes):
        if not any(s.group in picks for s in axis):
            continue
        pick = _along(structure, axis, picks)
        if d != described.contracted:
            tensor = tensor.index_select(d, pick.source.to(tensor.device))
        elif described.blocks == 1:
            tensor = _summed(tensor, d, pick)
        else:
            # Dimension 0 is resized already. Each block of outputs takes in the block of inputs with the same index.
            outputs, sources, shares = (t.chunk(described.blocks) for t in (tensor, pick.source, pick.share))
            tensor = torch.cat(
                [
                    _summed(rows, d, _Pick(source - block * tensor.shape[d], share, share))
                    for block, (rows, source, share) in enumerate(zip(outputs, sources, shares, strict=True))
                ]
            )
    return tensor.contiguous()


def _summed(tensor: Tensor, d: int, pick: _Pick) -> Tensor:
    """Resized weights, whose dimension `d` is summed over: copies of a channel share the weight of the original."""
    share = pick.share.to(tensor).view(-1, *[1] * (tensor.dim() - d - 1))
    return tensor.index_select(d, pick.source.to(tensor.device)) * share


def _with_noise(
    tensor: Tensor,
    structure: Channels,
    described: TensorChannels,
    picks: Mapping[int, _Pick],
    scale: Tensor,
    generator: torch.Generator,
) -> Tensor:
    d = 1 if described.contracted == 0 else 0
    copied = _along(structure, described.axes[d], picks).copied.to(tensor.device)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return torch.where(copied.view(-1, *[1] * (tensor.dim() - d - 1)), tensor + scale * drawn, tensor)


def _update_sizes(model: nn.Module, structure: Channels, widths: Mapping[int, int]) -> None:
    """Set the attributes of modules that repeat the sizes of their tensors, such as ``in_features``."""
    for path, attributes in structure.sizes.items():
        module = model.get_submodule(path)
        for attribute, axes in attributes.items():
            if any(s.group in widths for axis in axes for s in axis):
                known = getattr(module, attribute)
                old = known if isinstance(known, tuple) else (known,)
                # An axis without channels keeps its size.
                new = tuple(structure.size(a, widths) if a else size for a, size in zip(axes, old, strict=True))
                setattr(module, attribute, new if isinstance(known, tuple) else new[0])


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Give every module with a method ``reset_parameters`` new parameters by it, in place, and return the model."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return model
