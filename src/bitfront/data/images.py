"""Images as samples: resized, cropped and normalised as the settings say, or else as the model needs it.

A folder of images is ``dataset = "path/to/folder"``, or ``dataset = "image-folder"`` with ``dataset_path``. It has a
folder per class, or train, val and test with a folder per class each (the layout of torchvision's ``ImageFolder``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from bitfront.config import settings_of
from bitfront.data import DATASETS
from bitfront.data.base import DataRequest, Dataset, Split
from bitfront.data.items import Items, ItemSettings, dataset_of_items
from bitfront.data.raw import Array
from bitfront.data.splitting import known_split
from bitfront.errors import ConfigError, DataError, parsing, require
from bitfront.preparation import Interpolation

#: The table of the configuration.
SETTINGS = ("dataset_settings",)
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageSettings(ItemSettings):
    """Settings of data that are images."""

    image_size: int | None = Field(
        None, ge=1, le=4096, description="pixels of a side; default: what the model takes, else as the images are"
    )
    resize: Literal["crop", "stretch"] = Field(
        "crop",
        description="`crop`: the shorter side is resized, and the middle cut out; `stretch`: both are resized",
    )
    channels: Literal[1, 3] | None = Field(None, description="1: grey, 3: colours; default: the model's, else 3")
    mean: list[float] | None = Field(
        None, description="of each channel, of pixels from 0 to 1; default: the model's, else none"
    )
    std: list[float] | None = Field(None, description="likewise, what the difference is divided by")


@dataclass(frozen=True)
class Prepared:
    """How an image becomes a sample.

    Attributes:
        size: (height, width) in pixels; None to leave images as they are.
        shorter: pixels of the shorter side before cropping; None to stretch.
        channels: 1 or 3.
        mean, std: of each channel; empty for none.
        interpolation: of the resizing.
        origin: where size, mean and std come from where the settings do not say, for the note.
    """

    size: tuple[int, int] | None
    shorter: int | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    origin: str

    @property
    def note(self) -> str:
        """One line about it."""
        parts = ["as they are" if self.size is None else f"{self.size[0]} x {self.size[1]} pixels"]
        if self.size is not None:
            how = "stretched" if self.shorter is None else f"the shorter side {self.shorter} pixels, the middle cut out"
            parts.append(f"others are resized ({self.interpolation}; {how})")
        parts.append("grey" if self.channels == 1 else "RGB")
        values = " ".join(f"{m:g}" for m in self.mean), " ".join(f"{s:g}" for s in self.std)
        scaled = f" less a mean of {values[0]}, divided by {values[1]}" if self.mean else ""
        parts.append(f"pixels from 0 to 1{scaled}")
        return f"images: {', '.join(parts)}{f' (as {self.origin})' if self.origin else ''}"

    def sample(self, image: Any) -> Array:
        """An image of Pillow as float32, shape (channels, height, width)."""
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None and image.size != self.size[::-1]:
            image = self._resized(image)
        x = np.asarray(image, dtype=np.float32) / np.float32(255)
        x = x[None] if x.ndim == 2 else np.moveaxis(x, -1, 0)
        if self.mean:
            x = (x - np.array(self.mean, np.float32)[:, None, None]) / np.array(self.std, np.float32)[:, None, None]
        return np.ascontiguousarray(x)

    def _resized(self, image: Any) -> Any:
        resampling = getattr(_pillow().Resampling, self.interpolation.upper())
        assert self.size is not None
        height, width = self.size
        if self.shorter is None:
            return image.resize((width, height), resampling)
        factor = self.shorter / min(image.size)
        scaled = [max(round(side * factor), least) for side, least in zip(image.size, (width, height), strict=True)]
        image = image.resize(tuple(scaled), resampling)
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
        return image.crop((left, top, left + width, top + height))


def preparation(settings: ImageSettings, request: DataRequest) -> Prepared:
    """How images become samples: by the settings, and where they say nothing by what the model needs.

    Raises:
        ConfigError: mean and std do not fit the channels.
    """
    needs = request.needs
    channels = settings.channels or (needs.channels if needs and needs.size else 3)
    size, shorter = (needs.size, needs.shorter) if needs else (None, None)
    if settings.image_size is not None:
        side = settings.image_size
        # The same share is cut off as of the model's size.
        shorter = round(side * shorter / min(size)) if size and shorter else side
        size = (side, side)
    mean, std = settings.mean, settings.std
    for key, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) not in (1, channels):
            raise ConfigError(f"{given} for {channels} channels; give one number per channel", key=(*SETTINGS, key))
    if std is not None and not all(value > 0 for value in std):
        raise ConfigError(f"{std} divides; every number must be above 0", key=(*SETTINGS, "std"))
    of_model = needs.mean if needs else (), needs.std if needs else ()
    means = _per_channel(of_model[0] if mean is None else mean, channels)
    stds = _per_channel(of_model[1] if std is None else std, channels)
    if means or stds:
        means, stds = means or (0.0,) * channels, stds or (1.0,) * channels
    return Prepared(
        size=size,
        shorter=shorter if settings.resize == "crop" and size else None,
        channels=channels,
        mean=means,
        std=stds,
        interpolation=needs.interpolation if needs else "bilinear",
        origin=needs.origin if needs and needs.size else "",
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value per channel. Grey images of a model of colours get the mean of its values."""
    if not values or len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


@DATASETS.register("image-folder", settings=ImageSettings)
def image_folder(request: DataRequest) -> Dataset:
    """A folder of images with a folder per class, also below train, val and test: dataset_path names it.

    Raises:
        DataError: there is no such folder, it has no images, or one cannot be read.
        MissingExtraError: Pillow is not installed.
    """
    if request.path is None:
        raise DataError('dataset = "image-folder" needs dataset_path, the folder with a folder of images per class')
    root = request.path
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; name the folder with a folder of images per class")
    settings = settings_of(ImageSettings, request.settings, SETTINGS)
    parts = _parts(root)
    names = _class_names(parts)
    how = preparation(settings, request)
    splits = {split: _items(folder, names, how) for split, folder in parts.items()}
    return dataset_of_items(
        splits, request, settings, name=root.name, source=str(root), class_names=names, notes=[how.note]
    )


def _parts(root: Path) -> dict[Split | None, Path]:
    """The folders of the splits; the root under None if it has none of them."""
    found: dict[Split | None, Path] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        split = known_split(folder.name)
        if split is not None:
            if split in found:
                raise DataError(f"{found[split]} and {folder} are the same split; remove one of them")
            found[split] = folder
    if found and "train" not in found:
        raise DataError(f"{root} has {', '.join(p.name for p in found.values())}, and no folder train; add one")
    return found or {None: root}


def _class_names(parts: dict[Split | None, Path]) -> list[str]:
    """The folders of classes of all splits, sorted. Raises DataError if there are fewer than two."""
    names = sorted({p.name for root in parts.values() for p in root.iterdir() if p.is_dir() and p.name[0] != "."})
    if len(names) < 2:
        shown = ", ".join(map(str, parts.values()))
        raise DataError(
            f"{shown}: needed is a folder of images per class, two or more, and here {'is' if names else 'are'} "
            f"{', '.join(names) or 'none'}. Put them in, or name the folder above"
        )
    return names


def _items(folder: Path, names: Sequence[str], how: Prepared) -> Items:
    """The images of one split. Raises DataError if there are none."""
    files = [
        (path, index)
        for index, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in ENDINGS and path.is_file()
    ]
    if not files:
        raise DataError(f"{folder} has no images below its folders of classes; allowed endings: {', '.join(ENDINGS)}")
    identity = "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path, _ in files)
    paths = [path for path, _ in files]
    return Items(np.array([index for _, index in files]), reader(paths, how), identity)


def reader(paths: Sequence[Path], how: Prepared) -> Callable[[int], Array]:
    """A function from the position of a file to its sample."""
    pillow = _pillow()

    def read(row: int) -> Array:
        with (
            parsing(DataError, f"{paths[row]} cannot be read as an image", "leave it out, or save it again"),
            pillow.open(paths[row]) as image,
        ):
            return how.sample(image)

    return read


def _pillow() -> Any:
    return require("PIL.Image", "images", "a dataset of images")
