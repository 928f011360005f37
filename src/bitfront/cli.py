"""The command line: parses, calls the API, prints. No logic.

Flags for the keys of the configuration are made from its schema, so that every key has one and they cannot disagree.
Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the work failed, 2 what was
asked cannot be done, 130 interrupted.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
from rich.console import Console

from bitfront.errors import BitfrontError

if TYPE_CHECKING:
    from bitfront.config import Config
    from bitfront.engine.rebuild import Transformed
    from bitfront.report.live import Live

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="The TOML file. Flags override it.")
]
File = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The same as --config.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
#: Keys below the top of the configuration that have a flag too.
SEARCH_FLAGS = {
    "strategy": ("search.strategy.name", str, "The strategy: brute_force, evolution, optuna."),
    "sampler": ("search.strategy.setup.sampler", str, "Optuna's sampler: tpe, random, nsgaii, nsgaiii, qmc, gp."),
    "n_trials": ("search.strategy.setup.n_trials", int, "Budget in distinct candidates."),
    "n_jobs": ("search.strategy.setup.n_jobs", int, "Worker processes; the numbers are the same for any."),
    "timeout": ("search.strategy.setup.timeout", float, "Seconds after which no further candidates are started."),
    "finetune": ("search.finetune.trials", int, "So many trials of the front are trained on, quantized."),
    "max_size": ("search.strategy.setup.max_size", int, "Brute force refuses larger spaces."),
}
#: Those of them that are about a comparison too.
COMPARED = ("n_trials", "n_jobs", "max_size")


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 10_000  # a pipe has no width; folding would only break what reads it
    return console


def _with_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` with a flag for every key of the configuration's top level; one that searches also for its budget.

    The verb receives them as ``overrides``, dotted key → value, without those not given.
    """
    from bitfront.config import Config

    flags = [(n, n, _plain(f.annotation), f.description or "") for n, f in Config.model_fields.items()]
    own = SEARCH_FLAGS if verb in SEARCHING else COMPARED if verb is compare else ()
    flags += [(name, *SEARCH_FLAGS[name]) for name in own]
    flags = [flag for flag in flags if flag[2] is not None]
    parameters = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "overrides"]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    for name, _, kind, text in flags:
        option = typer.Option("--" + name.replace("_", "-"), help=text[:1].upper() + text[1:], show_default=False)
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def wrapper(**given: Any) -> None:
        overrides = {key: given.pop(name) for name, key, _, _ in flags}
        verb(**given, overrides={k: v for k, v in overrides.items() if v is not None})

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__doc__ = verb.__doc__
    return wrapper


def _plain(annotation: Any) -> type | None:
    """The type a flag of that field parses; None for tables. Words are checked by the schema, for its messages."""
    if get_origin(annotation) is dict:
        return None
    for part in (annotation, *get_args(annotation)):
        if part in (str, int, float):
            return part  # type: ignore[no-any-return]
    return str if all(isinstance(a, str) for a in get_args(annotation)) and get_args(annotation) else None


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


def _events(quiet: bool) -> Live:
    from bitfront.report.live import Live

    return Live(_console(stderr=True), quiet=quiet)


def _print_json(document: object) -> None:
    # JSON has no NaN: what could not be measured is null.
    finite = json.loads(json.dumps(document, default=str), parse_constant=lambda _: None)
    print(json.dumps(finite, indent=2, ensure_ascii=False))


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

    with _events(quiet) as events:
        events.note(f"configuration: {config or 'the embedded default (bitfront init writes it)'}")
        run = api.search(loaded, restart=restart, events=events)
    if as_json:
        _print_json(tables.as_json(run))
    else:
        out = _console()
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
        typer.Option("--strategy", metavar="NAME", help="E.g. brute_force, evolution, optuna:tpe; may be repeated."),
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
    from bitfront.report import contest

    with _events(quiet) as events:
        events.note(f"configuration: {config or 'the embedded default (bitfront init writes it)'}")
        found = api.compare(loaded, strategies=strategy, seeds=seeds, restart=restart, events=events)
    if as_json:
        _print_json(contest.as_json(found))
        return
    out = _console()
    contest.sheet(found).show(out)
    for line in contest.lines(found):
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
    from bitfront.report import tables

    with _events(quiet) as events:
        made = api.plan(loaded, events=events)
        seconds = made.seconds_per_candidate()
        for note in made.notes:
            events.note(note)
    if as_json:
        _print_json(
            {
                "space_size": made.space.size,
                "parameters": [{"name": p.name, "choices": p.labels} for p in made.space.parameters],
                "sites": [
                    {"site": o.site, "type": o.type, "rule": o.rule, "options": o.options} for o in made.space.offers()
                ],
                "strategy": made.strategy,
                "sampler": made.sampler,
                "candidates": min(made.n_trials, made.space.size),
                "seconds_per_candidate": seconds,
            }
        )
        return
    out = _console()
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

    with _events(quiet) as events:
        trained = bf.train(loaded, events=events)
    result = trained.result
    assert result is not None
    best = result.history[result.best_epoch - 1]
    if as_json:
        _print_json({"checkpoint": str(trained.checkpoint), "stopped": result.stopped, **vars(best)})
    else:
        _console().print(
            f"{trained.checkpoint}: epoch {best.epoch} of {len(result.history)} ({result.stopped}), "
            f"validation loss {best.val_loss:.4f}, accuracy {best.val_accuracy:.4f}",
            soft_wrap=True,
        )
    if result.stopped == "interrupted":
        raise typer.Exit(130)


def test(
    config: ConfigFile = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Evaluate the trained model on the test split."""
    loaded = _config(config, overrides)
    import bitfront as bf
    from bitfront.metrics.intervals import wilson

    with _events(quiet) as events:
        result = bf.test(loaded, split=split, events=events)
    low, high = wilson(result.accuracy, result.samples)
    if as_json:
        _print_json({**vars(result), "accuracy_interval": [low, high], "split": split})
    else:
        _console().print(
            f"{split}: loss {result.loss:.4f}, accuracy {result.accuracy:.4f} [{low:.4f}, {high:.4f}] "
            f"({result.correct:,} of {result.samples:,})",
            soft_wrap=True,
        )


def transform(
    config: ConfigFile = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="RUN", help="A run folder.")] = None,
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
    with _events(quiet) as events:
        if run is not None and trial is not None:
            result = bf.transform_trial(_run_folder(run, overrides), trial, check=check, events=events)
        else:
            result = bf.transform_config(_config(config, overrides), check=check, events=events)
    if as_json:
        _print_json(_transformed(result))
        return
    out = _console()
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


def _run_folder(run: Path, overrides: dict[str, Any]) -> Path:
    """A path, or the name of a run below the project folder."""
    named = Path(overrides.get("project_dir", "runs")) / run
    return named if not run.exists() and named.exists() else run


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
    run: Annotated[Path | None, typer.Option("--run", metavar="RUN", help="A run folder.")] = None,
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

    with _events(quiet) as events:
        if loaded is not None:
            result = analysis.analyze_config(loaded, batch, events)
        else:
            assert run is not None
            assert trial is not None
            result = analysis.analyze_trial(_run_folder(run, overrides), trial, batch, events)
    if as_json:
        _print_json(result.to_dict())
    elif as_csv:
        print(result.to_csv(), end="")
    else:
        out = _console()
        tables.analysis(result).show(out)
        for line in result.remarks():
            out.print(line, soft_wrap=True, markup=False)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the name of a run below runs.")],
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

    written = write_report(_run_folder(run, {}), output, x=x, y=y, metrics=metric or [])
    if as_json:
        _print_json({"page": str(written.page), "figures": [str(path) for path in written.figures]})
        return
    for path in (written.page, *written.figures):
        print(path)


def init(
    model: Annotated[str, typer.Option("--model", help="A model's name, or package.module:factory.")] = "digits-cnn",
    dataset: Annotated[str, typer.Option("--dataset", help="A dataset's name, or package.module:factory.")] = "digits",
    dataset_path: Annotated[str | None, typer.Option("--dataset-path", help="File or folder of the data.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: MODEL-DATASET.toml; - for stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented TOML that runs."""
    target = output or Path(f"{model}-{dataset}.toml".replace(":", "-"))
    if str(target) != "-" and target.exists() and not force:
        from bitfront.errors import ConfigError

        raise ConfigError(f"{target} exists; --force overwrites it, --output names another file")
    from bitfront import api

    text, notes = api.init(model, dataset, dataset_path, str(target) if str(target) != "-" else "FILE.toml")
    for note in notes:
        _console(stderr=True).print(f"note: {note}", soft_wrap=True)
    if str(target) == "-":
        print(text, end="")
        return
    target.write_text(text, encoding="utf-8")
    _console().print(f"wrote {target}; now: bitfront search --config {target}", soft_wrap=True)


def list_(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="Which kind.")],
    as_json: AsJson = False,
) -> None:
    """Show what there is of a kind.

    Kinds: models, datasets, formats, metrics, strategies, samplers, spaces.
    """
    from bitfront import api
    from bitfront.report import tables

    columns, rows = api.listing(what)
    if as_json:
        _print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    tables.Sheet(columns, rows).show(_console())


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"bitfront {version('bitfront')}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Finds the whole accuracy-against-cost front of a PyTorch model."""


VERBS: dict[str, Callable[..., None]] = {
    "search": search,
    "compare": compare,
    "plan": plan,
    "train": train,
    "test": test,
    "transform": transform,
    "analyze": analyze,
    "report": report,
    "init": init,
    "list": list_,
}
CONFIGURED = (search, compare, plan, train, test, transform, analyze)
SEARCHING = (search, plan)


def build(argv: list[str]) -> typer.Typer:
    """The command, as it is needed for `argv`.

    Only the verb that is asked for gets the flags of the configuration: reading the schema takes longer than
    everything else that ``--help`` does. Completion needs them all.
    """
    app = typer.Typer(
        name="bitfront",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_main)
    for name, verb in VERBS.items():
        needed = name in argv or "_BITFRONT_COMPLETE" in os.environ
        if verb in CONFIGURED:
            app.command(name=name)(_with_flags(verb) if needed else _described_only(verb))
        else:
            app.command(name=name)(verb)
    return app


def _described_only(verb: Callable[..., None]) -> Callable[..., None]:
    def nothing() -> None:
        raise AssertionError("a verb that is run has its flags")

    nothing.__doc__ = verb.__doc__
    return nothing


def main() -> None:
    """The command ``bitfront``: runs a verb, and turns errors into one message and an exit code."""
    try:
        build(sys.argv[1:])()
    except BitfrontError as error:
        _complain(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(130)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _complain(f"error: {error.filename or 'a file'}: {error.strerror or error}")
            sys.exit(2)
        # Whoever read our output has had enough (head, less).
        sys.stderr.close()
        sys.exit(0)


def _complain(text: str) -> None:
    from rich.markup import escape

    head, colon, rest = text.partition(":")
    _console(stderr=True).print(f"[bold red]{head}{colon}[/bold red]{escape(rest)}", soft_wrap=True)
