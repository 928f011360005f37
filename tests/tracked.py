"""Reads tracked searches back, with the tools themselves: (number, values) of every trial that is there.

A trial whose values are there twice comes twice.
"""

from collections import Counter


def _by_step(histories):
    """(number, values) of histories: name -> [(step, value)]."""
    counts = Counter((name, step) for name, history in histories.items() for step, _ in history)
    times = {step: max(n for (_, s), n in counts.items() if s == step) for _, step in counts}
    values = {step: {name: dict(h)[step] for name, h in histories.items() if step in dict(h)} for step in times}
    return [(step, values[step]) for step, n in sorted(times.items()) for _ in range(n)]


def mlflow_client(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder.resolve().parent / 'mlflow.db'}")


def mlflow_run(folder, identifier):
    """The one run of a search."""
    client = mlflow_client(folder)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`bitfront.search` = '{identifier}'")
    return client, run


def mlflow_steps(folder, identifier):
    """Trials that are steps."""
    client, run = mlflow_run(folder, identifier)
    found = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return _by_step({key: [(m.step, m.value) for m in metrics] for key, metrics in found.items()})


def mlflow_children(folder, identifier):
    """Trials that are child runs."""
    client, run = mlflow_run(folder, identifier)
    children = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", max_results=1000
    )
    found = []
    for child in children:
        assert child.info.status != "RUNNING"
        trials = _by_step(
            {
                k: [(m.step, m.value) for m in client.get_metric_history(child.info.run_id, k)]
                for k in child.data.metrics
            }
        )
        assert [number for number, _ in trials] == [int(child.data.tags["bitfront.trial"])]
        found += trials
    return found


def trackio_steps(identifier, project="bitfront"):
    """Trials that are steps."""
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs(project, run_id=identifier)
    return [(row["step"], row) for row in rows if "failed" in row]


def trackio_runs(identifier, project="bitfront"):
    """Trials that are runs of a group."""
    from trackio.sqlite_storage import SQLiteStorage

    runs = [r["id"] for r in SQLiteStorage.get_run_records(project) if r["id"].startswith(f"{identifier}-")]
    return [trial for run in runs for trial in trackio_steps(run, project)]


def tensorboard_steps(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return _by_step({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})


def wandb_records(path):
    """The records of a file of Weights & Biases: a log of LevelDB, with blocks of 32 KB and a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_steps(folder, identifier):
    """Trials in the files of all sessions together."""
    import json

    found = []
    for path in sorted((folder / "wandb").glob(f"offline-run-*-{identifier}/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") != "history":
                continue
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            if "failed" in row:
                found.append((int(row["_step"]), row))
    return found
