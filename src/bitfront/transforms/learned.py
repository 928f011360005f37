"""From formats to learned ranges, for fine-tuning a candidate, and back to formats.

A format creates the module that learns its range (``Format.learned_range``). Formats without one do not change.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from bitfront.formats.base import Format, Operand
from bitfront.formats.learned import LearnedRange
from bitfront.graph import Graph
from bitfront.operations.base import Rounds
from bitfront.transforms.correct import Correction
from bitfront.transforms.quantize import rebuilt


def learning(form: Format) -> Rounds:
    """The learned range of a calibrated format; the format itself if it has none."""
    return form.learned_range() or form


def learning_model(
    graph: Graph, formats: Mapping[str, Mapping[Operand, Format]], corrections: Mapping[str, Correction]
) -> tuple[nn.Module, dict[str, dict[Operand, Rounds]]]:
    """Like ``quantize(graph, formats, corrections=...)``, for training: ranges are parameters of the model.

    Args:
        formats: site name → calibrated formats by operand.

    Returns:
        The model, and its formats and learned ranges by site and operand.
    """
    rounds = {site: {o: learning(f) for o, f in operands.items()} for site, operands in formats.items()}
    model = rebuilt(graph, rounds, corrections)
    for module in list(model.modules()):
        for operand, rounding in getattr(module, "formats", {}).items():
            if isinstance(rounding, nn.Module):
                module.add_module(f"{operand}_range", rounding)
    return model, rounds


def settle(rounds: Mapping[str, Mapping[Operand, Rounds]]) -> None:
    """Stop learning the ranges that change in jumps; all other training goes on."""
    for operands in rounds.values():
        for each in operands.values():
            if isinstance(each, LearnedRange):
                each.settle()


def frozen(rounds: Mapping[str, Mapping[Operand, Rounds]]) -> dict[str, dict[Operand, Format]]:
    """Site → operand → the learned format."""
    formats: dict[str, dict[Operand, Format]] = {}
    for site, of_site in rounds.items():
        for operand, each in of_site.items():
            learned = each.frozen() if isinstance(each, LearnedRange) else each
            assert isinstance(learned, Format)
            formats.setdefault(site, {})[operand] = learned
    return formats


def shadow(graph: Graph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float weights of a trained model of ``learning_model``, as a state dict of the captured model."""
    weights = {name: state[name] for name in graph.model.state_dict() if name in state}
    for site in graph.sites:
        # For a functional site with corrected parameters, these were trained.
        for operand, name in site.operand_parameters:
            corrected = f"{site.name}_{operand}_corrected"
            if corrected in state:
                weights[name] = state[corrected]
    return weights
