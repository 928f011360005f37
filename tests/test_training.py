"""The training loop: it learns, it repeats itself bit for bit, it stops when asked."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from bitfront.errors import ConfigError, DataError, EvaluationError
from bitfront.models.base import build_model
from bitfront.scoring import evaluate
from bitfront.training import TrainSettings, train


def dataset(x, y, val=None, num_classes=None):
    """What training needs of a Dataset."""
    splits = {"train": (x, y), "val": val if val is not None else (x, y)}
    return SimpleNamespace(
        name="synthetic", mapped=False, split=splits.__getitem__, num_classes=num_classes or int(y.max()) + 1
    )


@pytest.fixture(scope="module")
def digits():
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return dataset(x[:1300], y[:1300], (x[1300:], y[1300:]))


@pytest.fixture
def blobs():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(300) % 5
    x = torch.randn(5, 16, generator=generator)[y] * 2 + torch.randn(300, 16, generator=generator)
    return dataset(x[:200], y[:200], (x[200:], y[200:]))


@pytest.fixture
def toy():
    return build_model("jsc-toy", (16,), 5, seed=0)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at_least"), [("digits-cnn", 0.96), ("digits-mlp", 0.93)])
def test_digits_are_learned(digits, name, at_least):
    model = build_model(name, (1, 8, 8), 10, seed=0)
    result = train(model, digits, TrainSettings(max_epochs=15, batch_size=32, learning_rate=4e-3))
    assert result.history[result.best_epoch - 1].val_accuracy >= at_least
    model.load_state_dict(result.best_state)
    val = evaluate(model, *digits.split("val"))
    assert val.accuracy == result.history[result.best_epoch - 1].val_accuracy
    assert val.loss == result.history[result.best_epoch - 1].val_loss


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_same_seed_gives_the_same_bits(blobs, toy, optimizer):
    model = nn.Sequential(toy, nn.Dropout(0.2))
    settings = TrainSettings(max_epochs=3, batch_size=32, optimizer=optimizer, learning_rate=1e-2, seed=4)
    torch.manual_seed(1)
    first = train(model, blobs, settings)
    torch.manual_seed(2)
    second = train(model, blobs, settings)
    assert equal(first.last_state, second.last_state)
    assert equal(first.best_state, second.best_state)
    assert first.history == second.history
    other = train(model, blobs, TrainSettings(**{**vars(settings), "seed": 5}))
    assert not equal(first.last_state, other.last_state)


def test_nothing_outside_changes(blobs, toy):
    toy.seq_blocks[0].eval()
    before, flags = copy.deepcopy(toy.state_dict()), [m.training for m in toy.modules()]
    random = torch.get_rng_state()
    train(toy, blobs, TrainSettings(max_epochs=2))
    assert equal(toy.state_dict(), before)
    assert [m.training for m in toy.modules()] == flags
    assert all(p.grad is None for p in toy.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_results_share_no_tensors(blobs, toy):
    result = train(toy, blobs, TrainSettings(max_epochs=3, learning_rate=0.01))
    assert result.best_epoch == 3
    toy.load_state_dict(result.best_state)
    nn.init.zeros_(toy.seq_blocks[2].weight)
    assert result.best_state["seq_blocks.2.weight"].any()


def test_the_learning_rate_follows_a_cosine_over_the_epochs(blobs, toy):
    result = train(toy, blobs, TrainSettings(max_epochs=4, learning_rate=0.1))
    rates = [record.learning_rate for record in result.history]
    assert rates[0] == 0.1
    assert rates[2] == pytest.approx((0.1 + 1e-6) / 2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=1e-6)
    for rate in rates:
        assert rate == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_best_and_last_belong_to_the_history(blobs, toy):
    result = train(toy, blobs, TrainSettings(max_epochs=12, learning_rate=0.5, batch_size=16))
    losses = [record.val_loss for record in result.history]
    assert result.best_epoch == losses.index(min(losses)) + 1
    assert [r.epoch for r in result.history if r.best][-1] == result.best_epoch
    for state, expected in ((result.best_state, min(losses)), (result.last_state, losses[-1])):
        toy.load_state_dict(state)
        assert evaluate(toy, *blobs.split("val")).loss == expected


def test_early_stopping(blobs, toy):
    hopeless = dataset(*blobs.split("train"), val=(blobs.split("val")[0], (blobs.split("val")[1] + 1) % 5))
    result = train(toy, hopeless, TrainSettings(max_epochs=50, learning_rate=0.05, patience=3))
    assert result.stopped == "patience"
    assert len(result.history) == result.best_epoch + 3 < 50


@pytest.mark.parametrize(("max_steps", "epochs"), [(1, 1), (7, 1), (8, 2), (10, 2), (14, 2)])
def test_max_steps(blobs, toy, max_steps, epochs):
    settings = TrainSettings(max_epochs=9, max_steps=max_steps, batch_size=32)  # 200 samples: 7 steps an epoch
    result = train(toy, blobs, settings)
    assert (result.stopped, result.steps, len(result.history)) == ("max_steps", max_steps, epochs)
    assert result.last_state["seq_blocks.0.num_batches_tracked"] == max_steps


def test_epoch_averages_weigh_each_sample_once(blobs):
    x, y = blobs.split("train")
    frozen = nn.Linear(16, 5)
    settings = TrainSettings(max_epochs=1, learning_rate=1e-30, batch_size=64)  # 64, 64, 64, 8
    record = train(frozen, blobs, settings).history[0]
    reference = evaluate(frozen, x, y)
    assert record.train_loss == pytest.approx(reference.loss, rel=1e-6)
    assert record.train_accuracy == reference.accuracy


def test_a_last_batch_of_one_is_left_out_only_for_batch_norm(blobs, toy):
    x, y = blobs.split("train")
    odd = dataset(x[:65], y[:65], num_classes=5)
    settings = TrainSettings(max_epochs=2, batch_size=32)
    assert train(toy, odd, settings).steps == 4
    assert train(nn.Linear(16, 5), odd, settings).steps == 6
    with pytest.raises(ConfigError, match=r"batch_size = 1 on 65 samples.*BatchNorm"):
        train(toy, odd, TrainSettings(batch_size=1))


def test_divergence_names_epoch_step_and_a_remedy(blobs):
    x, y = blobs.split("train")
    poisoned = x.clone()
    poisoned[17] = math.nan
    with pytest.raises(EvaluationError, match=r"became nan in epoch 1, at step \d of 7\. Try .* 0\.01, .* 0\.001"):
        train(
            nn.Linear(16, 5),
            dataset(poisoned, y, (x, y)),
            TrainSettings(learning_rate=0.01, batch_size=32),
        )
    with pytest.raises(EvaluationError, match="validation loss is nan after epoch 1"):
        train(nn.Linear(16, 5), dataset(x, y, (poisoned, y)), TrainSettings())


def test_an_interrupt_leaves_the_finished_epochs(blobs, toy):
    def interrupt(step, loss):
        if step == 12:
            raise KeyboardInterrupt

    settings = TrainSettings(max_epochs=9, batch_size=32, log_every_n_steps=1)
    result = train(toy, blobs, settings, on_step=interrupt)
    assert (result.stopped, len(result.history), result.best_epoch, result.steps) == ("interrupted", 1, 1, 7)
    one = train(toy, blobs, TrainSettings(max_epochs=9, max_steps=7, batch_size=32))
    assert equal(result.last_state, one.last_state)

    def at_once(step, loss):
        raise KeyboardInterrupt

    nothing = train(toy, blobs, settings, on_step=at_once)
    assert (nothing.stopped, nothing.best_epoch, nothing.history) == ("interrupted", 0, ())
    assert equal(nothing.best_state, toy.state_dict())


def test_callbacks(blobs, toy):
    steps, epochs = [], []
    settings = TrainSettings(max_epochs=3, batch_size=32, log_every_n_steps=5)
    result = train(
        toy,
        blobs,
        settings,
        on_step=lambda step, loss: steps.append((step, loss())),
        on_epoch=epochs.append,
    )
    assert [step for step, _ in steps] == [5, 10, 15, 20]
    assert all(isinstance(loss, float) and math.isfinite(loss) for _, loss in steps)
    assert tuple(epochs) == result.history
    assert equal(result.last_state, train(toy, blobs, settings).last_state)


def test_frozen_parameters_stay(blobs, toy):
    toy.seq_blocks[2].weight.requires_grad_(False)
    state = train(toy, blobs, TrainSettings(max_epochs=1)).last_state
    assert torch.equal(state["seq_blocks.2.weight"], toy.seq_blocks[2].weight)
    assert not torch.equal(state["seq_blocks.5.weight"], toy.seq_blocks[5].weight)
    with pytest.raises(ConfigError, match="no parameter to train"):
        train(toy.requires_grad_(False), blobs, TrainSettings())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_epochs", 0),
        ("max_steps", 0),
        ("max_steps", -2),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -1.0),
        ("patience", 0),
        ("log_every_n_steps", 0),
    ],
)
def test_settings_out_of_range(key, value):
    with pytest.raises(ConfigError, match=rf"{key} = {value!r} is not possible; allowed") as caught:
        TrainSettings(**{key: value})
    assert caught.value.key == (key,)


def test_an_unknown_optimizer():
    with pytest.raises(ConfigError, match=r"'adamm'; allowed: adam, adamw, sgd\. Did you mean 'adam'"):
        TrainSettings(optimizer="adamm")


def test_empty_splits(blobs):
    x, y = blobs.split("train")
    for empty, message in ((dataset(x, y, (x[:0], y[:0])), "the val split of dataset 'synthetic' is empty"),):
        with pytest.raises(DataError, match=message):
            train(nn.Linear(16, 5), empty, TrainSettings())
    with pytest.raises(DataError, match="no samples"):
        evaluate(nn.Linear(16, 5), x[:0], y[:0])


class Returns(nn.Linear):
    def __init__(self, change):
        super().__init__(16, 5)
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


@pytest.mark.parametrize(
    ("change", "output"),
    [
        (lambda logits: logits[:, :3], r"returned a tensor of shape \(\d+, 3\)"),
        (lambda logits: logits.argmax(1), r"returned a tensor of shape \(\d+,\)"),
        (lambda logits: (logits, None), "returned tuple"),
    ],
)
def test_a_model_with_another_output(blobs, change, output):
    with pytest.raises(EvaluationError, match=rf"logits of shape \(128, 5\); it {output}"):
        train(Returns(change), blobs, TrainSettings())
    with pytest.raises(EvaluationError, match=rf"logits of shape \(100, 5\); it {output}"):
        evaluate(Returns(change), *blobs.split("val"))


def test_evaluate_does_not_depend_on_chunks_and_restores_flags(blobs, toy):
    x, y = blobs.split("train")
    toy.seq_blocks[3].eval()
    state, flags = copy.deepcopy(toy.state_dict()), [m.training for m in toy.modules()]
    whole = evaluate(toy, x, y)
    for batch_size in (1, 7, 64, 200):
        part = evaluate(toy, x, y, batch_size=batch_size)
        assert part.loss == pytest.approx(whole.loss, rel=1e-6)
        assert (part.correct, part.samples) == (whole.correct, 200)
    assert equal(toy.state_dict(), state)
    assert [m.training for m in toy.modules()] == flags
    toy.eval()
    logits = toy(x)
    assert whole.loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-6)
    assert whole.accuracy == (logits.argmax(1) == y).sum().item() / 200


def test_evaluate_restores_flags_after_an_error(blobs, toy):
    with pytest.raises(RuntimeError):
        evaluate(toy, torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    assert toy.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu(digits):
    model = build_model("digits-cnn", (1, 8, 8), 10, seed=0)
    before = torch.cuda.get_rng_state()
    result = train(model, digits, TrainSettings(max_epochs=15, batch_size=32, learning_rate=4e-3), device="cuda")
    assert result.history[result.best_epoch - 1].val_accuracy >= 0.96
    assert all(value.device.type == "cpu" for value in result.best_state.values())
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_gradients_of_several_batches_are_one_step(blobs):
    """Batches of 40 in steps of 2 are batches of 80, with the same order, where no batch norm sees the batch."""
    model = build_model("digits-mlp", (16,), 5, seed=0)
    common = {"max_epochs": 2, "learning_rate": 0.1, "optimizer": "sgd"}
    halves = train(model, blobs, TrainSettings(batch_size=40, accumulation=2, **common))
    whole = train(model, blobs, TrainSettings(batch_size=80, **common))
    single = train(model, blobs, TrainSettings(batch_size=40, **common))
    assert (halves.steps, whole.steps, single.steps) == (6, 6, 10)  # of 200 samples the last step of an epoch has 40
    for key, value in whole.last_state.items():
        torch.testing.assert_close(halves.last_state[key], value)
    assert not torch.allclose(single.last_state["fc1.weight"], whole.last_state["fc1.weight"], atol=1e-4)


def test_a_scheduler_sets_the_rate_of_every_step(blobs, toy):
    settings = TrainSettings(max_epochs=2, batch_size=50, learning_rate=0.1, scheduler="linear", warmup_steps=4)
    result = train(toy, blobs, settings)
    assert [record.learning_rate for record in result.history] == pytest.approx([0.075, 0.025])  # of the last steps
    never = train(toy, blobs, TrainSettings(max_epochs=1, batch_size=50, scheduler="linear", warmup_steps=10**9))
    assert torch.allclose(never.last_state["seq_blocks.2.weight"], toy.state_dict()["seq_blocks.2.weight"], atol=1e-9)
    assert settings.why_plain == "the learning rate changes with every step (lr_scheduler = 'linear')"
    assert TrainSettings(accumulation=3).why_plain == "each step is of 3 batches"
