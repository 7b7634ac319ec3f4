"""Sets of perturbed inputs: a ball around each input, cut by the domain that is certified.

The last axis carries the norm; every other axis is independent, so that images (B, I) and
embedded sequences (B, T, C) need the same code: the sequence norm is the largest token's.
"""

import dataclasses
import math

import torch
from torch import Tensor

from common.config import one_of, positive
from solvers.robustness.settings import NORMS


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Threat:
    """What an attack may do to each vector.

    Attributes:
        norm: ``l2`` or ``linf``, over the last axis.
        epsilon: Radius around the input, above 0.
        box: Whether results stay in [0, 1], where inputs must lie.
        ball: l2 radius about 0 in which results stay, where inputs must lie; None for no limit.
    """

    norm: str
    epsilon: float
    box: bool = False
    ball: float | None = None

    def __post_init__(self) -> None:
        one_of("norm", self.norm, NORMS)
        positive("epsilon", self.epsilon)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """Return a point of the set near ``y``; ``x`` is the input, of the same shape."""
        delta = y - x
        if self.norm == "l2":
            delta = delta * _shrink(delta.norm(dim=-1, keepdim=True), self.epsilon)
        else:
            delta = delta.clamp(-self.epsilon, self.epsilon)
        y = x + delta
        if self.box:
            # Towards a convex set that holds x: never farther from x, in either norm.
            y = y.clamp(0.0, 1.0)
        if self.ball is not None:
            y = y * _shrink(y.norm(dim=-1, keepdim=True), self.ball * (1 - 1e-13))
            if self.norm == "linf":
                # Scaling can leave the cube; the segment to x lies in both sets.
                delta = y - x
                y = x + delta * _shrink(delta.abs().amax(-1, keepdim=True), self.epsilon)
        return y

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the step of size 1 that follows ``gradient`` best; 0 where it vanishes."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-300)

    def random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random point of the set; the generator is of the CPU."""
        if self.norm == "linf":
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        else:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            share = torch.rand((*x.shape[:-1], 1), generator=generator, dtype=x.dtype)
            noise *= share.pow(1 / x.shape[-1]) / noise.norm(dim=-1, keepdim=True)
        return self.project(x, x + self.epsilon * noise.to(x.device))

    def l2_radius(self, dimension: int) -> float:
        """Return the radius of the smallest l2 ball that holds the set (without its cuts)."""
        return self.epsilon * (math.sqrt(dimension) if self.norm == "linf" else 1.0)


def _shrink(size: Tensor, limit: float) -> Tensor:
    return (limit / size.clamp(min=1e-300)).clamp(max=1.0)
