"""Real networks of torchvision, timm and transformers, without weights, and the state in which torchvision can be
imported: its CPU wheel may lack a C extension that fits torch, and then registering shapes of operators that nobody
defined raises. The operators are not used here, so declaring them is enough."""

from __future__ import annotations

import pytest
import torch


def torchvision():
    """torchvision, importable whether or not its C extension loads; skips where it is not installed."""
    try:
        import torchvision
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        _declare()
        import torchvision
    return torchvision


_DECLARED = []


def _declare() -> None:
    if not _DECLARED:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)  # what is declared lives as long as the library object
