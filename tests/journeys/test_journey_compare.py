"""``bitfront compare`` as a user types it."""

import json
import os
import signal

import pytest
from journey import SLOW_NET, SLOWLY, rows, settings, wait_for_rows

pytestmark = pytest.mark.journey

STRATEGIES = ["--strategy", "brute_force", "--strategy", "optuna:tpe", "--strategy", "evolution"]


def test_strategies_are_compared(trained):
    typed = trained("compare", "--config", "small.toml", *STRATEGIES, "--seeds", 2, "--n-trials", 12)
    assert (
        "compared: brute_force, optuna:tpe, evolution; 2 seeds, 12 distinct evaluations each, brute force all 36"
        in typed.err
    )
    assert "brute_force: 1 run, 36 evaluations, " in typed.err
    assert "optuna:tpe: 2 runs, 24 evaluations, " in typed.err
    table = [line for line in typed.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["brute_force", "optuna:tpe", "evolution"]
    assert "median [quartiles] over seeds" in typed.out
    assert "36 candidates evaluated now, 0 known from before; saved in runs/small/compare" in typed.out
    result = json.loads((trained.folder / "runs/small/compare/compare.json").read_text())
    assert [c["evaluations"] for c in result["courses"]] == [36, 12, 12, 12, 12]
    figures = trained.folder / "runs/small/compare/figures"
    assert {p.name for p in figures.iterdir()} == {"courses.png", "courses.svg", "fronts.png", "fronts.svg"}

    # Given again it evaluates nothing, and says the same but for the time.
    again = trained("compare", "small.toml", *STRATEGIES, "--seeds", 2, "--n-trials", 12, "--json", "--quiet")
    assert again.err == ""
    repeated = json.loads(again.out)
    assert (repeated["evaluated"], repeated["known"]) == (0, 36)
    assert [c["repeats"] for c in repeated["courses"]] == [c["repeats"] for c in result["courses"]]
    assert [c["volume"]["value"] for c in repeated["courses"]] == [c["volume"]["value"] for c in result["courses"]]

    # Other settings of training, too: the weights of the search stay what they are.
    best = trained.folder / "runs/small/checkpoints/best.pt"
    before = best.read_bytes()
    briefly = ["--max-epochs", 1, "--strategy", "optuna:random", "--n-trials", 8]
    trained("compare", "small.toml", *briefly, "--restart", "--quiet")
    assert best.read_bytes() == before
    assert (trained.folder / "runs/small/compare/checkpoints/best.pt").read_bytes() != before


def test_an_interrupted_comparison_says_so_and_a_killed_one_goes_on(shell, data):
    shell.write("slow_net.py", SLOW_NET)
    options = {"model": "slow_net:net", "project": "slow", "weights": "[2, 3, 4, 6, 8]", "top": "max_steps = 100"}
    shell.write("slow.toml", settings(data, **options))
    asked = ["compare", "slow.toml", "--strategy", "evolution", "--strategy", "optuna:random", "--seeds", 1]
    cache = shell.folder / "runs/slow/compare/cache.sqlite"
    process = shell.start(*asked, "--n-trials", 20, **SLOWLY)
    wait_for_rows(cache, 3, shell, process)
    os.killpg(process.pid, signal.SIGINT)
    typed = shell.finish(process, code=130)
    assert typed.out == ""
    stored = f"{len(rows(cache))} evaluated candidates are stored; the same command goes on with them"
    assert typed.err.splitlines()[-2:] == [stored, "interrupted"]
    process = shell.start(*asked, "--n-trials", 20, **SLOWLY)
    wait_for_rows(cache, 8, shell, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = rows(cache)
    typed = shell(*asked, "--n-trials", 20)
    assert f"{len(before)} candidates are known from earlier sessions" in typed.err
    after = rows(cache)
    assert after[: len(before)] == before
    assert len({row[1] for row in after}) == len(after) < 40
    assert "the true front is not known: everything is relative to the best of all results so far" in typed.out


MISTAKES = {
    ("--strategy", "optuna:tpee"): "error: --strategy optuna:tpee: there is no sampler 'tpee'; allowed: tpe, random",
    ("--strategy", "brutal"): "error: --strategy brutal: there is no strategy called 'brutal'; allowed: brute_force, ",
    ("--strategy", "evolution:tpe"): "error: --strategy evolution:tpe: strategy 'evolution' has no variants",
    ("--strategy", "tpe"): "error: --strategy tpe: 'tpe' is a sampler of strategy 'optuna'; write optuna:tpe",
    ("--seeds", "0"): "error: --seeds: 0 is not possible; allowed: 1 or more",
    ("--seeds", "two"): "Invalid value for '--seeds'",
    ("--n-trials", "0"): "error: --n-trials: 0 is not possible",
    ("--sampler", "tpe"): "No such option: --sampler",
    ("--strategy", "brute", "--max-size", "10"): "the space has 36 candidates, and brute force, which evaluates all",
}


def test_mistakes(shell, data):
    shell.write("small.toml", settings(data))
    program = """
import contextlib, io, json, sys
from bitfront import cli
answers = []
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = ["compare", "small.toml", *words]
    err, code = io.StringIO(), 0
    with contextlib.redirect_stdout(err), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    answers.append([code, err.getvalue()])
print(json.dumps(answers))
"""
    answers = json.loads(shell.python(program, json.dumps(list(MISTAKES))))
    for (words, message), (code, text) in zip(MISTAKES.items(), answers, strict=True):
        assert code == 2, (words, text)
        assert message in text, (words, text)
    assert not (shell.folder / "runs").exists()
