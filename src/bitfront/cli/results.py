"""The subcommands that take a run or one of its trials: transform, analyze, report, explain,
convert, dashboard."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitfront.cli import printing
from bitfront.cli.completing import FORMATS, words
from bitfront.cli.named import Words, read_words
from bitfront.cli.options import (
    AsJson,
    ConfigFile,
    Quiet,
    RunArgument,
    RunOption,
    load_configuration,
    refuse_flags,
    run_folder,
)
from bitfront.errors import ConfigError

if TYPE_CHECKING:
    from bitfront.engine.rebuild import Transformed

Trials = Annotated[
    int | None,
    typer.Option("--trials", metavar="N", help="About N trials at most: the front, and every n-th of the others."),
]


def transform(
    names: Words = None,
    config: ConfigFile = None,
    run: RunOption = None,
    trial: Annotated[int | None, typer.Option("--trial", metavar="N", help="The trial to rebuild.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Evaluate the rebuilt model.")] = False,
    smaller: Annotated[
        bool, typer.Option("--smaller", help="Save it without idle channels too, for a trial with learned bits.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Rebuild the model of a trial, and save it.

    Give --run RUN --trial N, or --config FILE, whose [passes] are then applied to the trained model: quantize, prune.
    """
    import bitfront as bf
    from bitfront.report import passes, tables
    from bitfront.report import smaller as smaller_tables

    config, overrides = read_words(names, config, overrides, quiet=quiet)
    if (run is None) == (config is None) or (run is None) != (trial is None):
        raise ConfigError("give either --run RUN --trial N, or --config FILE")
    if smaller and run is None:
        raise ConfigError("--smaller is for a trial with learned bits; give --run RUN --trial N with it")
    if run is not None:
        refuse_flags(overrides)
    with printing.events(quiet) as events:
        if run is not None and trial is not None:
            result = bf.transform_trial(
                run_folder(run, overrides.get("project_dir", "runs")),
                trial,
                check=check,
                smaller=smaller,
                events=events,
            )
        else:
            result = bf.transform_config(load_configuration(config, overrides), check=check, events=events)
    if as_json:
        printing.print_json(_transformed(result))
        return
    out = printing.console()
    tables.changes(result).show(out)
    if result.formats:
        out.print()
        tables.formats(result).show(out)
    for what, sheet in passes.sheets(result):
        printing.print_line(f"\n{what}:")
        sheet.show(out)
    for file in passes.write(result):
        printing.print_line(f"wrote {file}")
    if result.widths:
        printing.print_line(f"widths: {', '.join(f'{layer} {x} ({w})' for layer, (x, w) in result.widths.items())}")
    if result.evaluation is not None:
        loss, *others = result.evaluation.values.items()
        line = ", ".join(f"{name} {value!r}" for name, value in (*others, loss))
        if result.trial is not None:
            leading, finetuned = others[0][0], result.trial.finetuned
            if finetuned is not None and finetuned.kept:
                line += f" (fine-tuning found {finetuned.metrics[leading]!r})"
            else:
                line += f" (the search found {result.trial.metrics[leading]!r})"
        printing.print_line(line)
    printing.print_line(f"saved to {result.folder}")
    if result.smaller is not None:
        out.print()
        smaller_tables.table(result).show(out)
        for line in smaller_tables.lines(result):
            printing.print_line(line)


def _transformed(result: Transformed) -> dict[str, Any]:
    document: dict[str, Any] = {
        "folder": str(result.folder),
        "formats": {site: {name: f.label for name, f in formats.items()} for site, formats in result.formats.items()},
        "config": dict(result.config),
    }
    if result.widths:
        document["widths"] = {layer: width for layer, (_, width) in result.widths.items()}
    if result.trial is not None:
        document["number"] = result.trial.number
        document["trial_metrics"] = result.trial.metrics
    if result.evaluation is not None:
        document |= {**vars(result.evaluation), **result.evaluation.values}
        document.pop("metrics", None)
    if result.pruned:
        document["pruned"] = {site: {"zero": zero, "weights": total} for site, (zero, total) in result.pruned.items()}
    if result.smaller is not None:
        document["smaller"] = {
            "weights": {path: {"before": before, "now": now} for path, (before, now) in result.smaller.layers.items()},
            "stays": list(result.smaller.stays),
            "samples_compared": result.smaller.samples,
            "metrics": dict(result.smaller_metrics),
        }
    return document


def analyze(
    names: Words = None,
    config: ConfigFile = None,
    run: RunOption = None,
    trial: Annotated[int | None, typer.Option("--trial", metavar="N", help="A trial of that run.")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Samples in the batch that is counted.")] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Count a model's operations, buffers, parameters and bits, module by module.

    Give --model and --dataset, or --config FILE (in the formats of its [passes.quantize]), or --run RUN --trial N.
    Nothing is trained. Without --dataset no data is read, if the model says of which shape its samples are.
    """
    from bitfront.config import load_config

    config, overrides = read_words(names, config, overrides, quiet=quiet)
    if (run is None) != (trial is None) or (run is not None and config is not None):
        raise ConfigError("give --run RUN --trial N, or --config FILE, or neither")
    if as_csv and as_json:
        raise ConfigError("give --csv or --json, not both")
    if run is not None:
        refuse_flags(overrides)
    loaded = None if run is not None else load_config(config, overrides)
    from bitfront.engine import analysis
    from bitfront.report import tables

    with printing.events(quiet) as events:
        if loaded is not None:
            result = analysis.analyze_config(loaded, batch, events)
        else:
            assert run is not None
            assert trial is not None
            result = analysis.analyze_trial(run_folder(run, overrides.get("project_dir", "runs")), trial, batch, events)
    if as_json:
        printing.print_json(result.to_dict())
    elif as_csv:
        print(result.to_csv(), end="")
    else:
        tables.analysis(result).show(printing.console())
        for line in result.remarks():
            printing.print_line(line)


def report(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; default: the run folder.")
    ] = None,
    x: Annotated[str | None, typer.Option("--x", metavar="PARAM", help="Parameter on the x axis of the grids.")] = None,
    y: Annotated[str | None, typer.Option("--y", metavar="PARAM", help="Parameter on the y axis of the grids.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME", help="Metric of the grids; can be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a run: figures, and one page that works offline.

    Writes report.html and figures/. Nothing is measured again. The search may still be running.
    """
    from bitfront.report.writing import write_report

    written = write_report(run_folder(run), output, x=x, y=y, metrics=metric or [])
    if as_json:
        printing.print_json({"page": str(written.page), "figures": [str(path) for path in written.figures]})
        return
    for path in (written.page, *written.figures):
        print(path)


def explain(
    run: RunArgument,
    trial: Annotated[int | None, typer.Option("--trial", metavar="N", help="Why this trial has its options.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="TEXT", help='E.g. "model_size <= 20 kB"; can be repeated.'),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="The measured metric; default: the objective.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Evaluate the answer for the budgets.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Explain a run: what options cost and buy, the price of a budget, what may be missing.

    Everything comes from stored trials; only --verify evaluates something.
    """
    import bitfront as bf
    from bitfront.report import explanation

    with printing.events(quiet) as events:
        result = bf.explain(run_folder(run), trial, budgets=budget or [], metric=metric, verify=verify, events=events)
    if as_json:
        printing.print_json(result.to_dict())
        return
    out = printing.console()
    for i, section in enumerate(explanation.sections(result)):
        printing.print_line(f"{chr(10) if i else ''}## {section.title}\n")
        for sentence in section.sentences:
            printing.print_line(sentence)
        if section.table is not None:
            out.print()
            section.table.show(out)


def convert(
    run: RunArgument,
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

    The search may still be running. A study holds at most 10,000 trials unless --trials gives another number.
    """
    from bitfront.report import study
    from bitfront.report.convert import convert as convert_run
    from bitfront.report.convert import write_csv

    if str(output) == "-":
        if to != "csv" or as_json:
            raise ConfigError("--output - is for --to csv without --json; give --output a file name for the others")
        try:
            write_csv(sys.stdout, run_folder(run), trials)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has closed the pipe (head, less); nothing must be flushed at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    done = convert_run(run_folder(run), to, output, force=force, trials=trials)
    if as_json:
        printing.print_json({"file": str(done.path), "format": done.format, "trials": done.trials, "total": done.total})
        return
    print(done.path)
    if quiet:
        return
    part = "" if done.trials == done.total else f" of {done.total:,}, the front and an even sample; --trials takes more"
    printing.print_line(f"{done.trials:,} trials{part}", stderr=True)
    if to == "optuna":
        printing.print_line(f"see it: optuna-dashboard {study.address(done.path)}", stderr=True)


def dashboard(
    run: RunArgument,
    port: Annotated[int, typer.Option("--port", metavar="N", help="0: any free port.")] = 8080,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    trials: Trials = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a run in optuna-dashboard, also while the search is running.

    Only this computer can open it. Ctrl-C ends it. It shows at most 2,000 trials unless --trials gives another number.
    """
    from bitfront.report.dashboard import SHOWN, served

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up like Ctrl-C
    with served(run_folder(run), port, trials if trials is not None else SHOWN) as server:
        if as_json:
            printing.print_json({"address": server.address, "trials": server.trials, "total": server.total})
        else:
            print(server.address)
        sys.stdout.flush()
        if not quiet and not as_json:
            part = "" if server.trials == server.total else f" of {server.total:,}, the front and an even sample"
            text = f"{server.trials:,} trials{part}; new ones appear as they arrive; Ctrl-C ends it"
            printing.print_line(text, stderr=True)
        if browser and _has_window():
            import webbrowser

            webbrowser.open(server.address)
        try:
            server.wait()
        except KeyboardInterrupt:
            return


def _has_window() -> bool:
    """Whether a browser would open in a window; a text browser would take over the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
