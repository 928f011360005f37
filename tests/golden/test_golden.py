"""Results do not change by a bit while the code is changed: small searches, held to what they gave before.

Where a result is meant to change, ``python tests/golden/runs.py tests/golden/expected`` writes them anew; the diff
belongs into the commit that changes it.
"""

import platform
from pathlib import Path

import pytest
import runs
import torch

pytestmark = pytest.mark.journey

EXPECTED = Path(__file__).parent / "expected"
#: Where it was recorded: sums in floating point depend on the processor and on torch.
RECORDED_WITH = (EXPECTED / "machine").read_text().split()


def machine():
    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__.split("+")[0]]


@pytest.mark.parametrize("name", runs.RUNS)
def test_results_are_what_they_were(name, tmp_path, warm):
    if name in runs.INEXACT and machine() != RECORDED_WITH:
        pytest.skip(f"float32 rounds differently on {machine()} than on {RECORDED_WITH}, where it was recorded")

    def forked(arguments, folder, env):
        started = warm.start(arguments, folder, env)
        out, err = started.communicate()
        return started.returncode, out, err

    assert runs.outcome(name, tmp_path, forked) == (EXPECTED / f"{name}.txt").read_text()
