"""Files of other versions of MASE's schema: what is understood, what is said, and where errors are."""

import pytest

from bitfront import tomlfile
from bitfront.config import from_document
from bitfront.errors import ConfigError

OLDER = """\
batch_size = 32
[search_space]
style = "mixed_precision"
name = "integer"
data_in_width = [2, 4]

[strategy]
name = "optuna"
num_batches = 10
data_loader = "val_dataloader"
runner = "module"
[strategy.setup]
n_trials = 10
sampler = "TPE"
model_parallel = false

[runner]
name = "mg"
num_batches = 3
"""
NAMED = """\
[search.strategy]
sw_runner = "basic_evaluation"
hw_runner = "average_bitwidth"
num_samples = 256
[search.search_space.setup]
accelerator = "cpu"
"""
FORMATS = """\
[default]
name = "integer"
weight_width = 8
[linear]
name = "integer"
weight_width = 4
"""


def parsed(text, **overrides):
    return from_document(tomlfile.parse(text, "f.toml"), overrides)


def test_tables_of_a_search_at_the_top():
    config = parsed(OLDER)
    assert config.search is not None
    space, strategy = config.search.search_space, config.search.strategy
    assert space.name == "graph/quantize/mixed_precision_ptq"
    assert space.seed["default"].config == {"name": ["integer"], "data_in_width": [2, 4]}
    assert strategy.setup.n_trials == 10
    assert strategy.sw_runner == {"basic_evaluation": {"num_samples": 96, "data_loader": "val_dataloader"}}
    assert set(strategy.metrics) == {"accuracy", "average_bitwidth"}
    assert config.notes == (
        "f.toml: [search_space], [strategy], [runner] at the top: read as the tables of [search]",
        "f.toml: the choices of [search_space] are those of every layer, seed.default",
        "f.toml: runner, model_parallel of these tables: no effect here",
        "f.toml: no metrics are named: accuracy and average_bitwidth are the objectives",
    )
    with pytest.raises(ConfigError, match=r"^f.toml:13: search.strategy.setup.n_trials: 0 is not possible"):
        parsed(OLDER.replace("n_trials = 10", "n_trials = 0"))
    with pytest.raises(ConfigError, match=r"^f.toml:3: search_space.style: 'llm_mixed_precision' is a space of MASE"):
        parsed(OLDER.replace("mixed_precision", "llm_mixed_precision"))


def test_choices_may_stand_in_a_table_below():
    text = OLDER.replace('name = "integer"\ndata', '[search_space.quantization]\nby = "type"\nname = ["integer"]\ndata')
    config = parsed(text)
    assert config.search is not None
    assert config.search.search_space.setup.by == "type"
    assert config.search.search_space.seed["default"].config == {"name": ["integer"], "data_in_width": [2, 4]}


def test_runners_by_name_and_an_accelerator_in_a_table():
    config = parsed(NAMED)
    assert config.search is not None
    assert config.search.strategy.sw_runner == {"basic_evaluation": {"num_samples": 256}}
    assert config.search.strategy.hw_runner == {"average_bitwidth": {}}
    assert config.accelerator == "cpu"
    assert len(config.notes) == 3
    assert parsed('accelerator = "mps"\n' + NAMED).notes[-1].endswith("no effect, that at the top is 'mps'")


def test_formats_at_the_top_are_the_quantize_pass():
    config = parsed(FORMATS)
    linear = {"config": {"name": "integer", "weight_width": 4}}
    default = {"config": {"name": "integer", "weight_width": 8}}
    assert config.passes == {"quantize": {"by": "type", "default": default, "linear": linear}}
    changed = '[default]\nname = "integer"\nweight_width = 8\n[module_classes_to_modify.linear]\nname = "default"\n'
    na = {"config": {"name": "NA"}}
    assert parsed(changed).passes == {"quantize": {"by": "type", "default": na, "linear": default}}
    with pytest.raises(ConfigError, match=r"^f.toml:1: linear: unknown key"):
        parsed(FORMATS[FORMATS.index("[linear]") :])


def test_checkpoints_that_only_others_open_are_refused_with_the_way():
    with pytest.raises(ConfigError, match=r"^f.toml:2: load_type: 'mz' is not possible: .*load_type = 'pt'"):
        parsed("load_name = 'x.mz'\nload_type = 'mz'")
    with pytest.raises(ConfigError, match=r"^load_type: 'hf' is not possible: .*model = 'hf:FOLDER'"):
        parsed("load_name = 'x'", load_type="hf")
    assert parsed("load_type = 'mz'").notes == ("load_type = 'mz' has no effect: there is no load_name",)
    assert parsed("load_type = 'mz'\nload_name = 'x.pt'", load_type="pl").load_type == "pl"


def test_keys_without_effect_may_be_flags():
    assert parsed("", num_workers=3).notes == ("num_workers has no effect here",)
