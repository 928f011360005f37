"""What a model of a library needs of its samples: the size and the normalisation of images, the tokenizer of texts.

A source of models says it, a reader of data applies it, and the settings of the data override each part. It stands
below both, since neither knows of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True)
class Preparation:
    """What a model needs of its samples.

    Attributes:
        origin: who says so, for notes: ``"timm's resnet18"``.
        size: (height, width) of images, in pixels; None if the model takes any, or no images.
        shorter: pixels of the shorter side before the image is cropped to `size`; None for no cropping.
        channels: of images.
        mean, std: of each channel, of pixels between 0 and 1; empty for none.
        interpolation: how images are resized.
        tokenizer: name or folder of the tokenizer of texts; empty if the model takes no texts.
        num_classes: of the classifier in the library's weights; None if these have none.
    """

    origin: str
    size: tuple[int, int] | None = None
    shorter: int | None = None
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: Interpolation = "bilinear"
    tokenizer: str = ""
    num_classes: int | None = None

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Of an image, (channels, height, width); None if the size is not known."""
        return None if self.size is None else (self.channels, *self.size)
