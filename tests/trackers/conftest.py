"""What the tests of the trackers share: a folder for trackio, a run of twelve trials, and a tiny search."""

import os
import shutil
import tempfile

import pytest

import bitfront as bf
from synthetic_runs import drawn, write

# trackio reads this once, when it is imported.
_TEMPORARY = tempfile.TemporaryDirectory(prefix="bitfront-trackio-")
os.environ["TRACKIO_DIR"] = _TEMPORARY.name


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A database of MLflow without runs: making one takes seconds."""
    tracking = pytest.importorskip("mlflow.tracking")
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(tmp_path, empty_database):
    """MLflow's database beside the run folders."""
    (tmp_path / "runs").mkdir()
    return shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")


@pytest.fixture
def twelve(tmp_path, monkeypatch):
    """A run of twelve trials, of which the second one failed."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return write(tmp_path / "runs" / "twelve", *drawn(12), errors=["", "lost", *[""] * 10], project="twelve")


@pytest.fixture
def searched(tmp_path, tiny_mlp):
    """A search of a tiny model in a folder, from Python."""
    import torch

    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))

    def search(**more):
        return bf.search(
            model=tiny_mlp,
            data=(x, (x[:, 0] > 0).long()),
            space={"linear": {"name": "integer", "weight_width": [2, 4, 8], "weight_frac_width": "auto"}},
            metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
            strategy="brute_force",
            project_dir=str(tmp_path / "runs"),
            project="tiny",
            **more,
        )

    return search
