"""Paired times: the arithmetic with a clock that is told what to say, the work by its calls."""

import itertools

import pytest
import torch

from common.errors import ConfigError
from compress.decoding import KVCache
from compress.timing import compare, decode_speed, forward_speed, mlp_speedup


class Clock:
    """Advances by what the work says it takes."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        """Return the time."""
        return self.now

    def work(self, name, seconds):
        """Return work called ``name`` that takes the next of ``seconds``, over and over."""
        durations = itertools.cycle(seconds)

        def run():
            self.calls.append(name)
            self.now += next(durations)

        return run


def test_median_of_the_paired_ratios():
    """Oracle: by hand; load that doubles both in one round leaves the ratio at 2."""
    clock = Clock()
    old, new = clock.work("old", [2.0, 8.0, 2.0]), clock.work("new", [1.0, 4.0, 1.0])
    speed = compare(old, new, rounds=3, warm_ups=0, clock=clock)
    assert (speed.ratio, speed.low, speed.high) == (2.0, 2.0, 2.0)
    assert (speed.before, speed.after) == (2.0, 1.0)


def test_percentiles_of_eleven_rounds():
    """Oracle: ratios 1 ... 11 have tenth and ninetieth percentiles 2 and 10."""
    clock = Clock()
    old, new = clock.work("old", range(1, 12)), clock.work("new", [1.0])
    speed = compare(old, new, rounds=11, warm_ups=0, clock=clock)
    assert (speed.ratio, speed.low, speed.high) == (6.0, 2.0, 10.0)


def test_warm_ups_do_not_count_and_turns_alternate():
    """Oracle: the first pairs are a hundred times slower; each round begins with the other one."""
    clock = Clock()
    old, new = clock.work("old", [300.0, 300.0, 3.0, 3.0]), clock.work("new", [1.0])
    speed = compare(old, new, rounds=2, warm_ups=2, clock=clock)
    assert (speed.ratio, speed.before) == (3.0, 3.0)
    assert clock.calls == ["old", "new", "new", "old", "old", "new", "new", "old"]


def test_repeats_are_divided_out():
    """Oracle: five runs of two seconds are two seconds each."""
    clock = Clock()
    old, new = clock.work("old", [2.0]), clock.work("new", [0.5])
    speed = compare(old, new, rounds=1, warm_ups=0, repeats=5, clock=clock)
    assert (speed.before, speed.after, speed.ratio) == (2.0, 0.5, 4.0)
    assert (speed.low, speed.high) == (4.0, 4.0)
    assert len(clock.calls) == 10


def test_forward_and_decode_state_batch_and_length(make_model):
    """Oracle: the arguments, and the defaults' documentation."""
    model = make_model("gelu")
    speed = forward_speed(model, model, batch=3, length=5, rounds=1)
    assert (speed.batch, speed.length) == (3, 5)
    assert forward_speed(model, model, rounds=1).length == 16
    speed = decode_speed(model, model, batch=2, rounds=1)
    assert (speed.batch, speed.length) == (2, 8)
    assert min(speed.before, speed.after, speed.ratio) > 0
    assert mlp_speedup(model, model, rounds=1) > 0


def test_each_decode_step_sees_the_same_cached_tokens(make_model, monkeypatch):
    """Oracle: the length that every step starts from."""
    seen, step = [], KVCache.step

    def record(cache, tokens_B1):
        seen.append((cache.length, tuple(tokens_B1.shape)))
        return step(cache, tokens_B1)

    monkeypatch.setattr(KVCache, "step", record)
    decode_speed(make_model("gelu"), make_model("relu"), batch=2, length=15, rounds=2)
    assert len(seen) > 4
    assert set(seen) == {(15, (2, 1))}


@pytest.mark.parametrize("measure", [forward_speed, decode_speed, mlp_speedup])
def test_the_given_clock_is_read(make_model, measure):
    """Oracle: a clock that ticks once per reading: all durations, so all ratios, are equal."""
    ticks = itertools.count()
    speed = measure(make_model("gelu"), make_model("relu"), rounds=3, clock=lambda: next(ticks))
    assert getattr(speed, "ratio", speed) == 1.0


@pytest.mark.parametrize(
    ("measure", "length", "most"), [(forward_speed, 17, 16), (decode_speed, 16, 15)]
)
def test_lengths_beyond_the_context_are_one_line(make_model, measure, length, most):
    """Oracle: the model's context of 16; a decode step needs room for its own token."""
    model = make_model("gelu")
    with pytest.raises(ConfigError, match=f"length={length}: expected 1 to {most} for") as info:
        measure(model, model, length=length)
    assert "\n" not in str(info.value)


def test_no_rounds_is_refused():
    """Oracle: a median needs a value."""
    with pytest.raises(ConfigError, match="rounds=0"):
        compare(lambda: None, lambda: None, rounds=0)


def test_gradients_are_not_kept(make_model):
    """Oracle: the mode seen inside the work."""
    seen = []
    compare(lambda: seen.append(torch.is_grad_enabled()), lambda: None, rounds=1, warm_ups=0)
    assert seen == [False]
