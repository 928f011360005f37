"""What is said and drawn of a comparison: the numbers of its runs, and nothing else."""

import dataclasses
import json
import math

import numpy as np
import pytest

from bitfront.engine.comparison.curves import Spread, spread
from bitfront.engine.comparison.results import Comparison, StrategyRun, add_curves
from bitfront.objectives import Objective, Objectives
from bitfront.report import comparison as comparison_report
from bitfront.report import comparison_figures
from bitfront.report.comparison_files import write_comparison

TWO = Objectives((Objective("accuracy", 1.0, "maximize"), Objective("size", 1.0, "minimize")))
THREE = Objectives((Objective("bits", 1.0, "minimize"), Objective("loss", 2.0, "minimize"), Objective("size", 1.0, "minimize")))  # fmt: skip
SUM = Objectives((Objective("loss", 1.0, "minimize"), Objective("size", 0.1, "minimize")), "maximize")


def comparison(folder, objectives=TWO, *, truth=True, seeds=5, budget=30, whole=120, constraints=()):
    """Synthetic runs: `whole` candidates, of which each run takes `budget`, in a random order."""
    rng, count = np.random.default_rng(0), len(objectives.directions)
    every = rng.random((whole, count)) * 10 ** np.arange(count) - (1.0 if "accuracy" in objectives.names else 0.0)
    every[rng.random(whole) < 0.1] = np.nan  # failed

    def course(strategy, seed, rows):
        evaluating = 0.001 + rng.random(len(rows)) / 100
        asking = np.cumsum(rng.random(len(rows))) / 100
        nothing = np.zeros(0)
        return StrategyRun(
            strategy, seed, rows[:, None], every[rows], asking, evaluating, float(asking[-1]) + 1, len(rows) + 7, 7, 2,
            "n_trials reached", nothing, nothing,
        )  # fmt: skip

    courses = [course("brute_force", 0, np.arange(whole))] if truth else []
    strategies = ("evolution", "optuna:tpe")
    courses += [course(s, seed, rng.permutation(whole)[:budget]) for s in strategies for seed in range(seeds)]
    runs, front, reference, volume = add_curves(courses, objectives)
    names = (("brute_force",) if truth else ()) + strategies
    return Comparison(
        folder, names, tuple(range(seeds)), budget, whole, objectives, constraints, truth, front, reference, volume,
        runs, 17, 3,
    )  # fmt: skip


@pytest.fixture
def known(tmp_path):
    return comparison(tmp_path / "compare")


# --- pictures


def heights(x, line_x, line_y):
    """A step function, given where it changes, at every `x`."""
    return line_y[np.searchsorted(line_x, x, side="right") - 1]


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [TWO, THREE, SUM], ids=["two", "three", "sum"])
@pytest.mark.parametrize("truth", [True, False])
def test_lines_are_the_curves_and_bands_their_quartiles(objectives, truth, tmp_path):
    result = comparison(tmp_path, objectives, truth=truth)
    panels = comparison_report.panels(result)
    whats = ["best"] if objectives is SUM else ["volume", "best"]
    assert [(p.what, p.over) for p in panels] == [(w, o) for w in whats for o in ("evaluations", "seconds")]
    figure = comparison_figures.courses(panels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(result.strategies)
    for axes, panel in zip(figure.axes, panels, strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (panel.x_title, panel.y_title)
        assert axes.get_xscale() == "log"
        drawn = {line.get_label(): line for line in axes.get_lines()}
        assert [line.strategy for line in panel.lines] == list(result.strategies)
        _, offset, factor = comparison_report.measure(result)
        for line, band in zip(panel.lines, axes.collections, strict=True):
            assert np.array_equal(drawn[line.strategy].get_xdata(), line.x)
            assert np.array_equal(drawn[line.strategy].get_ydata(), line.median, equal_nan=True)
            curve = result.curve(line.strategy, panel.what, panel.over)
            shift, turn = (0.0, 1.0) if panel.what == "volume" else (offset, factor)
            ends = (curve.low, curve.high) if turn > 0 else (curve.high, curve.low)
            for shown, true in zip((line.median, line.low, line.high), (curve.median, *ends), strict=True):
                expected = np.where(np.isfinite(true), shift + turn * true, np.nan)
                assert np.array_equal(heights(curve.x, line.x, shown), expected, equal_nan=True)
            vertices = {tuple(v) for path in band.get_paths() for v in path.vertices}
            fine = np.isfinite(line.low) & np.isfinite(line.high)
            for side in (line.low, line.high):
                assert set(zip(line.x[fine], side[fine], strict=True)) <= vertices
        across = [line.get_ydata()[0] for line in axes.get_lines() if line.get_label().startswith("_")]
        assert across == [height for height, _ in panel.levels]
        assert [t.get_text() for t in axes.texts] == [text for _, text in panel.levels]


def test_a_panel_begins_where_the_first_curve_is_in_sight():
    rising = comparison_report.Line("evolution", np.array([1.0, 10.0, 100.0]), *[np.array([0.1, 0.5, 0.9])] * 3)
    later = comparison_report.Line("brute_force", np.array([20.0, 30.0]), *[np.array([np.nan, 0.5])] * 3)
    panel = comparison_report.Panel("volume", "evaluations", "", "", (later, rising), ())
    assert comparison_figures.start(panel, 0.4, 1.0) == pytest.approx(10 / 1.5)
    assert comparison_figures.start(dataclasses.replace(panel, lines=(later,)), 0.4, 1.0) == pytest.approx(20)
    assert comparison_figures.start(panel, 2.0, 3.0) is None


def test_the_true_front_is_marked_where_it_is_known(tmp_path):
    for truth, word in ((True, "true"), (False, "best known")):
        result = comparison(tmp_path, truth=truth)
        volume, _, best, _ = comparison_report.panels(result)
        assert volume.levels == ((1.0, f"{word} front"), (0.95, "95 %"), (0.99, "99 %"))
        assert volume.y_title == f"part of the {word} hypervolume"
        assert best.levels == ((1 + result.best, "true best" if truth else "best known"),)
        assert best.y_title == "best error (1 − accuracy) so far"
        (plane,) = comparison_report.planes(result)
        (axes,) = comparison_figures.fronts([plane], result).axes
        assert f"{word} front" in [line.get_label() for line in axes.get_lines()]


def test_points_drawn_are_the_results_and_the_fronts(known):
    (plane,) = comparison_report.planes(known)
    (axes,) = comparison_figures.fronts([plane], known).axes
    drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    truth = known.of("brute_force")[0].losses
    complete = truth[~np.isnan(truth).any(axis=1)] * [-1, 1]
    assert sorted(map(tuple, drawn["everything evaluated"])) == sorted(map(tuple, complete[:, ::-1]))
    assert sorted(map(tuple, drawn["true front"])) == sorted(map(tuple, (known.front * [-1, 1])[:, ::-1]))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("size", "accuracy")
    for strategy in ("evolution", "optuna:tpe"):
        runs = known.of(strategy)
        middle = sorted(runs, key=lambda c: c.volume[-1])[2]
        expected = middle.front(30) * [-1, 1]
        points = drawn[f"{strategy}, seed {middle.seed}"]
        assert sorted(map(tuple, points)) == sorted(map(tuple, expected[:, ::-1]))
    assert len(drawn) == 4, "brute force is the front"


def test_one_picture_of_fronts_per_cost(tmp_path):
    planes = comparison_report.planes(comparison(tmp_path, THREE))
    assert [(p.x_title, p.y_title) for p in planes] == [("loss", "bits"), ("size", "bits")]
    assert comparison_report.planes(comparison(tmp_path, SUM)) == ()


def test_of_many_results_some_are_drawn_and_of_long_curves_where_they_change(tmp_path):
    result = comparison(tmp_path, whole=9000, budget=50)
    (plane,) = comparison_report.planes(result)
    (axes,) = comparison_figures.fronts([plane], result).axes
    drawn = axes.get_lines()[0].get_xydata()
    every = -(-len(plane.results) // comparison_figures.SHOWN)
    assert every > 1
    assert len(drawn) <= comparison_figures.SHOWN
    assert np.array_equal(drawn, np.asarray(plane.results)[::every])
    (brute, *_) = comparison_report.panels(result)[0].lines
    assert len(brute.x) < 200
    assert brute.x[-1] == 9000


def test_the_axis_shows_what_strategies_find_and_not_what_brute_force_has_not(known):
    panel = comparison_report.panels(known)[0]
    low, high = comparison_figures.limits(panel)
    others = [line for line in panel.lines if line.strategy != "brute_force"]
    assert low < min(line.low[line.x >= 3].min() for line in others)
    assert high > 1.0
    assert math.isfinite(comparison_figures.limits(dataclasses.replace(panel, lines=panel.lines[:1]))[0])


@pytest.mark.slow
def test_files(known, monkeypatch):
    known.folder.mkdir()
    written = write_comparison(known)
    assert [p.name for p in written] == ["courses.png", "courses.svg", "fronts.png", "fronts.svg"]
    for path in written:
        assert 1000 < path.stat().st_size < 600_000
    monkeypatch.setattr(comparison_report, "can_draw", lambda: False)
    other = comparison(known.folder / "other")
    other.folder.mkdir()
    assert write_comparison(other) == ()
    assert [p.name for p in other.folder.iterdir()] == ["compare.json"]
    assert not any("see it" in line for line in comparison_report.lines(other))


# --- words and numbers


def test_the_json_has_all_numbers(known, monkeypatch):
    monkeypatch.setattr(comparison_report, "can_draw", lambda: False)
    known.folder.mkdir()
    write_comparison(known)
    said = json.loads((known.folder / "compare.json").read_text())
    assert (said["truth"], said["budget"], said["seeds"], said["space_size"]) == (True, 30, [0, 1, 2, 3, 4], 120)
    assert said["front"] == (known.front * [-1, 1]).tolist()
    assert said["reference_point"] == (known.reference * [-1, 1]).tolist()
    assert said["hypervolume"] == known.hypervolume
    for course, run in zip(said["courses"], known.runs, strict=True):
        assert (course["strategy"], course["seed"]) == (run.strategy, run.seed)
        for name, curve in (("volume", run.volume), ("best", -run.best)):
            steps = course[name]
            shown = heights(np.arange(1, len(run) + 1), steps["evaluations"], np.array(steps["value"], dtype=float))
            assert np.array_equal(shown, np.where(np.isfinite(curve), curve, np.nan), equal_nan=True)
            assert steps["seconds"] == run.seconds[np.array(steps["evaluations"]) - 1].tolist()
    for standing, result in zip(said["standings"], known.results, strict=True):
        assert standing["regret"]["values"] == list(result.regret.values)
        reached = [None if math.isinf(v) else v for v in result.evaluations[1].values]
        assert standing["evaluations"][1]["values"] == reached
        assert standing["evaluations"][1]["reached"] == sum(v is not None for v in reached)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((312.0, 312.0, 312.0), "312"),
        ((250.0, 312.0, 331.0, 312.0, 312.0), "312"),
        ((250.0, 300.0, 312.0, 360.0, 400.0), "312 [300, 360]"),
        ((250.0, 300.0, 312.0, math.inf, math.inf), "312 [300, > 400], 3 of 5"),
        ((250.0, math.inf, math.inf, math.inf, math.inf), "> 400, 1 of 5"),
        ((math.inf, math.inf), "> 400, 0 of 2"),
        ((12345.0,), "12,345"),
    ],
)
def test_what_was_not_reached_is_said(values, shown):
    assert comparison_report.reached(spread(values), [400] * len(values)) == shown


def test_what_was_not_reached_exceeds_what_each_run_spent():
    """Of runs that end early no more is said than that."""
    once = spread((math.inf, math.inf, 0.044))
    assert comparison_report.reached(once, (0.11, 0.05, 0.05)) == "> 0.05 [> 0.047, > 0.08], 1 of 3"
    assert comparison_report.reached(once, (0.2, 0.3, 0.05)) == "> 0.2 [> 0.12, > 0.25], 1 of 3"
    # A quartile is at least the one below it.
    some = spread((70, 80, math.inf, math.inf, math.inf))
    assert comparison_report.reached(some, (100, 100, 50, 50, 50)) == "> 80 [80, > 80], 2 of 5"


def test_a_spread_without_any_value():
    assert comparison_report.spread(Spread((math.inf,), math.inf, math.inf, math.inf)) == "no result"
    assert comparison_report.spread(Spread((0.0123456, 0.5), 0.25617, 0.0123456, 0.5)) == "0.26 [0.012, 0.5]"


def test_the_table(known):
    sheet = comparison_report.sheet(known)
    assert sheet.columns == [
        "strategy", "evals to 95 %", "evals to 99 %", "seconds to 95 %", "regret at 30",
        "shortfall at 30", "seconds strategy + evaluating", "repeats",
    ]  # fmt: skip
    assert [row[0] for row in sheet.rows] == list(known.strategies)
    evolution = dict(zip(sheet.columns, sheet.rows[1], strict=True))
    result = known.results[1]
    assert evolution["regret at 30"] == comparison_report.spread(result.regret)
    assert evolution["evals to 99 %"] == comparison_report.reached(result.evaluations[1], [30] * 5)
    assert evolution["repeats"] == "7 of 37"


def test_with_one_objective_there_is_no_column_of_volumes(tmp_path):
    result = comparison(tmp_path, SUM)
    assert comparison_report.sheet(result).columns == [
        "strategy", "evals to the best", "shortfall at 30", "seconds strategy + evaluating", "repeats",
    ]  # fmt: skip
    text = "\n".join(comparison_report.lines(result))
    assert "hypervolume" not in text
    assert "shortfall: by how much the best sum of scaled metrics of a run is worse than the true best" in text
    assert comparison_report.panels(result)[0].y_title == "best sum of scaled metrics so far"
    assert comparison_report.as_json(result)["reference_point"] is None


def test_lines_say_what_it_is_relative_to(tmp_path):
    text = "\n".join(comparison_report.lines(comparison(tmp_path)))
    assert "the true front is known: every candidate was evaluated\n" in text
    assert "of the true hypervolume" in text
    assert "best known" not in text
    assert "failed: 22 of the candidates of all runs" in text
    assert "seeds 0 to 4: median [quartiles] over seeds" in text
    assert "brute_force evaluates all 120 in the order of the space" in text
    assert "17 candidates evaluated now, 3 known from before" in text
    text = "\n".join(comparison_report.lines(comparison(tmp_path, truth=False, seeds=1, constraints=("size <= 5",))))
    assert "the true front is not known: everything is relative to the best of all results so far" in text
    assert "of the best known hypervolume" in text
    assert "worse than the best known\n" in text
    assert "true hypervolume" not in text
    assert "constraints: size <= 5; nothing else counts" in text
    assert "per run, seed 0" in text
    assert "one seed: what differs may be luck; --seeds 5 shows how much of it" in text
    assert "this run alone" not in text
    few = comparison(tmp_path, truth=False, seeds=1)
    alone = dataclasses.replace(few.runs[0], volume=np.array([0.5, 1.0]))
    text = "\n".join(comparison_report.lines(dataclasses.replace(few, strategies=("evolution",), runs=(alone,))))
    assert "these are those of this run alone: a regret of 0 says nothing; compare more strategies" in text
    assert "one seed" not in text


@pytest.mark.parametrize(
    ("objectives", "shown"),
    [
        (TWO, ("error (1 − accuracy)", 1.0, 1.0)),
        (Objectives((Objective("accuracy", 2.0, "maximize"),)), ("accuracy × 2", 0.0, -1.0)),
        (Objectives((Objective("loss", 1.0, "minimize"),)), ("loss", 0.0, 1.0)),
        (SUM, ("sum of scaled metrics", 0.0, -1.0)),
    ],
)
def test_how_the_leading_objective_is_shown(objectives, shown, tmp_path):
    assert comparison_report.measure(comparison(tmp_path, objectives)) == shown


@pytest.mark.parametrize(("objectives", "volume"), [(TWO, True), (SUM, False)])
def test_the_runs_as_a_data_frame(objectives, volume, tmp_path):
    pytest.importorskip("pandas", reason="the extra 'pandas' is not installed")
    result = comparison(tmp_path, objectives)
    frame = result.frame
    assert frame.index.tolist() == [(run.strategy, run.seed) for run in result.runs]
    assert ("regret" in frame, "seconds_to_99" in frame) == (volume, volume)
    for of in result.results:
        rows = frame.loc[of.strategy]
        assert tuple(rows["shortfall"]) == of.shortfall.values
        assert tuple(rows["evaluations_to_best"]) == of.to_best.values
        if volume:
            assert tuple(rows["regret"]) == of.regret.values
            assert tuple(rows["evaluations_to_95"]) == of.evaluations[0].values
            assert tuple(rows["seconds_to_99"]) == of.seconds[1].values
