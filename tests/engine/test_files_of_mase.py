"""What users of MASE write in their files, searched and transformed: numbers reported are those of deployed models."""

import re

import numpy as np
import pytest
import torch

import bitfront as bf
from bitfront import tomlfile
from bitfront.config import from_document
from bitfront.errors import ConfigError
from bitfront.models.base import models_with
from bitfront.report import passes

TOP = 'model = "digits-mlp"\ndataset = "digits"\nmax_epochs = 3\nlearning_rate = 1e-2\naccelerator = "cpu"\n'
SEARCH = """\
[search.search_space.setup]
by = "type"
[search.search_space.seed.linear.config]
name = ["integer"]
data_in_width = [8]
data_in_frac_width = [4, 9]
weight_width = [4]
weight_frac_width = [5, 6]
bias_width = [8]
[search.strategy]
name = "brute_force"
[search.strategy.sw_runner.basic_evaluation]
num_samples = 128
[search.strategy.hw_runner.basic_computation]
[search.strategy.metrics.accuracy]
[search.strategy.metrics.total_bitops]
"""
SUMMED = 'sum_scaled_metrics = true\ndirection = "maximize"\n'
TRAIN = "[search.strategy.sw_runner.basic_train]\nmax_epochs = 1\nnum_samples = 128\nbatch_size = 16\n"


def parsed(text, **overrides):
    return from_document(tomlfile.parse(TOP + text, "f.toml"), overrides)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return bf.train(parsed("", project_dir=str(folder))).checkpoint


def test_more_bits_behind_the_point_than_bits(tmp_path, weights):
    """What is searched is what is deployed, and what is exported, to the bit."""
    run = bf.search(parsed(SEARCH, project_dir=str(tmp_path), load_name=str(weights)))
    assert len(run) == 16
    best = max(run.trials, key=lambda trial: trial.metrics["accuracy"])
    assert best.metrics["accuracy"] > 0.5
    alone = bf.transform_trial(run.folder, best.number, check=True).evaluation
    assert (alone.accuracy, alone.loss) == (best.metrics["accuracy"], best.metrics["loss"])
    for target in ("c", "onnx"):
        exported = bf.export(run, best.number, to=target, samples=50)
        assert (exported.samples, exported.differing) == (50, 0)


def test_candidates_are_trained_with_a_scheduler_and_several_batches_per_step(tmp_path, weights):
    text = SEARCH.replace("[4, 9]", "[4]").replace("[5, 6]", "[5]") + TRAIN
    keys = {
        "plain": "",
        "linear": "lr_scheduler = 'linear'\nnum_warmup_steps = 2\n",
        "several": "gradient_accumulation_steps = 4\n",
    }
    losses = {}
    for name, more in keys.items():
        config = parsed(text + more, project=name, project_dir=str(tmp_path), load_name=str(weights))
        run = bf.search(config)
        (trial,) = run.trials
        losses[name] = trial.metrics["loss"]
        alone = bf.transform_trial(run.folder, 0, check=True).evaluation
        assert (alone.accuracy, alone.loss) == (trial.metrics["accuracy"], trial.metrics["loss"])
        slow = [note for note in bf.plan(config).notes if "one by one" in note]
        assert bool(slow) == (name != "plain")
    assert len(set(losses.values())) == 3
    with pytest.raises(ConfigError, match=r"f.toml:\d+: search.*num_warmup_steps: 3 steps of warm-up belong to a"):
        bf.plan(parsed(text + "num_warmup_steps = 3\n"))


def test_costs_per_batch():
    def flops(more, **overrides):
        plan = bf.plan(parsed(SEARCH.replace("basic_computation]", "basic_computation]\n" + more), **overrides))
        values = plan.evaluator.closed_form_values(plan.space.uniform()[:1], ["total_flops", "total_bitops"])
        return np.array([values["total_flops"][0], values["total_bitops"][0]]), plan.identity(None).get("batch")

    sample, none = flops("")
    assert none is None
    for more, size in (('per = "batch"', 40), ('per = "batch"\nbatch_size = 8', 8)):
        batch, known = flops(more, batch_size=40)
        assert batch.tolist() == (size * sample).tolist()
        assert known == size


@pytest.mark.parametrize(
    ("scale", "note"),
    [
        ("-1e-12", "total_bitops hardly counts in the sum: .* less than one sample of 128 in accuracy, 0.0078"),
        ("-1e-5", None),
        (
            "-1.0",
            "accuracy hardly counts in the sum: scaled, it changes by 1 at most, less than the smallest step of total",
        ),
    ],
)
def test_a_term_below_the_steps_of_the_others_is_named(scale, note):
    text = SEARCH.replace("metrics.total_bitops]", f"metrics.total_bitops]\nscale = {scale}").replace(
        "width = [4]", "width = [4, 8]"
    )
    text = text.replace('"brute_force"\n', '"brute_force"\n[search.strategy.setup]\n' + SUMMED)
    notes = [n for n in bf.plan(parsed(text)).notes if "hardly counts" in n]
    assert len(notes) == (note is not None)
    if note:
        (text,) = notes
        assert re.match(note, text)


def test_passes_prune_and_report(tmp_path, weights):
    text = """\
[passes.report_node_shape]
save_path = "SHAPES"
[passes.prune.weight]
sparsity = 0.75
scope = "global"
[passes.quantize]
by = "type"
[passes.quantize.linear.config]
name = "integer"
data_in_width = 8
data_in_frac_width = 7
weight_width = 8
weight_frac_width = 8
[passes.summarize_quantization]
[passes.report_node_type]
[passes.report_node_meta_param]
"""
    text = text.replace("SHAPES", str(tmp_path / "tables" / "shapes.csv"))
    result = bf.transform_config(parsed(text, project_dir=str(tmp_path), load_name=str(weights)), check=True)
    zeros, total = map(sum, zip(*result.pruned.values(), strict=True))
    state = result.model.state_dict()
    assert total == 64 * 32 + 32 * 10
    assert zeros == sum(int((state[f"{layer}.weight"] == 0).sum()) for layer in ("fc1", "fc2")) >= int(0.75 * total)
    assert result.pruned["fc1"][0] / 2048 > result.pruned["fc2"][0] / 320, "the smaller weights are in the wider layer"
    tables = dict(passes.sheets(result))
    assert list(tables) == [
        "prune",
        "report_node_shape",
        "summarize_quantization",
        "report_node_type",
        "report_node_meta_param",
    ]
    assert ["fc1", "64", "32", "weight 32×64, bias 32"] in [list(row) for row in tables["report_node_shape"].rows]
    assert any("weight int8.8" in cell for row in tables["report_node_meta_param"].rows for cell in row)
    (written,) = passes.write(result)
    assert written.read_text().splitlines()[0] == "node,in,out,parameters"


def test_pruning_alone_is_local_and_leaves_the_rest_in_float(tmp_path, weights):
    config = parsed("[passes.prune.weight]\nsparsity = 0.5\n", project_dir=str(tmp_path), load_name=str(weights))
    result = bf.transform_config(config)
    assert result.pruned == {"fc1": (1024, 2048), "fc2": (160, 320)}
    before, after = torch.load(weights, weights_only=True), result.model.state_dict()
    before = before.get("state_dict", before)
    kept = after["fc1.weight"] != 0
    assert torch.equal(after["fc1.weight"][kept], before["fc1.weight"][kept])
    assert before["fc1.weight"][kept].abs().min() >= before["fc1.weight"][~kept].abs().max()
    assert torch.equal(after["fc1.bias"], before["fc1.bias"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[passes.prune.activation]\nsparsity = 0.1", r"f.toml:6: passes.prune.activation: activations are not pruned"),
        ("[passes.prune]", r"f.toml:6: passes.prune: a table \[passes.prune.weight\] is needed"),
        ("[passes.prune.weight]\nsparsity = 1.0", r"f.toml:7: passes.prune.weight.sparsity: 1.0 is not possible"),
        ("[passes.report_node_type]\nwhat = 1", r"f.toml:7: passes.report_node_type.what: unknown key; allowed: which"),
    ],
)
def test_mistakes_in_passes_are_located(text, message):
    with pytest.raises(ConfigError, match=message):
        bf.transform_config(parsed(text))


def test_models_that_have_the_layers_of_a_file():
    assert models_with(["seq_blocks_2", "seq_blocks_3", "seq_blocks_4"], (16,), 5) == ["jsc-three-linears"]
    assert models_with(["conv1", "fc1"], (1, 8, 8), 10) == ["digits-cnn"]
    assert models_with(["nothing"], (16,), 5) == []
