"""Resolvents ``J(z, step) = (I + step dg)^-1 z`` of convex functions ``g``, mostly indicators.

Each is an object that can be called, knows the conjugate of its function (for duality gaps), and,
for a set ``C``, its diameter and the projection onto ``span(C - C)``.
Source: spec halpern_solvers 1.4, 2.10 and 5.1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.config import check_types, positive
from common.errors import ConfigError, ShapeError

Step = float | Tensor

_CONJUGATE_ROOM = 1e-9  # relative overshoot of a dual norm that counts as rounding


class ConvexResolvent(ABC):
    """What every resolvent of a subdifferential offers.

    Attributes:
        separable: Whether it acts entry by entry, so that ``step`` may be a tensor like ``z``.
    """

    separable: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, z: Tensor, step: Step) -> Tensor:
        """Return ``argmin_u g(u) + |u - z|^2 / (2 step)``, of the shape of ``z``."""

    def diameter(self, like: Tensor) -> float | None:
        """Return the largest distance of two points of the domain, None when it is unbounded.

        Args:
            like: Any tensor of the shape of the points.
        """
        return None

    def tangent_projection(self, v: Tensor) -> Tensor:
        """Return the projection of ``v`` onto the span of the differences of the domain."""
        return v

    def value(self, z: Tensor) -> float:
        """Return ``g(z)`` for ``z`` in the domain, which is not tested; 0 for an indicator."""
        return 0.0

    @abstractmethod
    def conjugate(self, v: Tensor) -> float:
        """Return ``sup_u <v, u> - g(u)``, infinity where the supremum is not finite."""


@dataclass(frozen=True, eq=False)
class Box(ConvexResolvent):
    """Box ``low <= u <= high``, entry by entry.

    Attributes:
        low: Lower ends, a number or a tensor like ``u``; minus infinity for none.
        high: Upper ends, likewise.

    Raises:
        ConfigError: for ends that are NaN, crossed, or infinite on the wrong side.
    """

    separable: ClassVar[bool] = True
    low: float | Tensor = -math.inf
    high: float | Tensor = math.inf

    def __post_init__(self) -> None:
        """Refuse an empty box."""
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (self.low, self.high))
        if not bool((low.cpu() <= high.cpu()).all()):
            raise ConfigError("box: expected low <= high in every entry; correct its ends")
        if bool((low == math.inf).any()) or bool((high == -math.inf).any()):
            raise ConfigError("box: expected low < inf and high > -inf; correct its ends")

    def __call__(self, z: Tensor, step: Step) -> Tensor:
        """Return the nearest point of the box."""
        if not isinstance(self.low, Tensor) and not isinstance(self.high, Tensor):
            return z.clamp(self.low, self.high)
        low, high = self.ends(z)
        return torch.minimum(torch.maximum(z, low), high)

    def diameter(self, like: Tensor) -> float | None:
        """Return the length of the diagonal."""
        low, high = self.ends(like)
        size = float(torch.linalg.vector_norm((high - low).double().expand(like.shape)))
        return size if math.isfinite(size) else None

    def tangent_projection(self, v: Tensor) -> Tensor:
        """Return ``v`` without the entries that the box fixes."""
        low, high = self.ends(v)
        return torch.where(low == high, torch.zeros_like(v), v)

    def conjugate(self, v: Tensor) -> float:
        """Return the support function ``sum_i max(low_i v_i, high_i v_i)``."""
        low, high = self.ends(v)
        ends = torch.where(v > 0, high, low).double()
        return float(torch.where(v == 0, 0.0, ends * v.double()).sum())

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ends with the dtype and device of ``like``."""
        return (
            torch.as_tensor(self.low, dtype=like.dtype, device=like.device),
            torch.as_tensor(self.high, dtype=like.dtype, device=like.device),
        )


class Identity(Box):
    """The whole space: ``G = 0``."""

    def __init__(self) -> None:
        super().__init__()


class Nonneg(Box):
    """The cone ``u >= 0``."""

    def __init__(self) -> None:
        super().__init__(low=0.0)


@dataclass(frozen=True)
class L1(ConvexResolvent):
    """``g(u) = weight |u|_1``; the resolvent is soft thresholding.

    Attributes:
        weight: At least 0.
    """

    separable: ClassVar[bool] = True
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Validate the weight."""
        check_types(self)
        positive("L1.weight", self.weight, zero=True)

    def __call__(self, z: Tensor, step: Step) -> Tensor:
        """Shrink every entry by ``step * weight``."""
        return _shrink(z, step, self.weight)

    def value(self, z: Tensor) -> float:
        """Return ``weight |z|_1``."""
        return self.weight * float(z.double().abs().sum())

    def conjugate(self, v: Tensor) -> float:
        """Return 0 where ``max |v_i| <= weight``, infinity elsewhere."""
        inside = float(v.abs().max()) <= self.weight * (1 + _CONJUGATE_ROOM)
        return 0.0 if inside else math.inf


@dataclass(frozen=True)
class ElasticNet(ConvexResolvent):
    """``g(u) = l1 |u|_1 + l2 |u|^2 / 2``.

    Attributes:
        l1: At least 0.
        l2: Above 0; without it use :class:`L1`.
    """

    separable: ClassVar[bool] = True
    l1: float = 1.0
    l2: float = 1.0

    def __post_init__(self) -> None:
        """Validate the weights."""
        check_types(self)
        positive("ElasticNet.l1", self.l1, zero=True)
        positive("ElasticNet.l2", self.l2)

    def __call__(self, z: Tensor, step: Step) -> Tensor:
        """Shrink every entry by ``step * l1``, then divide by ``1 + step * l2``."""
        return _shrink(z, step, self.l1) / (1 + step * self.l2)

    def value(self, z: Tensor) -> float:
        """Return ``l1 |z|_1 + l2 |z|^2 / 2``."""
        z = z.double()
        return self.l1 * float(z.abs().sum()) + self.l2 / 2 * float((z * z).sum())

    def conjugate(self, v: Tensor) -> float:
        """Return ``sum_i max(|v_i| - l1, 0)^2 / (2 l2)``."""
        excess = (v.double().abs() - self.l1).clamp_min(0)
        return float((excess * excess).sum()) / (2 * self.l2)


class Simplex(ConvexResolvent):
    """Probability simplex along the last axis; leading axes are independent simplices."""

    def __call__(self, z: Tensor, step: Step) -> Tensor:
        """Return the nearest points of the simplices."""
        return project_simplex(z)

    def diameter(self, like: Tensor) -> float | None:
        """Return ``sqrt(2)`` per row, 0 for simplices that are a single point."""
        return math.sqrt(2 * like.numel() / like.shape[-1]) if like.shape[-1] > 1 else 0.0

    def tangent_projection(self, v: Tensor) -> Tensor:
        """Return ``v`` minus its mean, row by row."""
        return v - v.mean(-1, keepdim=True)

    def conjugate(self, v: Tensor) -> float:
        """Return the largest entry, summed over the rows."""
        return float(v.double().amax(-1).sum())


@dataclass(frozen=True)
class L2Ball(ConvexResolvent):
    """Euclidean (Frobenius) ball of this radius around 0."""

    radius: float = 1.0

    def __post_init__(self) -> None:
        """Validate the radius."""
        check_types(self)
        positive("L2Ball.radius", self.radius)

    def __call__(self, z: Tensor, step: Step) -> Tensor:
        """Scale ``z`` into the ball."""
        size = torch.linalg.vector_norm(z)
        return z * (self.radius / size.clamp_min(self.radius))

    def diameter(self, like: Tensor) -> float | None:
        """Return twice the radius."""
        return 2 * self.radius

    def conjugate(self, v: Tensor) -> float:
        """Return ``radius |v|``."""
        return self.radius * float(torch.linalg.vector_norm(v.double()))


@dataclass(frozen=True)
class SpectralBall(ConvexResolvent):
    """Matrices (rows, columns) of spectral norm at most ``radius``."""

    radius: float = 1.0

    def __post_init__(self) -> None:
        """Validate the radius."""
        check_types(self)
        positive("SpectralBall.radius", self.radius)

    def __call__(self, z: Tensor, step: Step) -> Tensor:
        """Clip the singular values at the radius."""
        if z.ndim != 2:
            raise ShapeError(f"spectral ball: expected a matrix, got shape {tuple(z.shape)}")
        left, sizes, right = torch.linalg.svd(z, full_matrices=False)
        if float(sizes[0]) <= self.radius:
            return z
        return (left * sizes.clamp_max(self.radius)) @ right

    def diameter(self, like: Tensor) -> float | None:
        """Return the Frobenius diameter, ``2 radius sqrt(min(rows, columns))``."""
        return 2 * self.radius * math.sqrt(min(like.shape))

    def conjugate(self, v: Tensor) -> float:
        """Return ``radius`` times the nuclear norm."""
        return self.radius * float(torch.linalg.svdvals(v.double()).sum())


class Product:
    """Resolvents of independent parts, for a problem whose point is a tuple of tensors."""

    def __init__(self, parts: Sequence[ConvexResolvent]) -> None:
        self.parts = tuple(parts)

    def __call__(self, z: tuple[Tensor, ...], step: Step) -> tuple[Tensor, ...]:
        """Apply every part to its own tensor."""
        return tuple(part(each, step) for part, each in zip(self.parts, z, strict=True))

    def diameter(self, like: tuple[Tensor, ...]) -> float | None:
        """Return the root of the sum of the squared diameters; None when one is unbounded."""
        total = 0.0
        for part, each in zip(self.parts, like, strict=True):
            if (size := part.diameter(each)) is None:
                return None
            total += size**2
        return math.sqrt(total)

    def tangent_projection(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Project every part."""
        pairs = zip(self.parts, v, strict=True)
        return tuple(part.tangent_projection(each) for part, each in pairs)


def project_simplex(point: Tensor) -> Tensor:
    """Return the nearest point of the probability simplex, along the last axis."""
    # The projection does not change with a common shift, and large entries would swallow the 1.
    point = point - point.amax(-1, keepdim=True)
    ordered = point.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    counts = torch.arange(1, point.shape[-1] + 1, dtype=point.dtype, device=point.device)
    active = (ordered * counts > excess).sum(-1, keepdim=True).clamp_min(1)
    shift = excess.gather(-1, active - 1) / active
    return (point - shift).clamp_min(0)


def _shrink(z: Tensor, step: Step, weight: float) -> Tensor:
    return z.sign() * (z.abs() - step * weight).clamp_min(0)
