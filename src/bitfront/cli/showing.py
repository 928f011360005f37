"""The verbs that hand a run to other tools: convert, dashboard."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from bitfront.cli.completing import FORMATS, runs, words
from bitfront.cli.printing import console, print_json

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or the name of a run below runs.", autocompletion=runs)
]
Trials = Annotated[
    int | None,
    typer.Option("--trials", metavar="N", help="Of a longer run the front and every n-th trial, about so many."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


def run_folder(run: Path, project_dir: str = "runs") -> Path:
    """A path, or the name of a run below the project folder; whatever is wrong with a name is said of the latter."""
    named = Path(project_dir) / run
    meant = named.exists() or (len(run.parts) == 1 and named.parent.is_dir())
    return named if not run.exists() and meant else run


def convert(
    run: RunFolder,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="csv, parquet or optuna.", autocompletion=words(FORMATS))
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Default: trials.csv, trials.parquet or optuna.db in the run folder; - for CSV to standard output.",
        ),
    ] = None,
    trials: Trials = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the trials of a run as CSV, as Parquet or as an Optuna study.

    The run may still be going on. A study holds 10,000 trials at most unless --trials says more.
    """
    from bitfront.errors import ConfigError
    from bitfront.report import study
    from bitfront.report.convert import convert as written
    from bitfront.report.convert import write_csv

    if str(output) == "-":
        if to != "csv" or as_json:
            raise ConfigError("--output - is for --to csv without --json; --output names a file for the rest")
        try:
            write_csv(sys.stdout, run_folder(run), trials)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever reads has had enough (head, less); nothing is left to be flushed at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    done = written(run_folder(run), to, output, force=force, trials=trials)
    if as_json:
        print_json({"file": str(done.path), "format": done.format, "trials": done.trials, "total": done.total})
        return
    print(done.path)
    if quiet:
        return
    told = console(stderr=True)
    part = "" if done.trials == done.total else f" of {done.total:,}, the front and an even sample; --trials takes more"
    told.print(f"{done.trials:,} trials{part}", soft_wrap=True)
    if to == "optuna":
        told.print(f"see it: optuna-dashboard {study.address(done.path)}", soft_wrap=True, markup=False)


def dashboard(
    run: RunFolder,
    port: Annotated[int, typer.Option("--port", metavar="N", help="0: any that is free.")] = 8080,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    trials: Trials = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a run in optuna-dashboard, also while it goes on.

    Only this computer can see it. Ctrl-C ends it. Of more than 2,000 trials it has a part unless --trials says more.
    """
    from bitfront.report.dashboard import SHOWN, served

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it, nothing of it is left
    with served(run_folder(run), port, trials if trials is not None else SHOWN) as found:
        if as_json:
            print_json({"address": found.address, "trials": found.trials, "total": found.total})
        else:
            print(found.address)
        sys.stdout.flush()
        if not quiet and not as_json:
            part = "" if found.trials == found.total else f" of {found.total:,}, the front and an even sample"
            told = console(stderr=True)
            told.print(f"{found.trials:,} trials{part}; new ones appear as they arrive; Ctrl-C ends it", soft_wrap=True)
        if browser and _has_windows():
            import webbrowser

            webbrowser.open(found.address)
        try:
            found.wait()
        except KeyboardInterrupt:
            return


def _has_windows() -> bool:
    """Whether a browser would get a window; a text browser would take the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
