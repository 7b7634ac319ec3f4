"""Best of many restarts: short sequences first, the best of them lengthened and refined."""

# Shape letters: B starts, T token, C width.

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from solvers.bounds.attack_ascent import (
    CLOSER,
    GLOBAL,
    LOCAL,
    Found,
    Recipe,
    Target,
    ascend,
    clip,
)
from solvers.bounds.attack_settings import Clock
from solvers.bounds.attack_starts import lengthened

Starts = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
"""``starts(count, tokens, generator)`` returns inputs and directions (B, T, C)."""

SHORTEST = 8
"""Sequences start at most this long, in tokens."""

_LARGEST_BATCH = 32
_KEPT = 4
_FIRST_SHARE = 0.5
_REFINE_RATE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """Budget of one search.

    Attributes:
        steps: Ascent steps at each length.
        restarts: Starts in all, shared by the recipes in turn.
        tokens: Longest sequence.
        lengthen: Start with short sequences; else all have ``tokens`` tokens.
        rate: First step per token relative to the radius.
        seed: Seed of starts and noise.
    """

    steps: int
    restarts: int
    tokens: int
    lengthen: bool
    rate: float
    seed: int

    def run(self, target: Target, starts: Starts, clock: Clock) -> float:
        """Return the best ratio of all restarts and lengths; 0 when there is no start."""
        generator = torch.Generator().manual_seed(self.seed)
        batches, best = -(-self.restarts // _LARGEST_BATCH), 0.0
        for index in range(batches):
            count = self.restarts // batches + (index < self.restarts % batches)
            part = clock.part(1 / (batches - index))
            best = max(best, self._batch(target, starts, count, generator, part))
        return best

    def _batch(
        self,
        target: Target,
        starts: Starts,
        count: int,
        generator: torch.Generator,
        clock: Clock,
    ) -> float:
        """Ascend at every length and refine the winner."""
        lengths = lengths_to(self.tokens) if self.lengthen else [self.tokens]
        x_BTC, direction_BTC = starts(count, lengths[0], generator)
        if not len(x_BTC):
            return 0.0
        values: list[Found] = []
        for index, tokens in enumerate(lengths):
            if index:
                x_BTC, direction_BTC = lengthened(values[-1].best(-(-count // _KEPT)), generator)
                x_BTC, direction_BTC = x_BTC[:, -tokens:], direction_BTC[:, -tokens:]
            # Where to go is decided at the first length, which gets half of the time.
            part = clock.part(1 / (len(lengths) + 1 - index) if index else _FIRST_SHARE)
            recipe = CLOSER if index else GLOBAL
            values.append(
                self._ascend(target, x_BTC, direction_BTC, recipe, self.rate, self.steps, part)
            )
        top = max(values, key=lambda found: found.value).best(1)
        rate, steps = self.rate * _REFINE_RATE, self.steps // 2
        last = self._ascend(target, top.x, top.direction, LOCAL, rate, steps, clock)
        return max(top.value, last.value)

    def _ascend(
        self,
        target: Target,
        x_BTC: Tensor,
        direction_BTC: Tensor,
        recipe: Recipe,
        rate: float,
        steps: int,
        clock: Clock,
    ) -> Found:
        run = functools.partial(ascend, target, recipe=recipe, clock=clock)
        began = clock.left
        start = run(clip(x_BTC), direction_BTC, steps=0, rate=rate)
        # Short of time, few good starts are followed well instead of many for a few steps.
        affordable = clock.left / max((began - clock.left) * steps, 1e-9)
        if affordable < 1 and len(x_BTC) > 1:
            start = start.best(max(1, int(affordable * len(x_BTC))))
        return run(start.x, start.direction, steps=steps, rate=rate)


def lengths_to(tokens: int) -> list[int]:
    """Return the lengths of a search: halves of ``tokens`` down to ``SHORTEST``, shortest first."""
    lengths = [tokens]
    while lengths[0] > SHORTEST:
        lengths.insert(0, -(-lengths[0] // 2))
    return lengths
