"""The example of each number format: searched, and a trial of its front rebuilt from the run folder."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.journey
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "formats").glob("*.toml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_example_of_a_format(example, shell):
    typed = shell("search", "--config", example, "--n-trials", 30, "--max-epochs", 3, "--project-dir", "runs")
    assert "30 of" in typed.out
    (folder,) = (shell.folder / "runs").iterdir()
    best = json.loads((folder / "best.json").read_text())
    entry = next(iter(best.values()))
    assert any(
        t.get("config", {}).get("name") == example.stem for t in entry["sampled_config"].values() if isinstance(t, dict)
    )
    typed = shell("transform", "--run", folder, "--trial", entry["number"], "--check", "--json")
    assert json.loads(typed.out)["accuracy"] == entry["software_metrics"]["accuracy"]
