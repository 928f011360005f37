"""The subcommands that take a configuration and compute: search, compare, plan, train, test."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitfront.cli import printing
from bitfront.cli.completing import SPLITS, compared_strategies, words
from bitfront.cli.named import Words, read_words
from bitfront.cli.options import AsJson, ConfigFile, Quiet, load_configuration
from bitfront.cli.starting import importing

InsecureExecutor = Annotated[
    bool,
    typer.Option(
        "--insecure-executor", help="Accept a connection to workers that is not encrypted and asks nobody who he is."
    ),
]


def search(
    names: Words = None,
    config: ConfigFile = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete the trials of an earlier search.")] = False,
    insecure_executor: InsecureExecutor = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Search the space; save and print the front.

    Trains first if there are no weights yet. A stopped search continues where it stopped. Without a file, the default
    configuration runs: digits-cnn on digits.
    """
    config, overrides = read_words(names, config, overrides, quiet=quiet)
    loaded = load_configuration(config, overrides)
    with importing():
        from bitfront import api
        from bitfront.report import remarks, tables

    with printing.events(quiet) as events:
        events.note(f"configuration: {config or 'the default (bitfront init writes it to a file)'}")
        run = api.search(loaded, restart=restart, insecure_executor=insecure_executor, events=events)
    if as_json:
        printing.print_json(tables.as_json(run))
    else:
        tables.best_trials(run).show(printing.console())
        for line in remarks.summary(run):
            printing.print_line(line)
    if run.stopped == "interrupted":
        raise typer.Exit(130)


def compare(
    names: Words = None,
    config: ConfigFile = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            metavar="NAME",
            help="E.g. brute_force, evolution, optuna:tpe; can be repeated.",
            autocompletion=compared_strategies,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Runs of each strategy.")] = 5,
    restart: Annotated[bool, typer.Option("--restart", help="Delete the results of an earlier comparison.")] = False,
    insecure_executor: InsecureExecutor = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Compare strategies on one space, with the same budget and the same random seeds.

    Every candidate is evaluated once, for all strategies. --n-trials is the budget of each run (400); brute force
    evaluates the whole space. Writes compare.json and figures to the folder compare in the run folder.
    """
    config, overrides = read_words(names, config, overrides, quiet=quiet)
    loaded = load_configuration(config, overrides)
    with importing():
        from bitfront import api
        from bitfront.report import comparison as comparison_report

    with printing.events(quiet) as events:
        events.note(f"configuration: {config or 'the default (bitfront init writes it to a file)'}")
        comparison = api.compare(
            loaded,
            strategies=strategy,
            seeds=seeds,
            restart=restart,
            insecure_executor=insecure_executor,
            events=events,
        )
    if as_json:
        printing.print_json(comparison_report.as_json(comparison))
        return
    comparison_report.sheet(comparison).show(printing.console())
    for line in comparison_report.lines(comparison):
        printing.print_line(line)


def plan(
    config: ConfigFile = None,
    names: Words = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Show what a search would do, without searching.

    Shows the options of each site and the rule they come from, the size of the space, the cost of a candidate and the
    expected time.
    """
    loaded = load_configuration(*read_words(names, config, overrides, quiet=quiet))
    with importing():
        from bitfront import api
        from bitfront.engine.planning.pacing import with_timeout
        from bitfront.engine.planning.probe import seconds_per_candidate
        from bitfront.report import plans

    with printing.events(quiet) as events:
        search_plan = api.plan(loaded, events=events)
        seconds = seconds_per_candidate(search_plan) or search_plan.evaluator.seconds_per_epoch()
        search_plan = with_timeout(search_plan, seconds)
        for note in search_plan.notes:
            events.note(note)
    learns = search_plan.evaluator.job.learning is not None
    if as_json:
        parameters = [{"name": p.name, "choices": p.labels} for p in search_plan.space.parameters]
        offers = search_plan.space.offers()
        sites = [{"site": o.site, "type": o.type, "rule": o.rule, "options": o.options} for o in offers]
        printing.print_json(
            {
                "space_size": search_plan.space.size,
                "parameters": parameters,
                "sites": sites,
                "strategy": search_plan.strategy.name,
                "sampler": search_plan.strategy.variant,
                "candidates": min(search_plan.n_trials, search_plan.space.size),
                **({"seconds_per_epoch": seconds} if learns else {"seconds_per_candidate": seconds}),
            }
        )
        return
    plans.plan_sites(search_plan).show(printing.console())
    for line in plans.plan_summary(search_plan, seconds):
        printing.print_line(line)


def train(
    names: Words = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Train the model.

    Writes the best and the last weights to checkpoints/ in the run folder.
    """
    loaded = load_configuration(*read_words(names, config, overrides, quiet=quiet))
    import bitfront as bf

    with printing.events(quiet) as events:
        trained = bf.train(loaded, events=events)
    result = trained.result
    assert result is not None
    best = result.history[result.best_epoch - 1]
    if as_json:
        printing.print_json({"checkpoint": str(trained.checkpoint), "stopped": result.stopped, **best.described})
    else:
        printing.print_line(
            f"{trained.checkpoint}: epoch {best.epoch} of {len(result.history)} ({result.stopped}), "
            f"validation loss {best.val_loss:.4f}, {best.leading[0]} {best.leading[1]:.4f}",
        )
    if result.stopped == "interrupted":
        raise typer.Exit(130)


def test(
    names: Words = None,
    config: ConfigFile = None,
    split: Annotated[str, typer.Option(help="train, val or test.", autocompletion=words(SPLITS))] = "test",
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Evaluate the trained model on the test split."""
    loaded = load_configuration(*read_words(names, config, overrides, quiet=quiet))
    import bitfront as bf
    from bitfront.metrics.intervals import wilson

    with printing.events(quiet) as events:
        result = bf.test(loaded, split=split, events=events)
    if isinstance(result, bf.TaskEvaluation):
        if as_json:
            printing.print_json({**result.values, "samples": result.samples, "split": split})
        else:
            text = ", ".join(f"{name} {value:.6g}" for name, value in result.values.items())
            printing.print_line(f"{split}: {text} ({result.samples:,} samples)")
        return
    low, high = wilson(result.accuracy, result.samples)
    if as_json:
        printing.print_json({**vars(result), "accuracy_interval": [low, high], "split": split})
    else:
        printing.print_line(
            f"{split}: loss {result.loss:.4f}, accuracy {result.accuracy:.4f} [{low:.4f}, {high:.4f}] "
            f"({result.correct:,} of {result.samples:,})",
        )
