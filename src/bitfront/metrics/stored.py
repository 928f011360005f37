"""What candidates store: each tensor of the model once per format that its users have for it, or once in float.

Where two sites share a weight, each rounds the float weight in its format, so that neither can be had from the values
of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph.memory import StoredTensor, TensorUse, stored_tensors
from bitfront.operations.base import Shape
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace

#: Per use of a tensor, a figure under each option of the group of its site.
Tables = tuple[NDArray[np.int64], ...]
#: A cache: what is known of spaces that are still in use.
_OF_SPACES: WeakKeyDictionary[FormatSpace, tuple[StoredForms, ...]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class StoredForms:
    """A stored tensor, and the forms that the candidates of a space keep it in.

    Attributes:
        groups: of the sites that use it in a format; there may be none.
        bits: of a value, per group and option.
        forms: the number of the form that the use has the tensor in, per group and option: equal for equal ones.
        all_bits: of the tensor, scales included; likewise.
        bytes: the same, rounded up to whole bytes. In the last place, without a group, these figures of a tensor in
            float; the bytes are those that it has in the model.
        part_bits, part_bytes: like the two before, of the part of the tensor that the use sees; in float, of all.
        formatted: whether there is a format, per group and option.
    """

    tensor: StoredTensor
    groups: tuple[int, ...]
    bits: Tables
    forms: Tables
    all_bits: Tables
    bytes: Tables
    part_bits: Tables
    part_bytes: Tables
    formatted: Tables

    def stored_bits(self, options: Codes) -> NDArray[np.int64]:
        """Bits of all forms of the tensor, scales included, for candidates by their options; shape (candidates,)."""
        return self._stored(self.all_bits, self.part_bits, FLOAT_BITS * self.tensor.elements, options)

    def stored_bytes(self, options: Codes) -> NDArray[np.int64]:
        """The same in bytes, each form rounded up to whole ones."""
        return self._stored(self.bytes, self.part_bytes, FLOAT_BITS // 8 * self.tensor.elements, options)

    def _stored(self, whole: Tables, parts: Tables, in_float: int, options: Codes) -> NDArray[np.int64]:
        if self.tensor.as_it_is:
            return np.broadcast_to(whole[-1], len(options))
        alone: NDArray[np.int64] = np.maximum.reduce(self.of_uses(whole, options))
        forms = self.of_uses(self.forms, options)
        total, several = np.zeros(len(options), dtype=np.int64), np.zeros(len(options), dtype=bool)
        for u, part in enumerate(self.of_uses(parts, options)):
            fresh = np.logical_and.reduce([forms[u] != earlier for earlier in forms[:u]], initial=True)
            total += part * fresh
            several |= fresh & (u > 0)
        # Every form can be had from the float values, so nobody stores more than these.
        return np.where(several, np.minimum(total, in_float), alone)

    def in_widest(self, figure_of: Callable[[int, Operand], NDArray[np.int64]], options: Codes) -> NDArray[np.int64]:
        """A figure per group and option, of the use with most bits; of several with as many bits, the largest.

        Args:
            figure_of: of a group of the space and an operand, shape (options of the group,).
        """
        bits = np.stack(self.of_uses(self.bits, options))
        uses = zip(self.groups, self.tensor.uses, strict=True)
        figures = np.stack([figure_of(g, use.operand)[options[:, g]] for g, use in uses])
        best: NDArray[np.int64] = np.where(bits == bits.max(axis=0), figures, 0).max(axis=0)
        return best

    def of_uses(self, tables: Tables, options: Codes) -> list[NDArray[np.int64]]:
        """The figure of each use in a format, of shape (candidates,)."""
        return [table[options[:, g]] for g, table in zip(self.groups, tables, strict=False)]

    def quantized(self, options: Codes) -> NDArray[np.float64]:
        """Whether it is kept in a format, 0 or 1, of shape (candidates,)."""
        if self.tensor.as_it_is:
            return np.zeros(len(options))
        everywhere: NDArray[np.float64] = np.minimum.reduce(self.of_uses(self.formatted, options)).astype(np.float64)
        return everywhere


def stored_forms(space: FormatSpace) -> tuple[StoredForms, ...]:
    """Every tensor that the model of a space stores."""
    # Strategies ask for costs many times per proposal, and each time all tables would be made again.
    if space not in _OF_SPACES:
        _OF_SPACES[space] = tuple(_forms(space, tensor) for tensor in stored_tensors(space.graph))
    return _OF_SPACES[space]


def weights(space: FormatSpace) -> tuple[StoredForms, ...]:
    """The tensors that are the weight of a site."""
    return tuple(form for form in stored_forms(space) if any(use.role == "weight" for use in form.tensor.uses))


def _forms(space: FormatSpace, tensor: StoredTensor) -> StoredForms:
    uses = tensor.uses
    numbers = {site.name: g for g, site in enumerate(space.sites)}
    groups = tuple(numbers[use.site] for use in uses)
    formats = [
        [option.get(use.operand) for option in space.site_formats[g]] for g, use in zip(groups, uses, strict=True)
    ]
    numbered: dict[tuple[Format | None, Shape], int] = {}
    pairs = list(zip(uses, formats, strict=True))
    forms = [[numbered.setdefault(_form(use, f), len(numbered)) for f in own] for use, own in pairs]
    bits = [[FLOAT_BITS if f is None else f.bits for f in own] for own in formats]
    whole = [[_all_bits(tensor.elements, use, f) for f in own] for use, own in pairs]
    seen = [min(tensor.elements, math.prod(use.shape)) for use in uses]
    part = [
        [_all_bits(tensor.elements if f is None else number, use, f) for f in own]
        for number, (use, own) in zip(seen, pairs, strict=True)
    ]
    in_bytes = [[[-(-figure // 8) for figure in own] for own in tables] for tables in (whole, part)]
    in_bits, elements = tensor.elements * FLOAT_BITS, tensor.elements * tensor.itemsize
    return StoredForms(
        tensor,
        groups,
        bits=_tables(bits, FLOAT_BITS),
        forms=_tables(forms),
        all_bits=_tables(whole, in_bits),
        bytes=_tables(in_bytes[0], elements),
        part_bits=_tables(part, in_bits),
        part_bytes=_tables(in_bytes[1], elements),
        formatted=_tables([[int(f is not None) for f in own] for own in formats]),
    )


def _tables(per_use: Sequence[Sequence[int]], *last: int) -> Tables:
    return tuple(np.array(table, dtype=np.int64) for table in (*per_use, *([figure] for figure in last)))


def _form(use: TensorUse, form: Format | None) -> tuple[Format | None, Shape]:
    """What tells the forms of one tensor apart. What a format learns, it learns from what its use sees."""
    return form, use.shape if form is not None and form.calibrates else ()


def _all_bits(elements: int, use: TensorUse, form: Format | None) -> int:
    """Bits of so many elements in a format, scales included; in float without one."""
    if form is None:
        return elements * FLOAT_BITS
    # Where values have bits of their own, `bits` is their mean, and the product is whole up to its last digits.
    return round(elements * form.bits) + form.overhead_bits(use.shape)
