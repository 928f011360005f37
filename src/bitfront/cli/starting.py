"""How a command starts quickly: what it imports is not searched for garbage meanwhile."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a subcommand: modules are not garbage, and looking for it among them takes a seventh of the
    time of ``import torch``. Nor is it looked for among them later."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
