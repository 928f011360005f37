"""A configured strategy: its class and its settings.

It is parsed once from the name, ``evolution`` or ``optuna:tpe``, and the keys of ``[search.strategy.setup]``. Planning,
searching and comparing all use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitfront.config import StrategySetup, settings_of
from bitfront.errors import ConfigError, nearest, one_of
from bitfront.spaces.base import Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import Knowledge, Strategy, StrategySettings

NAME = ("search", "strategy", "name")
SETUP = ("search", "strategy", "setup")
#: The setting that says by itself which strategy is meant.
SAMPLER = "sampler"


@dataclass(frozen=True)
class ConfiguredStrategy:
    """A strategy with its settings.

    Attributes:
        name: the name under which it is registered.
        kind: its class.
        settings: its checked settings, an instance of ``kind.Settings``.
        batch: how many candidates it proposes at a time; None: as many as it does by itself.
    """

    name: str
    kind: type[Strategy]
    settings: StrategySettings
    batch: int | None = None

    @property
    def variant(self) -> str | None:
        """The variant: the part after the colon of ``optuna:tpe``; None for strategies without variants."""
        return str(getattr(self.settings, self.kind.variant)) if self.kind.variant else None

    @property
    def title(self) -> str:
        """The name with the variant: ``evolution``, ``optuna:tpe``."""
        return self.name if self.variant is None else f"{self.name}:{self.variant}"

    @property
    def words(self) -> str:
        """The name as a part of a sentence."""
        return self.name.replace("_", " ")

    @property
    def largest(self) -> int | None:
        """The largest space that it evaluates without a budget, in candidates; None if there is no limit."""
        return int(getattr(self.settings, self.kind.limit)) if self.kind.limit else None

    @property
    def identity(self) -> dict[str, Any]:
        """What proposals depend on beside space, history and seed; a part of the identity of a run."""
        settings = self.settings.model_dump(exclude_defaults=True, exclude={self.kind.variant})
        # In run folders the key of the variant is "sampler" for every strategy.
        return {
            "strategy": self.name,
            "sampler": self.variant,
            **({"strategy_settings": settings} if settings else {}),
            **({} if self.batch is None else {"batch": self.batch}),
        }

    def make(self, space: Space, objectives: int, seed: int, knowledge: Knowledge | None = None) -> Strategy:
        """A new strategy object.

        Args:
            space: the space of the search.
            objectives: number of objectives.
            seed: random seed, 0 or more.
            knowledge: what is known before any evaluation; None: nothing.
        """
        strategy = self.kind(space, objectives, seed, self.settings)
        if self.batch is not None:
            strategy.batch = self.batch
        if knowledge is not None:
            strategy.knowledge = knowledge
        return strategy


def configured_strategy(text: str, setup: Mapping[str, Any] | None = None) -> ConfiguredStrategy:
    """The strategy with the name `text`, with its settings.

    Args:
        text: a name (``evolution``), or a name and a variant (``optuna:tpe``).
        setup: key → value of ``[search.strategy.setup]``, without the keys that every search has. Keys of other
            strategies are accepted and have no effect, because one file may be used with several strategies.

    Raises:
        ConfigError: there is no such strategy or variant, or a key is unknown or has a wrong value. Its ``key`` is the
            path in the TOML.
    """
    name, named = with_variant(text)
    kind, official = _kind(name), STRATEGIES.official(name)
    given = {**(setup or {}), **named}
    for key in given:
        _check_key(key, given[key], kind, official)
    used = {key: value for key, value in given.items() if key in kind.Settings.model_fields}
    settings = settings_of(kind.Settings, used, SETUP)
    instead = settings.instead
    return configured_strategy(instead, setup) if instead else ConfiguredStrategy(official, kind, settings)


def with_variant(text: str) -> tuple[str, dict[str, Any]]:
    """(name, the setting of the variant): ``("optuna", {"sampler": "tpe"})`` for ``optuna:tpe``.

    A name without a colon, or one that is not registered, is returned unchanged, with an empty table.

    Raises:
        ConfigError: the strategy has no variants.
    """
    name, colon, variant = text.partition(":")
    if not colon or name not in STRATEGIES:
        return text, {}
    key = STRATEGIES.get(name).variant
    if not key:
        with_variants = [n for n in STRATEGIES.names() if STRATEGIES.get(n).variant]
        raise ConfigError(
            f"strategy {name!r} has no variants, so write its name without a colon; strategies with variants: "
            f"{', '.join(with_variants)}",
            key=NAME,
        )
    return name, {key: variant}


def all_settings() -> frozenset[str]:
    """The keys of ``[search.strategy.setup]`` that are settings of any strategy."""
    return frozenset(key for name in STRATEGIES.names() for key in STRATEGIES.get(name).Settings.model_fields)


def variant_settings() -> frozenset[str]:
    """The keys of ``[search.strategy.setup]`` that choose a variant of a strategy."""
    return frozenset(STRATEGIES.get(name).variant for name in STRATEGIES.names()) - {""}


def without_effect(strategy: ConfiguredStrategy, setup: Mapping[str, Any]) -> list[str]:
    """Remarks on keys of `setup` that are settings of other strategies only, and differ from their defaults."""
    notes = []
    for key, value in setup.items():
        if key in strategy.kind.Settings.model_fields or (key == SAMPLER and _names(value, strategy.name)):
            continue
        owners = _owners(key)
        if any(STRATEGIES.get(n).Settings.model_fields[key].default != value for n in owners):
            notes.append(f"setup.{key} has no effect: it is a setting of {' and '.join(owners)}")
    return notes


def _kind(name: str) -> type[Strategy]:
    try:
        return STRATEGIES.get(name)
    except ConfigError as error:
        error.key = NAME
        for other in STRATEGIES.names():
            kind = STRATEGIES.get(other)
            if name in kind.variants:
                raise ConfigError(
                    f"{name!r} is a {kind.variant} of strategy {other!r}; write {other}:{name}", key=NAME
                ) from None
        raise


def _owners(key: str) -> list[str]:
    return [name for name in STRATEGIES.names() if key in STRATEGIES.get(name).Settings.model_fields]


def _names(sampler: object, strategy: str) -> bool:
    """Whether a file's sampler is the strategy itself, as ``sampler = "brute-force"`` is brute force."""
    return sampler in STRATEGIES and STRATEGIES.official(str(sampler)) == strategy


def _check_key(key: str, value: object, kind: type[Strategy], name: str) -> None:
    """Raise ConfigError for a key that no strategy has, or that names the sampler of another one. Other settings of
    other strategies have no effect: one file may be used with several."""
    if key in kind.Settings.model_fields:
        return
    owners = _owners(key)
    if not owners:
        known = [*StrategySetup.model_fields, *kind.Settings.model_fields]
        raise ConfigError(f"unknown key; {one_of(known)}.{nearest(key, known)}", key=(*SETUP, key))
    if key == SAMPLER and not _names(value, name):
        raise ConfigError(f"a {key} belongs to strategy {owners[0]!r}, and this one is {name!r}", key=(*SETUP, key))
