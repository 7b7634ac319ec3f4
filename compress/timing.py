"""Real times before and after pruning: forward pass, decode step, MLPs alone.

Old and new take turns in alternating order; the result is the median of the paired ratios, so
that what else the machine does weighs little. Everything here is a measurement.
"""

# Legend: B sequences, T tokens, C width.

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import positive
from common.errors import ConfigError
from compress.decoding import KVCache

ROUNDS = 15
WARM_UPS = 3
BATCH_TOKENS = 2048
"""Tokens of a timed forward pass, unless stated."""
STEPS = 4
"""Decode steps per measurement: a single one of a small model is short for the clock."""

Work = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """A paired comparison of two durations.

    Attributes:
        ratio: Median of old over new: how many times faster the new one is.
        low: Tenth percentile of the ratios.
        high: Ninetieth percentile.
        before: Median of the old one, seconds.
        after: Median of the new one, seconds.
        batch: Sequences.
        length: Tokens per sequence; for a decode step those that are cached.
    """

    ratio: float
    low: float
    high: float
    before: float
    after: float
    batch: int = 1
    length: int = 1


def forward_speed(
    dense: Any,
    pruned: Any,
    *,
    batch: int | None = None,
    length: int | None = None,
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter,
) -> Speed:
    """Compare forward passes on random tokens.

    Args:
        dense: Transformer before pruning.
        pruned: After pruning.
        batch: Sequences; by default about 2048 tokens together.
        length: Tokens per sequence; the context by default.
        rounds: Pairs of measurements.
        clock: Seconds; of the processor where a busy machine should not count.

    Raises:
        ConfigError: for a length beyond the context.
    """
    length = _length(dense, length, dense.config.context)
    batch = batch or max(1, BATCH_TOKENS // length)
    tokens_BT = _tokens(dense, batch, length)
    device = dense.embedding.weight.device
    works = [lambda model=model: model(tokens_BT) for model in (dense, pruned)]
    return compare(*works, device=device, rounds=rounds, batch=batch, length=length, clock=clock)


def decode_speed(
    dense: Any,
    pruned: Any,
    *,
    batch: int = 1,
    length: int | None = None,
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter,
) -> Speed:
    """Compare single decode steps behind cached keys and values.

    Args:
        dense: Transformer before pruning.
        pruned: After pruning.
        batch: Sequences.
        length: Cached tokens per sequence; half the context by default.
        rounds: Pairs of measurements.
        clock: Seconds; of the processor where a busy machine should not count.

    Raises:
        ConfigError: when the context has no room for one more token.
    """
    length = _length(dense, length, dense.config.context - 1, max(1, dense.config.context // 2))
    tokens_BT = _tokens(dense, batch, length)
    device = dense.embedding.weight.device
    works = [_decoder(model, tokens_BT) for model in (dense, pruned)]
    return compare(
        *works, device=device, rounds=rounds, repeats=STEPS, batch=batch, length=length, clock=clock
    )


def mlp_speedup(
    dense: Any, pruned: Any, *, rounds: int = ROUNDS, clock: Clock = time.perf_counter
) -> float:
    """Return how many times faster all MLPs together run after pruning.

    Args:
        dense: Transformer before pruning.
        pruned: After pruning.
        rounds: Pairs of measurements.
        clock: Seconds; of the processor where a busy machine should not count.
    """
    weight = dense.embedding.weight
    x_TC = torch.zeros(BATCH_TOKENS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    works = [
        lambda model=model: [layer.mlp(x_TC) for layer in model.layers] for model in (dense, pruned)
    ]
    return compare(*works, device=weight.device, rounds=rounds, clock=clock).ratio


@torch.no_grad()
def compare(
    old: Work,
    new: Work,
    *,
    device: torch.device | str = "cpu",
    rounds: int = ROUNDS,
    warm_ups: int = WARM_UPS,
    repeats: int = 1,
    batch: int = 1,
    length: int = 1,
    clock: Clock = time.perf_counter,
) -> Speed:
    """Time two pieces of work in turns.

    Args:
        old: What is compared against.
        new: What should be faster.
        device: Waited for before the clock is read.
        rounds: Pairs of measurements.
        warm_ups: Pairs before them that do not count.
        repeats: Runs per measurement; the seconds are those of one.
        batch: Stated in the result.
        length: Stated in the result.
        clock: Seconds.
    """
    positive("rounds", rounds)
    pairs = []
    for turn in range(-warm_ups, rounds):
        works = (old, new) if turn % 2 == 0 else (new, old)
        first, second = (_seconds(work, torch.device(device), clock, repeats) for work in works)
        pair = (first, second) if turn % 2 == 0 else (second, first)
        if turn >= 0:
            pairs.append(pair)
    ratios = [before / after for before, after in pairs]
    low, high = _deciles(ratios)
    return Speed(
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        before=statistics.median(before for before, _ in pairs),
        after=statistics.median(after for _, after in pairs),
        batch=batch,
        length=length,
    )


def _decoder(model: Any, tokens_BT: Tensor) -> Work:
    cache = KVCache(model)
    cache.prefill(tokens_BT)
    length, last_B1 = cache.length, tokens_BT[:, -1:]

    def step() -> None:
        # Each step overwrites the keys and values of the one before: the length stays.
        cache.length = length
        cache.step(last_B1)

    return step


def _seconds(work: Work, device: torch.device, clock: Clock, repeats: int) -> float:
    _wait(device)
    began = clock()
    for _ in range(repeats):
        work()
    _wait(device)
    return (clock() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _deciles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    found = statistics.quantiles(values, n=10, method="inclusive")
    return found[0], found[-1]


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    return tokens_BT.to(model.embedding.weight.device)


def _length(model: Any, length: int | None, most: int, default: int | None = None) -> int:
    chosen = (default or most) if length is None else length
    if not 1 <= chosen <= most:
        raise ConfigError(
            f"length={chosen}: expected 1 to {most} for the model's context of "
            f"{model.config.context}; lower it"
        )
    return chosen
