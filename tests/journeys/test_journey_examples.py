"""The example configurations of users, as they are."""

import json

import pytest

from bitfront.kernels import onednn

pytestmark = pytest.mark.journey


def test_by_type_brute_force(shell, shared_examples, few_jets):
    shell.env["BITFRONT_DATA"] = str(few_jets)
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
        number, metrics = entry["number"], entry["software_metrics"]
        typed = shell("transform", "--run", "first/jsc-new-brute", "--trial", number, "--check", "--json")
        alone = json.loads(typed.out)
        assert (alone["accuracy"], alone["loss"]) == (metrics["accuracy"], metrics["loss"])


def test_unified_metric(shell, shared_examples, few_jets):
    shell.env["BITFRONT_DATA"] = str(few_jets)
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


def test_brute_force_native(shell, shared_examples, few_jets):
    shell.env["BITFRONT_DATA"] = str(few_jets)
    config = shared_examples / "brute_force_native.toml"
    why = (
        "weight is int16.8, which no kernel"
        if onednn.exact()
        else "this processor or build of torch has no exact kernels"
    )
    modelled = f"latency_high: modelled, not measured (seq_blocks_2 (Linear): {why}"
    assert modelled in shell("plan", "--config", config).err.replace("\n", " ")
    typed = shell("search", "--config", config, "--max-epochs", 1, "--project-dir", "runs")
    assert modelled in typed.err.replace("\n", " ")
    assert "16 of 16 candidates evaluated (space exhausted)" in typed.out
    log = json.loads((shell.folder / "runs/jsc-sixteen/log.json").read_text()).values()
    assert len(log) == 16
    for entry in log:
        metrics = entry["software_metrics"]
        assert 0 < metrics["latency"] == metrics["latency_p90"] == metrics["latency_low"] == metrics["latency_high"]
    # Wider operands are never faster in the model.
    by_bits = sorted((entry["software_metrics"]["total_bitops"], entry["software_metrics"]["latency"]) for entry in log)
    assert by_bits[0][1] < by_bits[-1][1]


@pytest.mark.skipif(not onednn.exact(), reason="this processor or build of torch has no exact kernels of bytes")
def test_a_search_for_latency_in_bytes(shell, shared_examples, few_jets):
    """The same file with the settings that have a kernel, and energy."""
    shell.env["BITFRONT_DATA"] = str(few_jets)
    text = (shared_examples / "brute_force_native.toml").read_text()
    text = text.replace("{width = 16, frac_width = 8}, ", "")
    text = text.replace("[search.strategy.sw_runner.latency]", "[search.strategy.sw_runner.latency]\nseconds = 0.02")
    text += "latency.scale = 1.0\n[search.strategy.sw_runner.energy]\nwindow = 0.05\nsource = 'estimated'\n"
    config = shell.write("bytes.toml", text)
    typed = shell("search", "--config", config, "--max-epochs", 1, "--project-dir", "runs")
    assert "9 of 9 candidates evaluated (space exhausted)" in typed.out
    assert "energy, power: estimated, not measured (share of the processors' time" in typed.err.replace("\n", " ")
    log = json.loads((shell.folder / "runs/jsc-sixteen/log.json").read_text()).values()
    assert len({entry["software_metrics"]["latency"] for entry in log}) == 1, "one network in bytes, timed once"
    assert all(entry["software_metrics"]["energy"] > 0 for entry in log)


def test_channel_multiplier(shell, shared_examples, few_jets):
    """Twelve settings are six networks, each trained once; the trained networks come back exactly."""
    shell.env["BITFRONT_DATA"] = str(few_jets)
    config = shared_examples / "channel_multiplier.toml"
    typed = shell("search", "--config", config, "--max-epochs", 1, "--project-dir", "runs")
    assert "space: 12 settings, 6 distinct networks, 2 parameters" in typed.err
    assert "eval_mode" not in typed.err
    assert "6 of 6 candidates evaluated (space exhausted)" in typed.out
    folder = shell.folder / "runs/jsc-widths"
    log = list(json.loads((folder / "log.json").read_text()).values())
    widths = [
        tuple(
            entry["sampled_config"][site]["config"]["channel_multiplier"] for site in ("seq_blocks_2", "seq_blocks_4")
        )
        for entry in log
    ]
    assert widths == [(a, b) for a in (1, 2) for b in (1, 2, 3)]
    for (a, b), entry in zip(widths, log, strict=True):
        assert entry["software_metrics"]["trained_epochs"] == 5
        assert entry["software_metrics"]["accuracy"] > 0.6
        first, second = 16 * a, 16 * b
        products = 16 * first + first * second + second * 5
        assert entry["hardware_metrics"]["total_flops"] == 4 * 16 + 16 + first + second + 5 + products
    best = json.loads((folder / "best.json").read_text())
    front = [entry["number"] for entry in best.values()]
    assert {p.name for p in (folder / "checkpoints").glob("trial-*.pt")} == {f"trial-{n}.pt" for n in front}
    for number in (front[0], next(n for n in range(6) if n not in front)):
        typed = shell("transform", "--run", "runs/jsc-widths", "--trial", number, "--check", "--json")
        alone, metrics = json.loads(typed.out), log[number]["software_metrics"]
        assert (alone["accuracy"], alone["loss"]) == (metrics["accuracy"], metrics["loss"])
    rows = shell("analyze", "--run", "runs/jsc-widths", "--trial", 5, "--csv").out.splitlines()
    assert [row.split(",")[0] for row in rows if "Linear" in row] == ["seq_blocks_2", "seq_blocks_4", "seq_blocks_6"]


def test_minifloats_beside_integers(shell, shared_examples, few_jets):
    shell.env["BITFRONT_DATA"] = str(few_jets)
    config = shared_examples / "old_schema_minifloat.toml"
    typed = shell("search", "--config", config, "--n-trials", "12")
    assert "transform has no effect here" in typed.err
    assert "12 of " in typed.out + typed.err
    typed = shell("transform", "--config", config, "--check")
    assert "e4m3" in typed.out


def test_three_linear_layers_in_a_row(shell, shared_examples, few_jets):
    """The second form of the width search: as the command of MASE has it, with its scheduler; each form for its model."""
    shell.env["BITFRONT_DATA"] = str(few_jets)
    config = shared_examples / "channel_multiplier_234.toml"
    typed = shell("search", "jsc-three-linears", "jsc", "--config", config, "--max-epochs", 1, "--cpu", 0)
    assert "note: model jsc-three-linears, dataset jsc, from the words of the command" in typed.err
    assert "setup.sampler" not in typed.err
    assert "candidates are trained one by one, which is slow: populations of networks have no lr_scheduler" in typed.err
    assert "6 of 6 candidates evaluated (space exhausted)" in typed.out
    log = json.loads((shell.folder / "runs/jsc-widths-234/log.json").read_text())
    typed = shell("transform", "--run", "runs/jsc-widths-234", "--trial", 5, "--check", "--json")
    alone, metrics = json.loads(typed.out), log["5"]["software_metrics"]
    assert (alone["accuracy"], alone["loss"]) == (metrics["accuracy"], metrics["loss"])
    typed = shell("plan", "--config", config, "--model", "jsc-tiny", code=2)
    hint = "The file names layers of model jsc-three-linears (seq_blocks_2, seq_blocks_3, seq_blocks_4)"
    assert hint in typed.err.replace("\n", " ")


def test_a_file_for_the_other_form_of_its_model(shell, shared_examples, few_jets):
    """The same layers have other names there; the run folder has those, and needs no flag."""
    shell.env["BITFRONT_DATA"] = str(few_jets)
    other = shell("plan", shared_examples / "channel_multiplier_234.toml", "--model", "jsc-three-linear-layers")
    assert "in jsc-three-linear-layers, seq_blocks_3 is seq_blocks_4, seq_blocks_4 is seq_blocks_6" in other.err
    config = shared_examples / "channel_multiplier.toml"
    short = ("--max-epochs", 1, "--n-trials", 2, "--project-dir", "runs")
    typed = shell("search", config, "--model", "jsc-three-linears", *short)
    note = "the file names layers of jsc-three-linear-layers; in jsc-three-linears, seq_blocks_4 is seq_blocks_3, seq_blocks_6"
    assert note in typed.err.replace("\n", " ")
    assert "space: 12 settings, 6 distinct networks, 2 parameters" in typed.err
    (shell.folder / "runs/jsc-widths/config.toml").rename(shell.folder / "saved.toml")
    again = shell("search", "saved.toml", "--n-trials", 2)
    assert "the file names layers" not in again.err
    assert again.out.splitlines()[0:3] == typed.out.splitlines()[0:3]
