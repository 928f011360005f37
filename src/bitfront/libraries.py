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
#: So many are listed in full.
_SHOWN = 24


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


def near(name: str, known: Iterable[str], where: str) -> str:
    """``" Near it: a, b, c (1,371 in all: timm.list_models())."`` for the end of a message; all names if they are few.

    Args:
        name: the unknown one.
        known: all names there are.
        where: where they are listed.
    """
    names = sorted(set(known))
    if not names:
        return f" There is none in {where}."
    by_lower_case = {other.lower(): other for other in names}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=_NEAR, cutoff=0.5)
    found = [by_lower_case[match] for match in matches]
    # A part of a name is the commonest mistake: resnet for resnet18.
    found += [other for other in names if name and name.lower() in other.lower() and other not in found]
    shown = f" Near it: {', '.join(found[:_NEAR])}." if found else ""
    if len(names) <= _SHOWN:
        return f"{shown} There are: {', '.join(names)}."
    return f"{shown} There are {len(names):,} in all: {where}."


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
