"""What candidates store: each tensor of the model once, in the widest form that one of its users needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.formats.base import FLOAT_BITS, Format
from bitfront.graph.memory import StoredTensor, TensorUse, stored_tensors
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace

#: Per use of a tensor, a figure under each option of the group of its site.
Tables = tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, eq=False)
class StoredForms:
    """A stored tensor, and the forms that the candidates of a space keep it in.

    Attributes:
        groups: of the sites that use it in a format; there may be none.
        bits: of a value, per group and option.
        all_bits: of the tensor, scales included; likewise.
        bytes: the same, rounded up to whole bytes. In the last place, without a group, these three of a tensor in
            float; the bytes are those that it has in the model.
        formatted: whether there is a format, per group and option.
    """

    tensor: StoredTensor
    groups: tuple[int, ...]
    bits: Tables
    all_bits: Tables
    bytes: Tables
    formatted: Tables

    def widest(self, tables: Tables, options: Codes) -> NDArray[np.int64]:
        """The largest figure among the uses of the tensor, for candidates by their options; shape (candidates,)."""
        if self.tensor.as_it_is:
            return np.broadcast_to(tables[-1], len(options))
        largest: NDArray[np.int64] = np.maximum.reduce(self.of_uses(tables, options))
        return largest

    def in_widest(self, by_group: Sequence[NDArray[np.int64]], options: Codes) -> NDArray[np.int64]:
        """A figure per group and option, of the use with most bits; of several with as many bits, the largest.

        Args:
            by_group: of every group of the space, shape (options of the group,).
        """
        bits = np.stack(self.of_uses(self.bits, options))
        figures = np.stack([by_group[g][options[:, g]] for g in self.groups])
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
    return tuple(_forms(space, tensor) for tensor in stored_tensors(space.graph))


def weights(space: FormatSpace) -> tuple[StoredForms, ...]:
    """The tensors that are the weight of a site."""
    return tuple(form for form in stored_forms(space) if any(use.operand == "weight" for use in form.tensor.uses))


def _forms(space: FormatSpace, tensor: StoredTensor) -> StoredForms:
    uses = tensor.uses
    numbers = {site.name: g for g, site in enumerate(space.sites)}
    groups = tuple(numbers[use.site] for use in uses)
    formats = [
        [option.get(use.operand) for option in space.site_formats[g]] for g, use in zip(groups, uses, strict=True)
    ]
    bits = [np.array([FLOAT_BITS if f is None else f.bits for f in own], dtype=np.int64) for own in formats]
    whole = [
        np.array([_all_bits(tensor, use, f) for f in own], dtype=np.int64)
        for use, own in zip(uses, formats, strict=True)
    ]
    formatted = [np.array([f is not None for f in own], dtype=np.int64) for own in formats]
    sizes = [-(-table // 8) for table in whole]
    last = (FLOAT_BITS, tensor.elements * FLOAT_BITS, tensor.elements * tensor.itemsize)
    for tables, figure in zip((bits, whole, sizes), last, strict=True):
        tables.append(np.array([figure], dtype=np.int64))
    return StoredForms(tensor, groups, tuple(bits), tuple(whole), tuple(sizes), tuple(formatted))


def _all_bits(tensor: StoredTensor, use: TensorUse, form: Format | None) -> int:
    """Bits of a tensor in a format, scales included; in float without one."""
    if form is None:
        return tensor.elements * FLOAT_BITS
    return tensor.elements * form.bits + form.overhead_bits(use.shape)
