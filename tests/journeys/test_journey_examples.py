"""The example configurations of users, as they are."""

import json

import pytest

pytestmark = pytest.mark.journey


def test_by_type_brute_force(shell, shared_examples):
    shell.env["BITFRONT_DATA"] = str(shared_examples.parent / "data")
    config = shared_examples / "jsc_new_by_type_brute.toml"
    typed = shell("search", "--config", config, "--project-dir", "first")
    assert [line for line in typed.err.splitlines() if "'linear'" in line] == [
        "'linear' of the seed names nothing here (by = 'name'), and is not used"
    ]
    assert len([line for line in typed.err.splitlines() if "cuda" in line.lower()]) <= 1  # none where there is one
    assert "18 of 18 candidates evaluated (space exhausted)" in typed.out
    log = json.loads((shell.folder / "first/jsc-new-brute/log.json").read_text())
    configs = [entry["sampled_config"] for entry in log.values()]
    assert len({json.dumps(c, sort_keys=True) for c in configs}) == len(configs) == 18
    assert {c["seq_blocks_2"]["config"]["weight_width"] for c in configs} == {2, 4, 8}
    assert all(set(c) == {"by", "default", "seq_blocks_2"} for c in configs)

    weights = "first/jsc-new-brute/checkpoints/best.pt"
    shell("search", "--config", config, "--project-dir", "second", "--load-name", weights, "--load-type", "pt")
    best = (shell.folder / "first/jsc-new-brute/best.json").read_bytes()
    assert (shell.folder / "second/jsc-new-brute/best.json").read_bytes() == best

    for entry in reversed(json.loads(best).values()):
        number, found = entry["number"], entry["software_metrics"]
        typed = shell("transform", "--run", "first/jsc-new-brute", "--trial", number, "--check", "--json")
        alone = json.loads(typed.out)
        assert (alone["accuracy"], alone["loss"]) == (found["accuracy"], found["loss"])


def test_unified_metric(shell, shared_examples):
    shell.env["BITFRONT_DATA"] = str(shared_examples.parent / "data")
    flags = ["--max-epochs", 1, "--n-trials", 20, "--project-dir", "runs"]
    typed = shell("search", "--config", shared_examples / "unified_metric.toml", *flags)
    assert "objectives: sum of scaled metrics (maximize)" in typed.err
    assert "on the front" not in typed.out
    best = json.loads((shell.folder / "runs/jsc-unified/best.json").read_text())
    log = json.loads((shell.folder / "runs/jsc-unified/log.json").read_text())
    assert list(best) == ["0"]
    assert len(log) == 20
    assert best["0"]["value"] == max(entry["value"] for entry in log.values())
    for entry in log.values():
        assert entry["value"] == sum(entry["scaled_metrics"].values())
        assert entry["scaled_metrics"]["total_bitops"] == entry["software_metrics"]["total_bitops"] * -0.0000000005
