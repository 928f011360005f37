"""A candidate's model with ranges that are learned, for fine-tuning, and back to plain formats.

Each format offers the module that learns its range (``Format.learned_range``); those that offer none stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from bitfront.formats.base import Format, Operand
from bitfront.formats.learned import LearnedRange
from bitfront.graph import Graph
from bitfront.transforms.correct import Correction
from bitfront.transforms.quantize import Rounds, rebuilt


def learning(form: Format) -> Rounds:
    """A calibrated format with a range that is learned; formats without one as they are."""
    return form.learned_range() or form


def learning_model(
    graph: Graph, formats: Mapping[str, Mapping[Operand, Format]], corrections: Mapping[str, Correction]
) -> tuple[nn.Module, dict[str, dict[Operand, Rounds]]]:
    """As ``quantize(graph, formats, corrections=...)``, for training: ranges are parameters of the model.

    Args:
        formats: site name → calibrated formats by operand.

    Returns:
        The model, and what rounds in it, by site and operand.
    """
    rounds = {site: {o: learning(f) for o, f in own.items()} for site, own in formats.items()}
    model = rebuilt(graph, rounds, corrections)
    for module in list(model.modules()):
        for operand, own in getattr(module, "formats", {}).items():
            if isinstance(own, nn.Module):
                module.add_module(f"{operand}_range", own)
    return model, rounds


def settle(rounds: Mapping[str, Mapping[Operand, Rounds]]) -> None:
    """What jumps while it is learned stays as it is from now on; whatever else is learned goes on."""
    for own in rounds.values():
        for each in own.values():
            if isinstance(each, LearnedRange):
                each.settle()


def frozen(rounds: Mapping[str, Mapping[Operand, Rounds]]) -> dict[str, dict[Operand, Format]]:
    """Site → operand → the format that was learned."""
    formats: dict[str, dict[Operand, Format]] = {}
    for site, of_site in rounds.items():
        for operand, each in of_site.items():
            learned = each.frozen() if isinstance(each, LearnedRange) else each
            assert isinstance(learned, Format)
            formats.setdefault(site, {})[operand] = learned
    return formats


def shadow(graph: Graph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float weights behind a trained model of ``learning_model``: a state dict of the graph's own model."""
    own = {name: state[name] for name in graph.model.state_dict() if name in state}
    for site in graph.sites:
        # A functional site with a corrected bias trains that one.
        corrected = f"{site.name}_bias_corrected"
        if corrected in state and site.bias:
            own[site.bias] = state[corrected]
    return own
