"""Conformance suites: what every member of a kind must do: a dataset, an executor, a format, and so on.

Each ``check_...`` takes the member (or its name) and raises an AssertionError that names the broken promise. They test
the members that are part of Bitfront, and they are public so that you can test yours in the same way: register it, then
call its suite in a test.
"""

from bitfront.testing.data import check_dataset
from bitfront.testing.executors import check_executor
from bitfront.testing.formats import check_format
from bitfront.testing.metrics import check_runner
from bitfront.testing.models import check_model
from bitfront.testing.operations import check_operation
from bitfront.testing.spaces import check_space
from bitfront.testing.strategies import check_strategy
from bitfront.testing.targets import check_target
from bitfront.testing.tasks import check_task
from bitfront.testing.trackers import check_tracker

__all__ = [
    "check_dataset",
    "check_executor",
    "check_format",
    "check_model",
    "check_operation",
    "check_runner",
    "check_space",
    "check_strategy",
    "check_target",
    "check_task",
    "check_tracker",
]
