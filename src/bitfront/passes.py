"""The tables ``[passes.*]`` of a configuration: what ``transform`` does to a trained model, and what it shows of it.

The names and keys are MASE's. ``quantize`` is read where formats are (``spaces.quantize.single``); this is the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bitfront.config import REPORTS, Config, Table, quantize_pass, settings_of
from bitfront.errors import ConfigError


class PruneSettings(Table):
    """``[passes.prune.weight]``."""

    sparsity: float = Field(ge=0, lt=1, description="share of the weights that become zero")
    scope: Literal["local", "global"] = Field(
        "local", description="`local`: this share of each layer; `global`: of all weights together"
    )
    method: Literal["l1-norm"] = Field("l1-norm", description="the smallest by magnitude are taken")
    granularity: Literal["elementwise"] = Field("elementwise", description="single weights")


class ReportSettings(Table):
    """``[passes.report_node_type]``, and of the other passes that show something."""

    which: Literal["all", "common", "hardware", "software"] = Field(
        "all", description="accepted, without effect: everything that is known is shown"
    )
    save_path: str | None = Field(None, description="file that the table is written to, too")
    save_dir: str | None = Field(None, description="folder that the table is written to, too, under the pass's name")


@dataclass(frozen=True)
class Passes:
    """The passes of a configuration, checked.

    Attributes:
        quantize: the candidate spelled out; None where nothing is quantized.
        prune: None where no weight is pruned.
        reports: (name, file that the table is written to, empty if none) of the passes that show something, in the
            order of the configuration.
    """

    quantize: Mapping[str, Any] | None
    prune: PruneSettings | None
    reports: tuple[tuple[str, str], ...] = ()


def configured_passes(config: Config) -> Passes:
    """The passes in a configuration.

    Raises:
        ConfigError: there is none, or a key is wrong.
    """
    tables = config.passes
    with config.locating():
        if "quantize" in tables or "prune" not in tables:
            quantize = None if {*tables} & {*REPORTS} and "quantize" not in tables else quantize_pass(config)
        else:
            quantize = None
        reports = [
            (name, _file(name, settings_of(ReportSettings, table, ("passes", name))))
            for name, table in tables.items()
            if name in REPORTS
        ]
        return Passes(quantize, _prune(tables["prune"]) if "prune" in tables else None, tuple(reports))


def _file(name: str, settings: ReportSettings) -> str:
    """The file that the table of a pass is written to; empty if none."""
    return settings.save_path or (settings.save_dir and str(Path(settings.save_dir) / f"{name}.csv")) or ""


def _prune(table: Mapping[str, Any]) -> PruneSettings:
    """``[passes.prune]``. Raises ConfigError."""
    where = ("passes", "prune")
    if "activation" in table:
        raise ConfigError(
            "activations are not pruned here; leave this table out. Weights are: [passes.prune.weight]",
            key=(*where, "activation"),
        )
    unknown = [key for key in table if key != "weight"]
    if unknown:
        raise ConfigError("unknown key; allowed: weight", key=(*where, unknown[0]))
    if not isinstance(table.get("weight"), Mapping):
        raise ConfigError("a table [passes.prune.weight] is needed, with its sparsity", key=where)
    return settings_of(PruneSettings, table["weight"], (*where, "weight"))
