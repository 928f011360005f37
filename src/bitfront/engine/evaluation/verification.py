"""The check before a search: the evaluator must give the same metrics as the deployed model.

Some candidates are evaluated twice on real samples: together by the evaluator of the search, with its fast paths, and
each alone as the model that would be deployed. If they differ, the fast path of the step that causes it is switched off
(``EvaluationJob.unmerged``), or all fast paths are (``EvaluationJob.whole``). A note says so, and the search continues
with correct metrics. If candidates are trained, two of them are trained for two steps, together and each alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.engine.evaluation.fixed import one_thread
from bitfront.engine.evaluation.interface import ONLY_CODE, EvaluationJob, Evaluator, ModelEvaluator
from bitfront.engine.evaluation.keeping import bytes_of
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.errors import EvaluationError, UserError
from bitfront.graph.baking import private_copy
from bitfront.graph.checking import check_same
from bitfront.interrupts import contained
from bitfront.population import train_population
from bitfront.scoring import measure
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import ModelSpace

#: Metric of the task → value, the loss among them: accuracy, or what another task has.
Score = Mapping[str, float]
#: Number of samples on which candidates are evaluated twice.
SAMPLES = 64
#: Number of candidates that are checked, however long that takes.
LEAST = 8
#: Share of the expected time of a search that the check may take.
SHARE = 0.02
#: Largest relative difference of two losses of one network: the last digits may differ on a GPU or another machine.
SAME_LOSS = 1e-5
#: Largest difference of outputs in batches of two sizes, as a share of the largest output: sums have another order.
SAME_IN_BATCHES = 1e-3
#: A model alone was seen to take so many times its weights: what is multiplied, activations, what is freed meanwhile.
ALONE = 10
#: Number of training steps, and the largest relative difference of two trainings: their sums of gradients have another
#: order.
TRAINING_STEPS, SAME_WEIGHTS = 2, 1e-3


@dataclass(frozen=True)
class Verification:
    """The result of the check before a search.

    Attributes:
        unmerged: names of steps of the graph whose fast path must not be used.
        whole: why no fast path may be used; empty if they may.
        separately: why candidates must not be trained together; empty if they may.
        notes: remarks for the user.
        candidates: number of candidates that were evaluated twice.
        alone: seconds per candidate as it is deployed, on the samples of the check.
        together: seconds that all of them took as the search evaluates them, with what happens once for their options.
    """

    unmerged: frozenset[str] = frozenset()
    whole: str = ""
    separately: str = ""
    notes: tuple[str, ...] = ()
    candidates: int = 0
    alone: float = 0.0
    together: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every fast path may be used."""
        return not (self.unmerged or self.whole or self.separately)

    def applied(self, job: EvaluationJob) -> EvaluationJob:
        """The job without the fast paths that are wrong."""
        training = job.training and replace(job.training, separately=self.separately)
        return replace(job, unmerged=self.unmerged, whole=self.whole, training=training)


def verify(
    evaluator: Evaluator,
    model: nn.Module,
    expected_seconds: float = 0.0,
    safe: Callable[[Codes], NDArray[np.bool_]] | None = None,
) -> Verification:
    """Compare the evaluator with the deployed model on a spread of candidates.

    Args:
        evaluator: the evaluator of the search, with the weights of the search.
        model: the user's float model, with these weights.
        expected_seconds: expected time of the whole search. The check takes at most a fiftieth of it, but checks at
            least eight candidates.
        safe: which of some candidates may be evaluated in this process (``Dispatcher.safe``); None: all.

    Raises:
        EvaluationError: the captured float model does not compute what the user's model computes.
    """
    began = time.perf_counter()
    if evaluator.accuracy_samples is None and not evaluator.job.splits:
        return Verification()  # no candidate is run
    split, x, y = _samples(evaluator)
    remarks = _check_float(evaluator, model, x)
    job = replace(evaluator.job, training=None, splits={split: (x, y)})
    # Without training, because the check is about the evaluation of a network, with any weights.
    untrained = open_evaluator(job, evaluator.space)
    codes: list[NDArray[np.int64]] = []
    expected: list[Score] = []
    started = time.perf_counter()
    for code in spread(evaluator.space):
        if len(codes) >= LEAST and time.perf_counter() - began > SHARE * expected_seconds:
            break
        if safe is not None and not safe(code[None])[0]:
            continue
        codes.append(code)
        expected.append(deployed_score(untrained, code, split))
    if not codes:
        return Verification(notes=remarks)  # each of them would end this process
    alone = (time.perf_counter() - started) / len(codes)
    result = _agreeing(untrained, np.array(codes), expected, split)
    together = evaluator.job.training is not None and evaluator.job.task.plainly_trained
    separately = _training_differs(evaluator, np.array(codes[:2])) if together else ""
    if separately:
        note = f"candidates are trained one by one, which is slow: {separately}"
        result = replace(result, separately=separately, notes=(*result.notes, note))
    return replace(result, notes=(*remarks, *result.notes), candidates=len(codes), alone=alone)


def spread(space: ModelSpace) -> Iterator[NDArray[np.int64]]:
    """Candidates that together have every option of every parameter.

    First come uniform ones from the lowest to the highest, then mixed ones, then the other uniform ones. Each is a
    canonical code, int64, shape (parameters,); none occurs twice.
    """
    seen: set[bytes] = set()
    uniform = space.uniform()
    mixed = _mixed(space.cardinalities.tolist())
    ends = uniform[np.unique(np.linspace(0, len(uniform) - 1, 4).astype(int))] if len(uniform) else uniform
    for code in (*ends, *mixed, *uniform):
        canonical = space.canonical(np.asarray(code, dtype=np.int64)[None])[0]
        if canonical.tobytes() not in seen:
            seen.add(canonical.tobytes())
            yield canonical


def _mixed(counts: list[int]) -> Codes:
    """Codes in which every option of every parameter appears, shape (largest count, parameters)."""
    rng = np.random.default_rng(0)
    rows = max(counts, default=1)
    columns = [rng.permutation(np.resize(rng.permutation(count), rows)) for count in counts]
    return np.stack(columns, axis=1).astype(np.int64) if columns else np.zeros((1, 0), dtype=np.int64)


def deployed_score(evaluator: Evaluator, code: NDArray[np.int64], split: str, number: int | None = None) -> Score:
    """Loss and metrics of the task of one candidate, evaluated alone as the model that would be deployed.

    All are NaN for a candidate that fails.

    Args:
        evaluator: the evaluator of the search.
        code: the code of the candidate, int64, shape (parameters,).
        split: the split that it is evaluated on.
        number: number of samples; None for all.
    """
    x, y = evaluator.samples(split, number)
    evaluator.job.weights.make_room(ALONE * bytes_of(evaluator.space.graph.model))
    try:
        alone, code_there = evaluator.alone(code)
        with contained(), one_thread():
            model, outputs = alone.model(code_there, bake=True), alone.space.graph.outputs
            result = measure(evaluator.job.task, model, x, y, batch_size=alone.chunk, outputs=outputs)
    except UserError:
        raise
    except Exception:  # the search's evaluator must fail for it too, and stores the reason
        return dict.fromkeys((m.name for m in evaluator.job.task.all_metrics), float("nan"))
    return result.values


def same(score: Score, expected: Score, *, exact: bool = False) -> bool:
    """Whether two scores can be those of the same network.

    Args:
        score, expected: the two scores.
        exact: whether all must be equal to the last bit. If not, an accuracy must still be.
    """
    for name, value in expected.items():
        tolerance = 0.0 if exact or name == "accuracy" else SAME_LOSS
        if not np.isclose(score[name], value, rtol=tolerance, atol=tolerance, equal_nan=True):
            return False
    return True


def _samples(evaluator: Evaluator) -> tuple[str, Tensor, Tensor]:
    """(a split that the search evaluates on, some of its samples and labels)."""
    choice = evaluator.accuracy_samples
    split = choice.split if choice else next(iter(evaluator.job.splits))
    x, y = evaluator.job.splits[split]
    # Where samples are large, as many as go through a model together.
    number = min(SAMPLES, evaluator.float_evaluator().chunk)
    return split, x[:number], y[:number]


def _check_float(evaluator: Evaluator, model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Remarks on what the float model computes. Raises EvaluationError if the captured one computes something else."""
    device = evaluator.device
    alone = evaluator.float_evaluator()
    with torch.no_grad(), one_thread():
        expected = private_copy(model).to(device).eval()(x.to(device).clone())
        captured = alone.model(ONLY_CODE)(x.to(device).clone())
    if not torch.equal(torch.nan_to_num(captured), torch.nan_to_num(expected)):
        largest = float((captured - expected).abs().max())
        raise EvaluationError(
            f"the captured model does not compute what the model computes: on {len(x)} samples its outputs differ by "
            f"up to {largest:.3g}. Its forward may depend on more than its input (a clock, a counter, random numbers); "
            "make it depend on its input and its parameters alone"
        )
    # What is rebuilt with formats of functions is made of the graph, which may differ where the modules do not.
    searched, users = evaluator.space.graph, alone.space.graph
    difference = check_same(users, model, x) if device == "cpu" else ""
    if not difference and searched is not users and device == "cpu":
        difference = check_same(searched, searched.model, x)
    if difference:
        raise EvaluationError(
            f"the captured graph does not compute what the model computes on {len(x)} samples: {difference}. Its "
            "forward may depend on more than its input; make it depend on its input and its parameters alone"
        )
    folds = evaluator.job.fold_batch_norm and searched is not users
    folding = _folding_remarks(searched.model, x, captured) if folds else ()
    return (*folding, *_batch_remarks(alone, x, captured))


def _folding_remarks(model: nn.Module, x: Tensor, expected: Tensor) -> tuple[str, ...]:
    """How far the outputs of the network with folded batch norms, in float, are from those of the user's model."""
    with torch.no_grad(), one_thread():
        outputs = private_copy(model).to(expected.device)(x.to(expected.device).clone())
    known = outputs.isfinite() & expected.isfinite()
    difference = float((outputs - expected)[known].abs().max()) if known.any() else 0.0
    largest = float(expected[known].abs().max()) if known.any() else 0.0
    measured = (
        f"in float, the network with folded batch norms gives outputs that differ from those of your model by at most "
        f"{difference:.2g}, measured on {len(x)} samples, and the largest output is {largest:.2g}"
    )
    if difference <= SAME_IN_BATCHES * largest:
        return (f"{measured}: it is the same up to float error",)
    return (
        f"{measured}: more than float error usually is. A batch norm whose variance is almost 0 makes its layer's "
        "weights huge; fold_batch_norm = false keeps it",
    )


def _batch_remarks(alone: ModelEvaluator, x: Tensor, outputs: Tensor) -> tuple[str, ...]:
    """A remark where the outputs for a sample depend on the other samples of its batch; `outputs` are those for `x`."""
    if len(x) < 2:
        return ()
    with torch.no_grad(), one_thread():
        model = alone.model(ONLY_CODE)
        apart = torch.cat([model(half.to(outputs.device).clone()) for half in x.chunk(2)])
    known = apart.isfinite() & outputs.isfinite()
    difference, scale = (apart - outputs)[known].abs(), outputs[known].abs()
    if not len(scale) or float(difference.max()) <= SAME_IN_BATCHES * float(scale.max()):
        return ()
    return (
        f"the outputs for a sample depend on the other samples of its batch: those for {len(x)} samples differ by up "
        f"to {float(difference.max()):.3g} where they are evaluated in two halves. Here a batch has up to "
        f"{alone.chunk:,} samples; with another batch size the metrics are others. A batch norm "
        "without running statistics does that",
    )


def _agreeing(evaluator: Evaluator, codes: Codes, expected: Sequence[Score], split: str) -> Verification:
    """The fast paths that must be switched off so that the evaluator gives the expected scores."""
    began = time.perf_counter()
    wrong = _wrong(evaluator, codes, expected, split)
    seconds = time.perf_counter() - began
    if not len(wrong):
        return Verification(together=seconds)
    culprits: set[str] = set()
    steps = evaluator.space.graph.nodes
    job = evaluator.job
    for step in steps:
        trial = open_evaluator(replace(job, unmerged=frozenset({step.name})), evaluator.space)
        if not len(_wrong(trial, codes[wrong], [expected[i] for i in wrong], split)):
            culprits = {step.name}
            break
    else:
        culprits = {step.name for step in steps}
    careful = open_evaluator(replace(job, unmerged=frozenset(culprits)), evaluator.space)
    first = _named(evaluator.space, codes[wrong[0]])
    if len(_wrong(careful, codes, expected, split)):
        why = f"the fast evaluation of {first} differs from its deployed model"
        return Verification(whole=why, together=seconds)  # the dispatcher reports it after the search
    layers = next(iter(culprits)) if len(culprits) == 1 else "all layers"
    note = (
        f"the fast evaluation of {layers} differs from the deployed model (seen with {first}); there candidates are "
        "computed as in the deployed model, which is slower"
    )
    return Verification(unmerged=frozenset(culprits), notes=(note,), together=seconds)


def _wrong(evaluator: Evaluator, codes: Codes, expected: Sequence[Score], split: str) -> NDArray[np.int64]:
    """The rows of `codes` whose scores differ from the expected ones when all are evaluated together."""
    exact = evaluator.device == "cpu"
    found = evaluator.scores(codes, split, None).of_task
    scores = [{name: float(values[i]) for name, values in found.items()} for i in range(len(codes))]
    pairs = zip(scores, expected, strict=True)
    wrong = [i for i, (score, want) in enumerate(pairs) if not same(score, want, exact=exact)]
    return np.array(wrong, dtype=np.int64)


def _named(space: ModelSpace, code: NDArray[np.int64]) -> str:
    """A candidate as a short text."""
    words = ", ".join(f"{p.name} {p.labels[c]}" for p, c in zip(space.parameters, code.tolist(), strict=True))
    return f"candidate ({words if len(words) <= 120 else words[:117] + '...'})"


def _training_differs(evaluator: Evaluator, codes: Codes) -> str:
    """Why candidates must not be trained together: two of them get other weights than each alone. Empty if not."""
    training = evaluator.job.training
    assert training is not None
    settings = replace(training.settings, max_epochs=1, max_steps=TRAINING_STEPS)
    used = slice(0, min(len(training.y), TRAINING_STEPS * settings.batch_size))
    few = training.dataset(evaluator.job.task.targets, SAMPLES, used)
    untrained = open_evaluator(replace(evaluator.job, training=None), evaluator.space)
    with one_thread():
        models = []
        for code in codes:
            alone, code_there = untrained.alone(code)
            models.append(alone.model(code_there))
        outputs = evaluator.space.graph.outputs
        train = partial(train_population, dataset=few, settings=settings, device=evaluator.device, outputs=outputs)
        try:
            together = train(models)
            apart = [train([m], alone="a check")[0] for m in models]
        except UserError:
            raise
        except Exception:  # in the search these candidates fail with it, and their trials have the reason
            return ""
    for code, member, reference in zip(codes, together, apart, strict=True):
        if member.alone or member.error or reference.error:
            continue
        name = _first_difference(member.state, reference.state)
        if name:
            return f"trained with others, {_named(evaluator.space, code)} gets another {name} than alone"
    return ""


def _first_difference(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str:
    """The first parameter or buffer that differs by more than another order of sums can cause; empty if none does."""
    for name, value in reference.items():
        other = state[name]
        if value.is_floating_point():
            scale = float(value.abs().max()) if value.numel() else 0.0
            if not torch.allclose(other, value, rtol=SAME_WEIGHTS, atol=SAME_WEIGHTS * scale + 1e-6, equal_nan=True):
                return name
        elif not torch.equal(other, value):
            return name
    return ""
