"""The page: what is in it, and that a browser shows it, by mouse, keyboard, in the dark and on a phone."""

import contextlib
import json
import re

import numpy as np
import pytest

from bitfront.engine.storage.store import Store
from bitfront.report import writing
from bitfront.report.page import LIMIT
from bitfront.report.writing import write_report
from synthetic_runs import choice, full_grid, site, write

EVIL = "<img src=x onerror=alert(1)>"


def page_of(run, folder, **options):
    """The page's text; the figures are not drawn, other tests look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitfront.report.figures.save", lambda figure, folder, name: [folder / name])
        for drawing in ("front", "layers", "importances", "effects", "history", "parallel"):
            patch.setattr(f"bitfront.report.figures.{drawing}", lambda *_: None)
        return write_report(run, folder, **options).page


def content(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


@pytest.fixture
def opened(browser):
    """Opens a page; at the end nobody has complained and nothing has been asked for."""
    contexts, trouble, requests = [], [], []

    def show(path, width=1280, dark=False, **options):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.on("dialog", lambda d: (trouble.append(d.message), d.dismiss()))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield show
    for context in contexts:
        context.close()
    assert trouble == []
    assert [r for r in requests if not r.startswith(("file:", "data:", "blob:"))] == []
    assert len([r for r in requests if r.startswith("file:")]) == len(contexts)


@pytest.fixture(scope="module")
def six_page(six, tmp_path_factory):
    return page_of(six, tmp_path_factory.mktemp("six"))


# ---- what is in it


def test_the_page_holds_every_trial(six, six_page):
    data = content(six_page)
    assert data["number"] == [0, 1, 2, 3, 4, 5]
    assert data["values"]["accuracy"] == pytest.approx(six.columns.metrics["accuracy"].tolist())
    assert np.array(data["choices"]).T.tolist() == six.columns.code.tolist()
    assert [data["number"][p] for p in data["front"]] == [5, 4, 3]
    assert data["metrics"]["average_bitwidth"] == "average_bitwidth [bits]"


def test_the_page_has_a_policy_that_forbids_it_to_load_anything(six_page):
    text = six_page.read_text(encoding="utf-8")
    assert (
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:\""
        in text
    )
    assert text.count("<script") - text.count('"<script') >= 3
    assert len(text.encode()) < LIMIT


@pytest.mark.long
@pytest.mark.slow
def test_a_long_run_makes_a_page_that_can_be_mailed(tmp_path):
    rng = np.random.default_rng(0)
    count, layers = 100_000, 20
    space = tuple(site(f"blocks_{i}_linear", choice("data_in", 4, 8), choice("weight", 2, 4, 8)) for i in range(layers))
    codes = np.stack([rng.integers(0, 2 + i % 2, count) for i in range(2 * layers)], axis=1)
    bits = codes.sum(axis=1) + 1.0
    run = write(
        tmp_path / "long",
        codes,
        {"accuracy": 1 - 1 / (bits + rng.random(count)), "average_bitwidth": bits},
        space=space,
    )
    path = page_of(run, tmp_path / "out")
    assert path.stat().st_size < LIMIT
    data = content(path)
    assert "of 100,000 trials are drawn" in data["note"]
    assert {data["number"][p] for p in data["front"]} == set(run.columns.number[run.front_rows].tolist())
    assert data["parallel"]["left_out"] == f"the {2 * layers - 10} parameters that matter least"


def test_too_few_trials_do_not_tell_which_parameters_matter_least(tmp_path):
    space = tuple(site(f"conv_{i}", choice("data_in", 4, 8), choice("weight", 4, 8)) for i in range(10))
    codes = np.random.default_rng(0).integers(0, 2, (12, 20))
    bits = codes.sum(axis=1) + 1.0
    run = write(tmp_path / "few", codes, {"accuracy": 1 - 1 / bits, "average_bitwidth": bits}, space=space)
    data = content(page_of(run, tmp_path / "out"))
    assert data["parallel"]["left_out"] == "the last 10 parameters; how much they matter is not known"


def test_where_there_is_no_room_the_page_says_so(six, tmp_path, monkeypatch):
    monkeypatch.setattr("bitfront.report.page.LIMIT", 1)
    text = page_of(six, tmp_path / "out").read_text(encoding="utf-8")
    assert "For bars there is no room in this page; they stand in the folder figures." in text
    assert "<img" not in text[text.index('<section id="grids">') : text.index('<section id="failures">')]


def test_failures_and_nan_are_reported(tmp_path):
    codes = full_grid()
    accuracy = np.array([0.5, np.nan, 0.7, 0.5, np.nan, 0.72])
    errors = ["", f"boom {EVIL}", "", "", "", ""]
    run = write(tmp_path / "bad", codes, {"accuracy": accuracy, "average_bitwidth": codes[:, 1] + 1.0}, errors=errors)
    text = page_of(run, tmp_path / "out").read_text(encoding="utf-8")
    assert "NaN" not in text[text.index('id="data"') : text.index("</script>", text.index('id="data"'))]
    assert EVIL not in text
    assert "boom &lt;img src=x onerror=alert(1)&gt;" in text
    assert "accuracy has no value in 1 trials" in text
    assert "6 of 6 candidates, 1 failed" in text


def test_a_run_that_goes_on_is_shown_as_that(tmp_path):
    """While its store is open for writing, with what was written after it was created."""
    run = write(tmp_path / "on", full_grid()[:0], {"accuracy": [], "average_bitwidth": []}, stopped="")
    path, metrics = run.folder / "trials.sqlite", ("accuracy", "average_bitwidth")
    with contextlib.closing(Store(path, metrics, full_grid().shape[1])) as writing:
        writing.add(full_grid()[:1], {"accuracy": np.array([0.5]), "average_bitwidth": np.array([2.0])}, [""], [0.1])
        text = page_of(run.folder, tmp_path / "out").read_text(encoding="utf-8")
    assert "the search was still running when this page was written" in text
    assert "3 effects need 6 trials with accuracy, and there are 1" in text


def test_where_the_report_goes(six, monkeypatch):
    monkeypatch.setattr("bitfront.report.figures.save", lambda figure, folder, name: [folder / name])
    written = writing.write_report(six.folder)
    assert written.page == six.folder / "report.html"
    names = [path.name for path in written.figures]
    assert names[:6] == ["front", "layers", "importance", "effects", "history", "parallel"]
    assert names[6:] == ["grid-accuracy", "grid-average_bitwidth", "bars-accuracy", "bars-average_bitwidth"]


# ---- in a browser


def points(page, name):
    """What the picture has drawn: (x, y) of a trace's points."""
    coordinates = page.evaluate(
        "name => { const t = document.getElementById('front-plot').data.find(t => t.name === name);"
        " return t.x.map((x, i) => [x, t.y[i]]); }",
        name,
    )
    drawn = page.locator(
        f"#front-plot .scatterlayer .trace:nth-child({1 if name == 'trials' else 2}) path.point"
    ).count()
    assert drawn == len(coordinates)
    return coordinates


def centre(page, trace, index):
    box = page.locator("#front-plot .scatterlayer .trace").nth(trace).locator("path.point").nth(index).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_points_hover_and_click(six, six_page, opened):
    page = opened(six_page)
    metrics = six.columns.metrics
    expected = [[float(metrics["average_bitwidth"][r]), float(metrics["accuracy"][r])] for r in (3, 4, 5)]
    assert points(page, "front") == [pytest.approx(p) for p in expected]
    rest = [[float(metrics["average_bitwidth"][r]), float(metrics["accuracy"][r])] for r in (0, 1, 2)]
    assert points(page, "trials") == [pytest.approx(p) for p in rest]
    assert page.locator("#front-plot .errorbar").count() == 3
    page.locator("#front-plot").scroll_into_view_if_needed()
    page.mouse.move(*centre(page, 1, 0))
    page.wait_for_selector("#front-plot .hoverlayer .hovertext")
    label = page.locator("#front-plot .hoverlayer").text_content()
    assert "trial 3" in label
    assert "fc1/weight int2.auto" in label
    page.mouse.click(*centre(page, 1, 0))
    details = page.locator("#details")
    details.locator("h3", has_text="Trial 3, on the front").wait_for()
    assert details.locator("pre.command").text_content() == (f"bitfront transform --run {six.folder} --check --trial 3")
    assert json.loads(details.locator("pre.spelled").text_content()) == six.trial(3).config
    # One that is not on the front, too; not so soon that plotly takes the two for a double click.
    page.wait_for_timeout(600)
    page.mouse.click(*centre(page, 0, 0))
    details.locator("h3", has_text="Trial 0").wait_for()
    assert json.loads(details.locator("pre.spelled").text_content()) == six.trial(0).config


def test_every_picture_is_drawn(six, six_page, opened):
    page = opened(six_page)
    drawn = page.locator(".js-plotly-plot")
    ids = drawn.evaluate_all("all => all.map(e => e.id)")
    assert ids == [
        "front-plot", "importance-0", "importance-1", "effects-0", "effects-1", "course-0", "course-1", "volume-plot", "lines",
    ]  # fmt: skip
    assert page.locator("#importance-0 .bars path").count() == 3  # two parameters and the rest
    assert page.locator("#effects-0 .trace:nth-child(2) path.point").count() == 5
    assert page.locator("#course-0 path.point").count() == 6
    assert page.locator("#layers td").all_text_contents() == ["8"] * 3 + ["8", "4", "2"]
    assert page.locator("#best tbody tr").count() == 4
    # Each twice, for a light and for a dark page.
    assert page.locator("#grids img").count() == 4
    assert page.locator("#grids img:visible").count() == 2
    assert page.locator("#grids img:visible").first.evaluate("i => i.complete && i.naturalWidth > 300")
    assert (
        page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].some(e => e._context.showSendToCloud)")
        is False
    )
    page.select_option("#history-x", "seconds")
    assert page.evaluate("document.getElementById('volume-plot').data[0].x.at(-1)") == pytest.approx(0.006)
    page.select_option("#front-x", "accuracy")
    assert page.evaluate("document.getElementById('front-plot').layout.xaxis.title.text") == "accuracy"


def test_by_keyboard_alone(six_page, opened):
    page = opened(six_page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    button = page.locator("#front-list button").first
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("#details h3").text_content() == "Trial 5, on the front"
    assert page.evaluate("document.activeElement.id") == "details"
    assert button.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll, pre')].every(e => e.tabIndex === 0 || e.closest('#details'))"
    )


def brightness(page, selector="body"):
    colour = page.evaluate("s => getComputedStyle(document.querySelector(s)).backgroundColor", selector)
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_dark_by_preference_and_by_button(six_page, opened):
    page = opened(six_page, dark=True)
    assert brightness(page) < 60
    assert page.evaluate("document.getElementById('front-plot').layout.paper_bgcolor") == "#16181b"
    assert page.locator("#grids img:visible").evaluate_all("all => all.map(e => e.className)") == ["dark", "dark"]
    page.get_by_role("button", name="Light", exact=True).click()
    assert brightness(page) > 240
    assert page.evaluate("document.getElementById('front-plot').layout.paper_bgcolor") == "#ffffff"
    page = opened(six_page)
    assert brightness(page) > 240
    page.get_by_role("button", name="Dark", exact=True).click()
    assert brightness(page) < 60


def test_on_a_phone_nothing_is_wider_than_the_screen(six_page, opened):
    page = opened(six_page, width=360, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#front-list button").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') &&"
        " e.getBoundingClientRect().right > 361).map(e => e.id || e.tagName)"
    )
    assert wide == []
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, dd, td, th, button, li')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "evil",
    [
        EVIL,
        "</script><script>alert(1)</script>",
        '" onmouseover="alert(1)" x="',
        "{{ 7 * 7 }}{% raw %}",
        "a & b &lt; c",
    ],
    ids=["tag", "script", "attribute", "template", "entity"],
)
def test_names_and_errors_of_others_are_text(tmp_path, opened, evil):
    codes, name = full_grid(), evil.replace("/", "")
    space = (site(f"fc{evil}", choice("data_in", 4, 8), choice("weight", 2, 4, 8)),)
    errors = ["", evil, "", "", "", ""]
    accuracy = np.where([bool(e) for e in errors], np.nan, 0.5 + codes[:, 1] / 10)
    run = write(
        tmp_path / f"r{name}", codes, {"accuracy": accuracy, "average_bitwidth": codes[:, 1] + 1.0},
        space=space, errors=errors, project=name,
    )  # fmt: skip
    page = opened(page_of(run, tmp_path / "out"))
    assert page.locator("h1").text_content() == name
    assert page.title() == f"{name} · Bitfront"
    page.locator("#front-list button").first.click()
    assert evil in page.locator("#details").text_content()
    assert page.locator("#failures td.error").text_content() == evil
    assert evil in page.locator("#layers tbody th").first.text_content()
    assert f"fc{evil}/data_in across" in page.locator("#grids caption").first.text_content()
    assert f"fc{evil}/data_in across" in page.locator("#grids .scroll").first.get_attribute("aria-label")
    assert page.locator("img[src=x], [onmouseover]").count() == 0


@pytest.mark.parametrize("trials", [0, 1])
def test_short_runs_are_shown(tmp_path, opened, trials):
    codes = full_grid()[:trials]
    run = write(tmp_path / "short", codes, {"accuracy": [0.5] * trials, "average_bitwidth": [2.0] * trials})
    page = opened(page_of(run, tmp_path / "out"))
    assert page.locator("#front-list button").count() == trials
    assert "Not shown: fewer than two trials count." in page.locator("#volume").text_content()


def test_a_summed_objective_is_shown(tmp_path, opened):
    codes = full_grid()
    metrics = {"accuracy": codes[:, 1] * 0.1, "average_bitwidth": codes[:, 1] + 1.0}
    run = write(tmp_path / "summed", codes, metrics, summed="maximize")
    page = opened(page_of(run, tmp_path / "out"))
    assert page.locator("#course-0 .ytitle").text_content() == "sum of scaled metrics"
    assert page.locator("#front-list button").count() == 1
