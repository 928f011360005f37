"""Every executor that can run on one machine: workers of two, one piece of work that ends them, and refused settings."""

from pathlib import Path
from unittest import mock

import pytest

from bitfront.config import ExecutorTable
from bitfront.errors import ConfigError, EvaluationError
from bitfront.executors import EXECUTORS
from bitfront.executors.base import configured_launcher
from bitfront.testing import check_executor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [("processes", {}), pytest.param("dask", {"address": "local"}, marks=pytest.mark.long)],
)
@pytest.mark.usefixtures("quick_workers")
def test_every_executor_keeps_the_contract(name, settings, tmp_path):
    check_executor(name, settings, folder=tmp_path)


def launcher(text, **settings):
    table = {"name": text.partition(":")[0], "at": text.partition(":")[2], **settings}
    return configured_launcher(ExecutorTable.model_validate(table))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loky:8", {"workers": 8}),
        ("dask:local", {"address": "local"}),
        ("dask:local:2", {"address": "local", "workers": 2}),
        ("dask:tls://host:8786", {"address": "tls://host:8786"}),
        ("slurm:64", {"backend": "job", "workers": 64}),
        ("slurm:local:2", {"backend": "local", "workers": 2}),
    ],
)
def test_what_is_typed_becomes_settings(text, expected):
    given = launcher(text).settings
    assert {key: getattr(given, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("loki:2", {}, "no executor called 'loki'.*Did you mean 'loky'"),
        ("loky:many", {}, "'many' is no number of workers; it is written as in 'loky:8'"),
        ("slurm:queue:2", {}, "'queue' is no backend; allowed: job, local"),
        ("dask:local", {"adress": "x"}, "search.strategy.executor.adress: unknown key"),
    ],
)
def test_what_is_no_executor_is_an_error(text, settings, message):
    with pytest.raises(ConfigError, match=message):
        launcher(text, **settings)


# An address of the documentation's net (RFC 5737): nobody has it.
FAR = "192.0.2.7:8786"


@pytest.mark.parametrize(
    "address", [f"tcp://{FAR}", FAR, "tcp://cluster:8786", "ucx://192.0.2.7:1", "tcp://[2001:db8::1]:1"]
)
def test_an_open_scheduler_of_another_machine_is_refused(address):
    with pytest.raises(ConfigError, match=r"is not encrypted.*run code as you.*tls://"):
        launcher(f"dask:{address}").check()
    launcher(f"dask:{address}").check(insecure=True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "localhost:8786", "tcp://[::1]:8786"])
def test_one_of_this_machine_is_accepted(address):
    launcher(f"dask:{address}").check()


def test_tls_needs_its_files(tmp_path):
    with pytest.raises(ConfigError, match="tls://host:1 needs tls_ca_file, a PEM file"):
        launcher("dask:tls://host:1").check()
    files = {key: str(tmp_path / key) for key in ("tls_ca_file", "tls_cert", "tls_key")}
    with pytest.raises(ConfigError, match=r"there is no file .*tls_ca_file"):
        launcher("dask:tls://host:1", **files).check()
    for file in files.values():
        Path(file).touch()
    launcher("dask:tls://host:1", **files).check()


def test_no_scheduler_is_an_error_that_says_how_to_start_one(monkeypatch):
    monkeypatch.setattr("bitfront.executors.dask.CONNECTING", 0.2)
    with pytest.raises(EvaluationError, match=r"dask: no scheduler answers at tcp://127\.0\.0\.1:9.*dask scheduler"):
        launcher("dask:tcp://127.0.0.1:9").launch(1)


def test_workers_that_die_while_they_start_are_started_again(monkeypatch):
    distributed = pytest.importorskip("distributed")
    cluster = mock.Mock(side_effect=RuntimeError("Nanny failed to start.\nmore"))
    monkeypatch.setattr(distributed, "LocalCluster", cluster)
    with pytest.raises(EvaluationError, match=r"dask: its workers cannot be started .*: Nanny failed to start\.$"):
        launcher("dask:local:1").launch(1)
    assert cluster.call_count == 3


def test_every_executor_is_listed():
    assert EXECUTORS.names() == ["dask", "loky", "mpi", "processes", "slurm"]
