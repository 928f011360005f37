"""The pressure under constraints: against a made-up network whose accuracy and cost follow the pressure."""

import pytest

from bitfront.learned_bits.steering import CLOSE, Rise, Target


def course(target, past_from, cycles=40, first=1e-7, last=2e-5):
    """The pressures of a course whose cycles are past the target from some pressure on."""
    usual = (last / first) ** (1 / (cycles // 2 - 1))
    rise, pressures = Rise(), []
    for _ in range(cycles):
        pressure = rise.next(first)
        pressures.append(pressure)
        rise, _ = rise.after(pressure, pressure >= past_from, usual, target)
    return pressures


@pytest.mark.parametrize("limit", [2e-7, 3e-6, 1e-5, 3e-5])
@pytest.mark.parametrize("target", [Target(least_right=100), Target(most_cost=1000), Target(100, 1000)])
def test_the_pressure_ends_near_the_limit(target, limit):
    pressures = course(target, limit)
    assert pressures[0] == 1e-7
    assert all(limit / CLOSE**3 <= p <= limit * CLOSE**3 for p in pressures[-8:])


def test_a_limit_below_the_first_pressure_is_reached_from_above():
    pressures = course(Target(least_right=100), 1e-9)
    assert all(1e-9 / CLOSE**3 <= p <= 1e-9 * CLOSE**3 for p in pressures[-8:])


def test_past_the_target():
    cheap, dear = (500.0, 90.0), (2000.0, 110.0)
    assert Target(least_right=100).past([cheap])
    assert not Target(least_right=100).past([cheap, dear])
    assert Target(most_cost=1000).past([cheap, dear])
    assert not Target(most_cost=1000).past([dear])
    assert not Target(100, 1000).past([dear])
    assert not Target()
