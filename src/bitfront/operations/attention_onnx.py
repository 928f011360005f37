"""How attention is written as ONNX: matrix products and a softmax, with a rounding wherever an operand has a format.

The roundings stand where ``operations/attention.py`` computes them. So what is written differs from the deployed model
only as float layers do: by the order of sums, and by the exponentials of the softmax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bitfront.errors import ExportError
from bitfront.operations.onnx import Named, OnnxWriter, reads


def _attended(
    w: OnnxWriter,
    n: fx.Node,
    parts: Sequence[str],
    shape: tuple[int, ...],
    sources: int,
    scale: float,
    added: Sequence[str] = (),
    cosine: str | None = None,
) -> tuple[str, str]:
    """(attention weights · values, attention weights).

    Args:
        parts: queries, keys, values, in their formats; shapes (..., length, width).
        shape: of the queries.
        sources: how many keys there are.
        scale: factor of the scores.
        added: what is added to the scores, one after the other.
        cosine: the tensor of another factor, of scores that are rounded already.
    """
    dims, name = len(shape), n.name
    query, key, value = parts
    turned = w.add("Transpose", [key], f"{name}.turned", perm=[*range(dims - 2), dims - 1, dims - 2])
    scores = w.add("MatMul", [query, turned], f"{name}.products")
    if scale != 1:
        # One factor per column: by a single one, runtimes multiply within the product, which rounds elsewhere.
        factor = w.constant(f"{name}.factor", np.full(sources, scale, np.float32))
        scores = w.add("Mul", [scores, factor], f"{name}.scaled")
    of_scores = (*shape[:-1], sources)
    scores = w.inner(n, "scores", scores, of_scores)
    if cosine is not None:
        scores = w.add("Mul", [scores, cosine], f"{name}.scaled")
    for mask in added:
        scores = w.add("Add", [scores, mask], f"{name}.masked")
    weights = w.inner(n, "attention", w.add("Softmax", [scores], f"{name}.weights", axis=-1), of_scores)
    return w.add("MatMul", [weights, value], f"{name}.attended"), weights


def _linear(w: OnnxWriter, n: fx.Node, x: str, weight: str, bias: str | None, what: str) -> str:
    """x · weightᵀ + bias."""
    turned = w.add("Transpose", [weight], f"{n.name}.{what}.turned", perm=[1, 0])
    product = w.add("MatMul", [x, turned], f"{n.name}.{what}.product")
    return product if bias is None else w.add("Add", [product, bias], f"{n.name}.{what}.sum")


def _shaped(w: OnnxWriter, n: fx.Node, x: str, shape: Sequence[int], what: str) -> str:
    return w.add("Reshape", [x, w.constant(f"{n.name}.{what}.shape", np.array(shape, np.int64))], f"{n.name}.{what}")


# --- masks -----------------------------------------------------------------------------------------------------------


def _additive(left_out: NDArray[np.bool_]) -> NDArray[np.float32]:
    """What is added to scores, so that some are left out."""
    return np.where(left_out, np.float32(-np.inf), np.float32(0)).astype(np.float32)


def _mask(w: OnnxWriter, n: fx.Node, place: tuple[int, str], *, kept: bool = False, more: int = 0) -> str | None:
    """A mask as what is added to scores; None if there is none.

    Args:
        place: position and name of the argument.
        kept: whether a boolean mask is true where values are kept; otherwise where they are left out.
        more: so many columns are added, which are kept.
    """
    mask: Tensor | None = w.sample(n, *place)
    if mask is None:
        return None
    name = f"{n.name}.{place[1]}"
    wider = [0] * (2 * mask.dim() - 1) + [more]
    if not w.flows(n, *place):
        values = mask.detach().numpy()
        values = values if mask.is_floating_point() else _additive(~values if kept else values)
        return w.constant(name, np.pad(values, [(0, 0)] * (mask.dim() - 1) + [(0, more)]).astype(np.float32))
    tensor = w.tensor(n, *place)
    if not mask.is_floating_point():
        ends = [w.constant(f"{name}.end", np.array(end, np.float32)) for end in (0, -np.inf)]
        tensor = w.add("Where", [tensor, *(ends if kept else ends[::-1])], f"{name}.added")
    return w.add("Pad", [tensor, w.constant(f"{name}.pads", np.array(wider))], f"{name}.padded") if more else tensor


# --- scaled_dot_product_attention ------------------------------------------------------------------------------------


def write_sdpa(w: OnnxWriter, n: fx.Node) -> str:
    """scaled_dot_product_attention."""
    if w.sample(n, 4, "dropout_p"):
        raise ExportError(f"{n.name} ({w.kind(n)}): draws random numbers")
    arguments = tuple(enumerate(("query", "key", "value")))
    shape, of_keys = (tuple(w.sample(n, *place).shape) for place in arguments[:2])
    parts = [w.value(n, *place) for place in arguments]
    if w.sample(n, 7, "enable_gqa"):
        heads = w.constant(f"{n.name}.heads", np.arange(shape[-3]) // (shape[-3] // of_keys[-3]))
        parts[1:] = [w.add("Gather", [x, heads], f"{n.name}.shared", axis=len(of_keys) - 3) for x in parts[1:]]
    mask = _mask(w, n, (3, "attn_mask"), kept=True)
    if w.sample(n, 5, "is_causal"):
        mask = w.constant(f"{n.name}.mask", _additive(~np.tri(shape[-2], of_keys[-2], dtype=bool)))
    scale = w.sample(n, 6, "scale")
    scale = 1 / math.sqrt(shape[-1]) if scale is None else float(scale)
    return _attended(w, n, parts, shape, of_keys[-2], scale, [] if mask is None else [mask])[0]


# --- multi-head attention --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What a call of a multi-head attention says beside its tensors.

    Attributes:
        batch: the dimension of the samples.
        masks: (position, name) of what is added per query and key, and of what is added per key of a sample.
    """

    heads: int
    batch: int
    masks: tuple[tuple[int, str], tuple[int, str]]
    zero: bool
    dropout: bool
    weights: bool
    averaged: bool


def _settings(w: OnnxWriter, n: fx.Node) -> _Settings:
    module = w.module_of(n)
    if module is not None:
        places = {"attn_mask": 5, "key_padding_mask": 3, "need_weights": 4, "average_attn_weights": 6}
        heads, zero, dropout = w.setting(n, 0, "num_heads"), w.setting(n, 0, "add_zero_attn"), False
    else:
        places = {"attn_mask": 16, "key_padding_mask": 14, "need_weights": 15, "average_attn_weights": 23}
        heads, zero = w.sample(n, 4, "num_heads"), w.sample(n, 9, "add_zero_attn")
        training = w.sample(n, 13, "training")
        dropout = bool(w.sample(n, 10, "dropout_p")) and training is not False
        if w.sample(n, 21, "static_k") is not None or w.sample(n, 22, "static_v") is not None:
            raise ExportError(f"{n.name} ({w.kind(n)}): static_k and static_v")
    wanted, averaged = (w.sample(n, places[name], name) for name in ("need_weights", "average_attn_weights"))
    first = module is not None and bool(w.setting(n, 0, "batch_first"))
    return _Settings(
        int(heads),
        0 if first else 1,
        ((places["attn_mask"], "attn_mask"), (places["key_padding_mask"], "key_padding_mask")),
        bool(zero),
        dropout,
        wanted is not False and reads(n, 1),
        averaged is not False,
    )


def write_attention(w: OnnxWriter, n: fx.Node) -> Named:
    """nn.MultiheadAttention and F.multi_head_attention_forward: (output, attention weights)."""
    settings, arguments = _settings(w, n), tuple(enumerate(("query", "key", "value")))
    shapes = [tuple(w.sample(n, *place).shape) for place in arguments]
    if any(
        len(shape) != 3 or w.sample_dims(n, *at) != {settings.batch}
        for shape, at in zip(shapes, arguments, strict=True)
    ):
        raise ExportError(f"{n.name} ({w.kind(n)}): its inputs have no dimension of samples where it takes one")
    if settings.dropout:
        raise ExportError(f"{n.name} ({w.kind(n)}): draws random numbers")
    length, sources = (shape[1 - settings.batch] for shape in shapes[:2])
    inputs = [w.value(n, *place) for place in arguments]
    if settings.batch:
        inputs = [w.add("Transpose", [x], f"{n.name}.samples_first", perm=[1, 0, 2]) for x in inputs]
    width, heads = shapes[0][2], settings.heads
    parts = _projected(w, n, inputs)
    appended = [w.held(n, f"bias_{name}") for name in ("key", "value")]
    if appended[0] is not None:
        parts[1:] = [_followed(w, n, x, row, width) for x, row in zip(parts[1:], appended, strict=True)]
    more = int(appended[0] is not None)
    sizes = [length, sources + more, sources + more]
    parts = [_shaped(w, n, x, (-1, size, heads, width // heads), "heads") for x, size in zip(parts, sizes, strict=True)]
    parts = [w.add("Transpose", [x], f"{n.name}.by_head", perm=[0, 2, 1, 3]) for x in parts]
    if settings.zero:
        more += 1
        pads = w.constant(f"{n.name}.pads", np.array([0, 0, 0, 0, 0, 0, 1, 0]))
        parts[1:] = [w.add("Pad", [x, pads], f"{n.name}.with_zero") for x in parts[1:]]
    batch = shapes[0][settings.batch]
    sizes = [length, sources + more, sources + more]
    parts = [
        w.inner(n, name, x, (batch, heads, size, width // heads))
        for (_, name), x, size in zip(arguments, parts, sizes, strict=True)
    ]
    shape = (batch, heads, length, width // heads)
    scale = 1 / math.sqrt(width // heads)
    out, weights = _attended(w, n, parts, shape, sources + more, scale, _masks(w, n, settings, more))
    out = w.add("Transpose", [out], f"{n.name}.by_step", perm=[0, 2, 1, 3])
    out = w.inner(n, "context", _shaped(w, n, out, (-1, length, width), "joined"), (batch, length, width))
    weight_out = w.held(n, "weight_out")
    assert weight_out is not None
    out = _linear(w, n, out, weight_out, w.held(n, "bias_out"), "out")
    if settings.batch:
        out = w.add("Transpose", [out], f"{n.name}.steps_first", perm=[1, 0, 2])
    if settings.weights and settings.averaged:
        weights = w.add(
            "ReduceMean", [weights, w.constant(f"{n.name}.axes", np.array([1]))], f"{n.name}.mean", keepdims=0
        )
    return out, weights if settings.weights else None


def _projected(w: OnnxWriter, n: fx.Node, inputs: Sequence[str]) -> list[str]:
    """Queries, keys and values of inputs (samples, length, width)."""
    together, names = w.held(n, "weight"), ("query", "key", "value")
    separate = [w.held(n, f"weight_{name}") for name in names]
    weights: Sequence[str | None] = separate
    if together is not None:
        weights = w.add_several(
            "Split", [together], [f"{n.name}.weight.{name}" for name in names], axis=0, num_outputs=3
        )
    bias = w.held(n, "bias")
    biases: Sequence[str | None] = (None,) * 3
    if bias is not None:
        biases = w.add_several("Split", [bias], [f"{n.name}.bias.{name}" for name in names], axis=0, num_outputs=3)
    projected = []
    for name, x, weight, added in zip(names, inputs, weights, biases, strict=True):
        if weight is None:
            raise ExportError(f"{n.name} ({w.kind(n)}): it has no weight for its {name}")
        projected.append(_linear(w, n, x, weight, added, name))
    return projected


def _followed(w: OnnxWriter, n: fx.Node, x: str, row: str | None, width: int) -> str:
    """`x` (samples, length, width) with a row (1, 1, width) behind it for each sample."""
    assert row is not None
    samples = w.add("Shape", [x], f"{n.name}.samples", start=0, end=1)
    rest = w.constant(f"{n.name}.row", np.array([1, width], np.int64))
    shape = w.add("Concat", [samples, rest], f"{n.name}.rows", axis=0)
    return w.add("Concat", [x, w.add("Expand", [row, shape], f"{n.name}.repeated")], f"{n.name}.followed", axis=1)


def _masks(w: OnnxWriter, n: fx.Node, settings: _Settings, more: int) -> list[str]:
    """What is added to the scores (samples, heads, length, sources)."""
    of_queries, of_keys = settings.masks
    mask = w.sample(n, *of_queries)
    if mask is not None and mask.dim() != 2:
        raise ExportError(f"{n.name} ({w.kind(n)}): a mask for each sample and head")
    both = [_mask(w, n, place, more=more) for place in (of_queries, of_keys)]
    if both[1] is not None:
        axes = w.constant(f"{n.name}.for_all", np.array([1, 2]))
        both[1] = w.add("Unsqueeze", [both[1], axes], f"{n.name}.key_padding_mask.for_all")
    first, *others = [each for each in both if each is not None] or [""]
    for other in others:
        first = w.add("Add", [first, other], f"{n.name}.masks")
    return [first] if first else []


# --- windows of an image ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Windows:
    """How an image is cut into windows: torchvision's shifted_window_attention.

    Attributes:
        size, shift: of a window, and by how much windows are shifted; (rows, columns).
        image: rows and columns.
        padded: the same with what is added to make whole windows.
    """

    size: tuple[int, int]
    shift: tuple[int, int]
    image: tuple[int, int]
    padded: tuple[int, int]

    @property
    def count(self) -> int:
        """How many windows there are."""
        return self.padded[0] // self.size[0] * (self.padded[1] // self.size[1])

    def cut(self, image: NDArray[np.int64]) -> NDArray[np.int64]:
        """(padded rows, padded columns) → (windows, places)."""
        (rows, columns), (height, width) = self.padded, self.size
        parts = image.reshape(rows // height, height, columns // width, width)
        return parts.transpose(0, 2, 1, 3).reshape(self.count, height * width)

    @property
    def places(self) -> NDArray[np.int64]:
        """Which pixel is at each place of each window; −1: one that is added."""
        image = np.full(self.padded, -1)
        image[: self.image[0], : self.image[1]] = np.arange(math.prod(self.image)).reshape(self.image)
        return self.cut(np.roll(image, (-self.shift[0], -self.shift[1]), (0, 1)))

    @property
    def mask(self) -> NDArray[np.float32] | None:
        """What is added to scores between pixels that are no neighbours: (windows, 1, places, places); or None."""
        if not any(self.shift):
            return None
        regions = np.zeros(self.padded, np.int64)
        ends = [((0, -s), (-s, -by), (-by, None)) for s, by in zip(self.size, self.shift, strict=True)]
        for count, (rows, columns) in enumerate(itertools.product(*ends)):
            regions[slice(*rows), slice(*columns)] = count
        cut = self.cut(regions)
        return np.where(cut[:, None, :, None] != cut[:, None, None, :], np.float32(-100), np.float32(0))


def _windows(w: OnnxWriter, n: fx.Node) -> _Windows:
    _, rows, columns, _ = w.sample(n, 0, "input").shape
    size = tuple(int(s) for s in w.sample(n, 4, "window_size"))
    padded = (-(-rows // size[0]) * size[0], -(-columns // size[1]) * size[1])
    given = w.sample(n, 6, "shift_size")
    shift = [0 if size[d] >= padded[d] else int(given[d]) for d in (0, 1)]
    return _Windows((size[0], size[1]), (shift[0], shift[1]), (rows, columns), padded)


def write_windows(w: OnnxWriter, n: fx.Node) -> str:
    """torchvision's shifted_window_attention: windows are cut and put together again by a choice of pixels."""
    if w.sample(n, 12, "training") is not False and (w.sample(n, 7, "attention_dropout") or w.sample(n, 8, "dropout")):
        raise ExportError(f"{n.name} ({w.kind(n)}): draws random numbers")
    cut, heads, name = _windows(w, n), int(w.sample(n, 5, "num_heads")), n.name
    batch, _, _, width = w.sample(n, 0, "input").shape
    pixels, places = math.prod(cut.image), cut.places
    x = _shaped(w, n, w.value(n, 0, "input"), (-1, pixels, width), "pixels")
    if (places < 0).any():
        x = w.add("Pad", [x, w.constant(f"{name}.pads", np.array([0, 0, 0, 0, 1, 0]))], f"{name}.padded")
    chosen = w.constant(f"{name}.places", np.where(places < 0, pixels, places).ravel())
    x = w.add("Gather", [x, chosen], f"{name}.windows", axis=1)
    count, inside = places.shape
    x = _shaped(w, n, x, (-1, inside, width), "by_window")
    parts, cosine = _in_windows(w, n, x, (batch * count, inside, width), heads)
    added = [w.constant(f"{name}.bias_of_places", _constant(w, n, 3, "relative_position_bias"))]
    if (mask := cut.mask) is not None:
        # The windows of a sample lie side by side: (samples, windows, heads, places, places).
        parts = [_shaped(w, n, part, (-1, count, heads, inside, width // heads), "of_sample") for part in parts]
        added.append(w.constant(f"{name}.mask", mask))
    shape = (batch, *([count] if mask is not None else []), heads, inside, width // heads)
    out, _ = _attended(w, n, parts, shape, inside, 1, added, cosine)
    out = _shaped(w, n, out, (-1, heads, inside, width // heads), "flat")
    out = w.add("Transpose", [out], f"{name}.by_place", perm=[0, 2, 1, 3])
    out = w.inner(n, "context", _shaped(w, n, out, (-1, inside, width), "joined"), (batch * count, inside, width))
    weight = w.held(n, "weight_out")
    assert weight is not None
    out = _linear(w, n, out, weight, w.held(n, "bias_out"), "out")
    back = np.empty(pixels, np.int64)
    flat = places.ravel()
    back[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    out = _shaped(w, n, out, (-1, count * inside, width), "all_places")
    out = w.add("Gather", [out, w.constant(f"{name}.back", back)], f"{name}.put_back", axis=1)
    return _shaped(w, n, out, (-1, *cut.image, width), "image")


def _constant(w: OnnxWriter, n: fx.Node, position: int, name: str) -> NDArray[np.float32]:
    if w.flows(n, position, name):
        raise ExportError(f"{n.name} ({w.kind(n)}): its {name} depends on the samples")
    tensor: Tensor = w.sample(n, position, name)
    values: NDArray[np.float32] = tensor.detach().float().numpy()
    return values


def _in_windows(
    w: OnnxWriter, n: fx.Node, x: str, shape: tuple[int, int, int], heads: int
) -> tuple[list[str], str | None]:
    """(queries, keys, values, each (windows, heads, places, width of a head); the factor of cosines, or None).

    Args:
        shape: of `x`: windows, places, width.
    """
    _, inside, width = shape
    weight, bias, name = w.held(n, "weight"), w.held(n, "bias"), n.name
    assert weight is not None
    logit_scale = None if w.sample(n, 11, "logit_scale") is None else _constant(w, n, 11, "logit_scale")
    if bias is not None and logit_scale is not None:
        kept = np.repeat(np.array([1, 0, 1], np.float32), width)
        bias = w.add("Mul", [bias, w.constant(f"{name}.kept", kept)], f"{name}.bias.kept")
    all_three = _linear(w, n, x, weight, bias, "projected")
    names = ("query", "key", "value")
    parts = w.add_several("Split", [all_three], [f"{name}.{part}" for part in names], axis=2, num_outputs=3)
    parts = [w.inner(n, operand, part, shape) for operand, part in zip(names, parts, strict=True)]
    parts = [_shaped(w, n, part, (-1, inside, heads, width // heads), "heads") for part in parts]
    parts = [w.add("Transpose", [part], f"{name}.by_head", perm=[0, 2, 1, 3]) for part in parts]
    if logit_scale is None:
        factor = w.constant(f"{name}.scale", np.full(width // heads, (width // heads) ** -0.5, np.float32))
        parts[0] = w.add("Mul", [parts[0], factor], f"{name}.query.scaled")
        return parts, None
    parts[:2] = [_unit(w, n, part) for part in parts[:2]]
    scale = torch.clamp(torch.from_numpy(logit_scale), max=math.log(100.0)).exp().numpy()
    return parts, w.constant(f"{name}.scale", np.broadcast_to(scale, (heads, 1, inside)))


def _unit(w: OnnxWriter, n: fx.Node, x: str) -> str:
    """Rows of unit length, as F.normalize makes them."""
    axes, least = (
        w.constant(f"{n.name}.axes", np.array([-1])),
        w.constant(f"{n.name}.least", np.array(1e-12, np.float32)),
    )
    length = w.add("ReduceL2", [x, axes], f"{n.name}.length", keepdims=1)
    return w.add("Div", [x, w.add("Max", [length, least], f"{n.name}.divisor")], f"{n.name}.unit")
