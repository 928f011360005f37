"""Images under the short names that MASE's files have: what torchvision reads, and downloads, as its own datasets."""

from __future__ import annotations

from dataclasses import replace

from bitfront.data import DATASETS
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.images import ImageSettings
from bitfront.data.sources import SOURCES


@DATASETS.register("mnist", settings=ImageSettings, sample_shape=(1, 28, 28), num_classes=10)
def mnist(request: DataRequest) -> Dataset:
    """Handwritten digits, 1 x 28 x 28: torchvision:MNIST with one channel (extra torchvision).

    Raises:
        DownloadError: the files are not there, and cannot be downloaded.
        MissingExtraError: torchvision is not installed.
    """
    settings = request.settings if request.needs else {"channels": 1, **request.settings}
    return SOURCES.get("torchvision")("MNIST", replace(request, settings=settings))


@DATASETS.register("cifar10", settings=ImageSettings, sample_shape=(3, 32, 32), num_classes=10)
def cifar10(request: DataRequest) -> Dataset:
    """Photographs of ten kinds of things, 3 x 32 x 32: the same as torchvision:CIFAR10 (extra torchvision).

    Raises:
        DownloadError: the files are not there, and cannot be downloaded.
        MissingExtraError: torchvision is not installed.
    """
    return SOURCES.get("torchvision")("CIFAR10", request)
