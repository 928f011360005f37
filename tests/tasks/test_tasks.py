"""Tasks: the conformance suite, and each metric against an independent implementation."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn import metrics as independent

import bitfront as bf
from bitfront import scoring
from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.targets import CLASSES, NUMBERS, targets_named
from bitfront.errors import ConfigError, DataError, EvaluationError
from bitfront.scoring import Tally, evaluate, measure
from bitfront.tasks import TASKS
from bitfront.tasks.base import TaskMetric, mean
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.tasks.configured import named_task
from bitfront.testing import check_task
from bitfront.testing import tasks as suite

generator = torch.Generator().manual_seed(0)
NUMBERS_WANTED = torch.randn(60, 3, generator=generator) + torch.tensor([0.0, 5.0, -1000.0])
NUMBERS_GIVEN = NUMBERS_WANTED + 0.3 * torch.randn(60, 3, generator=generator)
LABELS = torch.randint(0, 5, (60,), generator=generator)
LOGITS = torch.randn(60, 5, generator=generator)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_regression_conforms(loss):
    values = check_task("regression", {"loss": loss}, NUMBERS_GIVEN, NUMBERS_WANTED)
    wanted, given = NUMBERS_WANTED.double().numpy(), NUMBERS_GIVEN.double().numpy()
    assert values["mse"] == pytest.approx(independent.mean_squared_error(wanted, given), rel=1e-12)
    assert values["mae"] == pytest.approx(independent.mean_absolute_error(wanted, given), rel=1e-12)
    # One output is at −1000: its variance must not be lost.
    assert values["r2"] == pytest.approx(independent.r2_score(wanted, given), rel=1e-9)
    if loss != "huber":
        assert values["loss"] == values[loss]


def test_classification_conforms_and_is_what_the_compiled_scoring_says():
    values = check_task("classification", {}, LOGITS, LABELS)
    compiled = evaluate(torch.nn.Identity(), LOGITS, LABELS)
    assert values == pytest.approx({"loss": compiled.loss, "accuracy": compiled.accuracy}, rel=1e-12)


def test_every_task_of_bitfront_is_registered_and_documented():
    names = {"anomaly_detection", "classification", "language_modelling", "multilabel", "regression", "segmentation"}
    assert names <= set(TASKS.names())
    assert all(text for _, text in TASKS.described())


def test_a_tally_in_chunks_is_the_whole_to_the_bit():
    for task, x, y in (
        (CLASSIFICATION, LOGITS, LABELS),
        (named_task("regression"), NUMBERS_GIVEN, NUMBERS_WANTED),
    ):
        whole = measure(task, torch.nn.Identity(), x, y, batch_size=7)
        tally = Tally(task, "logits", 5)
        for given, targets in zip(x.split(7), y.split(7), strict=True):
            tally.add(given, targets)
        assert tally.evaluation().values == whole.values


def test_outputs_that_do_not_fit_are_named():
    task = named_task("regression")
    with pytest.raises(EvaluationError, match=r"returned a tensor of shape \(60, 3\) for 60 samples; one number per"):
        measure(task, torch.nn.Identity(), NUMBERS_GIVEN, NUMBERS_WANTED[:, :2])
    with pytest.raises(DataError, match="no samples"):
        measure(task, torch.nn.Identity(), NUMBERS_GIVEN[:0], NUMBERS_WANTED[:0])


def test_a_constant_target_has_no_r2_and_an_unknown_task_is_refused():
    task = named_task("regression")
    constant = measure(task, torch.nn.Identity(), torch.zeros(9, 1), torch.ones(9, 1))
    assert np.isnan(constant.metrics["r2"])
    assert constant.metrics["mse"] == 1.0
    for name, settings, message in (
        ("regresion", {}, "Did you mean 'regression'"),
        ("regression", {"los": "mse"}, "Did you mean 'loss'"),
        ("regression", {"loss": "rmse"}, "'mse', 'mae', 'huber'|allowed: mse, mae, huber"),
        ("bitfront.scoring:evaluate", {}, "the factory bitfront.scoring:evaluate of the task failed"),
        ("bitfront.errors:ConfigError", {}, "failed|extends bitfront.tasks.base.Task"),
    ):
        with pytest.raises(ConfigError, match=message):
            named_task(name, settings)


def test_targets_have_names():
    assert targets_named("numbers") is NUMBERS
    assert targets_named(CLASSES) is CLASSES
    with pytest.raises(DataError, match="allowed: classes, numbers, labels, masks, tokens, anomalies, outputs"):
        targets_named("number of things")


class Broken(type(named_task("regression"))):
    """A regression that is wrong in one way."""

    def results(self, outputs, targets, ends):
        found = dict(super().results(outputs, targets, ends))
        found["squared"] = found["squared"] / found["squared"].max()  # depends on the batch
        return found


def test_the_suite_finds_a_result_that_depends_on_the_batch():
    task = Broken(named_task("regression").settings)
    suite.pickle.dumps(task)
    with pytest.raises(AssertionError, match="squared of a sample depends on its batch"):
        check_task(task, {}, NUMBERS_GIVEN, NUMBERS_WANTED)


THERE = (torch.rand(60, 4, generator=generator) < torch.tensor([0.5, 0.2, 0.1, 0.0])).float()
THOUGHT = 2 * THERE - 1 + torch.randn(60, 4, generator=generator)


@pytest.mark.parametrize("ends", ["logits", "class_probabilities", "class_log_probabilities"])
def test_multilabel_conforms(ends):
    outputs = {"logits": THOUGHT, "class_probabilities": THOUGHT.sigmoid()}.get(ends, THOUGHT.sigmoid().log())
    values = check_task("multilabel", {}, outputs, THERE, ends)
    there, given = THERE.numpy(), (THOUGHT > 0).numpy()
    for average in ("micro", "macro"):
        theirs = independent.f1_score(there, given, average=average, zero_division=0)
        assert values[f"{average}_f1"] == pytest.approx(theirs, rel=1e-12)
    theirs = np.mean([independent.roc_auc_score(there[:, i], THOUGHT[:, i]) for i in range(3)])  # nobody has the fourth
    assert values["auc"] == pytest.approx(theirs, rel=1e-6)
    assert values["exact_match"] == pytest.approx(independent.accuracy_score(there, given))
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(THOUGHT.double(), THERE.double())
    assert values["loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_labels_have_a_threshold_and_a_weight():
    few = check_task("multilabel", {"threshold": 0.9}, THOUGHT, THERE)
    assert few["micro_f1"] < check_task("multilabel", {"threshold": 0.5}, THOUGHT, THERE)["micro_f1"]
    weighted = named_task("multilabel", {"positive_weight": 3.0})
    expected = -(3 * THERE * THOUGHT.sigmoid().log() + (1 - THERE) * (-THOUGHT).sigmoid().log()).mean()
    for outputs, ends in ((THOUGHT, "logits"), (THOUGHT.sigmoid(), "class_probabilities")):
        assert torch.isclose(weighted.training_loss(outputs, THERE, ends), expected, rtol=1e-5)
    # A network that is not a number in one output has no F1.
    broken = THOUGHT.clone()
    broken[7, 2] = torch.nan
    metrics = measure(weighted, torch.nn.Identity(), broken, THERE).metrics
    assert all(np.isnan(value) for value in metrics.values())


def test_labels_are_read_and_refused():
    x = np.random.default_rng(0).normal(size=(40, 3))
    data = from_arrays(x, (x > 0).astype(int), targets="labels", class_names=["a", "b", "c"])
    assert data.num_classes == 3
    assert data.y["train"].dtype == torch.float32
    for y, names, message in (
        (2 * (x > 0), (), "allowed: 1 for a label, 0 for none"),
        (x[:, 0] > 0, (), r"needed are numbers \(samples, labels\)"),
        (x > 0, ("a", "b"), "2 names for 3 labels"),
    ):
        with pytest.raises(DataError, match=message):
            from_arrays(x, y, targets="labels", class_names=names)
    with pytest.raises(DataError, match="differ in their number of labels"):
        from_splits({"train": (x, x > 0), "test": (x + 1, x[:, :2] > 0)}, targets="labels")


def test_numbers_are_read_and_refused():
    x = np.random.default_rng(0).normal(size=(40, 3))
    assert from_arrays(x, x[:, 0], targets="numbers").y["train"].shape == (28, 1)
    for y, names, message in (
        (np.array(["a"] * 40), (), "a regression needs real numbers"),
        (np.where(x > 2, np.nan, x), (), "only finite numbers"),
        (x[:, :, None], (), r"needed are numbers \(samples,\) or \(samples, outputs\)"),
        (x, ("a", "b"), "2 names for 3 outputs"),
    ):
        with pytest.raises(DataError, match=message):
            from_arrays(x, y, targets="numbers", class_names=names)


MASK = torch.randint(-1, 4, (12, 5, 7), generator=generator)
PIXELS = torch.randn(12, 5, 5, 7, generator=generator)  # the fifth class is nowhere there
PIXELS += 2 * torch.nn.functional.one_hot(MASK.clamp(min=0), 5).permute(0, 3, 1, 2)
PIXELS[:, 4] -= 100.0
MASK = torch.where(MASK < 0, -100, MASK)


@pytest.mark.parametrize("ends", ["logits", "probabilities", "log_probabilities"])
def test_segmentation_conforms(ends):
    outputs = {"logits": PIXELS, "probabilities": PIXELS.softmax(1)}.get(ends, PIXELS.log_softmax(1))
    values = check_task("segmentation", {}, outputs, MASK, ends)
    labelled = MASK != -100
    there, given = MASK[labelled].numpy(), PIXELS.argmax(1)[labelled].numpy()
    assert values["miou"] == pytest.approx(independent.jaccard_score(there, given, average="macro"), rel=1e-12)
    assert values["pixel_accuracy"] == pytest.approx(independent.accuracy_score(there, given), rel=1e-12)
    theirs = torch.nn.functional.cross_entropy(PIXELS.double(), MASK, ignore_index=-100)
    assert values["loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_a_class_can_be_ignored_and_classes_can_have_weights():
    settings = {"ignore_index": 0, "class_weights": [1.0, 2.0, 0.5, 1.0, 1.0], "label_smoothing": 0.1}
    values = check_task("segmentation", settings, PIXELS, MASK)
    kept = MASK > 0
    there, given = MASK[kept].numpy(), PIXELS.argmax(1)[kept].numpy()
    expected = independent.jaccard_score(there, given, labels=[0, 1, 2, 3], average="macro", zero_division=0)
    assert values["miou"] == pytest.approx(expected, rel=1e-12)
    loss = named_task("segmentation", settings).training_loss(PIXELS, MASK, "logits")
    wanted = torch.where(MASK == 0, -100, MASK)
    weight = torch.tensor(settings["class_weights"])
    assert loss == torch.nn.functional.cross_entropy(PIXELS, wanted, weight, label_smoothing=0.1)
    with pytest.raises(EvaluationError, match="class_weights has 2 numbers, and one per class is needed"):
        measure(named_task("segmentation", {"class_weights": [1.0, 2.0]}), torch.nn.Identity(), PIXELS, MASK)


def test_masks_are_read_and_refused():
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 6))
    y = np.random.default_rng(1).integers(0, 3, size=(20, 4, 6)).astype(np.uint8)
    y[:, 0] = 255
    data = from_arrays(x, y[:, None], targets="masks")
    assert data.num_classes == 3
    assert set(data.y["train"].unique().tolist()) == {-100, 0, 1, 2}
    for wrong, names, message in (
        (y.astype(float), (), "needed are whole numbers"),
        (y[:, 0, 0], (), r"needed are whole numbers \(samples, height, width\)"),
        (y.astype(int) - 1, (), "values from -1 to 254"),
        (y, ("a", "b"), "2 class names, and classes go up to 2"),
        (np.full((20, 4, 6), 255), (), "no value with a label"),
    ):
        with pytest.raises(DataError, match=message):
            from_arrays(x, wrong, targets="masks", class_names=names)


def test_language_modelling_conforms():
    asked = torch.randint(0, 11, (20, 6), generator=generator)
    asked[3:9, 4:] = -100
    logits = torch.randn(20, 6, 11, generator=generator)
    values = check_task("language_modelling", {"label_smoothing": 0.1}, logits, asked)
    theirs = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), asked.flatten(), ignore_index=-100)
    assert values["loss"] == pytest.approx(float(theirs), rel=1e-12)
    assert values["perplexity"] == pytest.approx(float(theirs.exp()), rel=1e-12)
    there = asked != -100
    right = independent.accuracy_score(asked[there], logits.argmax(2)[there])
    assert values["token_accuracy"] == pytest.approx(right, rel=1e-12)


def test_tokens_stay_whole_numbers():
    ids = np.random.default_rng(0).integers(0, 50, size=(40, 9))
    ids[0, 0] = 63  # never asked for, and still one of the vocabulary
    data = from_arrays(ids[:, :-1], ids[:, 1:], targets="tokens")
    assert data.x["train"].dtype == data.y["train"].dtype == torch.int64
    assert data.num_classes == 64
    for x, y, message in (
        (ids / 2, ids, "needed are ids of tokens"),
        (ids - 1, ids, "x has the id -1; needed are integers from 0"),
        (ids, ids[:, 0], "needed are ids of tokens"),
        (ids, ids[:, :, None], r"needed is \(samples, tokens\)"),
        (ids, np.full_like(ids, -100), "no value with a label"),
    ):
        with pytest.raises(DataError, match=message):
            from_arrays(x, y, targets="tokens")


def test_ties_count_half_in_an_auc():
    scores, there = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0], [2.0]] * 2), torch.tensor([0.0, 1, 0, 1, 1, 0] * 2)
    values = measure(named_task("multilabel"), torch.nn.Identity(), scores, there[:, None])
    assert values.metrics["auc"] == pytest.approx(independent.roc_auc_score(there, scores[:, 0]))
    nobody = measure(named_task("multilabel"), torch.nn.Identity(), scores, torch.zeros(12, 1))
    assert np.isnan(nobody.metrics["auc"])


def test_a_classification_is_trained_with_weights_and_smoothing():
    settings = {"class_weights": [1.0, 0.5, 2.0, 1.0, 1.0], "label_smoothing": 0.1}
    task = named_task("classification", settings)
    assert task.classifies
    assert not task.plainly_trained
    assert CLASSIFICATION.plainly_trained
    # What is measured is the plain cross entropy.
    plain = check_task("classification", {}, LOGITS, LABELS)
    assert check_task("classification", settings, LOGITS, LABELS) == plain
    weight = torch.tensor(settings["class_weights"])
    expected = torch.nn.functional.cross_entropy(LOGITS, LABELS, weight, label_smoothing=0.1)
    for outputs, ends in (
        (LOGITS, "logits"),
        (LOGITS.softmax(1), "probabilities"),
        (LOGITS.log_softmax(1), "log_probabilities"),
    ):
        assert torch.isclose(task.training_loss(outputs, LABELS, ends), expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="5 class weights and 4 classes"):
        task.training_loss(LOGITS[:, :4], LABELS.clamp(max=3), "logits")
    with pytest.raises(ConfigError, match="one probability per class"):
        task.training_loss(LOGITS.sigmoid(), LABELS, "class_probabilities")


class TopThree(type(CLASSIFICATION)):
    """A classification whose answers count if the label is among the first three."""

    metrics = (
        TaskMetric("top3", "", "maximize", "share", partial(mean, name="among"), share=True),
        *type(CLASSIFICATION).metrics,
    )

    def results(self, outputs, targets, ends):
        among = (outputs.topk(3, dim=1).indices == targets[:, None]).any(dim=1)
        return {**super().results(outputs, targets, ends), "among": among.double()}


def test_a_class_that_extends_classification_is_measured_by_what_it_adds():
    task = TopThree(CLASSIFICATION.settings)
    assert not task.classifies
    assert not task.plainly_trained
    values = check_task(task, {}, LOGITS, LABELS)
    assert values["top3"] == pytest.approx(independent.top_k_accuracy_score(LABELS, LOGITS, k=3))
    assert values["accuracy"] == check_task("classification", {}, LOGITS, LABELS)["accuracy"]


def test_results_of_large_outputs_are_computed_in_pieces(monkeypatch):
    whole = measure(named_task("segmentation"), torch.nn.Identity(), PIXELS, MASK)
    monkeypatch.setattr(scoring, "RESULT_VALUES", 3 * PIXELS[0].numel())
    seen = []
    task = named_task("segmentation")
    measured = type(task).results

    def results(self, outputs, targets, ends):
        seen.append(len(outputs))
        return measured(self, outputs, targets, ends)

    monkeypatch.setattr(type(task), "results", results)
    assert measure(task, torch.nn.Identity(), PIXELS, MASK).values == whole.values
    assert seen == [3, 3, 3, 3]


def test_top_five_and_macro_f1_of_a_classification():
    logits, labels = torch.randn(80, 9, generator=generator), torch.randint(0, 8, (80,), generator=generator)
    settings = {"more_metrics": ["top5_accuracy", "macro_f1"]}
    values = check_task("classification", settings, logits, labels)
    theirs = independent.top_k_accuracy_score(labels, logits, k=5, labels=range(9))
    assert values["top5_accuracy"] == pytest.approx(theirs, rel=1e-12)
    theirs = independent.f1_score(labels, logits.argmax(1), average="macro")
    assert values["macro_f1"] == pytest.approx(theirs, rel=1e-12)
    plain = check_task("classification", {}, logits, labels)
    assert {name: values[name] for name in plain} == plain
    # Few formats have many equal outputs: the first of them count, as in the accuracy.
    equal = measure(named_task("classification", settings), torch.nn.Identity(), torch.zeros(80, 9), labels).metrics
    assert equal["accuracy"] == float((labels == 0).double().mean())
    assert equal["top5_accuracy"] == float((labels < 5).double().mean())
    broken = logits.clone()
    broken[3, 4] = torch.nan
    metrics = measure(named_task("classification", settings), torch.nn.Identity(), broken, labels).metrics
    assert np.isnan([metrics["top5_accuracy"], metrics["macro_f1"]]).all()
    task = named_task("classification", {**settings, "class_weights": [1.0] * 5})
    assert not task.classifies
    assert "top5_accuracy is for six classes or more, and the data has 5" in task.unfit(5)
    assert "5 class weights and 9 classes" in task.unfit(9)
    assert "5 class weights and 3 classes" in named_task("segmentation", {"class_weights": [1.0] * 5}).unfit(3)


def test_a_token_that_is_not_asked_for():
    asked = torch.randint(0, 11, (20, 6), generator=generator)
    logits = torch.randn(20, 6, 11, generator=generator)
    settings = {"ignore_index": 0}
    values = check_task("language_modelling", settings, logits, asked)
    there = torch.where(asked == 0, -100, asked)
    assert values == check_task("language_modelling", {}, logits, there)
    losses = [
        named_task("language_modelling", s).training_loss(logits, y, "logits")
        for s, y in ((settings, asked), ({}, there))
    ]
    assert losses[0] == losses[1]


def squared(outputs, targets):
    return ((outputs - targets) ** 2).sum()


def wrong_loss(outputs, targets):
    return outputs


def test_training_minimises_a_function_of_the_user():
    task = named_task("regression", {"training_loss": "test_tasks:squared"})
    assert task.minimised(NUMBERS_GIVEN, NUMBERS_WANTED, "logits") == squared(NUMBERS_GIVEN, NUMBERS_WANTED)
    library = named_task("multilabel", {"training_loss": "torch.nn.functional:binary_cross_entropy_with_logits"})
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(THOUGHT, THERE)
    assert library.minimised(THOUGHT, THERE, "logits") == theirs
    smoothed = {"training_loss": "torch.nn.functional:cross_entropy"}
    assert not named_task("classification", smoothed).plainly_trained
    assert named_task("regression").minimised(NUMBERS_GIVEN, NUMBERS_WANTED, "logits") == torch.nn.functional.mse_loss(
        NUMBERS_GIVEN, NUMBERS_WANTED
    )
    for name, message in (
        ("test_tasks:squard", "squard"),
        ("torch.nn:MSELoss", "is a class; needed is a function of .outputs, targets."),
        ("torch.nn:functional", "is a module; needed is a function"),
    ):
        with pytest.raises(ConfigError, match=message):
            named_task("regression", {"training_loss": name})
    for name, message in (
        ("test_tasks:wrong_loss", r"returned a tensor of shape \(60, 3\); needed is one number"),
        ("torch.nn.functional:nll_loss", r"failed with outputs \(60, 3\) and targets torch.float32 \(60, 3\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            named_task("regression", {"training_loss": name}).minimised(NUMBERS_GIVEN, NUMBERS_WANTED, "logits")


ANOMALOUS = (torch.rand(80, generator=generator) < 0.25).float()
SEEN = torch.randn(80, 6, generator=generator)
GIVEN_BACK = SEEN + torch.where(ANOMALOUS > 0, 0.6, 0.4)[:, None] * torch.randn(80, 6, generator=generator)


@pytest.mark.parametrize("error", ["squared", "absolute"])
def test_anomaly_detection_conforms(error):
    targets = torch.cat([ANOMALOUS[:, None], SEEN], dim=1)
    values = check_task("anomaly_detection", {"error": error}, GIVEN_BACK, targets)
    score = GIVEN_BACK.double() - SEEN.double()
    score = (score**2 if error == "squared" else score.abs()).mean(1)
    assert values["auc"] == pytest.approx(independent.roc_auc_score(ANOMALOUS, score), rel=1e-12)
    theirs = independent.average_precision_score(ANOMALOUS, score)
    assert values["average_precision"] == pytest.approx(theirs, rel=1e-12)
    assert values["loss"] == pytest.approx(float(score[ANOMALOUS == 0].mean()), rel=1e-12)
    # Pictures are given back as pictures; what is compared is the same.
    task = named_task("anomaly_detection", {"error": error})
    assert measure(task, torch.nn.Unflatten(1, (2, 3)), GIVEN_BACK, targets).values == values
    assert "the 6 values of each sample" in task.wrong(GIVEN_BACK[:, :5], targets)
    # Scores that are equal count as one.
    rounded = torch.cat([ANOMALOUS[:, None], torch.zeros(80, 1)], dim=1)
    equal = measure(task, torch.nn.Identity(), ANOMALOUS[:, None].round() + torch.arange(80)[:, None] % 3, rounded)
    score = (ANOMALOUS + torch.arange(80) % 3) ** (2 if error == "squared" else 1)
    theirs = independent.average_precision_score(ANOMALOUS, score)
    assert equal.metrics["average_precision"] == pytest.approx(theirs, rel=1e-12)


def test_training_sees_normal_samples_only():
    x, y = np.random.default_rng(0).normal(size=(100, 2, 3)), np.arange(100) % 4 == 0
    data = from_arrays(x, y, targets="anomalies", standardise=True)
    assert not data.y["train"][:, 0].any()
    assert torch.equal(data.y["val"][:, 1:], data.x["val"].flatten(1))
    assert set(data.y["test"][:, 0].tolist()) == {0.0, 1.0}
    assert any(note.startswith("17 anomalies of train are left out") for note in data.notes), data.notes
    # The statistics are those of the normal samples.
    assert data.x["train"].mean(0).abs().max() < 1e-5
    evaluation = {"sw_runner": {"basic_evaluation": {"data_loader": "train"}}, "metrics": {"auc": {}}}
    with pytest.raises(
        ConfigError, match=r"53 samples of train .* are all of one kind.*training sees normal samples only"
    ):
        bf.search(
            model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 6)),
            data=data,
            task="anomaly_detection",
            space={"linear": {"name": "integer", "data_in_width": [8], "weight_width": [4, 8], "bias_width": [8]}},
            strategy={"name": "brute_force", **evaluation},
        )
    for labels, message in (
        (y * 2, "allowed: 0 for normal, 1 for an anomaly"),
        (np.stack([y, y], axis=1), r"needed are numbers \(samples,\)"),
        (np.zeros(100), "every sample of val is normal"),
        (np.ones(100), "the train split has no normal sample"),
    ):
        with pytest.raises(DataError, match=message):
            from_arrays(x, labels, targets="anomalies")
