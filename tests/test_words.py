"""The words after a subcommand: a file, or a model and a dataset as MASE's command takes them."""

from pathlib import Path

import pytest

from bitfront.cli.named import read_words
from bitfront.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("f.toml").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "option", "file", "overrides", "said"),
    [
        ([], None, None, {}, ""),
        (["f.toml"], None, "f.toml", {}, ""),
        (["no.toml"], None, "no.toml", {}, ""),
        (["jsc_tiny", "jsc"], None, None, {"model": "jsc_tiny", "dataset": "jsc"}, "note: model jsc_tiny, dataset jsc"),
        (["toy"], "f.toml", "f.toml", {"model": "toy"}, "note: model toy"),
        (["toy", "f.toml", "digits"], None, "f.toml", {"model": "toy", "dataset": "digits"}, "note: model toy"),
        (["timm:resnet18"], None, None, {"model": "timm:resnet18"}, "note: model timm:resnet18"),
    ],
)
def test_what_exists_decides(words, option, file, overrides, said, capsys):
    file_read, changed = read_words(words, option and Path(option), {"seed": 1})
    assert (file_read, changed) == (file and Path(file), {"seed": 1, **overrides})
    assert capsys.readouterr().err.startswith(said)


def test_a_file_with_the_name_of_a_model_is_the_file(folder, capsys):
    (folder / "toy").touch()
    assert read_words(["toy"], None, {}) == (Path("toy"), {})
    assert "toy is a file here, and read as the configuration; for the model: --model toy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option", "message"),
    [
        (["f.toml", "g.toml"], None, "two configuration files, f.toml and g.toml"),
        (["f.toml"], "g.toml", "two configuration files, f.toml and --config g.toml"),
        (["jsc-tinny"], None, "jsc-tinny: there is no such file, and no model of that name.*Did you mean 'jsc-tiny'"),
        (["toy", "jsc", "more"], None, "too many words"),
        (["toy", "digits"], None, "two datasets, digits and --dataset jsc"),
    ],
)
def test_words_that_cannot_be_read(words, option, message):
    with pytest.raises(ConfigError, match=message):
        read_words(words, option and Path(option), {"dataset": "jsc"})
