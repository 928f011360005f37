"""The subcommands around a search, and how the command prints."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time

import pytest
from journey import PATIENCE, settings

pytestmark = pytest.mark.journey

SUBCOMMANDS = "search plan train test transform analyze report convert dashboard init list".split()
LISTS = ("models", "datasets", "formats", "metrics", "strategies", "samplers", "spaces")


def test_init_writes_a_file_that_runs(shell):
    typed = shell("init", "--model", "digits-mlp", "--dataset", "digits")
    assert typed.out == "wrote digits-mlp-digits.toml; now: bitfront search --config digits-mlp-digits.toml\n"
    typed = shell("search", "--config", "digits-mlp-digits.toml", "--max-epochs", 1, "--n-trials", 5)
    assert "5 of 36 candidates evaluated (n_trials reached)" in typed.out
    assert (shell.folder / "runs/digits-mlp-digits/best.json").is_file()
    shell.write("digits-mlp-digits.toml", "# mine")
    typed = shell("init", "--model", "digits-mlp", code=2)
    assert "digits-mlp-digits.toml exists; --force overwrites it, --output names another file" in typed.err
    assert (shell.folder / "digits-mlp-digits.toml").read_text() == "# mine"


def test_without_a_file_the_default_configuration_runs(shell):
    typed = shell("search", "--max-steps", 5, "--max-epochs", 1, "--n-trials", 3, "--sampler", "random")
    assert "the default (bitfront init" in typed.err
    assert "3 of 1,296 candidates evaluated (n_trials reached)" in typed.out
    assert (shell.folder / "runs/digits-cnn-digits/best.json").is_file()


def test_a_file_starts_from_what_suits_the_target(shell):
    """Each runs, in a folder of its project; every layer is offered the choices."""
    for flags, name, offered, cost in (
        ([], "digits-cnn-digits", "affine2sc-mse affine4sc-mse affine8sc-mse", "average_bitwidth"),
        (["--target", "fpga"], "digits-cnn-digits-fpga", "int2.auto-c int4.auto-c int8.auto-c", "ebops"),
    ):
        assert shell("init", *flags).out == f"wrote {name}.toml; now: bitfront search --config {name}.toml\n"
        plan = shell("plan", f"{name}.toml").out
        assert plan.count(f"weight: {offered}; ") == 4
        assert f"objectives: accuracy (maximize), {cost} (minimize)" in plan
        typed = shell("search", "--config", f"{name}.toml", "--max-epochs", 1, "--n-trials", 3)
        assert "3 of 1,296 candidates evaluated" in typed.out
        assert f"{cost} " in typed.out
        assert (shell.folder / "runs" / name / "best.json").is_file()
    typed = shell("init", "--target", "fgpa", code=2)
    assert typed.err == (
        "error: there is no target 'fgpa'; allowed: processor, onnxruntime, fpga, microcontroller. Did you mean 'fpga'?\n"
    )


@pytest.mark.parametrize(
    ("target", "to", "same"),
    [
        ("onnxruntime", "qdq", "the largest output is the same one on 269 of 269"),
        ("microcontroller", "c", "269 of 269 equal to the searched network in every bit"),
    ],
)
def test_a_file_for_a_runtime_ends_in_a_file_that_it_runs(shell, target, to, same):
    """A residual network with batch norms: these are folded, and what joins two layers has formats too."""
    pytest.importorskip("onnxruntime")
    shell.write(
        "mine.py",
        textwrap.dedent("""
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.norm, self.relu = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
                self.inner, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
                self.mean, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

            def forward(self, x):
                x = self.relu(self.norm(self.stem(x)))
                return self.head(self.mean((x + self.norm2(self.inner(x))).relu()).flatten(1))
        """),
    )
    name = f"mine-Net-digits-{target}"
    shell("init", "--model", "mine:Net", "--dataset", "digits", "--target", target)
    assert f"bitfront export {name} --trial N --to {to}\n" in (shell.folder / f"{name}.toml").read_text()
    typed = shell("search", "--config", f"{name}.toml", "--max-epochs", 2)
    assert "the network with folded batch norms gives outputs that differ" in typed.err
    assert re.search(r"^  \d+: stem 8/\d/(16|-), inner 8/\d/(16|-), .*mean 8/-/-, head", typed.out, re.M)
    assert same in shell("export", name, "--trial", 1, "--to", to).out


def test_a_file_of_init_has_a_plan_for_every_kind_of_weights(shell):
    shell.write(
        "mine.py",
        textwrap.dedent("""
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(20, 8)
                self.mix = nn.Conv1d(8, 8, 3, padding=1)
                self.up = nn.ConvTranspose1d(8, 8, 2)
                self.memory = nn.LSTM(8, 6, batch_first=True)
                self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
                self.head = nn.Linear(6, 10)

            def forward(self, x):
                x = self.table(x.flatten(1)[:, ::8].abs().clamp(max=19).long()).transpose(1, 2)
                x, _ = self.memory(self.up(self.mix(x)).transpose(1, 2))
                return self.head(self.attend(x, x, x)[0].mean(1))
        """),
    )
    for target in ("processor", "onnxruntime", "fpga", "microcontroller"):
        shell("init", "--model", "mine:Net", "--target", target, "--output", f"{target}.toml")
        plan = shell("plan", f"{target}.toml").out
        for site in ("table", "mix", "up", "memory", "attend", "head"):
            assert re.search(rf"^\| {site} .*(affine|integer) \(.*weight", plan, re.M), (target, site, plan)


def test_plan_shows_and_does_nothing(shell, data):
    shell.write("small.toml", settings(data))
    typed = shell("plan", "small.toml")
    assert "| fc1   | Linear | linear  | integer (data_in: int4.auto int8.auto; " in typed.out
    assert "| relu1 | ReLU   | default | float " in typed.out
    assert "space: 36 distinct candidates, " in typed.out
    assert re.search(r"cost: .* ms per candidate \(measured\), about .* in all", typed.out)
    assert not (shell.folder / "runs").exists()
    shown = json.loads(shell("plan", "--config", "small.toml", "--json", "--quiet").out)
    assert shown["space_size"] == shown["candidates"] == 36
    assert [site["options"] for site in shown["sites"]] == [6, 1, 6]


def test_a_file_that_names_no_model_is_about_the_default_and_says_so(shell, data):
    lines = settings(data).splitlines()
    shell.write("without.toml", "\n".join(line for line in lines if not line.startswith(("model", "dataset"))))
    assert (
        "no model is named, so this is about digits-cnn on digits; model = ... names"
        in shell("plan", "without.toml").err
    )
    assert "no model is named" not in shell("plan", "without.toml", "--model", "digits-mlp").err


def test_help_version_and_small_searches_are_quick(shell):
    """The first two do not load torch; a search does, but nothing of what takes as long again."""
    program = """if True:
        import contextlib, io, sys
        from bitfront import cli
        for words in sys.argv[1:]:
            sys.argv[1:] = words.split()
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                cli.main()
            slow = ["torch", "optuna", "torch._dynamo", "scipy", "sklearn", "pandas", "matplotlib"]
            print(len(out.getvalue()) > 10, *(name for name in slow if name in sys.modules))
    """
    asked = ["--version", "--help", *(f"{name} --help" for name in SUBCOMMANDS)]
    search = "search --model digits-mlp --max-epochs 1 --n-trials 3"
    assert shell.python(program, *asked, search, cold=True).splitlines() == ["True"] * len(asked) + ["True torch"]
    assert re.fullmatch(r"bitfront \d+\.\d+.*\n", shell("--version").out)
    typed = shell("search", "--help")
    assert all(flag in typed.out for flag in ("--config", "--restart", "--n-trials", "--max-epochs", "--project-dir"))


def test_list(shell):
    listed = {what: json.loads(shell("list", what, "--json").out) for what in LISTS}
    assert {"jsc-tiny", "digits-cnn"} <= {row["name"] for row in listed["models"]}
    assert {"integer"} <= {row["name"] for row in listed["formats"]}
    assert {"accuracy", "average_bitwidth"} <= {row["metric"] for row in listed["metrics"]}
    assert all(row for rows in listed.values() for row in rows)
    assert all(isinstance(cell, str) for rows in listed.values() for row in rows for cell in row.values())
    typed = shell("list", "formats")
    assert typed.out.startswith("| name ")
    assert typed.err == ""


def test_quiet_prints_results_only_and_a_pipe_gets_plain_text(trained):
    typed = trained("search", "--config", "small.toml", "--quiet")
    assert typed.err == ""
    typed_again = trained("search", "--config", "small.toml", "--restart", "--project-dir", "runs")
    for text in (typed.out, typed_again.out, typed_again.err):
        assert text
        assert "\x1b" not in text
        assert "\r" not in text
    assert typed.out == typed_again.out


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_on_a_terminal_the_table_fits(searched):
    main, terminal = pty.openpty()
    env = {**searched.env, "COLUMNS": "80", "LINES": "40", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "bitfront", "search", "--config", "small.toml"]
    process = subprocess.Popen(
        command, cwd=searched.folder, env=env, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    searched.running.append(process)
    os.close(terminal)
    seen, end = b"", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        ready, _, _ = select.select([main], [], [], 1)
        try:
            part = os.read(main, 65536) if ready else b""
        except OSError:  # that is how a terminal says that its last user has gone
            break
        if ready and not part:
            break
        seen += part
    else:
        pytest.fail(f"this did not end within {PATIENCE} s: {seen!r}")
    os.close(main)
    assert process.wait(PATIENCE) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    table = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n") if line.lstrip("\r")[:1] in "╭│├╰"]
    table = [line for line in table if line]
    assert len(table) > 5, text
    assert max(map(len, table)) <= 80, text
    assert "software_metrics" in "".join(table)
