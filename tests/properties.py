"""How many examples the property tests draw, and which.

``BITFRONT_PROPERTIES`` says for what: in the ``suite`` they are always the same, so that what fails is due to a change, and
half as many as a test says; ``all`` draws all of them, ``quick`` a fifth; ``fuzz`` draws others, from the seed that
``fuzz.py`` gives.
"""

import os

from hypothesis import HealthCheck, Phase, settings

#: Use → the share of the examples that are drawn.
USES = {"suite": 0.5, "all": 1.0, "quick": 0.2, "fuzz": 1.0}
USE = os.environ.get("BITFRONT_PROPERTIES", "suite")
assert USE in USES, f"BITFRONT_PROPERTIES is {USE!r}; allowed: {', '.join(USES)}"
#: Where a test does not say how many: most take less than a millisecond each.
EXAMPLES = 100


def max_examples(number: int, *, suite: int | None = None, shrink: bool = True) -> settings:
    """A decorator of a property test: it draws `number` examples, or the share of them that this use draws.

    Args:
        suite: how many the suite draws, in place of its share; where an example takes a second.
        shrink: whether an example that fails is reduced. Where one takes a tenth of a second that takes minutes.
    """
    phases = (Phase.explicit, Phase.generate, *((Phase.shrink,) if shrink else ()))
    drawn = suite if suite is not None and USE == "suite" else max(1, round(number * USES[USE]))
    return settings(max_examples=drawn, phases=phases)


def load() -> None:
    """Make this what hypothesis does where a test says nothing else."""
    settings.register_profile(
        "bitfront",
        max_examples(EXAMPLES),
        deadline=None,
        derandomize=USE != "fuzz",
        print_blob=USE == "fuzz",
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("bitfront")
