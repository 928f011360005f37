"""train → test → search → transform, as a user goes through it the first time."""

import json
from itertools import pairwise

import pytest
from journey import settings

pytestmark = pytest.mark.journey


@pytest.mark.quick
def test_from_training_to_a_rebuilt_model(searched, trained_once, searched_once):
    typed = trained_once[1]
    assert typed.out.startswith("runs/small/checkpoints/best.pt: epoch ")
    assert "training: 2 epochs on 2,000 samples, adam" in typed.err
    assert (searched.folder / "runs/small/checkpoints/last.pt").is_file()

    typed = searched("test", "--config", "small.toml", "--json", cold=True)
    tested = json.loads(typed.out)
    assert tested["samples"] == 1000
    assert tested["split"] == "test"
    assert tested["accuracy"] == tested["correct"] / 1000
    assert "weights from runs/small/checkpoints/best.pt" in typed.err

    typed = searched_once[1]
    header, rule, *table = [line for line in typed.out.splitlines() if line.startswith("|")]
    assert [c.strip() for c in header.strip("|").split("|")] == [
        "number",
        "software_metrics",
        "hardware_metrics",
        "scaled_metrics",
        "test accuracy",
    ]
    assert set(rule) <= set("|-: ")
    assert "trained earlier with these settings" in typed.err
    assert "training:" not in typed.err
    assert f"36 of 36 candidates evaluated (space exhausted); {len(table) - 1} on the front" in typed.out

    run = searched.folder / "runs/small"
    best, log = json.loads((run / "best.json").read_text()), json.loads((run / "log.json").read_text())
    assert list(best) == [str(i) for i in range(len(table) - 1)]
    assert [e["number"] for e in log.values()] == list(range(36))
    for entry in (*best.values(), *log.values()):
        assert {"number", "value", "software_metrics", "hardware_metrics", "scaled_metrics", "sampled_config"} <= {
            *entry
        }
        accuracy, bits = entry["software_metrics"]["accuracy"], entry["hardware_metrics"]["average_bitwidth"]
        assert entry["scaled_metrics"] == {"accuracy": accuracy, "average_bitwidth": 0.2 * bits}
        assert entry["value"] == [accuracy, 0.2 * bits]
    values = [entry["value"] for entry in best.values()]
    assert len(values) > 1
    assert all(a[0] > b[0] and a[1] > b[1] for a, b in pairwise(values)), f"not a front: {values}"
    assert [row.split("|")[1].strip() for row in table] == ["float", *(str(e["number"]) for e in best.values())]
    assert log[str(best["0"]["number"])]["software_metrics"] == best["0"]["software_metrics"]

    rebuild, see = typed.out.splitlines()[-2:]
    assert see == "see it: bitfront report runs/small"
    assert rebuild.startswith("rebuild one: bitfront transform --run runs/small --trial ")
    for entry in [best[str(len(best) // 2)]]:
        typed = searched("transform", "--run", "runs/small", "--trial", entry["number"], "--check", "--json")
        rebuilt = json.loads(typed.out)
        assert rebuilt["accuracy"] == entry["software_metrics"]["accuracy"]
        assert rebuilt["loss"] == entry["software_metrics"]["loss"]
        assert rebuilt["config"] == entry["sampled_config"]
        folder = searched.folder / rebuilt["folder"]
        assert (folder / "model.pt").is_file()
        assert set(json.loads((folder / "quantization.json").read_text())["formats"]) == {"fc1", "fc2"}


def test_the_tables_of_transform_say_what_changed(searched):
    typed = searched("transform", "--project-dir", "runs", "--run", "small", "--trial", "0", "--check")
    assert "| Linear  |        2 |         2 |         0 |" in typed.out
    assert "| site | data_in |" in typed.out
    [line] = [line for line in typed.out.splitlines() if line.startswith("accuracy ")]
    metrics = json.loads((searched.folder / "runs/small/log.json").read_text())["0"]["software_metrics"]
    assert (
        line == f"accuracy {metrics['accuracy']!r}, loss {metrics['loss']!r} (the search found {metrics['accuracy']!r})"
    )
    typed = searched("transform", "--run", "runs/smal", "--trial", "0", code=2)
    assert "runs/smal: there is no such run folder; runs in runs: small" in typed.err


def test_a_changed_training_setting_trains_again(trained):
    typed = trained("search", "--config", "small.toml", "--max-epochs", "1")
    assert "trained earlier" not in typed.err
    assert "training: 1 epoch on 2,000 samples" in typed.err


def test_a_search_without_weights_trains_first(shell, data, trained_once):
    shell.write("small.toml", settings(data))
    typed = shell("search", "--config", "small.toml", "--project-dir", "elsewhere", "--json")
    assert "trained: 2 epochs in " in typed.err
    summary = json.loads(typed.out)
    assert summary["folder"] == "elsewhere/small"
    assert summary["trials"] == summary["space_size"] == 36
    assert summary["stopped"] == "space exhausted"
    assert (shell.folder / "elsewhere/small/checkpoints/best.pt").is_file()
    # The weights of the same training elsewhere, given by name, lead to the same front.
    weights = trained_once[0] / "runs/small/checkpoints/best.pt"
    typed = shell("search", "--config", "small.toml", "--load-name", weights, "--json")
    assert f"weights from {weights}" in typed.err
    assert json.loads(typed.out)["front"] == summary["front"]


def test_transform_applies_the_passes_of_a_file(trained):
    text = (trained.folder / "small.toml").read_text()
    text += '\n[passes.quantize]\nby = "type"\n[passes.quantize.default.config]\nname = "NA"\n'
    text += '[passes.quantize.linear.config]\nname = "integer"\n'
    text += "".join(f"{o}_width = 8\n{o}_frac_width = {f}\n" for o, f in (("data_in", 4), ("weight", 5), ("bias", 4)))
    trained.write("small.toml", text)
    typed = trained("transform", "--config", "small.toml", "--check", "--json")
    summary = json.loads(typed.out)
    assert summary["formats"]["fc1"] == {"data_in": "int8.4", "weight": "int8.5", "bias": "int8.4"}
    assert summary["samples"] == 1000
    assert "trained earlier with these settings" in typed.err


def test_analyze_shows_a_model_a_file_and_a_trial(trained, searched):
    typed = trained("analyze", "--model", "digits-mlp", "--dataset", "digits", "--batch", "8", "--json")
    table = json.loads(typed.out)
    assert {m["type"] for m in table["modules"]} == {"Flatten", "Linear", "ReLU"}
    assert table["total"]["operations"] == sum(m["operations"] for m in table["modules"])

    typed = searched("analyze", "--run", "runs/small", "--trial", "0")
    [line] = [line for line in typed.out.splitlines() if line.startswith("| fc1 ")]
    chosen = json.loads((searched.folder / "runs/small/log.json").read_text())["0"]["sampled_config"]["fc1"]["config"]
    bits = "/".join(str(chosen[f"{o}_width"]) for o in ("data_in", "weight", "bias"))
    assert line.split("|")[6].strip() == bits

    text = (trained.folder / "small.toml").read_text()
    text += '\n[passes.quantize]\nby = "type"\n[passes.quantize.linear.config]\nname = "integer"\nweight_width = 3\n'
    trained.write("passes.toml", text + "weight_frac_width = 2\n")
    header, *rows = trained("analyze", "--config", "passes.toml", "--csv").out.splitlines()
    place = header.split(",").index("weight_bits")
    assert {row.split(",")[place] for row in rows if ",Linear," in row} == {"3"}
