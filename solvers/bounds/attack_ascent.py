"""Ascent on the sensitivity of a map: the worst direction in closed form, the input by gradients.

In the norm "largest token" the worst direction at an input is known up to the output direction:
with ``g = J^T y`` every token of it is ``g_t / |g_t|``. One backward pass through a pair of inputs
yields both this and the gradient of the pair's ratio in the input, so both move at every step.
"""

# Shape letters: B starts, T token, C width, O outputs.

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from solvers.bounds.attack_settings import Clock

ROUNDING = 1e-11
"""Relative rounding error a ratio may carry at ``NEAR``, subtracted from every result."""

NEAR = 1e-3
"""Smallest distance of a pair relative to the ball: local, and far above float64 rounding."""

_MOMENTUM = 0.9
_VANISHED = 1e-280


class Target(NamedTuple):
    """A map of sequences on a ball of tokens.

    ``run`` takes (B, T, C) to (B, T, O); only the last token of the output is attacked, because an
    earlier one is the last of a shorter sequence. ``soften`` scales the attention logits. ``gauge``
    says by which factor each token (B, T) of a sequence lies outside a smaller domain.
    """

    run: Callable[[Tensor], Tensor]
    radius: float
    soften: Callable[[float], None]
    gauge: Callable[[Tensor], Tensor] | None = None


class Found(NamedTuple):
    """Best ratios (B,), inputs (B, T, C) in units of the radius, and unit directions (B, T, C)."""

    ratio: Tensor
    x: Tensor
    direction: Tensor

    def best(self, count: int) -> "Found":
        """Return the ``count`` starts of the largest ratios, best first."""
        top = self.ratio.topk(min(count, len(self.ratio))).indices
        return Found(self.ratio[top], self.x[top], self.direction[top])

    @property
    def value(self) -> float:
        """The largest ratio, less what rounding may have added; 0 when nothing was tried."""
        return float(self.ratio.max()) * (1 - ROUNDING) if len(self.ratio) else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How an ascent sees the landscape; all of it is undone before anything is counted.

    Attributes:
        far: First distances of the pairs relative to the ball, given to the starts in turn: large
            ones see past the kinks of piecewise linear activations, whose curvature is zero almost
            everywhere.
        near: Last distances, likewise; distances shrink geometrically.
        soft: First factor on the attention logits, which grows to 1 over the first part of the
            ascent: steep logits hide one layer's plateau behind another's.
    """

    far: tuple[float, ...] = (NEAR,)
    near: tuple[float, ...] = (NEAR,)
    soft: float = 1.0


GLOBAL = Recipe(far=(NEAR, 0.5), near=(NEAR, 0.01), soft=0.05)
CLOSER = Recipe(far=(NEAR, 0.1), near=(NEAR, 0.01), soft=0.5)
LOCAL = Recipe(far=(0.01,))

_SOFT_SHARE = 0.7


def ascend(
    target: Target,
    x_BTC: Tensor,
    direction_BTC: Tensor,
    *,
    recipe: Recipe,
    steps: int,
    rate: float,
    clock: Clock,
) -> Found:
    """Move inputs and directions to larger ratios and remember the best of every start.

    Args:
        target: What is attacked.
        x_BTC: Inputs in units of the radius, float64; tokens outside the ball are moved onto it.
        direction_BTC: Directions; every token is normalised.
        recipe: Pair distances and softening.
        steps: Steps; 0 evaluates the starts only.
        rate: First step per token relative to the radius; falls to 0 along a cosine. The starts
            share it out, down to a thirtieth: the steeper the logits, the finer the steps.
        clock: Ends the ascent early.

    Returns:
        The best ratio of each start over all steps with the true logits.
    """
    direction_BTC = F.normalize(direction_BTC, dim=-1)
    best = Found(x_BTC.new_zeros(len(x_BTC)), x_BTC.clone(), direction_BTC.clone())
    velocity_BTC = torch.zeros_like(x_BTC)
    rate_B11 = rate * torch.logspace(0, -1.5, len(x_BTC), dtype=x_BTC.dtype)[:, None, None]
    far_B11, near_B11 = (_in_turn(sizes, x_BTC) for sizes in (recipe.far, recipe.near))
    for step in range(steps + 1):
        # Short of time, the schedule runs faster instead of being cut off.
        share = max(step / max(steps, 1), clock.share)
        is_last = step == steps or share >= 1
        half_B11 = far_B11 * (near_B11 / far_B11) ** min(share, 1.0) / 2
        soft = 1.0 if is_last else min(1.0, recipe.soft ** (1 - share / _SOFT_SHARE))
        target.soften(soft)
        x_BTC = clip((x_BTC / (1 - half_B11)), 1 - ROUNDING) * (1 - half_B11)
        change_BTC = half_B11 * direction_BTC
        ratio_B, towards_BTC, uphill_BTC = _probe(target, x_BTC, change_BTC)
        if soft == 1.0:
            better = ratio_B > best.ratio
            best.ratio[better], best.x[better] = ratio_B[better], x_BTC[better]
            best.direction[better] = direction_BTC[better]
        if is_last:
            break
        seen = towards_BTC.norm(dim=-1, keepdim=True) > _VANISHED
        direction_BTC = torch.where(seen, F.normalize(towards_BTC, dim=-1, eps=0), direction_BTC)
        velocity_BTC = _MOMENTUM * velocity_BTC + uphill_BTC
        speed_B11 = rate_B11 * (1 + math.cos(math.pi * share)) / 2
        x_BTC = x_BTC + speed_B11 * F.normalize(velocity_BTC, dim=-1, eps=_VANISHED)
    target.soften(1.0)
    return best


def clip(x_BTC: Tensor, radius: float = 1.0) -> Tensor:
    """Move tokens outside the ball of ``radius`` onto it."""
    return x_BTC * (radius / x_BTC.norm(dim=-1, keepdim=True).clamp(min=radius))


def _in_turn(sizes: tuple[float, ...], x_BTC: Tensor) -> Tensor:
    chosen = [sizes[i % len(sizes)] for i in range(len(x_BTC))]
    return torch.tensor(chosen, dtype=x_BTC.dtype)[:, None, None]


def _probe(target: Target, x_BTC: Tensor, change_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ratios at ``x +- change``, ``J^T y``, and the gradient in x."""
    pair = target.radius * torch.cat((x_BTC + change_BTC, x_BTC - change_BTC))
    if target.gauge is not None:
        # Both ends shrink alike, so that the pair stays one of the same direction.
        outside_B = target.gauge(pair).amax(-1).view(2, -1).amax(0).clamp(min=1.0)
        pair = pair / (outside_B * (1 + ROUNDING)).repeat(2)[:, None, None]
    pair.requires_grad_()
    with torch.enable_grad():
        output_BO = target.run(pair)[:, -1]
        count = len(x_BTC)
        moved_BO = (output_BO[:count] - output_BO[count:]).detach()
        y_BO = F.normalize(moved_BO, dim=-1, eps=_VANISHED)
        (slope,) = torch.autograd.grad((output_BO * torch.cat((y_BO, y_BO))).sum(), pair)
    given_B = (pair[:count] - pair[count:]).detach().norm(dim=-1).amax(-1)
    first_BTC, second_BTC = slope[:count], slope[count:]
    uphill_BTC = first_BTC - second_BTC
    # Each start has its own scale, which changes a lot along an ascent.
    size_B11 = uphill_BTC.flatten(1).norm(dim=-1)[:, None, None].clamp(min=_VANISHED)
    ratio_B = moved_BO.norm(dim=-1) / given_B
    # Pairs that a thin domain has brought close together cancel: their difference is rounding.
    size_B = target.radius * ratio_B + output_BO.detach().norm(dim=-1).view(2, -1).amax(0)
    ratio_B = (ratio_B - ROUNDING * NEAR * size_B / given_B).clamp(min=0.0)
    return ratio_B, first_BTC + second_BTC, uphill_BTC / size_B11
