"""What the tests of the report share: a run of six candidates, and a browser."""

import shutil

import pytest
from made import full_grid, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def six(tmp_path_factory):
    """All six candidates of two parameters: bits in, bits of weights; accuracy grows with both, half as fast with the
    first."""
    codes = full_grid()
    accuracy = 0.8 + 0.02 * codes[:, 0] + 0.04 * codes[:, 1]
    return write(
        tmp_path_factory.mktemp("runs") / "six",
        codes,
        {"accuracy": accuracy, "average_bitwidth": 2.0 ** (1 + codes[:, 1])},
    )


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; .ci/run installs it where apt can")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()
