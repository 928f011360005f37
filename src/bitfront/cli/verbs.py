"""The verbs: each parses nothing, calls the API, and prints what came of it. No logic.

What a verb needs is imported in it: ``--help`` must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitfront.cli import printing
from bitfront.cli.completing import ROOMS, SPLITS, competitors, members, runs, words
from bitfront.cli.flags import SEARCH_FLAGS
from bitfront.cli.showing import RunFolder, convert, dashboard, run_folder

if TYPE_CHECKING:
    from bitfront.config import Config
    from bitfront.engine.rebuild import Transformed

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="The TOML file. Flags override it.")
]
File = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The same as --config.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


def _one_file(positional: Path | None, option: Path | None) -> Path | None:
    if positional is not None and option is not None:
        from bitfront.errors import ConfigError

        raise ConfigError(f"two configurations are named, {positional} and --config {option}; give one")
    return positional or option


def _config(file: Path | None, overrides: dict[str, Any]) -> Config:
    """The file; without one, what ``bitfront init`` would write for the model and the dataset."""
    from bitfront import config, template, tomlfile

    if file is not None:
        return config.load(file, overrides)  # without torch: a mistake in the file is told at once
    from bitfront import api

    model = overrides.get("model", template.DEFAULT_MODEL)
    dataset = overrides.get("dataset", template.DEFAULT_DATASET)
    text, _ = api.init(model, dataset, overrides.get("dataset_path"))
    return config.from_document(tomlfile.parse(text, "the embedded default"), overrides)


def search(
    file: File = None,
    config: ConfigFile = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away the trials of an earlier search.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Search the space; save and print the front.

    Trains first where there are no weights yet. A search that was stopped goes on where it was. Without a file, the
    embedded default: digits-cnn on digits.
    """
    config = _one_file(file, config)
    loaded = _config(config, overrides)
    from bitfront import api
    from bitfront.report import tables

    with printing.events(quiet) as events:
        events.note(f"configuration: {config or 'the embedded default (bitfront init writes it)'}")
        run = api.search(loaded, restart=restart, events=events)
    if as_json:
        printing.print_json(tables.as_json(run))
    else:
        out = printing.console()
        tables.best_trials(run).show(out)
        for line in tables.summary(run):
            out.print(line, soft_wrap=True)
    if run.stopped == "interrupted":
        raise typer.Exit(130)


def compare(
    file: File = None,
    config: ConfigFile = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            metavar="NAME",
            help="E.g. brute_force, evolution, optuna:tpe; may be repeated.",
            autocompletion=competitors,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Runs of each strategy.")] = 5,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what was evaluated earlier.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Compare strategies on one space: same budget, same seeds.

    Every candidate is evaluated once, for all of them. --n-trials is the budget of each run (400); brute force goes
    through the whole space. Writes compare.json and figures into the folder compare of the run folder.
    """
    config = _one_file(file, config)
    loaded = _config(config, overrides)
    from bitfront import api
    from bitfront.report import comparison as comparison_report

    with printing.events(quiet) as events:
        events.note(f"configuration: {config or 'the embedded default (bitfront init writes it)'}")
        found = api.compare(loaded, strategies=strategy, seeds=seeds, restart=restart, events=events)
    if as_json:
        printing.print_json(comparison_report.as_json(found))
        return
    out = printing.console()
    comparison_report.sheet(found).show(out)
    for line in comparison_report.lines(found):
        out.print(line, soft_wrap=True, markup=False)


def plan(
    config: ConfigFile = None,
    file: File = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Show what a search would do, without doing it.

    What each site gets and by which rule, the size of the space, the cost of a candidate, the expected time.
    """
    loaded = _config(_one_file(file, config), overrides)
    from bitfront import api
    from bitfront.engine.planning.probe import seconds_per_candidate
    from bitfront.report import tables

    with printing.events(quiet) as events:
        made = api.plan(loaded, events=events)
        seconds = seconds_per_candidate(made)
        for note in made.notes:
            events.note(note)
    if as_json:
        printing.print_json(
            {
                "space_size": made.space.size,
                "parameters": [{"name": p.name, "choices": p.labels} for p in made.space.parameters],
                "sites": [
                    {"site": o.site, "type": o.type, "rule": o.rule, "options": o.options} for o in made.space.offers()
                ],
                "strategy": made.strategy.name,
                "sampler": made.strategy.variant,
                "candidates": min(made.n_trials, made.space.size),
                "seconds_per_candidate": seconds,
            }
        )
        return
    out = printing.console()
    tables.plan_sites(made).show(out)
    for line in tables.plan_summary(made, seconds):
        out.print(line, soft_wrap=True)


def train(
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Train the model.

    Best and last weights go to the run folder's checkpoints.
    """
    loaded = _config(config, overrides)
    import bitfront as bf

    with printing.events(quiet) as events:
        trained = bf.train(loaded, events=events)
    result = trained.result
    assert result is not None
    best = result.history[result.best_epoch - 1]
    if as_json:
        printing.print_json({"checkpoint": str(trained.checkpoint), "stopped": result.stopped, **vars(best)})
    else:
        printing.console().print(
            f"{trained.checkpoint}: epoch {best.epoch} of {len(result.history)} ({result.stopped}), "
            f"validation loss {best.val_loss:.4f}, accuracy {best.val_accuracy:.4f}",
            soft_wrap=True,
        )
    if result.stopped == "interrupted":
        raise typer.Exit(130)


def test(
    config: ConfigFile = None,
    split: Annotated[str, typer.Option(help="train, val or test.", autocompletion=words(SPLITS))] = "test",
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Evaluate the trained model on the test split."""
    loaded = _config(config, overrides)
    import bitfront as bf
    from bitfront.metrics.intervals import wilson

    with printing.events(quiet) as events:
        result = bf.test(loaded, split=split, events=events)
    low, high = wilson(result.accuracy, result.samples)
    if as_json:
        printing.print_json({**vars(result), "accuracy_interval": [low, high], "split": split})
    else:
        printing.console().print(
            f"{split}: loss {result.loss:.4f}, accuracy {result.accuracy:.4f} [{low:.4f}, {high:.4f}] "
            f"({result.correct:,} of {result.samples:,})",
            soft_wrap=True,
        )


def transform(
    config: ConfigFile = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="RUN", help="A run folder.", autocompletion=runs)] = None,
    trial: Annotated[int | None, typer.Option("--trial", metavar="N", help="The trial to rebuild.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Evaluate the rebuilt model.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Rebuild the model of a trial, and save it.

    Either --run RUN --trial N, or --config FILE, whose [passes.quantize] is applied to its trained model.
    """
    import bitfront as bf
    from bitfront.errors import ConfigError
    from bitfront.report import tables

    if (run is None) == (config is None) or (run is None) != (trial is None):
        raise ConfigError("give either --run RUN --trial N, or --config FILE")
    if run is not None:
        _refuse_flags(overrides)
    with printing.events(quiet) as events:
        if run is not None and trial is not None:
            result = bf.transform_trial(
                run_folder(run, overrides.get("project_dir", "runs")), trial, check=check, events=events
            )
        else:
            result = bf.transform_config(_config(config, overrides), check=check, events=events)
    if as_json:
        printing.print_json(_transformed(result))
        return
    out = printing.console()
    tables.changes(result).show(out)
    out.print()
    tables.formats(result).show(out)
    if result.widths:
        out.print(f"widths: {', '.join(f'{layer} {x} ({w})' for layer, (x, w) in result.widths.items())}")
    if result.evaluation is not None:
        line = f"accuracy {result.evaluation.accuracy!r}, loss {result.evaluation.loss!r}"
        if result.trial is not None:
            own = result.trial.finetuned
            kept = own is not None and own.kept
            found = own.metrics["accuracy"] if own and kept else result.trial.metrics["accuracy"]
            line += f" ({'training it on' if kept else 'the search'} found {found!r})"
        out.print(line, soft_wrap=True)
    out.print(f"saved to {result.folder}", soft_wrap=True)


def _refuse_flags(overrides: dict[str, Any]) -> None:
    if set(overrides) - {"project_dir"}:
        from bitfront.errors import ConfigError

        given = ", ".join("--" + key.replace("_", "-") for key in overrides)
        raise ConfigError(f"--run takes its configuration from the run folder; leave out {given}")


def _transformed(result: Transformed) -> dict[str, Any]:
    document: dict[str, Any] = {
        "folder": str(result.folder),
        "formats": {s: {o: f.label for o, f in own.items()} for s, own in result.formats.items()},
        "config": dict(result.config),
    }
    if result.widths:
        document["widths"] = {layer: width for layer, (_, width) in result.widths.items()}
    if result.trial is not None:
        document["number"] = result.trial.number
        document["trial_metrics"] = result.trial.metrics
    if result.evaluation is not None:
        document |= vars(result.evaluation)
    return document


def analyze(
    config: ConfigFile = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="RUN", help="A run folder.", autocompletion=runs)] = None,
    trial: Annotated[int | None, typer.Option("--trial", metavar="N", help="One of its trials.")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Samples that the numbers are for.")] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Show what a model does, module by module: operations, buffers, parameters, bits.

    Of --model and --dataset, or of --config FILE in the formats of its [passes.quantize], or of --run RUN --trial N.
    Nothing is trained.
    """
    from bitfront.errors import ConfigError

    if (run is None) != (trial is None) or (run is not None and config is not None):
        raise ConfigError("give --run RUN --trial N, or --config FILE, or neither")
    if as_csv and as_json:
        raise ConfigError("give --csv or --json, not both")
    if run is not None:
        _refuse_flags(overrides)
    loaded = None if run is not None else _config(config, overrides)
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
        out = printing.console()
        tables.analysis(result).show(out)
        for line in result.remarks():
            out.print(line, soft_wrap=True, markup=False)


def report(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; default: the run folder.")
    ] = None,
    x: Annotated[str | None, typer.Option("--x", metavar="PARAM", help="Parameter across, of grid pictures.")] = None,
    y: Annotated[str | None, typer.Option("--y", metavar="PARAM", help="Parameter upwards.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME", help="Metric of the grids; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a run: figures, and one page that works offline.

    Writes report.html and figures/. Nothing is measured again; the run may still be going on.
    """
    from bitfront.report.writing import write_report

    written = write_report(run_folder(run), output, x=x, y=y, metrics=metric or [])
    if as_json:
        printing.print_json({"page": str(written.page), "figures": [str(path) for path in written.figures]})
        return
    for path in (written.page, *written.figures):
        print(path)


def init(
    model: Annotated[
        str,
        typer.Option("--model", help="A model's name, or package.module:factory.", autocompletion=members("models")),
    ] = "digits-cnn",
    dataset: Annotated[
        str,
        typer.Option("--dataset", help="A dataset's name, or package.module:factory.", autocompletion=members("data")),
    ] = "digits",
    dataset_path: Annotated[str | None, typer.Option("--dataset-path", help="File or folder of the data.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: MODEL-DATASET.toml; - for stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a commented TOML that runs."""
    target = output or Path(f"{model}-{dataset}.toml".replace(":", "-"))
    if str(target) != "-" and target.exists() and not force:
        from bitfront.errors import ConfigError

        raise ConfigError(f"{target} exists; --force overwrites it, --output names another file")
    from bitfront import api

    text, notes = api.init(model, dataset, dataset_path, str(target) if str(target) != "-" else "FILE.toml")
    for note in () if quiet else notes:
        printing.console(stderr=True).print(f"note: {note}", soft_wrap=True)
    if str(target) == "-":
        print(text, end="")
        return
    target.write_text(text, encoding="utf-8")
    hint = "" if quiet else f"; now: bitfront search --config {target}"
    printing.console().print(f"wrote {target}{hint}", soft_wrap=True)


def list_(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="Which kind.", autocompletion=words(ROOMS))],
    as_json: AsJson = False,
) -> None:
    """Show what there is of a kind.

    Kinds: models, datasets, formats, metrics, strategies, samplers, spaces.
    """
    from bitfront import api
    from bitfront.report import tables

    columns, rows = api.listing(what)
    if as_json:
        printing.print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    tables.Sheet(columns, rows).show(printing.console())


VERBS: dict[str, Callable[..., None]] = {
    "search": search,
    "compare": compare,
    "plan": plan,
    "train": train,
    "test": test,
    "transform": transform,
    "analyze": analyze,
    "report": report,
    "convert": convert,
    "dashboard": dashboard,
    "init": init,
    "list": list_,
}
CONFIGURED = (search, compare, plan, train, test, transform, analyze)
#: Which flags beside those of the top a verb has.
BUDGET: dict[Callable[..., None], Collection[str]] = {
    search: SEARCH_FLAGS,
    plan: SEARCH_FLAGS,
    compare: ("n_trials", "n_jobs", "max_size"),
}
