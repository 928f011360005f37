"""Run folders that an earlier state of Bitfront wrote (0.1.0, commit 3782fe5) still export.

``runs_before.tar.xz`` has two searches of digits-mlp on scikit-learn's digits: ``layers`` (brute force over formats per
layer) and ``learned`` (learned bits per element).
"""

import tarfile
from pathlib import Path

import pytest

import bitfront as bf

ARCHIVE = Path(__file__).with_name("runs_before.tar.xz")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(("run", "number"), [("layers", 15), ("layers", 3), ("learned", 0)])
def test_a_run_of_an_earlier_version_still_exports(runs, run, number):
    trial = bf.Run.load(runs / run).trial(number)
    for target in ("c", "onnx"):
        result = bf.export(trial, to=target)
        assert result.folder == runs / run / "exported" / f"trial-{number}-{target}"
        assert result.samples > 200
        assert result.differing == 0
