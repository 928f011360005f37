"""An explanation of a run in short sentences and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitfront.engine.explanation.explain import explain
from bitfront.engine.explanation.results import (
    Alternative,
    Answer,
    Estimate,
    Explanation,
    Held,
    PlaceAlternatives,
    Prices,
    Step,
)
from bitfront.engine.storage.run import Run
from bitfront.errors import RunError
from bitfront.report.tables import Sheet, number
from bitfront.spaces.base import counted

#: Rows of the table of options, at most; places whose options differ least are left out.
ROWS = 120
#: Rows of a table of prices, at most.
PRICED = 12
#: A smaller difference is rounding of the arithmetic.
SMALLEST = 1e-9
#: Under this rank correlation, or with fewer results within their intervals, predictions are no guide.
TRUSTED_RANKS, TRUSTED_INSIDE = 0.5, 0.7


@dataclass(frozen=True)
class Section:
    """A part of the explanation: a heading, sentences, and a table below them, if any."""

    title: str
    sentences: tuple[str, ...]
    table: Sheet | None = None


def sections_for_page(run: Run) -> list[Section]:
    """The explanation of a run without a trial, for its page; why there is none if there is none."""
    try:
        return sections(explain(run))
    except RunError as error:
        return [Section("", (f"There is no explanation: {str(error).removeprefix(f'{run.folder}: ')}.",))]


def sections(explanation: Explanation) -> list[Section]:
    """The explanation for people, in the order in which it is read."""
    e = explanation
    parts = [_layers(e), _interactions(e)]
    if e.trial is not None:
        parts.append(_trial(e, e.trial))
    parts += [_prices(e, prices) for prices in e.prices]
    parts += [Section("Answer", tuple(_answer(e, answer))) for answer in e.answers]
    parts.append(Section("Gap", tuple(_gap(e))))
    if e.notes:
        parts.append(Section("Notes", e.notes))
    return parts


# -- numbers


def amount(value: float, unit: str, *, signed: bool = False) -> str:
    """A cost with its unit, bytes from 1,000 on as kB."""
    sign = "+" if signed and value > 0 else ""
    if unit == "bytes":
        return f"{sign}{value / 1000:.4g} kB" if abs(value) >= 1000 else f"{sign}{value:.4g} B"
    return f"{sign}{number(value)} {unit}".strip()


def _word(explanation: Explanation) -> str:
    return "points" if explanation.share else explanation.unit or explanation.metric


def _value(explanation: Explanation, value: float) -> str:
    return f"{100 * value:.2f} %" if explanation.share else f"{value:.4g} {explanation.unit}".strip()


def _plain(explanation: Explanation, difference: float, *, signed: bool = True) -> str:
    """A difference of the metric as a number: in points if it is a share."""
    shown = 100 * difference if explanation.share else difference
    shown = 0.0 if abs(shown) < SMALLEST else shown
    text = f"{shown:.2f}" if explanation.share else f"{shown:.3g}"
    return f"+{text}" if signed and shown > 0 else text


def _interval(explanation: Explanation, estimate: Estimate) -> str:
    return f"{_plain(explanation, estimate.low)} to {_plain(explanation, estimate.high)}"


def _with_interval(explanation: Explanation, estimate: Estimate) -> str:
    """A value of the metric: measured and by which trial, or predicted with its interval."""
    text = _value(explanation, estimate.value)
    if estimate.trial is not None:
        return f"{text} (measured, trial {estimate.trial})"
    return f"{text} (predicted, {_value(explanation, estimate.low)} to {_value(explanation, estimate.high)})"


def _trials(numbers: Sequence[int]) -> str:
    return f"trial {numbers[0]}" if len(numbers) == 1 else f"trials {', '.join(map(str, numbers))}"


# -- sections


def _layers(e: Explanation) -> Section:
    shown, rows = e.effects, sum(len(p.options) for p in e.effects)
    sentences = [
        "Each option is compared with the first one in the list of its layer, everything else as in "
        f"{_trials(e.around)}, on average. Costs are exact; effects are predicted, with 90 % intervals."
    ]
    if rows > ROWS:
        ranked = sorted(shown, key=lambda p: -_range([o.effect.value for o in p.options]))
        kept: set[str] = set()
        count = 0
        for place in ranked:
            count += len(place.options)
            if count > ROWS:
                break
            kept.add(place.place)
        sentences.append(
            f"Of {len(shown)} places, the {len(kept)} whose options change {e.metric} most are shown; --json has all."
        )
        shown = tuple(p for p in shown if p.place in kept)
    columns = ["layer", "option", *e.costs, f"{e.metric} ({_word(e)})" if e.share else e.metric, "90 % interval"]
    table = [
        [
            place.place if i == 0 else "",
            option.option,
            *(amount(option.costs[c], e.units[c], signed=True) if i else "" for c in e.costs),
            _plain(e, option.effect.value) if i else "",
            _interval(e, option.effect) if i else "",
        ]
        for place in shown
        for i, option in enumerate(place.options)
    ]
    return Section("What options cost and buy", tuple(sentences), Sheet(columns, table, right=columns[2:]))


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _interactions(e: Explanation) -> Section:
    if not e.interactions:
        return Section("Layers that interact", ("There is one layer with a choice, so there are no pairs.",))
    sentence = (
        f"By how much {e.metric} changes more when both layers take their cheapest option in place of their dearest "
        "than by the sum of the two changes. Predicted, with 90 % intervals; the strongest pairs."
    )
    columns = ["layer", "with", "beyond the sum", "90 % interval"]
    rows = [[*i.layers, _plain(e, i.excess.value), _interval(e, i.excess)] for i in e.interactions]
    return Section("Layers that interact", (sentence,), Sheet(columns, rows, right=columns[2:]))


def _trial(e: Explanation, trial: int) -> Section:
    sentences = [_why(e, place) for place in e.alternatives]
    best = best_buy(e)
    if best is not None:
        place, option = best
        more = amount(option.costs[e.costs[0]], e.units[e.costs[0]])
        sentences.append(
            f"The best next step from here is {place.place} to {option.option}: {more} more for "
            f"{_plain(e, option.difference)} {_word(e)} ({option.value.word})."
        )
    columns = ["layer", "has", "instead", *e.costs, e.metric, "known how"]
    rows = [
        [
            place.place if i == 0 else "",
            place.option if i == 0 else "",
            other.option,
            *(amount(other.costs[c], e.units[c], signed=True) for c in e.costs),
            _value(e, other.value.value),
            f"measured, trial {other.value.trial}"
            if other.value.trial is not None
            else f"predicted, {_value(e, other.value.low)} to {_value(e, other.value.high)}",
        ]
        for place in e.alternatives
        for i, other in enumerate(place.alternatives)
    ]
    return Section(f"Why trial {trial} has its options", tuple(sentences), Sheet(columns, rows, right=columns[3:-2]))


def _why(e: Explanation, place: PlaceAlternatives) -> str:
    """Why a trial has its option at one place: the next cheaper option, and the next dearer one."""
    if not e.costs:
        ranked = sorted(place.alternatives, key=lambda a: a.difference, reverse=e.better == "higher")
        return f"{place.place} has {place.option}: {_would(e, ranked[0])}."
    cost = e.costs[0]
    cheaper = [a for a in place.alternatives if a.costs[cost] < 0]
    same = [a for a in place.alternatives if a.costs[cost] == 0]
    dearer = [a for a in place.alternatives if a.costs[cost] > 0]
    sign = 1.0 if e.better == "lower" else -1.0
    same = [] if cheaper or dearer else sorted(same, key=lambda a: sign * a.difference)[:2]
    told = [*cheaper[-1:], *same, *dearer[:1]]
    return f"{place.place} has {place.option}: {'; '.join(_would(e, a) for a in told)}."


def _would(e: Explanation, other: Alternative) -> str:
    """``2 bits would save 0.3 kB and lose 1.2 points (predicted, ...)``."""
    parts = []
    if e.costs:
        more, unit = other.costs[e.costs[0]], e.units[e.costs[0]]
        parts.append(
            f"cost the same {e.costs[0]}"
            if more == 0
            else f"{'save' if more < 0 else 'cost'} {amount(abs(more), unit)}"
        )
    size = _plain(e, abs(other.difference), signed=False)
    if other.difference == 0:
        parts.append("change nothing")
    elif e.share:
        parts.append(f"{'gain' if other.difference > 0 else 'lose'} {size} {_word(e)}")
    else:
        parts.append(f"{'raise' if other.difference > 0 else 'lower'} {e.metric} by {size} {e.unit}".strip())
    how = "predicted" if other.value.trial is None else f"measured, trial {other.value.trial}"
    return f"{other.option} would {' and '.join(parts)} ({how})"


def best_buy(e: Explanation) -> tuple[PlaceAlternatives, Alternative] | None:
    """The change of the explained trial that buys most per cost; None if no dearer option is expected to buy any."""
    sign = 1.0 if e.better == "higher" else -1.0
    able = [
        (sign * a.difference / a.costs[e.costs[0]], place, a)
        for place in e.alternatives
        for a in place.alternatives
        if e.costs and a.costs[e.costs[0]] > 0 and sign * a.difference > 0
    ]
    return max(able, key=lambda item: item[0])[1:] if able else None


def price_unit(prices: Prices, unit: str) -> tuple[float, str]:
    """(how much of a cost a price is for, its name): kB, bits, or a round number of operations."""
    extent = prices.steps[-1].cost - prices.steps[0].cost
    if unit == "bytes":
        return (1000.0, "one more kB") if extent >= 5000 else (100.0, "100 more bytes")
    if unit == "bits":
        return 1.0, "one more bit"
    size = 10.0 ** math.floor(math.log10(extent / 10)) if extent > 0 else 1.0
    return size, f"{number(size)} more {unit}".strip()


def _prices(e: Explanation, prices: Prices) -> Section:
    size, word = price_unit(prices, e.units[prices.cost])
    sentences = []
    if e.trial is not None and len(prices.steps) > 1:
        sentences.append(_price_of_trial(e, prices, size, word))
    if not prices.exact:
        sentences.append(
            "The space is too large to predict all of it: the front is the exact one of the main effects, improved by "
            "changes of one layer."
        )
    if len(prices.steps) == 1:
        only = prices.steps[0]
        sentences.append(
            f"More {prices.cost} than {amount(only.cost, e.units[prices.cost])} buys nothing: {e.metric} is "
            f"{_with_interval(e, only.value)} there."
        )
        return Section(f"The price of {prices.cost}", tuple(sentences))
    steps = prices.steps
    if len(steps) > PRICED:
        sentences.append(f"Some of {len(steps)} steps; --json has all.")
        steps = tuple(steps[i * (len(steps) - 1) // (PRICED - 1)] for i in range(PRICED))
    columns = ["from", e.metric, "known how", f"{word} buys", "next"]
    rows = [
        [
            amount(step.cost, e.units[prices.cost]),
            _value(e, step.value.value),
            step.value.word if step.value.trial is None else f"trial {step.value.trial}",
            f"{_plain(e, size * step.price, signed=False)} {_word(e)}" if step.changes else "nothing",
            _next(step),
        ]
        for step in steps
    ]
    return Section(f"The price of {prices.cost}", tuple(sentences), Sheet(columns, rows, right=columns[:2]))


def _next(step: Step) -> str:
    parts = [f"{place} {after} (from {before})" for place, (before, after) in step.changes.items()]
    return "; ".join(parts[:3]) + (f"; {len(parts) - 3} more" if len(parts) > 3 else "")


def _price_of_trial(e: Explanation, prices: Prices, size: float, word: str) -> str:
    at = e.trial_costs[prices.cost]
    price = prices.price(at)
    where = f"Where trial {e.trial} is ({amount(at, e.units[prices.cost])})"
    if price == 0:
        return f"{where}, more {prices.cost} buys nothing."
    return f"{where}, {word} buys about {_plain(e, size * price, signed=False)} {_word(e)}."


def _answer(e: Explanation, answer: Answer) -> Iterator[str]:
    wanted = " and ".join(answer.budgets)
    best = f"the least {answer.optimised}" if answer.optimised in e.costs else f"the best {e.metric}"
    costs = ", ".join(f"{c} {amount(v, e.units[c])}" for c, v in answer.costs.items())
    yield f"With {wanted}, {best}: {_with_interval(e, answer.value)}" + (f", {costs}." if costs else ".")
    for site, table in _sites(answer):
        words = ", ".join(f"{key} {value}" for key, value in table.items())
        yield f"  {site}: {words}"
    if answer.failed:
        yield f"Its evaluation failed: {answer.failed}"
    elif answer.value.trial is None and not answer.verified:
        chance = "" if answer.chance is None else f" The chance that it keeps this is {100 * answer.chance:.0f} %."
        yield f"It was not evaluated; --verify does that.{chance}"
    elif answer.value.trial is None:
        broken = f", and it does not keep {' and '.join(answer.broken)}" if answer.broken else ""
        yield (
            f"Verified: {e.metric} {_value(e, answer.verified[e.metric])}; the prediction was "
            f"{_value(e, answer.value.value)}{broken}."
        )
    if answer.value.trial is None:
        best = (
            "no trial keeps this" if answer.measured is None else f"trial {answer.measured} is the best that keeps this"
        )
        yield f"Of what was measured, {best}."
    if not answer.exact:
        yield "It is the best of the candidates that were compared; the space is too large to predict all of it."


def _sites(answer: Answer) -> Iterator[tuple[str, dict[str, object]]]:
    tables = answer.config if "by" not in answer.config else {"": answer.config}
    for table in tables.values():
        for site, entry in table.items():
            if site not in ("by", "default") and isinstance(entry, dict):
                yield site, entry["config"]


def _gap(e: Explanation) -> Iterator[str]:
    gap = e.gap
    failed = f", {gap.failed} of them failed" if gap.failed else ""
    yield f"{gap.evaluated + gap.failed:,} of {counted(gap.candidates)} candidates were evaluated{failed}."
    if gap.best is None:
        yield "No trial fulfils the constraints."
    else:
        yield f"The best verified {e.metric} is {_value(e, gap.best.value)} (trial {gap.best.trial})."
    if gap.proven:
        yield "Proven: every candidate of the space was evaluated, so the front is complete."
    elif gap.looked_at:
        yield from _missing(e)
    else:
        yield "All candidates that were compared are evaluated; nothing is known to be missing."
    yield from _held(gap.held)


def _missing(e: Explanation) -> Iterator[str]:
    gap = e.gap
    cost = f" at no more {e.costs[0]}" if e.costs else ""
    focus = "" if gap.focus is None else f" within {gap.focus:g} {'points' if e.share else '%'} of the float model"
    looked = f"of {gap.looked_at:,} candidates{focus} that were not evaluated"
    if gap.expected > 0:
        yield (
            f"Estimated, not proven: {looked}, the best is predicted to be "
            f"{_plain(e, gap.expected, signed=False)} {_word(e)} better than every trial{cost}."
        )
    else:
        yield (f"Estimated, not proven: {looked}, none is predicted to be better than the trials{cost}.")
    yield (
        f"With 95 % per candidate, as far as the model holds, none is more than "
        f"{_plain(e, gap.possible, signed=False)} {_word(e)} better."
    )


def _held(held: Held | None) -> Iterator[str]:
    if held is None:
        yield "Too few trials to tell how well predictions held."
        return
    ranks = "not defined" if math.isnan(held.correlation) else f"{held.correlation:.2f}"
    yield (
        f"How predictions held ({held.how}): rank correlation {ranks}, {100 * held.inside:.0f} % of {held.predicted} "
        "results within their 90 % intervals."
    )
    if not (held.correlation >= TRUSTED_RANKS and held.inside >= TRUSTED_INSIDE):
        yield "That is too little to rely on predictions; take what was measured."
