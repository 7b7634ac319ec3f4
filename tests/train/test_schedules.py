"""Learning-rate schedules: closed forms are the oracles."""

import pytest

from common.errors import ConfigError
from train.schedules import Schedule


def test_linear_is_the_published_decay():
    """Oracle: (steps - s) / steps."""
    schedule = Schedule()
    assert [schedule.factor(s, 4) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_warmup_hold_and_final():
    """Oracle: written out; the first step moves, the hold stays at 1, the end is ``final``."""
    schedule = Schedule(warmup=0.2, hold=0.3, final=0.1)
    factors = [schedule.factor(s, 10) for s in range(11)]
    assert factors[:6] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert factors[6:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_cosine_and_constant():
    """Oracle: half-way of the cosine is 1/2; constant stays 1 after the warm-up."""
    assert Schedule(kind="cosine").factor(5, 10) == pytest.approx(0.5)
    assert Schedule(kind="constant", warmup=0.1).factor(99, 100) == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_factors_stay_in_range_and_fall_after_the_warmup(kind):
    """Property: 0 <= factor <= 1, never rising after the warm-up."""
    schedule = Schedule(kind=kind, warmup=0.25, hold=0.25)
    factors = [schedule.factor(s, 40) for s in range(50)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[0] > 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "step"}, "kind='step'"),
        ({"warmup": 1.5}, "warmup"),
        ({"warmup": 0.5, "hold": 0.6}, "hold"),
        ({"final": -0.1}, "final"),
    ],
)
def test_impossible_settings_are_config_errors(settings, match):
    """Errors name the value."""
    with pytest.raises(ConfigError, match=match):
        Schedule(**settings)
