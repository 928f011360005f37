"""Synthetic keywords: spectrogram-like samples of twelve "words", computed, so that an example needs no download.

They are not speech, and accuracies on them say nothing about speech. They have its shape (a second in 49 frames of 10
features, as MLPerf Tiny's keyword spotting takes them), and what makes it hard: a word comes earlier or later, faster
or slower, louder or softer, in noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitfront.data import DATASETS
from bitfront.data.arrays import from_arrays
from bitfront.data.base import DataRequest, Dataset
from bitfront.errors import DataError

WORDS, FRAMES, FEATURES = 12, 49, 10
SAMPLES = 3600
#: Of the words; the same for every seed of a search, which draws the split.
_SEED = 20171128
_NOISE = 1.0


@DATASETS.register("synthetic-keywords", sample_shape=(1, FRAMES, FEATURES), num_classes=WORDS)
def keywords(request: DataRequest) -> Dataset:
    """3,600 computed spectrograms of 12 synthetic words, 1 x 49 x 10: no speech, but of its shape; needs no file.

    The split is stratified and drawn from the seed.

    Raises:
        DataError: a path was given.
    """
    if request.path is not None:
        raise DataError(
            f'dataset = "synthetic-keywords" is computed and reads no file, but dataset_path is {request.path}; leave '
            'dataset_path out, or use dataset = "npz"'
        )
    x, y = samples()
    return from_arrays(
        x,
        y,
        name="synthetic-keywords",
        class_names=[f"word {k}" for k in range(WORDS)],
        seed=request.seed,
        source="computed",
    )


def samples() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(samples, float32 of shape (3600, 1, 49, 10); the word of each, int64)."""
    rng = np.random.default_rng(_SEED)
    y = np.arange(SAMPLES) % WORDS
    # A word is a track of each feature over time, through six random points.
    points = rng.normal(size=(WORDS, 6, FEATURES)) * np.linspace(1.5, 0.5, FEATURES)
    begin, length = rng.uniform(2, 17, SAMPLES), rng.uniform(22, 32, SAMPLES)
    time = (np.arange(FRAMES) - begin[:, None]) / length[:, None] * 5  # 0 to 5 within the word
    left = np.clip(np.floor(time), 0, 4).astype(int)
    part = np.clip(time - left, 0, 1)[..., None]
    track = (1 - part) * points[y[:, None], left] + part * points[y[:, None], left + 1]
    spoken = ((time >= 0) & (time <= 5))[..., None]
    loud = rng.uniform(0.6, 1.4, (SAMPLES, 1, 1))
    noise = rng.normal(size=(SAMPLES, FRAMES, FEATURES)) * _NOISE
    return (track * spoken * loud + noise)[:, None].astype(np.float32), y
