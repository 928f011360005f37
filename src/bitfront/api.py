"""The verbs of the Python API that combine several parts: plan, search, compare, init.

The command line uses them too.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bitfront import config as configuration
from bitfront import tomlfile
from bitfront.config import Config, StrategySetup
from bitfront.data.base import Dataset
from bitfront.engine.comparison.results import Comparison
from bitfront.engine.planning.builder import make_plan
from bitfront.engine.planning.inputs import ARRAYS, given_data, open_data, open_model
from bitfront.engine.planning.inputs import dataset_of as dataset_of
from bitfront.engine.planning.plan import Plan
from bitfront.engine.search.session import run_search
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.trial import FromPython
from bitfront.errors import ConfigError, DataError, RunError
from bitfront.events import Events
from bitfront.executors.given import Given
from bitfront.graph import capture
from bitfront.interrupts import guarded
from bitfront.metrics import RUNNERS
from bitfront.models import MODELS
from bitfront.spaces.joint import PARTS
from bitfront.strategies.configured import ConfiguredStrategy, all_settings, configured_strategy, with_variant
from bitfront.tasks.base import Task
from bitfront.tasks.configured import named_task, task_of
from bitfront.tasks.distillation import without_labels
from bitfront.template import DEFAULT_TARGET, Leading, target_named, template

if TYPE_CHECKING:
    from bitfront.trackers.base import Tracker


def plan(
    source: str | Path | Config | None = None,
    *,
    model: nn.Module | str | None = None,
    data: Any = None,
    space: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | Sequence[str] | None = None,
    strategy: str | Mapping[str, Any] | None = None,
    events: Events | None = None,
    **overrides: Any,
) -> Plan:
    """Check and plan a search, without running it: what ``search`` would do with the same arguments.

    Args:
        source, model, data, space, metrics, strategy, overrides: as in ``search``.
        events: receives notes.

    Raises:
        UserError: the request is wrong.
    """
    events = events or Events()
    config = _configured(source, model, data, space, metrics, strategy, overrides)
    with guarded():
        _trackers(config)
        return _laid_out(config, model, data, events)


def search(
    source: str | Path | Config | None = None,
    *,
    model: nn.Module | str | None = None,
    data: Any = None,
    space: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | Sequence[str] | None = None,
    strategy: str | Mapping[str, Any] | None = None,
    executor: Executor | Callable[[], Executor] | str | None = None,
    insecure_executor: bool = False,
    restart: bool = False,
    events: Events | None = None,
    **overrides: Any,
) -> Run:
    """Search for the front of a model. Returns the run.

    Either from a file, ``search("file.toml")``, or from Python::

        search(model=net, data=(x, y), space={"linear": {"name": "integer", "weight_width": [2, 4, 8], ...}},
               metrics={"accuracy": "maximize", "average_bitwidth": "minimize"}, strategy="brute_force")

    Args:
        source: a TOML file, or a loaded configuration.
        model: a trained nn.Module, which is not changed; or a name.
        data: (x, y), which is split; ``{"train": (x, y), "val": ..., "test": ...}``; a Dataset; or a name. With
            ``class_names=[...]`` the classes have these names. A part of the data that lacks classes is fine for a
            trained nn.Module, where nothing is trained. With ``labels=False`` x alone is enough, and candidates are
            compared with the outputs of `model`.
        space: ``{"by": "type" | "name" | "regex_name", key: {parameter: choices}}``; ``by`` is ``type`` if left out.
            ``default_for`` as in ``[search.search_space.setup]``.
            With ``"name": "channel_size"`` it is a space of widths; ``{"name": "joint", "widths": {...}, "quantize":
            {...}}`` has both.
        metrics: metric → direction, or ``{"scale": 1.0, "direction": ...}``, or a list of names; the runners are
            added.
        strategy: ``"brute_force"``, ``"optuna"``, ``"optuna:nsgaii"``, or a table as in the TOML:
            ``{"name": "optuna", "setup": {"sampler": "nsgaii"}}``.
        executor: what carries out the evaluations; no result depends on it: any ``concurrent.futures.Executor``, a
            function that makes one (then it is made again after all its workers were lost), a Dask client, or a text
            as of ``--executor``: ``"loky:8"``.
        insecure_executor: accept a connection to workers that others can use and read.
        restart: delete the trials of an earlier search in this run folder.
        events: receives notes and the progress. Left out, they are shown in a notebook, and nothing is shown elsewhere;
            ``bf.Events()`` shows nothing.
        overrides: any key of the configuration, e.g. ``task="regression"``, ``seed=1``, ``project="mine"``,
            ``n_trials=50``, ``fold_batch_norm=True``, ``track="mlflow"`` (or a list of names); also the settings of the
            strategy, e.g. ``sampler="nsgaii"``, and ``constraints={"accuracy_drop": "<= 1 %"}``.

    Raises:
        UserError: the request is wrong; nothing has been evaluated.
        EvaluationError: nothing could be evaluated, or trials could not be written.
    """
    events = events or _shown()
    _refuse_in_worker("search")
    executor, overrides = _executor_named(executor, overrides)
    config = _configured(source, model, data, space, metrics, strategy, overrides)
    with guarded():
        trackers = _trackers(config)
        layout = _laid_out(config, model, data, events, executor=executor, insecure=insecure_executor)
        if not trackers:
            run = run_search(layout, restart, events)
        else:
            from bitfront.trackers.following import followed  # what it imports is for a search that is followed

            with followed(config.run_folder, trackers, events) as heard:
                run = run_search(layout, restart, heard)
    return replace(run, given=_from_python(model, data))


def compare(
    source: str | Path | Config | None = None,
    *,
    strategies: Sequence[str] | None = None,
    seeds: int = 5,
    model: nn.Module | str | None = None,
    data: Any = None,
    space: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | Sequence[str] | None = None,
    executor: Executor | Callable[[], Executor] | str | None = None,
    insecure_executor: bool = False,
    restart: bool = False,
    events: Events | None = None,
    **overrides: Any,
) -> Comparison:
    """Run several strategies on one space, with the same budget and the same random seeds. Returns the results of each.

    Every candidate is evaluated once, whichever strategy proposes it first. The results are kept in the folder
    ``compare`` of the run folder, with ``compare.json`` and, if matplotlib is installed, ``figures/``.

    Args:
        strategies: e.g. ``["brute_force", "optuna:tpe"]``; None: surrogate, evolution, three of Optuna's samplers, and
            brute force if that takes no more than two minutes. Brute force evaluates the whole space, whatever the
            budget, and its front is the true front that all are compared with. ``learned_bits`` trains networks that
            are in no space; ``learned_bits:channel`` and ``learned_bits:layer`` are the same with shared bits.
        seeds: number of runs of each strategy, with the random seed of the configuration and the following ones. Model,
            data and samples are those of the first seed.
        restart: delete the results of an earlier comparison in this run folder.
        source, model, data, space, metrics, executor, insecure_executor: as in ``search``.
        overrides: as in ``search``; ``n_trials`` is the budget of each run, 400 by default, and ``timeout`` the time of
            each run, in seconds of its proposals and of its candidates. The strategy of the configuration is ignored.

    Returns:
        ``results`` has the numbers of each strategy, ``curve(strategy, what, over)`` the curves, ``runs`` every run.

    Raises:
        UserError: the request is wrong; nothing has been evaluated.
        EvaluationError: nothing could be evaluated, or results could not be written.
    """
    from bitfront.engine.comparison.compare import prepared, run_comparison  # a search does not wait for these
    from bitfront.report.comparison import can_draw
    from bitfront.report.comparison_files import write_comparison

    events = events or _shown()
    _refuse_in_worker("compare")
    if isinstance(strategies, str):
        strategies = [strategies]
    executor, overrides = _executor_named(executor, overrides)
    config = prepared(_configured(source, model, data, space, metrics, None, overrides))
    with guarded():
        # The compared strategies are chosen after planning; until then the plan has a strategy that takes any space.
        evolution = configured_strategy("evolution")
        layout = _laid_out(config, model, data, events, evolution, executor=executor, insecure=insecure_executor)
        if not can_draw():
            events.note("no figures: matplotlib is not installed: pip install 'bitfront[report]'")
        result = run_comparison(layout, strategies, seeds, restart, events)
        write_comparison(result)
    return result


def _executor_named(
    executor: Executor | Callable[[], Executor] | str | None, overrides: dict[str, Any]
) -> tuple[Executor | Callable[[], Executor] | None, dict[str, Any]]:
    """(the executor if it is an object, the overrides; its name is one of them)."""
    if isinstance(executor, str):
        return None, {**overrides, "executor": executor}
    return executor, overrides


def _laid_out(
    config: Config,
    model: Any,
    data: Any,
    events: Events,
    strategy: ConfiguredStrategy | None = None,
    *,
    executor: Executor | Callable[[], Executor] | None = None,
    insecure: bool = False,
) -> Plan:
    """The plan of a search; objects among the arguments replace what the configuration names."""
    given_model = model if isinstance(model, nn.Module) else None
    return make_plan(
        config,
        model=given_model,
        dataset=given_data(config, data, given_model, events),
        strategy=strategy,
        executor=None if executor is None else Given(executor),
        insecure=insecure,
        report=events.note,
        progress=events.downloading,
    )


def _shown() -> Events:
    """What shows the progress for who has given no events."""
    from bitfront.report.live import shown_events

    return shown_events()


def _from_python(model: Any, data: Any) -> FromPython:
    """What came from Python, for who wants networks of the run; names are in the run folder."""
    return FromPython(*(None if isinstance(value, str) else value for value in (model, data)))


def _trackers(config: Config) -> Mapping[str, Tracker]:
    """Name → tracker of a search. Raises UserError where one is unknown, has a wrong setting, or is not installed."""
    if config.search is None or not (config.search.track or config.search.tensorboard):
        return {}
    from bitfront.trackers.configured import configured_trackers

    return configured_trackers(config)


def _refuse_in_worker(verb: str) -> None:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RunError(
            f"{verb}() was called while a worker process imports your script, because n_jobs > 1 starts new processes; "
            "put the call below `if __name__ == '__main__':`"
        )


def _configured(
    source: str | Path | Config | None,
    model: nn.Module | str | None,
    data: Any,
    space: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | Sequence[str] | None,
    strategy: str | Mapping[str, Any] | None,
    overrides: Mapping[str, Any],
) -> Config:
    if model is not None and not isinstance(model, (str, nn.Module)):
        raise ConfigError(f"model is a {type(model).__name__}; allowed: an nn.Module, or a name")
    if isinstance(source, Config):
        values = source.effective()
        name = source._document.name
    elif source is not None:
        document = tomlfile.read(Path(source))
        values, name = dict(document.values), document.name
    else:
        values, name = {}, "search(...)"
    if isinstance(source, Config) and not (model or data or space or metrics or strategy or overrides):
        return source
    lines = document.lines if source is not None and not isinstance(source, Config) else {}
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if key == "constraints" and isinstance(value, Mapping):
            flat.update({f"search.constraints.{name}": condition for name, condition in value.items()})
        else:
            flat[_path_of(key)] = value
    if isinstance(model, str):
        flat["model"] = model
    elif model is not None:
        values = {**values, "model": type(model).__name__}
    if isinstance(data, str):
        flat["dataset"] = data
    elif data is not None:
        values = {**values, "dataset": data.name if isinstance(data, Dataset) else ARRAYS}
    named, given_settings, labels = (
        overrides.get(key, values.get(key, otherwise))
        for key, otherwise in (("task", "cls"), ("task_settings", None), ("labels", True))
    )
    task = named_task(named, given_settings)
    table = _search_table(space, metrics, strategy, task if labels else without_labels(task))
    if table:
        values = _merged(values, {"search": table})
    return configuration.from_document(tomlfile.Document(name, values, lines), flat)


def _path_of(key: str) -> str:
    """The dotted key of an override. Keys of a strategy's setup (of any strategy), ``fold_batch_norm``,
    ``tensorboard`` and ``track`` need no table in their names."""
    if key in Config.model_fields or "." in key:
        return key
    if key in StrategySetup.model_fields or key in all_settings():
        return f"search.strategy.setup.{key}"
    if key == "executor":
        return "search.strategy.executor"
    return f"search.{key}" if key in ("tensorboard", "track", "fold_batch_norm") else key


def _search_table(
    space: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | Sequence[str] | None,
    strategy: str | Mapping[str, Any] | None,
    task: Task,
) -> dict[str, Any]:
    table: dict[str, Any] = {}
    if space is not None:
        table["search_space"] = _space_table(space)
    strategy_table: dict[str, Any] = {}
    if isinstance(strategy, str):
        name, setup = with_variant(strategy)
        strategy_table = {"name": name, **({"setup": setup} if setup else {})}
    elif strategy is not None:
        strategy_table = dict(strategy)
    if metrics is not None:
        if isinstance(metrics, str):
            metrics = [metrics]
        if not isinstance(metrics, Mapping):
            metrics = {name: {} for name in metrics}
        strategy_table["metrics"] = {k: {"direction": v} if isinstance(v, str) else dict(v) for k, v in metrics.items()}
        for name in RUNNERS.names():
            runner = RUNNERS.get(name)
            if any(m.name in metrics for m in runner.of_task(task)):
                strategy_table.setdefault(runner.side, {}).setdefault(name, {})
    if strategy_table:
        table["strategy"] = strategy_table
    if table:
        table.setdefault("search_space", {})
        table.setdefault("strategy", {})
    return table


def _space_table(space: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: _space_table(space[name]) for name in PARTS if space.get("name") == "joint" and name in space}
    if parts:
        return {"name": "joint", **parts}
    setup = {"by": space.get("by", "type"), **{k: v for k, v in space.items() if k == "default_for"}}
    choices = {
        k: v if "config" in v else {"config": dict(v)}
        for k, v in space.items()
        if k not in ("by", "name", "default_for")
    }
    named = {"name": space["name"]} if isinstance(space.get("name"), str) else {}
    return {**named, "setup": setup, "seed": choices}


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def init(
    model: str,
    dataset: str | None = None,
    dataset_path: str | None = None,
    file: str = "FILE.toml",
    target: str = DEFAULT_TARGET,
    task: str = "classification",
    keys: Mapping[str, Any] | None = None,
) -> tuple[str, list[str]]:
    """(text of a TOML that runs, notes) for a model and a dataset.

    The model is captured to list its layers; if the data is missing, the text is a guess, and a note says so.

    Args:
        model: a model's name, that of a library, or ``package.module:factory``.
        dataset: a dataset's name, that of a library, a path, or ``package.module:factory``; None for the one that the
            model is made for.
        dataset_path: file or folder of the data.
        file: the name of the file, for the comment in its first line.
        target: ``"processor"`` (affine integers, weights with a scale per channel), ``"onnxruntime"`` (the same in
            bytes, for kernels that fuse), ``"fpga"`` (fixed point, weights with a binary point per channel) or
            ``"microcontroller"`` (fixed point, to be written in C).
        task: what the samples are.
        keys: further keys of the configuration that model and data depend on, dotted; those in
            ``[dataset_settings]`` are written into the text.

    Raises:
        UserError: there is no such target or model, or the model cannot be captured.
    """
    target_named(target)  # before data is opened
    names = {"task": task, **(keys or {}), "model": model, "dataset": dataset, "dataset_path": dataset_path}
    config = configuration.load_config(None, names)
    dataset, settings = config.dataset, config.dataset_settings or {}
    found = task_of(config)
    leads = Leading("classification" if found.classifies else task, found.leading.name, found.leading.direction)
    try:
        data = open_data(config)
    except DataError as error:
        if model not in MODELS and ":" not in model:
            MODELS.get(model)  # raises, and lists the models
        return template(
            model, dataset, dataset_path=dataset_path, file=file, target=target, task=leads, settings=settings
        ), [f"the layers are a guess, because the data could not be read: {error}"]
    graph = capture(open_model(config, data), data.split("train")[0][:2])
    weighted = [site for site in graph.sites if site.stored_weights]
    ops = list(dict.fromkeys(site.op for site in weighted))
    others = list(dict.fromkeys(site.op for site in (*graph.sites, *graph.nameable) if site.op not in ops))
    samples = len(data.split("train")[1])
    text = template(model, dataset, ops, len(weighted), samples, dataset_path, file, target, leads, settings, others)
    return text, []
