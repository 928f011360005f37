"""Random numbers of dropout that do not touch PyTorch's global ones, so that several trainings may take turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Stream:
    """A stream of random numbers for one training, independent of PyTorch's global one.

    Args:
        device: where the numbers are drawn; on a GPU, that of the GPU goes with that of the CPU.
        seed: where the stream begins.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._cuda = [device] if device.type == "cuda" else []
        self._states: list[Tensor] = []
        self._seed = seed

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside this block, the global generators continue this stream; after it, they have their old state again."""
        with torch.random.fork_rng(devices=self._cuda):
            if self._states:
                torch.set_rng_state(self._states[0])
                for gpu, state in zip(self._cuda, self._states[1:], strict=True):
                    torch.cuda.set_rng_state(state, gpu)
            else:
                torch.default_generator.manual_seed(self._seed)
                for gpu in self._cuda:
                    with torch.cuda.device(gpu):
                        torch.cuda.manual_seed(self._seed)
            yield
            self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self._cuda)]
