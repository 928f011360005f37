"""Settings of strategies: from the TOML and from Python, in errors, notes, lists and the identity of a run folder."""

import numpy as np
import pytest
from pydantic import Field

import bitfront as bf
from bitfront import api, listing, tomlfile
from bitfront.config import from_document
from bitfront.engine.planning.builder import make_plan
from bitfront.errors import ConfigError
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import Knowledge, Strategy, StrategySettings
from bitfront.strategies.configured import configured_strategy, with_variant, without_effect
from bitfront.testing.strategies import check_strategy

TOML = """\
model = "digits-mlp"
[search.search_space]
setup.by = "type"
[search.search_space.seed.linear.config]
name = ["integer"]
weight_width = [2, 4, 8]
[search.strategy]
name = "{name}"
[search.strategy.setup]
{setup}
[search.strategy.hw_runner.average_bitwidth]
[search.strategy.metrics]
average_bitwidth.direction = "minimize"
"""


class StridesSettings(StrategySettings):
    """``[search.strategy.setup]`` of ``strides``."""

    stride: int = Field(3, ge=1, description="from one candidate to the next")


class Strides(Strategy):
    """Every n-th candidate."""

    Settings = StridesSettings
    settings: StridesSettings

    def propose(self, history, n, rng):
        every = self.space.numbered(0, self.space.size)
        fresh = history.fresh(np.concatenate([every[:: self.settings.stride], every]))
        return fresh[:n]


@pytest.fixture(autouse=True)
def _registered():
    STRATEGIES.names()  # those of the package are loaded
    members, aliases = dict(STRATEGIES._members), dict(STRATEGIES._aliases)
    STRATEGIES.register("strides")(Strides)
    yield
    STRATEGIES._members, STRATEGIES._aliases = members, aliases


def plan(name, setup="", **overrides):
    document = tomlfile.parse(TOML.format(name=name, setup=setup), "f.toml")
    given = {f"search.strategy.setup.{k}": v for k, v in overrides.items()}
    return make_plan(from_document(document, given))


# --- a user's strategy -----------------------------------------------------------------------------------------------


def test_a_strategy_in_one_file_with_one_setting_conforms():
    check_strategy(Strides, seeded=False, stateless=True)
    check_strategy(
        lambda space, objectives, seed: Strides(space, objectives, seed, StridesSettings(stride=2)),
        seeded=False,
        stateless=True,
    )


def test_its_setting_comes_from_the_file_from_python_and_from_overrides():
    assert plan("strides").make_strategy(Knowledge()).settings.stride == 3
    assert plan("strides", "stride = 7").make_strategy(Knowledge()).settings.stride == 7
    assert plan("strides", "stride = 7", stride=2).make_strategy(Knowledge()).settings.stride == 2
    search = {"model": "digits-mlp", "data": "digits", "metrics": {"average_bitwidth": "minimize"}, "max_epochs": 1}
    space = {"linear": {"name": ["integer"], "weight_width": [2, 4, 8]}}
    for more in ({"strategy": {"name": "strides", "setup": {"stride": 5}}}, {"strategy": "strides", "stride": 5}):
        config = api._configured(
            None, search["model"], search["data"], space, search["metrics"], more.pop("strategy"), more
        )
        assert make_plan(config).strategy.settings == StridesSettings(stride=5)


def test_a_search_uses_it(tmp_path):
    run = bf.search(
        model="digits-mlp", data="digits", space={"linear": {"name": ["integer"], "weight_width": [2, 3, 4, 6, 8]}},
        metrics={"average_bitwidth": "minimize"}, strategy="strides", stride=4, n_trials=12, max_epochs=1,
        project_dir=str(tmp_path), accelerator="cpu",
    )  # fmt: skip
    first = run.columns.code[5:, :].tolist()  # behind the uniform ones
    assert first[:2] == [[0, 4], [1, 3]]
    assert run.config.search.strategy.setup.of_strategy == {"stride": 4}
    with pytest.raises(
        bf.UserError, match=r'strategy_settings: it has {"stride": 4}, requested is nothing, or the default'
    ):
        bf.search(run.config, stride=3)


def test_mistakes_name_file_line_key_and_the_nearest_spelling():
    with pytest.raises(ConfigError) as caught:
        plan("strides", "n_jobs = 1\nstrid = 2")
    assert str(caught.value).startswith(
        "f.toml:11: search.strategy.setup.strid: unknown key; allowed: n_jobs, n_trials, "
    )
    assert str(caught.value).endswith("save_every_n_trials, stride. Did you mean 'stride'?")
    with pytest.raises(ConfigError, match=r"^f.toml:10: search.strategy.setup.stride: 0 is not possible: input should"):
        plan("strides", "stride = 0")
    with pytest.raises(ConfigError, match=r"^f.toml:10: search.strategy.setup.stride: 'two' is of the wrong type"):
        plan("strides", "stride = 'two'")
    with pytest.raises(ConfigError, match=r"^search.strategy.setup.stride: 0 is not possible"):
        plan("strides", stride=0)


def test_it_is_listed_with_its_settings():
    columns, rows = listing.members("strategies")
    assert columns[-1] == "settings in [search.strategy.setup]"
    assert ("strides", "Every n-th candidate.", "stride") in rows
    assert {row[0]: row[-1] for row in rows}["brute_force"] == "max_size"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"timeout": (int, Field(3, description="x"))}, "timeout: a key that every search has"),
        ({"stride": (int, Field(description="x"))}, "stride needs a default"),
        ({"stride": (int, Field(3))}, "stride needs a description"),
    ],
)
def test_the_conformance_suite_looks_at_settings(field, message):
    from pydantic import create_model

    class Wrong(Strides):
        Settings = create_model("Wrong", __base__=StrategySettings, **field)

        def __init__(self, space, objectives, seed):
            super().__init__(space, objectives, seed, StridesSettings())

    with pytest.raises(AssertionError, match=message):
        check_strategy(Wrong)


# --- those that there are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setup", "title", "identity"),
    [
        ("evolution", "", "evolution", {"strategy": "evolution", "sampler": None}),
        ("brute", "max_size = 10", "brute_force", {"strategy": "brute_force", "sampler": None}),
        ("optuna", "", "optuna:tpe", {"strategy": "optuna", "sampler": "tpe"}),
        ("optuna", "sampler = 'NSGA-II'", "optuna:nsgaii", {"strategy": "optuna", "sampler": "nsgaii"}),
        ("optuna:random", "", "optuna:random", {"strategy": "optuna", "sampler": "random"}),
        ("optuna", "sampler = 'brute'", "brute_force", {"strategy": "brute_force", "sampler": None}),
        ("brute_force", "sampler = 'brute'", "brute_force", {"strategy": "brute_force", "sampler": None}),
        ("strides", "", "strides", {"strategy": "strides", "sampler": None}),
        (
            "strides",
            "stride = 4",
            "strides",
            {"strategy": "strides", "sampler": None, "strategy_settings": {"stride": 4}},
        ),
    ],
)
def test_what_a_run_folder_is_known_by(name, setup, title, identity):
    strategy = configured_strategy(name, tomlfile.parse(setup, "f.toml").values)
    assert strategy.title == title
    assert strategy.identity == identity


def test_a_setting_of_another_strategy_is_said_to_have_no_effect():
    assert "setup.stride has no effect: it is a setting of strides" in plan("evolution", "stride = 4").notes
    assert not [
        n for n in plan("evolution", "max_size = 1000000").notes if "max_size" in n
    ]  # as folders of old have it
    assert without_effect(configured_strategy("evolution"), {"max_size": 5}) == [
        "setup.max_size has no effect: it is a setting of brute_force"
    ]
    with pytest.raises(
        ConfigError, match=r"f.toml:10: .*sampler: a sampler belongs to strategy 'optuna', and this one"
    ):
        plan("evolution", "sampler = 'tpe'")


def test_variants_stand_behind_a_colon():
    assert with_variant("optuna:tpe") == ("optuna", {"sampler": "tpe"})
    assert with_variant("evolution") == ("evolution", {})
    assert with_variant("nobody:tpe") == ("nobody:tpe", {})
    with pytest.raises(ConfigError, match=r"'evolution' has no variants, .* strategies with variants: .*optuna"):
        with_variant("evolution:tpe")
    with pytest.raises(ConfigError, match=r"'gp' is a sampler of strategy 'optuna'; write optuna:gp"):
        configured_strategy("gp")


def test_a_strategy_beside_the_file_takes_the_place_of_its_sampler():
    values = {"model": "jsc-tiny", "dataset": "jsc", "search": {"strategy": {"setup": {"sampler": "tpe"}}}}
    document = tomlfile.Document("f.toml", values)
    assert from_document(document).search.strategy.name == "optuna"
    config = from_document(document, {"search.strategy.name": "surrogate"})
    assert config.search.strategy.setup.of_strategy == {}
    assert config.notes == ("strategy surrogate takes the place of the file's sampler 'tpe'",)
    kept = from_document(document, {"search.strategy.name": "optuna"})
    assert kept.search.strategy.setup.of_strategy == {"sampler": "tpe"}


def test_one_file_serves_learned_bits_and_other_strategies():
    setup = {"weight": "layer", "weight_width": [4, 8]}
    strategy = configured_strategy("surrogate", setup)
    assert strategy.title == "surrogate"
    assert any("weight" in note for note in without_effect(strategy, setup))
    assert configured_strategy("learned_bits", setup).title == "learned_bits:layer"
    assert configured_strategy("learned_bits:channel", setup).title == "learned_bits:channel"
