"""The synthetic keywords: always the same samples, twelve words in equal numbers, and no file."""

import numpy as np
import pytest

from bitfront.data import DATASETS
from bitfront.data.base import DataRequest
from bitfront.data.keywords import FEATURES, FRAMES, SAMPLES, WORDS, samples
from bitfront.errors import DataError


def test_samples_are_the_same_each_time_and_words_differ():
    (x, y), (again, _) = samples(), samples()
    assert np.array_equal(x, again)
    assert x.shape == (SAMPLES, 1, FRAMES, FEATURES)
    assert np.bincount(y).tolist() == [SAMPLES // WORDS] * WORDS
    means = np.stack([x[y == word].mean(axis=0).ravel() for word in range(WORDS)])
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1) + 1e9 * np.eye(WORDS)
    within = np.sqrt(np.mean([x[y == word].var(axis=0).sum() for word in range(WORDS)]))
    assert 0.3 < apart.min() / within < 3


def test_it_reads_no_file():
    with pytest.raises(DataError, match="computed and reads no file"):
        DATASETS.get("synthetic-keywords")(DataRequest(path="words.npz"))
