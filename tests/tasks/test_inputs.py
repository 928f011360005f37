"""Models with several inputs by name, and with several outputs: packed, unpacked, searched, the same as alone."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
import libraries
from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.packing import packed
from bitfront.errors import CaptureError, ConfigError, DataError
from bitfront.tasks.adapting import adapted

rng = np.random.default_rng(0)
IDS = rng.integers(0, 30, size=(120, 8))
MASK = rng.random((120, 8)) < 0.8
EXTRA = rng.normal(size=(120, 2, 3)).astype(np.float32)
LABELS = ((IDS * MASK).sum(axis=1) > 90).astype(int)
X = {"input_ids": IDS, "attention_mask": MASK, "extra": EXTRA}


class Several(nn.Module):
    """Takes three inputs of three dtypes; returns a mapping."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(30, 8), nn.Linear(14, 2)

    def forward(self, input_ids, extra, attention_mask=None):
        hidden = self.embedding(input_ids) * attention_mask.unsqueeze(2)
        return {"hidden": hidden, "logits": self.fc(torch.cat([hidden.sum(1), extra.flatten(1)], dim=1))}


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.fc, self.what = nn.Linear(4, 3), what

    def forward(self, x):
        return self.what(self.fc(x))


def test_inputs_come_back_as_they_were():
    rows, layout = packed({None: X})
    assert rows[None].dtype == np.float64
    back = {one.name: one.unpacked(torch.from_numpy(rows[None])) for one in layout}
    assert back["input_ids"].dtype == torch.int64
    assert back["attention_mask"].dtype == torch.bool
    assert back["extra"].dtype == torch.float32
    for name, array in X.items():
        assert np.array_equal(back[name].numpy(), array), name


def test_a_dataset_of_several_inputs():
    data = from_arrays(X, LABELS)
    assert data.model_shape == {"input_ids": (8,), "attention_mask": (8,), "extra": (2, 3)}
    assert pickle.loads(pickle.dumps(data)).fingerprint == data.fingerprint  # noqa: S301
    # Other names are other data, although the numbers are the same.
    renamed = {"input_ids": IDS, "attention_mask": MASK, "more": EXTRA}
    assert from_arrays(renamed, LABELS).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({}, "x is an empty mapping"),
        ({"ids": IDS, "mask": MASK[:5]}, "different numbers of samples"),
        ({"ids": IDS * 2**55}, "integers of inputs may go up to"),
        ({"ids": np.array(["a"] * 120)}, "needed are numbers"),
        ({"x": np.full((120, 2), np.inf)}, "not finite"),
    ],
)
def test_inputs_that_cannot_be_packed_are_named(x, message):
    with pytest.raises(DataError, match=message):
        from_arrays(x, LABELS)


def test_splits_must_have_the_same_inputs():
    half = {name: array[60:] for name, array in X.items()}
    with pytest.raises(DataError, match="every split needs the same"):
        from_splits({"train": (X, LABELS), "test": ({**half, "extra": half["extra"][:, :1]}, LABELS[60:])})
    with pytest.raises(DataError, match="x of train is a mapping, and that of other splits is not"):
        from_splits({"train": (X, LABELS), "test": (half["extra"], LABELS[60:])})


@pytest.mark.parametrize(
    ("what", "output", "picked"),
    [
        (lambda y: y, None, lambda y: y),
        (lambda y: (y, y + 1), 1, lambda y: y + 1),
        (lambda y: {"aux": y, "out": 2 * y}, None, lambda y: 2 * y),
        (lambda y: {"aux": y, "out": 2 * y}, "aux", lambda y: y),
        (lambda y: [y], None, lambda y: y),
        (lambda y: y[:, 0], None, lambda y: y[:, :1]),
        (lambda y: {"value": y[:, 1], "count": 3}, None, lambda y: y[:, 1:2]),
    ],
)
def test_the_output_is_picked(what, output, picked):
    torch.manual_seed(0)
    model, x = Returns(what), torch.randn(5, 4)
    found = adapted(model, x, output=output)
    assert torch.equal(found(x), picked(model.fc(x)))
    assert found.state_dict().keys() == model.state_dict().keys()
    assert found.training
    assert not model._forward_hooks
    # A model that returns one tensor with a row per sample is not even copied.
    assert (found is model) == (isinstance(model(x), torch.Tensor) and model(x).ndim == 2)


def test_an_output_that_is_not_clear_must_be_named():
    model, x = Returns(lambda y: {"first": y, "second": y, "third": 1}), torch.randn(5, 4)
    with pytest.raises(ConfigError, match=r"several outputs \(first, second\); say which .* output = 'first'"):
        adapted(model, x)
    with pytest.raises(ConfigError, match=r"no output 'secnd'; allowed: first, second. Did you mean 'second'"):
        adapted(model, x, output="secnd")
    with pytest.raises(ConfigError, match="returns one tensor"):
        adapted(Returns(lambda y: y), x, output=0)
    with pytest.raises(CaptureError, match="without a tensor that has a row per sample"):
        adapted(Returns(lambda y: {"loss": y.sum()}), x)
    rows, layout = packed({None: X})
    with pytest.raises(CaptureError, match=r"fails on its inputs input_ids \(2, 8\) torch.int64, .*unexpected keyword"):
        adapted(Returns(lambda y: y), torch.from_numpy(rows[None][:2]), layout)


SPACE = {"linear": {"name": "integer", "data_in_width": [4, 8], "weight_width": [3, 8], "bias_width": [8]}}


def searched(model, x, y, folder, quality, **more):
    found = {quality: {}, "average_bitwidth": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        run = bf.search(
            model=model, data=(x, y), space=SPACE, metrics=found, project_dir=str(folder), project="run", **more
        )
    data = from_arrays(x, y, targets="tokens" if "task" in more else "classes")
    for trial in run.front:
        rebuilt = bf.transform_trial(folder / "run", trial.number, check=True, data=data, model=model)
        measured = rebuilt.evaluation.values
        assert measured == {name: trial.metrics[name] for name in measured}
    return run, rebuilt


def test_a_traced_model_with_three_inputs(tmp_path):
    torch.manual_seed(0)
    model = Several().eval()
    run, rebuilt = searched(model, X, LABELS, tmp_path, "accuracy", strategy="brute_force")
    assert not any("cannot trace" in note for note in run.notes)
    assert len(run) == 4
    # What was rebuilt is called as the user's model is.
    few = {name: torch.from_numpy(array[:3]) for name, array in X.items()}
    assert rebuilt.model(**few).shape == rebuilt.model(few).shape == (3, 2)
    # The float model of the search is the user's, to the bit.
    data = from_arrays(X, LABELS)
    val = {one.name: one.unpacked(data.x["val"]) for one in data.inputs}
    right = (model(**val)["logits"].argmax(1) == data.y["val"]).float().mean()
    assert run.reference["accuracy"] == pytest.approx(float(right))


def test_candidates_of_such_a_model_are_trained(tmp_path):
    torch.manual_seed(0)
    runner = {"sw_runner": {"basic_evaluation": {}, "basic_train": {"max_epochs": 1}}}
    strategy = {"name": "brute_force", **runner}
    run, _ = searched(Several().eval(), X, LABELS, tmp_path, "accuracy", strategy=strategy)
    assert set(run.columns.metrics["trained_epochs"]) == {1.0}


def test_learned_bits_are_refused_with_several_inputs(tmp_path):
    with pytest.raises(ConfigError, match=r"networks with one input, and the data has several .input_ids"):
        bf.search(
            model=Several().eval(),
            data=(X, LABELS),
            strategy="learned_bits",
            metrics=["accuracy", "ebops"],
            project_dir=str(tmp_path),
        )


def library():
    libraries.torchvision()  # transformers asks for it
    return pytest.importorskip("transformers", exc_type=ModuleNotFoundError)


@pytest.mark.slow
def test_bert_with_a_mask(tmp_path):
    transformers = library()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=30, num_labels=2, max_position_embeddings=16, **sizes)
    x = {"input_ids": IDS, "attention_mask": MASK.astype(np.int64)}
    model = transformers.BertForSequenceClassification(config).eval()
    searched(model, x, LABELS, tmp_path, "accuracy", strategy="evolution", n_trials=6)


@pytest.mark.slow
def test_gpt2_as_a_language_model(tmp_path):
    transformers = library()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    x, y = {"input_ids": IDS[:, :-1]}, IDS[:, 1:]
    run, _ = searched(model, x, y, tmp_path, "perplexity", task="language_modelling", strategy="evolution", n_trials=6)
    assert all(20 < trial.metrics["perplexity"] < 60 for trial in run.front)
