"""What the figures show: the tables they are drawn from, and that what is drawn is what is in the tables."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from matplotlib import cbook
from mpl_toolkits.mplot3d import proj3d
from PIL import Image

from bitfront.errors import ConfigError
from bitfront.pareto import hypervolume
from bitfront.report import data, figures, grid
from bitfront.report.importance import Effect, Influence
from bitfront.report.layout import spaced, wide_text
from bitfront.spaces.described import Size
from synthetic_runs import TWO, choice, full_grid, site, write

TRIALS = 100_000


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """10⁵ trials, with a few failures and NaN."""
    rng = np.random.default_rng(0)
    space = tuple(site(f"fc{i}", choice("data_in", 2, 3, 4, 8), choice("weight", 2, 3, 4, 6, 8)) for i in range(4))
    codes = np.stack([rng.integers(0, 4 + i % 2, TRIALS) for i in range(8)], axis=1)
    bits = codes[:, 1::2].sum(axis=1) + 1.0
    accuracy = 1 - 1 / (bits + codes[:, 0] + rng.random(TRIALS))
    errors = [""] * TRIALS
    for row in range(0, TRIALS, 10_000):
        accuracy[row], errors[row] = np.nan, "it blew up"
    run = write(
        tmp_path_factory.mktemp("long") / "long", codes, {"accuracy": accuracy, "average_bitwidth": bits}, space=space,
        errors=errors,
    )  # fmt: skip
    assert len(run) == TRIALS
    return run


@pytest.fixture
def odd(tmp_path):
    """Runs that are not as one expects: by name."""

    def of(name):
        codes, folder = full_grid(), tmp_path / name
        bits = 2.0 ** (1 + codes[:, 1])
        accuracy = np.array([0.5, 0.6, 0.7, 0.5, 0.65, 0.72])
        errors = [""] * 6
        if name == "one trial":
            return write(folder, codes[:1], {"accuracy": accuracy[:1], "average_bitwidth": bits[:1]}, stopped="")
        if name == "no trial":
            return write(folder, codes[:0], {"accuracy": [], "average_bitwidth": []}, stopped="")
        if name == "nothing to choose":
            space = (site("fc1", choice("weight", 4)),)
            return write(folder, codes[:1, :0], {"accuracy": [0.5], "average_bitwidth": [4]}, space=space)
        if name == "failures":
            accuracy[[1, 4]], errors[1], errors[4] = np.nan, "boom $x$ <b>", "boom $x$ <b>"
        if name == "all failed":
            accuracy[:], bits[:], errors = np.nan, np.nan, ["no"] * 6
        if name == "NaN":
            accuracy[2] = np.nan
            return write(folder, codes, {"accuracy": accuracy, "average_bitwidth": bits, "loss": np.full(6, np.nan)})
        if name == "infinite":
            accuracy[0] = -np.inf
        if name == "one objective":
            return write(
                folder, codes, {"accuracy": accuracy, "model_size": bits}, objectives=[("accuracy", "maximize")], samples=None
            )  # fmt: skip
        if name == "summed":
            return write(folder, codes, {"accuracy": accuracy, "average_bitwidth": bits}, summed="maximize")
        if name == "no accuracy":
            metrics = {"loss": 1 - accuracy, "model_size": bits}
            return write(
                folder, codes, metrics, objectives=[("loss", "minimize"), ("model_size", "minimize")], reference={}
            )
        if name == "nothing fulfils":
            bound = {"text": "accuracy >= 2", "metric": "accuracy", "comparison": ">=", "bound": 2.0, "drop": False}
            return write(folder, codes, {"accuracy": accuracy, "average_bitwidth": bits}, constraints=[bound])
        return write(folder, codes, {"accuracy": accuracy, "average_bitwidth": bits}, errors=errors)

    return of


#: name → trials that are drawn, how many are on the front, what stands in the cells of the first grid.
ODD = {
    "one trial": (1, 1, ["0.5", "–", "–", "–", "–", "–"]),
    "no trial": (0, 0, []),
    "nothing to choose": (1, 1, []),
    "failures": (4, 3, ["0.5", "0.5", "failed", "failed", "0.7", "0.72"]),
    "all failed": (0, 0, []),
    "NaN": (6, 4, ["0.5", "0.5", "0.6", "0.65", "failed", "0.72"]),
    "infinite": (6, 3, ["failed", "0.5", "0.6", "0.65", "0.7", "0.72"]),
    "one objective": (6, 1, ["0.5", "0.5", "0.6", "0.65", "0.7", "0.72"]),
    "summed": (6, 1, ["0.5", "0.5", "0.6", "0.65", "0.7", "0.72"]),
    "no accuracy": (6, 4, ["0.5", "0.5", "0.4", "0.35", "0.3", "0.28"]),
    "nothing fulfils": (6, 0, ["0.5", "0.5", "0.6", "0.65", "0.7", "0.72"]),
}


def all_figures(run):
    cloud, influences = data.cloud(run), data.influences(run)
    return {
        "front": figures.front(run, cloud),
        "layers": figures.layers(data.layer_map(run, cloud.front)),
        "importance": figures.importances(influences),
        "effects": figures.effects(run, influences),
        "history": figures.history(data.history(run)),
        "parallel": figures.parallel(data.parallel(run, influences)),
        "failures": figures.failures(data.failures(run)),
        **{f"grid-{g.metric}": grid.heatmap(g) for g in grid.grids(run)},
        **{f"bars-{g.metric}": grid.bars(g) for g in grid.grids(run)},
    }


def line(axes, label):
    (labelled,) = [line for line in axes.get_lines() if line.get_label() == label]
    return labelled


# ---- the front


def test_bounds_of_constraints_are_lines_where_there_are_points_on_both_sides(tmp_path):
    codes = full_grid()
    metrics = {"accuracy": np.array([0.5, 0.6, 0.7, 0.5, 0.65, 0.72]), "average_bitwidth": 2.0 ** (1 + codes[:, 1])}
    bounds = [("average_bitwidth", "<=", 5.0), ("accuracy", ">=", 0.6), ("average_bitwidth", "<=", 100.0)]
    kept = [{"text": "", "metric": m, "comparison": c, "bound": b, "drop": False} for m, c, b in bounds]
    run = write(tmp_path / "bounded", codes, metrics, constraints=kept)
    (axes,) = figures.front(run, data.cloud(run)).axes
    lines = [drawn for drawn in axes.get_lines() if drawn.get_linestyle() == "--"]
    assert [list(map(float, drawn.get_xdata())) for drawn in lines] == [[5, 5], [0, 1]]
    assert [list(map(float, drawn.get_ydata())) for drawn in lines] == [[0, 1], [0.6, 0.6]]
    assert [text.get_text() for text in axes.get_legend().get_texts()].count("constraints") == 1


def test_every_trial_is_a_point_and_the_front_has_its_intervals(six):
    cloud = data.cloud(six)
    assert cloud.rows.tolist() == list(range(6))
    assert six.columns.number[cloud.front].tolist() == [5, 4, 3]
    for place, row in enumerate(cloud.front):
        assert (cloud.low[place], cloud.high[place]) == six.row(int(row)).intervals["accuracy"]
    assert cloud.note == "6 trials, 3 on the front"
    (axes,) = figures.front(six, cloud).axes
    points = line(axes, "trials").get_xydata()
    assert sorted(map(tuple, points)) == sorted(
        zip(six.columns.metrics["average_bitwidth"], six.columns.metrics["accuracy"], strict=True)
    )
    assert axes.containers[0].lines[0].get_xydata() == pytest.approx(np.array([[2, 0.82], [4, 0.86], [8, 0.9]]))
    low = [segment[0][1] for segment in axes.containers[0].lines[2][0].get_segments()]
    assert low == pytest.approx(cloud.low[::-1].tolist())
    assert line(axes, "float model").get_xydata().tolist() == [[32, 0.97]]
    assert axes.get_xlabel() == "average_bitwidth [bits]"
    assert axes.get_ylabel() == "accuracy, 95 % intervals"
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("direction", "path"),
    [
        ("minimize", [(2, 0.82), (4, 0.82), (4, 0.86), (8, 0.86), (8, 0.9)]),
        ("maximize", [(2, 0.9), (2, 0.86), (4, 0.86), (4, 0.82), (8, 0.82)]),
    ],
)
def test_a_front_is_a_staircase_of_what_its_members_reach(tmp_path, direction, path):
    objectives = (("accuracy", "maximize"), ("average_bitwidth", direction))
    accuracy = np.array([0.82, 0.86, 0.9] if direction == "minimize" else [0.9, 0.86, 0.82])
    metrics = {"accuracy": accuracy, "average_bitwidth": np.array([2.0, 4, 8])}
    run = write(tmp_path / "run", full_grid()[:3], metrics, objectives=objectives)
    (axes,) = figures.front(run, data.cloud(run)).axes
    (drawn,) = [drawn for drawn in axes.get_lines() if drawn.get_drawstyle() != "default"]
    steps = cbook.STEP_LOOKUP_MAP[drawn.get_drawstyle()](*drawn.get_xydata().T)
    assert np.array(steps).T.tolist() == [list(place) for place in path]


@pytest.mark.parametrize("most", [30, 300, 3_000, 300_000])
def test_numbers_on_a_logarithmic_axis_do_not_meet(tmp_path, most):
    codes = full_grid()
    metrics = {"accuracy": codes[:, 1] * 0.1, "average_bitwidth": np.geomspace(32, 32 * most, len(codes))}
    run = write(tmp_path / "run", codes, metrics)
    drawn = figures.front(run, data.cloud(run))
    (axes,) = drawn.axes
    drawn.canvas.draw()
    low, high = axes.get_xlim()
    boxes = [
        label.get_window_extent()
        for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= place <= high
    ]
    assert axes.get_xscale() == "log"
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_numbers_below_effects_and_history_do_not_meet(tmp_path):
    codes = full_grid()
    metrics = {"accuracy": codes[:, 0] * 0.1, "average_bitwidth": 1e6 * np.arange(1, len(codes) + 1)}
    run = write(tmp_path / "run", codes, metrics)
    run.units["average_bitwidth"] = "bit operations"
    effects, history = figures.effects(run, data.influences(run)), figures.history(data.history(run))
    for axes in effects.axes:
        assert_apart(effects, axes.get_xticklabels())
    for axes in history.axes[:3]:
        assert set(axes.get_xticks() % 1) == {0}


def assert_apart(figure, labels):
    """No label touches the next one."""
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_one_panel_per_cost(tmp_path):
    codes = full_grid()
    metrics = {"accuracy": codes[:, 0] * 0.1, "average_bitwidth": codes[:, 1] + 1.0, "model_size": codes[:, 1] * 3.0}
    objectives = [("accuracy", "maximize"), ("average_bitwidth", "minimize"), ("model_size", "minimize")]
    run = write(tmp_path / "three", codes, metrics, objectives=objectives)
    drawn = figures.front(run, data.cloud(run))
    assert [axes.get_xlabel() for axes in drawn.axes] == ["average_bitwidth [bits]", "model_size [bytes]"]


def test_of_many_trials_the_front_and_some_of_the_others_are_drawn(long_run):
    cloud = data.cloud(long_run)
    assert len(cloud.rows) <= data.SHOWN + data.FRONT
    assert set(cloud.front) <= set(cloud.rows)
    assert cloud.on_front == len(long_run.front_rows)
    assert f"{len(cloud.rows):,} of 99,990 trials are drawn" in cloud.note
    shown, every = long_run.columns.metrics["accuracy"][cloud.rows], long_run.columns.metrics["accuracy"]
    assert np.isfinite(shown).all()
    # The cloud's outline is kept, not only where it is dense.
    assert shown.min() == np.nanmin(every)
    assert shown.max() == np.nanmax(every)
    assert set(long_run.columns.metrics["average_bitwidth"][cloud.rows]) == set(
        long_run.columns.metrics["average_bitwidth"][long_run.columns.complete]
    )


# ---- what the layers chose


def test_the_map_says_what_each_trial_of_the_front_chose(tmp_path):
    space = (
        site("fc1", choice("weight", 2, 8), optional=True),
        site("fc2", choice("data_in", 4), choice("weight", 4, 8)),
        site("wide", choice("width", "x0.5", "x2")),
    )
    # fc1/name, fc1/weight, fc2/weight, wide/width
    codes = [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]]
    run = write(tmp_path / "map", codes, {"accuracy": [0.9, 0.8, 0.7], "average_bitwidth": [9, 8, 7]}, space=space)
    layer_map = data.layer_map(run, run.front_rows)
    assert layer_map.numbers == (0, 1, 2)
    assert layer_map.places == ("fc1/weight", "fc2/weight", "wide/width")  # fc2/data_in is the same everywhere
    assert layer_map.labels == (
        ("float", "int8.auto", "int2.auto"),
        ("int4.auto", "int8.auto", "int4.auto"),
        ("x0.5", "x2", "x2"),
    )
    assert layer_map.shades.tolist() == [[1.0, 1.0, 0.25], [0.5, 1.0, 0.5], [0.25, 1.0, 1.0]]
    written = [t.get_text() for t in figures.layers(layer_map).axes[0].texts]
    assert written == ["float", "8", "2", "4", "8", "4", "x0.5", "x2", "x2"]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["int8.auto", "int4.auto"], ["8", "4"]),
        (["int8.6", "int8.4", "int16.8"], ["int8.6", "int8.4", "int16.8"]),
        (["affine8sc", "float", "x1.5"], ["8", "float", "x1.5"]),
        (["affine8sc", "my8"], ["8", "my8"]),
    ],
)
def test_labels_are_shortened_where_that_tells_them_apart(labels, shown):
    bits = {"int8.auto": 8, "int4.auto": 4, "int8.6": 8, "int8.4": 8, "int16.8": 16, "affine8sc": 8, "float": 32}
    sizes = {label: Size("bits", b) for label, b in bits.items()} | {"x1.5": Size("width", 1.5)}
    assert data.shortened(labels, sizes) == tuple(shown)


# ---- how it went


def test_history_is_the_best_so_far_and_the_volume(six):
    course = data.history(six)
    accuracy, bits = course.courses
    assert accuracy.values.tolist() == six.columns.metrics["accuracy"].tolist()
    assert accuracy.best.tolist() == pytest.approx([0.8, 0.84, 0.88, 0.9])
    assert accuracy.steps.tolist() == [0, 1, 2, 5]
    assert (bits.steps.tolist(), bits.best.tolist(), bits.direction) == ([0], [2.0], "minimize")
    assert course.trials.tolist() == [1, 2, 3, 4, 5, 6]
    assert course.seconds.tolist() == pytest.approx([0.001 * i for i in range(1, 7)])
    losses = six.objectives.losses(six.columns.metrics)
    scaled = (losses - losses.min(axis=0)) / (losses.max(axis=0) - losses.min(axis=0))
    assert course.volume.tolist() == pytest.approx([hypervolume(scaled[:n], np.ones(2)) for n in range(1, 7)])
    panels = figures.history(course).axes
    assert panels[0].get_lines()[1].get_xydata().tolist()[-1] == [6, 0.9]
    assert panels[2].get_lines()[0].get_ydata().tolist() == course.volume.tolist()
    assert panels[3].get_lines()[0].get_xdata().tolist() == course.seconds.tolist()


def test_history_of_many_trials_keeps_every_improvement(long_run):
    course = data.history(long_run)
    best = np.fmax.accumulate(np.nan_to_num(long_run.columns.metrics["accuracy"], nan=-1))
    assert course.courses[0].best.tolist() == np.unique(best[best > -1]).tolist()
    assert 0 < len(course.courses[0].rows) <= data.SHOWN
    assert len(course.volume) == data.MOMENTS
    losses = long_run.objectives.losses(long_run.columns.metrics)
    low, high = np.nanmin(losses, axis=0), np.nanmax(losses, axis=0)
    ends = course.trials[:: data.MOMENTS // 8]
    volumes = [hypervolume((losses[:end] - low) / (high - low), np.ones(2)) for end in ends]
    assert course.volume[:: data.MOMENTS // 8].tolist() == pytest.approx(volumes)


# ---- parallel coordinates, failures


def test_parallel_coordinates_have_a_line_per_trial(six):
    coordinates = data.parallel(six, data.influences(six))
    assert [a.name for a in coordinates.axes] == ["fc1/data_in", "fc1/weight", "accuracy", "average_bitwidth"]
    assert coordinates.values[:2].T.tolist() == six.columns.code.tolist()
    assert coordinates.front.sum() == 3
    up = data.heights(coordinates)
    assert up[0].tolist() == [0.25, 0.25, 0.25, 0.75, 0.75, 0.75]
    assert up[2, 5] == pytest.approx(0.98)
    axes = figures.parallel(coordinates).axes[0]
    assert [lines.get_segments()[0].shape for lines in axes.collections] == [(4, 2), (4, 2)]
    assert [len(lines.get_segments()) for lines in axes.collections] == [3, 3]
    assert axes.get_title() == "6 trials, the front in blue"
    assert figures.parallel(data.parallel(six, (), limit=2)).axes[0].get_title().startswith("4 of 6 trials")


def test_failures_are_counted_by_what_they_say(odd):
    run = odd("failures")
    assert data.failures(run) == (data.Failure("boom $x$ <b>", 2, 1),)
    assert len(data.cloud(run).rows) == 4
    (axes,) = figures.failures(data.failures(run)).axes
    assert axes.patches[0].get_width() == 2
    assert data.undefined(odd("NaN")) == {"accuracy": 1, "loss": 6}


# ---- grids


def test_a_grid_has_the_trials_values_in_its_cells(six):
    cells = grid.grid(six, "fc1/weight", "fc1/data_in", "accuracy")
    assert (cells.columns, cells.rows) == (("int2.auto", "int4.auto", "int8.auto"), ("int4.auto", "int8.auto"))
    assert cells.values.tolist() == [pytest.approx([0.8, 0.84, 0.88]), pytest.approx([0.82, 0.86, 0.9])]
    axes, bar = grid.heatmap(cells).axes
    assert [t.get_text() for t in axes.texts] == ["0.8", "0.84", "0.88", "0.82", "0.86", "0.9"]
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("fc1/weight", "fc1/data_in", "accuracy")
    (space,) = grid.bars(cells).axes
    assert len(space.collections) == 6
    assert sorted(t.get_text() for t in space.texts) == sorted(cells.text(r, c) for r in range(2) for c in range(3))
    assert space.get_zlim()[0] == pytest.approx(0.7)
    assert "the upright axis begins at 0.7" in space.get_title()


@pytest.mark.parametrize("label", ["int{}", "affine{}sc-mse", "fixed point of {} bits, saturating"])
def test_labels_of_a_grid_have_room(six, label):
    cells = grid.grid(six, "fc1/weight", "fc1/data_in", "accuracy")
    names = tuple(label.format(i) for i in range(3))
    cells = dataclasses.replace(cells, columns=names, rows=names[:2])
    heatmap = grid.heatmap(cells)
    below = heatmap.axes[0].get_xticklabels()
    if len(label) > 20:
        assert {text.get_rotation() for text in below} == {45}
    else:
        assert_apart(heatmap, below)
    bars = grid.bars(cells)
    bars.draw_without_rendering()
    (axes,) = bars.axes
    name = axes.yaxis.label.get_window_extent()
    assert not any(name.overlaps(text.get_window_extent()) for text in axes.get_yticklabels())


def test_cells_never_evaluated_differ_from_zero_and_from_failed_ones(tmp_path):
    run = write(
        tmp_path / "holes", [[0, 0], [0, 1], [1, 0]],
        {"accuracy": [0.0, np.nan, 0.5], "average_bitwidth": [1, np.nan, 2]}, errors=["", "boom", ""],
    )  # fmt: skip
    cells = grid.grid(run, "fc1/weight", "fc1/data_in", "accuracy")
    texts = [[cells.text(r, c) for c in range(3)] for r in range(2)]
    assert texts == [["0", "failed", "–"], ["0.5", "–", "–"]]
    axes = grid.heatmap(cells).axes[0]
    assert sorted(p.get_hatch() for p in axes.patches) == ["///", "///", "///", "xx"]
    (space,) = grid.bars(cells).axes
    assert len(space.get_lines()) == 8  # four crosses on the floor
    assert space.get_zlim()[0] == 0


def test_other_parameters_are_averaged(long_run):
    cells = grid.grid(long_run, "fc0/data_in", "fc3/weight", "accuracy")
    codes, values = long_run.columns.code, long_run.columns.metrics["accuracy"]
    inside = (codes[:, 0] == 1) & (codes[:, 7] == 2) & np.isfinite(values)
    assert cells.values[2, 1] == pytest.approx(values[inside].mean())
    assert cells.trials[2, 1] == inside.sum()
    assert cells.trials.sum() == long_run.columns.complete.sum()
    assert cells.failed.sum() == 10
    assert "mean of up to" in cells.note


@pytest.mark.parametrize(
    ("x", "y", "metrics", "message"),
    [
        (
            "fc1/wieght", "fc1/data_in", [],
            "x: this run has no parameter that varies 'fc1/wieght'; allowed: fc1/data_in, fc1/weight. "
            "Did you mean 'fc1/weight'?",
        ),
        (
            "fc1/weight", "fc1/data_in", ["acuracy"],
            "metrics: this run has no metric with a value 'acuracy'; allowed: accuracy, average_bitwidth. "
            "Did you mean 'accuracy'?",
        ),
        ("fc1/weight", None, [], "y: missing, and a grid needs two parameters; allowed: fc1/data_in, fc1/weight"),
        ("fc1/weight", "fc1/weight", [], "y: 'fc1/weight' is x already; a grid needs two parameters"),
    ],
)  # fmt: skip
def test_what_no_grid_can_be_drawn_of(six, x, y, metrics, message):
    with pytest.raises(ConfigError) as raised:
        grid.grids(six, x, y, metrics)
    assert str(raised.value) == message


def test_metrics_of_a_grid_need_two_parameters(six, long_run):
    assert [g.metric for g in grid.grids(six, metrics=["accuracy"])] == ["accuracy"]
    with pytest.raises(ConfigError, match="metrics: a grid needs two parameters, x and y; allowed: fc0/data_in, "):
        grid.grids(long_run, metrics=["accuracy"])


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (12, 3), (3, 15)])
def test_grids_of_any_shape(tmp_path, shape):
    space = (site("fc1", choice("data_in", *range(2, 2 + shape[0])), choice("weight", *range(2, 2 + shape[1]))),)
    codes = full_grid(space)
    values = np.arange(float(len(codes)))
    run = write(tmp_path / "shape", codes, {"accuracy": values, "average_bitwidth": values}, space=space)
    if len(run.space.parameters) == 1:
        assert grid.grids(run) == ()
        return
    cells = grid.grids(run)[0]
    assert cells.values.shape == shape[::-1]
    assert cells.values.T.tolist() == values.reshape(shape).tolist()
    for figure in (grid.heatmap(cells), grid.bars(cells)):
        saved(figure)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([0.2, 0.9], (0.0, 0.2, 0.9)),
        ([0.8, 0.9], (0.7, 0.8, 0.9)),
        ([0.0, 0.0], (0.0, 0.0, 0.0)),
        ([-3.0, -1.0], (-3.0, -3.0, 0.0)),
        ([5.0], (0.0, 5.0, 5.0)),
        ([], (0.0, 0.0, 1.0)),
    ],
)
def test_where_the_upright_axis_begins(known, expected):
    assert grid.base(np.array(known)) == pytest.approx(expected)


# ---- odd runs


def saved(figure):
    """The size of a figure in pixels at 30 dots per inch. Checks that it does not have only one colour."""
    out = io.BytesIO()
    figure.savefig(out, dpi=30)
    picture = Image.open(out).convert("L")
    low, high = picture.getextrema()
    assert high - low > 100
    return picture.size


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_runs_are_drawn(odd, name):
    run = odd(name)
    drawn = all_figures(run)
    for title, figure in drawn.items():
        assert saved(figure) == pytest.approx(30 * figure.get_size_inches(), abs=1), title
    trials, on_front, cells = ODD[name]
    points = line(drawn["front"].axes[0], "trials").get_xdata()
    assert (len(points), len(run.front)) == (trials, on_front)
    heatmaps = [figure for title, figure in drawn.items() if title.startswith("grid-")]
    assert ([t.get_text() for t in heatmaps[0].axes[0].texts] if heatmaps else []) == cells


@pytest.mark.long
@pytest.mark.slow
def test_a_long_run_is_drawn(long_run):
    drawn = all_figures(long_run)
    axes, rows = drawn["front"].axes[0], data.cloud(long_run).rows
    expected = [long_run.columns.metrics[m][rows] for m in ("average_bitwidth", "accuracy")]
    assert np.array_equal(line(axes, "trials").get_xydata().T, expected)
    saved(drawn["front"])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("one objective", "one objective has no volume; its course says the same"),
        ("one trial", "fewer than two trials count"),
        ("nothing fulfils", "fewer than two trials count"),
    ],
)
def test_without_a_volume_the_reason_is_given(odd, name, missing):
    course = data.history(odd(name))
    assert (course.missing, len(course.volume)) == (missing, 0)


@pytest.mark.slow
def test_the_same_figure_makes_the_same_bytes(six, tmp_path):
    def written(folder):
        folder.mkdir()
        saved = figures.save(figures.front(six, data.cloud(six)), folder, "front")
        assert [p.name for p in saved] == ["front.png", "front.svg"]
        return [p.read_bytes() for p in saved]

    assert written(tmp_path / "a") == written(tmp_path / "b")


def test_two_parameters_are_two():
    assert len(TWO[0]["alternatives"][0]["operands"]) == 2


def test_labels_of_effects_that_have_no_room_share_one():
    """An axis of 100 points from 0 to 1; a character is about four points wide."""

    def labels(*means):
        options = tuple(Effect(f"w{i}", 0.0, mean, 1) for i, mean in enumerate(means))
        return spaced(Influence("fc1/weight", 0.5, options), (0.0, 1.0), 100, {})

    assert labels(0.2, 0.8, 0.5) == [(0.2, "w0"), (0.5, "w2"), (0.8, "w1")]
    assert labels(0.4, 0.44, 0.8) == [(pytest.approx(0.42), "w0 w1"), (0.8, "w2")]
    # In the frame; of many, the first and the last.
    ((middle, text),) = labels(1.0, 1.0, 1.0, 1.0, 1.0)
    assert text == "w0 … w4"
    assert middle == pytest.approx(1 - (wide_text(text) + 4) / 200)


def test_axes_of_bits_have_powers_of_two(six, tmp_path):
    drawn = figures.front(six, data.cloud(six)).axes[0]
    assert set(np.log2(drawn.get_xticks()) % 1) == {0}
    axes = figures.effects(six, data.influences(six)).axes[1]
    assert set(np.log2(np.diff(axes.get_xticks())) % 1) == {0}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_metric_that_is_the_same_everywhere_is_drawn_without_complaints(tmp_path, value):
    same = np.full(6, value)
    run = write(tmp_path / "same", full_grid(), {"accuracy": same, "average_bitwidth": same})
    for figure in all_figures(run).values():
        saved(figure)


def test_values_of_bars_do_not_cover_each_other(tmp_path):
    """Sixteen bars of one height: those in the first row hide most of the others."""
    space = (site("fc1", choice("data_in", 2, 4, 6, 8), choice("weight", 2, 4, 6, 8)),)
    rng = np.random.default_rng(0)
    run = write(
        tmp_path / "bars", full_grid(space), {"accuracy": 0.9 + 0.01 * rng.random(16), "average_bitwidth": np.ones(16)},
        space=space,
    )  # fmt: skip
    figure = grid.bars(grid.grids(run)[0])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = []
    for text in axes.texts:
        x, y, _ = proj3d.proj_transform(*text.get_position_3d(), axes.get_proj())
        width = 0.6 * len(text.get_text()) * text.get_fontsize() * figure.dpi / 72
        boxes.append((*axes.transData.transform((x, y)), width))
    assert 4 <= len(boxes) < 16
    high = 8 * figure.dpi / 72
    assert all(
        abs(a[1] - b[1]) >= high or abs(a[0] - b[0]) >= (a[2] + b[2]) / 2 for a, b in itertools.combinations(boxes, 2)
    )
