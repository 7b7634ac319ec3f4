"""Trusted: ellipsoids of the residual stream, the sets in which tokens and their changes lie.

An ellipsoid is the image of the unit ball under a matrix that is stored exactly, so whatever is
proved about it holds for the set itself; rounding only ever makes the next set larger.
"""

# Shape letters: C width.

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.norms import TINY, gamma, round_up, times_power
from solvers.bounds.enclosure import Enclosure

_LARGEST_RATIO = 1e100  # of the radii that a sum weighs against each other


class Ellipsoid(NamedTuple):
    """The set ``{2^exponent F u : |u| <= 1}``; ``F`` is ``factor_CC``, ``norm`` bounds its norm."""

    factor_CC: Tensor
    exponent: int
    norm: float

    @classmethod
    def ball(cls, width: int, radius: float) -> "Ellipsoid":
        """Return the ball of ``radius`` >= 0 in ``width`` dimensions."""
        mantissa, exponent = math.frexp(radius)
        return cls(mantissa * torch.eye(width, dtype=torch.float64), exponent, mantissa)

    @classmethod
    def covering(cls, shape_CC: Enclosure, exponent: int = 0) -> "Ellipsoid":
        """Return an ellipsoid around all ``{2^exponent x : x^T S^-1 x <= 1}`` of an enclosure.

        The Cholesky factor of ``S + shift I`` is taken, with a shift above the enclosure's error
        and the factorisation's backward error; the ball of ``sqrt(top)`` is the last resort.
        """
        # Cholesky reads one triangle: an unsymmetric midpoint would have another error there.
        mid_CC, error = (shape_CC.mid + shape_CC.mid.mT) / 2, float(shape_CC.error)
        size = mid_CC.shape[0]
        trace = float(mid_CC.trace()) + size * error
        rounding = 2.02 * gamma(size + 2) / (1 - gamma(size + 2)) * max(trace, 0.0)
        shifted_CC = mid_CC.clone()
        shifted_CC.diagonal().add_(2 * rounding + 1.01 * error + TINY)
        factor_CC, info = torch.linalg.cholesky_ex(shifted_CC)
        if int(info) != 0 or not bool(torch.isfinite(factor_CC).all()):
            return cls.ball(size, round_up(math.sqrt(max(shape_CC.top(), 0.0))))._moved(exponent)
        shift = math.frexp(float(factor_CC.abs().max()))[1]
        factor_CC = times_power(factor_CC, -shift)
        return cls(factor_CC, exponent + shift, Enclosure.exact(factor_CC).norm())

    @property
    def enclosed(self) -> Enclosure:
        """The factor ``F`` without its exponent."""
        return Enclosure.exact(self.factor_CC)

    @property
    def scaled(self) -> Enclosure:
        """The whole factor ``2^exponent F``."""
        return self.enclosed.shifted(self.exponent)

    @property
    def radius(self) -> float:
        """Bound on the l2 norm of every point."""
        if self.norm == 0.0:
            return 0.0
        # Below the normal numbers a power of two would round, perhaps to 0.
        return max(math.ldexp(self.norm, self.exponent), TINY) if self.exponent < 900 else math.inf

    def gauge(self, points: Tensor) -> Tensor:
        """Return by which factor (...,) of the ellipsoid each point (..., C) is held (estimate)."""
        units = torch.linalg.solve_triangular(
            self.factor_CC, points.flatten(0, -2).mT * 2.0**-self.exponent, upper=False
        )
        return units.norm(dim=0).view(points.shape[:-1])

    def times(self, factor: float) -> "Ellipsoid":
        """Return the ball that holds all images under maps of l2 constant ``factor`` >= 0."""
        norm, shift = math.frexp(round_up(self.norm * factor))
        ball = Ellipsoid.ball(len(self.factor_CC), norm)
        return ball._moved(shift + self.exponent)

    def plus_ball(self, radius: float) -> "Ellipsoid":
        """Return an ellipsoid around all points within ``radius`` >= 0 of this one."""
        identity_CC = torch.eye(len(self.factor_CC), dtype=torch.float64)
        return self.plus(Enclosure.exact(identity_CC), radius)

    def plus(self, points_CK: Enclosure, scale: float = 1.0) -> "Ellipsoid":
        """Return an ellipsoid around all sums with ``scale P v``, ``|v| <= 1``, scale >= 0.

        The sum of ``E(S)`` and ``E(T)`` lies in ``E((1 + p) S + (1 + 1/p) T)`` for any p > 0; p is
        near the ratio of the radii.
        """
        added_CK = points_CK.scaled(scale)
        reach = added_CK.norm() if scale else 0.0
        if reach == 0.0:
            return self
        exponent = max(self.exponent, math.frexp(reach)[1])
        own = math.ldexp(self.norm, self.exponent - exponent)
        ratio = math.ldexp(reach, -exponent) / max(own, 1 / _LARGEST_RATIO)
        ratio = min(max(ratio, 1 / _LARGEST_RATIO), _LARGEST_RATIO)
        shape_CC = self.enclosed.shifted(self.exponent - exponent).gram().scaled(1 + ratio)
        added_CC = added_CK.shifted(-exponent).gram().scaled(1 + 1 / ratio)
        return Ellipsoid.covering(shape_CC + added_CC, exponent)

    def _moved(self, exponent: int) -> "Ellipsoid":
        return self._replace(exponent=self.exponent + exponent)


class Tokens(NamedTuple):
    """Where the tokens between two blocks lie: in an ellipsoid, and in two balls as well.

    Attributes:
        domain: The ellipsoid.
        radius: l2 radius of a ball; the domain may reach beyond it.
        naive_radius: The same from operator norms alone, at least ``radius``.
    """

    domain: Ellipsoid
    radius: float
    naive_radius: float

    @classmethod
    def ball(cls, width: int, radius: float) -> "Tokens":
        """Return the tokens of an embedding in the ball of ``radius``."""
        return cls(Ellipsoid.ball(width, radius), radius, radius)

    def gauge(self, points: Tensor) -> Tensor:
        """Return by which factor of these sets together each point (..., C) is held (estimate)."""
        in_ball = points.norm(dim=-1) / max(self.radius, TINY)
        return torch.maximum(self.domain.gauge(points), in_ball)
