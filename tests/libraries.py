"""Real networks of torchvision, timm and transformers, without weights, whether or not torchvision's C extension loads."""

from __future__ import annotations

import pytest

from bitfront import libraries
from bitfront.errors import MissingExtraError


def torchvision():
    """torchvision; skips where it is not installed."""
    try:
        return libraries.torchvision("a test")
    except MissingExtraError:
        pytest.skip("torchvision is not installed")
