"""The example of each number format: searched, and a trial in that format rebuilt from the run folder."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.journey
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "formats").glob("*.toml"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_example_of_a_format(example, shell):
    typed = shell("search", "--config", example, "--n-trials", 30, "--max-epochs", 3, "--project-dir", "runs")
    assert "30 of" in typed.out
    (folder,) = (shell.folder / "runs").iterdir()
    trials = json.loads((folder / "log.json").read_text()).values()
    names = [{t["config"]["name"] for t in e["sampled_config"].values() if isinstance(t, dict)} for e in trials]
    entry = next(entry for entry, used in zip(trials, names, strict=True) if example.stem in used)
    typed = shell("transform", "--run", folder, "--trial", entry["number"], "--check", "--json")
    assert json.loads(typed.out)["accuracy"] == entry["software_metrics"]["accuracy"]
