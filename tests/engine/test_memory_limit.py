"""A limit of memory: what is kept is forgotten, outputs are written to disk, and no number changes; a limit that cannot
be held is an error that says what the least is. Half-precision models."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.engine.evaluation import keeping
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.engine.evaluation.keeping import KeptWeights
from bitfront.engine.evaluation.spilling import Spill
from bitfront.engine.planning.memory import size_in_bytes
from bitfront.errors import ConfigError
from bitfront.metrics.configured import configured_runner
from bitfront.transforms import observe

CHOICES = {
    "linear": {"name": ["affine"], "data_in_width": [4, 8], "weight_width": [3, 8]},
    "conv2d": {"name": ["affine", "integer"], "data_in_width": [4, 8], "weight_width": [4, 8]},
}


class Tokens(nn.Module):
    """Linear layers on rows, as in a transformer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head((x + self.b(torch.relu(self.a(x)))).mean(1))


class Untraced(Tokens):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) < 1e9 else x


def convolutions():
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3))


NETWORKS = {
    "rows": (Tokens, (6, 8)),
    "flat": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), (8,)),
    "convolutions": (convolutions, (2, 6, 6)),
    "untraced": (Untraced, (6, 8)),
}


def job_of(name, weights=None):
    make, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(40, *shape, generator=generator)
    y = torch.randint(3, (40,), generator=generator)
    runners = (configured_runner("basic_evaluation"),)
    return EvaluationJob(
        model=model,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="type",
        choices=CHOICES,
        runners=runners,
        splits={"val": (x, y)},
        calibration=x,
        weights=weights or KeptWeights(),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_limit_forgets_weights_and_changes_no_number(name, monkeypatch):
    usual = FixedEvaluator(job_of(name))
    codes = usual.space.sample(24, np.random.default_rng(0))
    expected = usual.evaluate(codes)
    # Whatever is written to disk pays, and nothing is let be.
    monkeypatch.setattr(Spill, "pays", lambda *_: True)
    kept = KeptWeights(limit=200)
    limited = FixedEvaluator(job_of(name, kept))
    for _ in range(2):
        found = limited.evaluate(codes)
        assert {m: v.tolist() for m, v in found.values.items()} == {m: v.tolist() for m, v in expected.values.items()}
    if name == "untraced":
        assert limited._plain_scorer._copy._prefixes.spill.written > 0
        assert limited._plain_scorer.note == ""
    else:
        assert kept.forgotten > 0
        assert usual.job.weights.forgotten == 0
        assert usual.job.weights.bytes > 5 * kept.bytes > 0


def test_what_is_kept_stays_below_its_limit():
    kept = KeptWeights(limit=1000)
    shelf = kept.shelf(owner := nn.Identity())
    for number in range(50):
        shelf.get(number % 7, lambda: torch.zeros(50))
        assert kept.bytes <= 1000
    assert kept.forgotten > 0
    del owner
    assert kept.bytes == 0


def test_freed_memory_is_returned_near_the_limit(monkeypatch):
    """Once, until there is more of it; and where a process is nearly full without it, less is kept."""
    kept = KeptWeights(limit=10**9, process=10_000)
    taken, freed = [8_000], []
    monkeypatch.setattr(keeping, "resident", lambda: taken[0])

    def returned():
        freed.append(taken[0])
        taken[0] = max(taken[0] - 500, 8_600)

    monkeypatch.setattr(keeping, "return_freed_memory", returned)
    shelf = kept.shelf(owner := nn.Identity())
    for now, times in ((8_000, 0), (8_600, 1), (8_700, 1), (8_850, 2), (7_000, 2), (8_600, 3)):
        taken[0] = now
        shelf.get("a", lambda: torch.zeros(100))
        assert len(freed) == times, now
    shelf.get("b", lambda: torch.zeros(100))
    assert kept.bytes == 800
    taken[0] = 10_200  # 9,700 when what is freed was returned: 200 more than 0.95 of what it may take
    shelf.get("b", lambda: torch.zeros(100))
    assert kept.limit == 600
    assert kept.forgotten == 1
    assert owner is not None


def test_a_model_alone_gets_the_room_of_what_is_kept(monkeypatch):
    kept = KeptWeights(limit=10**9, process=10_000)
    monkeypatch.setattr(keeping, "resident", lambda: 8_000)
    shelf = kept.shelf(owner := nn.Identity())
    shelf.get("a", lambda: torch.zeros(100))
    kept.make_room(1_500)
    assert kept.bytes == 400
    kept.make_room(1_501)
    assert kept.bytes == 0
    shelf.get("a", lambda: torch.zeros(100))
    kept.make_room()
    assert kept.bytes == 0
    without = KeptWeights(limit=10**9)
    without.shelf(owner).get("a", lambda: torch.zeros(100))
    without.make_room(10**12)
    assert without.bytes == 400


@pytest.mark.parametrize(
    "like", [torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)]
)
def test_outputs_on_disk_come_back_as_they_were(like, tmp_path):
    spill = Spill(tmp_path)
    value = (like, None, (torch.arange(5), 3.0))
    for _ in range(2):  # the second takes the place of the first
        written = spill.write(value)
        back = spill.read(written)
        assert torch.equal(back[0], like)
        assert back[0].stride() == like.stride()
        assert torch.equal(back[2][0], torch.arange(5))
        assert (back[1], back[2][1]) == (None, 3.0)
        spill.forget(written)
    assert spill._end == like.numel() * 4 + 40
    assert spill.write(like[:, ::2]) is None  # with gaps
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_disks_are_used_where_they_are_faster():
    spill = Spill(speed=1e8)
    assert spill.pays(10**6, 1, 1.0)
    assert not spill.pays(10**9, 1, 1.0)
    assert spill.pays(10**7, 5, 1.0)


def test_calibration_in_pieces_sees_the_same_values(monkeypatch):
    job = job_of("convolutions")
    graph = FixedEvaluator(job).space.graph
    wanted = [(s.name, o) for s in graph.sites if s.weight for o in ("data_in", "weight")]
    whole = observe.observe(graph, wanted, job.calibration, samples=True)
    monkeypatch.setattr(observe, "SAMPLES_BYTES", 7 * 4 * 64)  # the largest output has 64 values
    assert observe.piece_length(graph, 40) == 7
    pieces = observe.observe(graph, wanted, job.calibration, samples=True)
    assert whole.keys() == pieces.keys()
    for key, seen in whole.items():
        torch.testing.assert_close(pieces[key].values, seen.values)
        for a, b in zip(pieces[key].samples, seen.samples, strict=True):
            torch.testing.assert_close(a, b)


def test_large_operands_in_pieces_keep_their_ends():
    whole, parts = (observe._OperandObserver(True, True) for _ in range(2))
    x = torch.randn(64, 4, 40, 40)
    x[3, 2, 1, 1] = 50.0
    whole.quantize(x)
    for number, piece in enumerate(x.split(16)):
        parts.pieces, parts.piece = 4, number
        parts.quantize(piece)
    one, other = whole.observed(), parts.observed()
    assert torch.equal(one.ends.amax(0).flatten(), other.ends.amax(0).flatten())
    assert torch.equal(one.ends.amin(0).flatten(), other.ends.amin(0).flatten())
    assert other.values.shape == one.values.shape
    assert other.samples[0].shape == one.samples[0].shape


@pytest.mark.parametrize(("text", "size"), [("8 GB", 8e9), ("512MiB", 512 * 2**20), ("1.5 kB", 1500), ("7 B", 7)])
def test_sizes_of_memory(text, size):
    assert size_in_bytes(text) == size


def searched(model, folder, **more):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(60, 8, generator=generator), torch.arange(60) % 3
    notes = []

    class Heard(bf.Events):
        def note(self, text):
            notes.append(text)

        def expected(self, seconds):
            notes.append(seconds)

    run = bf.search(
        model=model,
        data={"train": (x[:40], y[:40]), "val": (x[40:], y[40:])},
        space={"linear": {"name": "affine", "data_in_width": [4, 8], "weight_width": [4, 8]}},
        metrics={"loss": "minimize", "average_bitwidth": "minimize"},
        strategy="evolution",
        n_trials=6,
        project_dir=str(folder),
        events=Heard(),
        **more,
    )
    return run, notes


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def test_a_limit_is_said_and_one_that_cannot_be_held_is_refused(tmp_path):
    run, notes = searched(linear(), tmp_path / "a", memory_limit="64 GB")
    assert any(str(n).startswith("memory_limit = 64 GB: ") for n in notes)
    assert sum(isinstance(n, float) and n > 0 for n in notes) == 1
    with pytest.raises(ConfigError, match=r"(?s)memory_limit.*10 MB cannot be held: this search takes .* at least"):
        searched(linear(), tmp_path / "b", memory_limit="10 MB")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match=r"memory_limit.*'lots' is no size of memory"):
        searched(linear(), tmp_path / "b", memory_limit="lots")
    assert len(run) == 6


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_their_values_in_float32(kind, tmp_path):
    half = linear().to(kind)
    before = copy.deepcopy(half.state_dict())
    run, notes = searched(half, tmp_path / "half")
    other, _ = searched(copy.deepcopy(half).float(), tmp_path / "float")
    assert [t.metrics for t in run.trials] == [t.metrics for t in other.trials]
    assert any("are taken as float32" in str(n) for n in notes)
    assert all(p.dtype == kind for p in half.parameters())
    assert all(torch.equal(v, before[k]) for k, v in half.state_dict().items())


def test_a_limit_is_refused_where_weights_are_trained(tmp_path):
    x, y = torch.randn(60, 8), torch.arange(60) % 3
    with pytest.raises(ConfigError, match=r"memory_limit.*the weights of one model"):
        bf.search(model=linear(), data=(x, y), strategy="learned_bits", memory_limit="8 GB", project_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["rows", "untraced"])
def test_a_process_that_takes_too_much_keeps_less(name, monkeypatch):
    usual = FixedEvaluator(job_of(name))
    codes = usual.space.sample(24, np.random.default_rng(0))
    expected = usual.evaluate(codes)
    weights = KeptWeights(limit=1 << 30, process=10**9)
    evaluator = FixedEvaluator(job_of(name, weights))
    # The process takes 100 bytes less than it may, and beside that what is kept.
    monkeypatch.setattr(keeping, "resident", lambda: 10**9 - 100 + weights.bytes)
    first, again = evaluator.evaluate(codes), evaluator.evaluate(codes)
    assert weights.bytes <= 100
    assert first.above_limit == again.above_limit == 0
    # What is forgotten does not help: the size that was measured is given on.
    monkeypatch.setattr(keeping, "resident", lambda: 2 * 10**9)
    last = evaluator.evaluate(codes)
    assert last.above_limit == 2 * 10**9
    assert weights.bytes == 0
    for measured in (first, again, last):
        for metric, column in expected.values.items():
            assert np.array_equal(measured.values[metric], column)
    assert pickle.loads(pickle.dumps(weights)).process == 10**9  # noqa: S301 (these are our bytes)


def test_a_limit_that_was_not_held_is_said_once_with_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "resident", lambda: 65_250_000_000)
    _, notes = searched(linear(), tmp_path, memory_limit="64 GB")
    (note,) = [n for n in notes if "memory_limit was exceeded" in str(n)]
    assert "a process took 65.25 GB, of which 64.00 GB are allowed" in note
