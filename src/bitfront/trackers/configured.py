"""The trackers of a search, as its configuration names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitfront.config import Config, settings_of
from bitfront.errors import ConfigError
from bitfront.trackers import TRACKERS
from bitfront.trackers.base import Tracker


def configured_trackers(config: Config) -> dict[str, Tracker]:
    """Name → tracker with its settings, for every tracker of a configuration; nothing is opened yet.

    Raises:
        ConfigError: there is no such tracker, or a setting is unknown or has a wrong value.
        MissingExtraError: a tool is not installed; the message says which extra installs it.
    """
    if config.search is None:
        return {}
    trackers: dict[str, Tracker] = {}
    with config.locating():
        for name, given in config.search.track.items():
            tracker = _configured(name, given)
            trackers.setdefault(TRACKERS.official(name), tracker)
    for name, tracker in trackers.items():
        tracker.require(f"track={name!r}", [f"track={name!r}"])
    if config.search.tensorboard and "tensorboard" not in trackers:
        kind = TRACKERS.get("tensorboard")
        kind.require("tensorboard=True", ["tensorboard=True"])
        trackers["tensorboard"] = kind()
    return trackers


def _configured(name: str, given: Mapping[str, Any]) -> Tracker:
    where = ("search", "track", name)
    try:
        kind = TRACKERS.get(name)
    except ConfigError as error:
        error.key = where
        raise
    return kind(settings_of(kind.Settings, given, where))
