"""The schema of the TOML: what is wrong is named with its key, its line, what is allowed and the nearest spelling."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bitfront import tomlfile
from bitfront.config import WITHOUT_EFFECT, Config, from_document, load_config, quantize_pass
from bitfront.errors import ConfigError

DATA = Path(os.environ.get("BITFRONT_DATA", Path(__file__).parents[2] / "shared" / "data"))
EXAMPLES = Path(os.environ.get("BITFRONT_SHARED_EXAMPLES", DATA.parent / "examples"))
NAMES = [
    "brute_force_native.toml",
    "channel_multiplier.toml",
    "jsc_new_by_type_brute.toml",
    "unified_metric.toml",
]
SEARCH = """\
model = "jsc-tiny"
[search.search_space]
[search.search_space.seed.default.config]
name = ["NA"]
[search.strategy]
name = "optuna"
[search.strategy.setup]
n_trials = 5
[search.strategy.metrics]
accuracy.scale = 1.0
"""


def parsed(text, **flags):
    return from_document(tomlfile.parse(text, "f.toml"), {k.replace("__", "."): v for k, v in flags.items()})


# --- what is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shared_examples_are_read_and_what_took_effect_can_be_read_again(name, tmp_path):
    if not (EXAMPLES / name).is_file():
        pytest.skip(f"{name} is not beside this checkout")
    config = load_config(EXAMPLES / name)
    raw = tomllib.loads((EXAMPLES / name).read_text())
    assert config.search.search_space.seed["default"].config["name"] == ["NA"]
    assert set(config.search.strategy.metrics) == set(raw["search"]["strategy"]["metrics"])
    assert config.run_name == raw["project"]
    (tmp_path / "config.toml").write_text(tomlfile.dumps(config.effective()))
    again = load_config(tmp_path / "config.toml")
    assert again.model_dump() == config.model_dump()


def test_without_a_file_there_are_defaults_that_can_be_written():
    config = load_config()
    assert config.model_dump() == Config().model_dump()
    assert config.run_folder == Path("runs/digits-cnn-digits").absolute()
    again = from_document(tomlfile.parse(tomlfile.dumps(config.effective()), "x"))
    assert again.model_dump() == config.model_dump()


def test_the_run_name_of_a_users_model_is_a_folders_name():
    assert parsed('model = "pkg/mod:make"\ndataset = "digits"').run_name == "pkg-mod-make-digits"


def test_na_is_none_at_the_top_and_a_choice_inside_of_a_seed():
    config = parsed('project = "NA"\nload_name = "NA"\n' + SEARCH)
    assert config.project is None
    assert config.load_name is None
    assert config.search.search_space.seed["default"].config == {"name": ["NA"]}


def test_the_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_keys_without_effect_are_accepted_and_named(key):
    config = parsed(f"{key} = 3\nseed = 7")
    assert config.notes == (f"f.toml: {key} has no effect here",)
    assert config.seed == 7
    assert not WITHOUT_EFFECT & set(Config.model_fields)


def test_there_are_no_notes_where_there_is_nothing_to_say():
    assert parsed(SEARCH).notes == ()


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 'x'", r"f.toml:1: modle: unknown key; allowed: model, dataset, .*\. Did you mean 'model'\?$"),
        ("\n\nBatch_Size = 3", r"f.toml:3: Batch_Size: unknown key; .*Did you mean 'batch_size'\?"),
        ("xyzzy = 1", r"f.toml:1: xyzzy: unknown key; allowed: [^?]*$"),
        (SEARCH + "[search.stratgy]\n", r"f.toml:11: search.stratgy: unknown key; allowed: search_space, strategy, .*Did you mean 'strategy'"),
        (SEARCH.replace("search_space]", "serach_space]"), r"f.toml:2: search.serach_space: unknown key; .*Did you mean 'search_space'"),
        (SEARCH.replace("accuracy.scale", "accuracy.sclae"), r"f.toml:10: search.strategy.metrics.accuracy.sclae: unknown key; allowed: scale, direction. Did you mean 'scale'"),
        (SEARCH + "[search.search_space.setup]\nbby = 'name'", r"f.toml:12: search.search_space.setup.bby: unknown key; allowed: by.*Did you mean 'by'"),
        (SEARCH + "[search.search_space.seed.linear]\nconfg = {}", r"f.toml:12: search.search_space.seed.linear.confg: unknown key; allowed: config. Did you mean 'config'"),
        (SEARCH + "[search.calibration]\nbias = true", r"f.toml:12: search.calibration.bias: unknown key; allowed: num_samples, bias_correction, batch_norm"),
        (SEARCH + "[search.strategy.hw_runners.x]", r"f.toml:11: search.strategy.hw_runners: unknown key; .*Did you mean 'hw_runner'"),
        ("[passes.quantise]", r"f.toml:1: passes.quantise: there is no pass 'quantise'; allowed: quantize, prune, .*Did you mean 'quantize'"),
    ],
)  # fmt: skip
def test_unknown_keys_at_every_level_are_named_with_the_nearest(text, message):
    with pytest.raises(ConfigError, match=message):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = '3'", r"f.toml:1: seed: '3' is of the wrong type: input should be a valid integer"),
        ("seed = true", r"f.toml:1: seed: True is of the wrong type"),
        ("seed = 1.0", r"f.toml:1: seed: 1.0 is of the wrong type"),
        ("seed = -1", r"f.toml:1: seed: -1 is not possible: input should be greater than or equal to 0"),
        ("model = 3", r"f.toml:1: model: 3 is of the wrong type: input should be a valid string"),
        (
            "search.strategy.name = 'brute_force'\n[search.constraints]\nlut = 5000",
            r'f.toml:3: search.constraints.lut: 5000 is no condition; write it like "<= 5000"',
        ),
        ("learning_rate = 0", r"f.toml:1: learning_rate: 0 is not possible: input should be greater than 0"),
        ("learning_rate = nan", r"f.toml:1: learning_rate: nan is not possible: input should be a finite number"),
        ("weight_decay = inf", r"f.toml:1: weight_decay: inf is not possible"),
        ("accelerator = 'cdua'", r"f.toml:1: accelerator: 'cdua' is not possible; allowed: auto, cpu, gpu, cuda, mps. Did you mean 'cuda'\?"),
        ("training_optimizer = 'adamx'", r"'adamx' is not possible; allowed: adam, adamw, sgd. Did you mean 'adam"),
        ("task = 1", r"f.toml:1: task: 1 is of the wrong type"),
        (SEARCH + "[search.search_space.setup]\nby = 'nmae'", r"f.toml:12: search.search_space.setup.by: 'nmae' is not possible; allowed: name, type, regex_name. Did you mean 'name'"),
        (SEARCH + "[search.calibration]\nnum_samples = 0", r"f.toml:12: search.calibration.num_samples: 0 is not possible: input should be greater"),
        (SEARCH + "[search.calibration]\nbatch_norm = 1", r"f.toml:12: search.calibration.batch_norm: 1 is of the wrong type"),
        (SEARCH + "accuracy.direction = 'up'", r"f.toml:11: search.strategy.metrics.accuracy.direction: 'up' is not possible; allowed: maximize, minimize"),
        (SEARCH.replace("= 5", "= 0"), r"f.toml:8: search.strategy.setup.n_trials: 0 is not possible: input should be greater than or equal to 1"),
        (SEARCH.replace("= 5", "= 5.5"), r"n_trials: 5.5 is of the wrong type"),
        (SEARCH + "[search.search_space.seed]\nlinear = 3", r"f.toml:12: search.search_space.seed.linear: 3 is of the wrong type"),
        (SEARCH + "[search.search_space.seed.linear]\n", r"f.toml:11: search.search_space.seed.linear.config: this key is missing"),
        ("search = 3", r"f.toml:1: search: 3 is of the wrong type"),
        ("[search]\nstrategy = 3", r"f.toml:2: search.strategy: 3 is of the wrong type"),
        ("[search.strategy]\nsetup = 3", r"f.toml:2: search.strategy.setup: 3 is of the wrong type"),
        ("passes = 3", r"f.toml:1: passes: 3 is of the wrong type"),
        ("[search]", r"f.toml:1: search.strategy: this key is missing"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_with_what_is_allowed(text, message):
    with pytest.raises(ConfigError, match=message):
        parsed(text)


def test_of_several_mistakes_the_misspelling_comes_first():
    with pytest.raises(ConfigError, match="serach_space"):
        parsed("seed = -1\n" + SEARCH.replace("search_space]", "serach_space]"))


# --- flags -----------------------------------------------------------------------------------------------------------


def test_flags_override_the_file_and_none_leaves_it_alone():
    config = parsed(SEARCH, seed=9, model=None, search__strategy__setup__n_trials=70)
    assert (config.seed, config.model, config.search.strategy.setup.n_trials) == (9, "jsc-tiny", 70)
    assert config.search.strategy.name == "optuna"


def test_a_wrong_override_is_named_by_its_key_not_as_a_line_of_the_file():
    with pytest.raises(
        ConfigError, match=r"^search.strategy.setup.n_trials: 0 is not possible: input should be greater"
    ) as caught:
        parsed(SEARCH, search__strategy__setup__n_trials=0)
    assert caught.value.file is None
    with pytest.raises(ConfigError, match=r"^accelerator: 'tpu' is not possible; allowed: auto, cpu"):
        parsed("accelerator = 'cpu'", accelerator="tpu")


def test_a_flag_for_a_table_that_is_none_in_the_file_reports_the_file():
    with pytest.raises(ConfigError, match=r"f.toml:1: search: 3 is of the wrong type"):
        parsed("search = 3", search__strategy__setup__n_trials=4)


def test_a_flag_puts_a_wrong_value_of_the_file_right():
    assert parsed("seed = -1", seed=2).seed == 2


# --- errors from further inside, and passes --------------------------------------------------------------------------


def test_errors_of_the_space_are_located_in_the_file():
    config = parsed(SEARCH)
    with (
        pytest.raises(ConfigError, match=r"^f.toml:4: search.search_space.seed.default.config.name: no") as caught,
        config.locating(),
    ):
        raise ConfigError("no", key=("search", "search_space", "seed", "default", "config", "name"))
    # An error that knows its place keeps it.
    with pytest.raises(ConfigError, match=r"^f.toml:4: "), parsed("seed = 1").locating():
        raise caught.value


def test_the_quantize_pass_is_what_stands_in_the_file():
    config = parsed("[passes.quantize]\nby = 'type'\nreport = true\n[passes.quantize.linear.config]\nname = 'integer'")
    assert quantize_pass(config) == {"by": "type", "linear": {"config": {"name": "integer"}}}
    with pytest.raises(ConfigError, match=r"there is no \[passes.quantize\]"):
        quantize_pass(parsed(SEARCH))


@pytest.mark.parametrize(
    "text", ['project = "a\\u0000b"', '"a\\u0000" = 1', 'load_name = "\\u0000"', '[passes.quantize]\nby = "\\u0000"']
)
def test_a_nul_character_is_refused_with_its_place(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"x.toml:\d: .*NUL character"):
        load_config(tmp_path / "x.toml")


@pytest.mark.parametrize(("value", "message"), [("a\0b", "NUL character"), ("\ud800", "cannot be the name of a file")])
def test_so_are_overrides(value, message):
    with pytest.raises(ConfigError, match=f"^project: .*{message}"):
        load_config(None, {"project": value})


def test_a_name_that_the_locale_has_no_letters_for(tmp_path):
    script = (
        "from bitfront.config import load_config\nfrom bitfront.errors import ConfigError\n"
        "try:\n    load_config('x.toml')\nexcept ConfigError as error:\n    print(error)\n"
    )
    (tmp_path / "x.toml").write_text('model = "jsc-tiny"\nproject = "ü"\n', encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(r"x.toml:2: project: '\xfc' cannot be the name of a file in this locale"), done.stderr
    assert "PYTHONUTF8=1" in done.stdout
