"""Imports of libraries that models and data come from, in the states in which they are met.

The wheel of torchvision on PyPI is built for the torch of PyPI. Beside another build of the same torch (for processors
alone, for instance) its C extension does not load, and its import fails, because it describes operators that nobody
has defined. timm and transformers import it too. These operators find boxes in images, and nothing here calls them, so
it is enough to declare them.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from bitfront.errors import cause, require

#: What torchvision describes at its import.
_OPERATORS = ("nms", "qnms")
#: A library of operators lives as long as its object.
_DECLARED: list[Any] = []
#: Of the names that are near an unknown one, so many are listed.
_NEAR = 6
_SHOWN = 12


def torchvision(purpose: str, module: str = "torchvision", extra: str = "torchvision") -> ModuleType:
    """torchvision, or a part of it, whether or not its C extension loads.

    Args:
        purpose: what needs it; the beginning of the message.
        module: the part to import.
        extra: the extra of Bitfront that installs it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        require("torchvision", extra, purpose)
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _DECLARED:
            raise
        _declare()
    return require(module, extra, purpose)


def _declare() -> None:
    import torch

    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """A context in which what a library prints goes to standard error: standard output has results alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def near(name: str, known: Iterable[str], what: str) -> str:
    """``" Near it: a, b, c."`` of many names, for the end of a message.

    Args:
        name: the unknown one.
        known: all names there are.
        what: what to call them, and where they are listed: ``"timm.list_models()"``.
    """
    names = sorted(set(known))
    lowered = name.lower()
    matches = difflib.get_close_matches(lowered, names, n=_NEAR, cutoff=0.5)
    # A part of a name is the commonest mistake: resnet for resnet18.
    matches += [other for other in names if lowered and lowered in other.lower() and other not in matches]
    if not names:
        return f" {what} is empty."
    if len(names) <= _SHOWN:
        return f" {what} has: {', '.join(names)}."
    shown = f" Near it: {', '.join(matches[:_NEAR])}." if matches else ""
    return f"{shown} {what} has {len(names):,} names."


def offline(what: str, where: str, error: Exception, remedy: str) -> str:
    """The message for files of a library that are neither in its cache nor can be downloaded.

    Args:
        what: the files: ``"the weights of timm:resnet18"``.
        where: the cache that was looked at.
        error: what the library raised.
        remedy: what to do without a network.
    """
    text = cause(error).rstrip(". ")
    return f"{what} are not in {where}, and cannot be downloaded ({text}). Without a network: {remedy}"
