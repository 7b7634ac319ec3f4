"""Trusted: matrices with a proved bound on their rounding error, and the operations on them.

An ``Enclosure`` stands for every matrix within ``error`` (spectral norm) of its midpoint; each
operation returns an enclosure of all results. Source: midpoint-radius arithmetic (Rump 1999), with
Frobenius norms in place of entrywise radii, and the a-priori error of a product of float64
matrices, ``|fl(A B) - A B| <= gamma_k |A| |B|``, in any order of summation.
"""

# Shape letters: M, N sizes of a matrix; leading axes (...) hold a stack, each with its own error.

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.norms import (
    SLACK,
    TINY,
    UNIT,
    certified_top,
    exact64,
    gamma,
    round_up,
    times_power,
)


class Enclosure(NamedTuple):
    """All matrices within ``error`` (...,) of ``mid`` (..., M, N); both float64."""

    mid: Tensor
    error: Tensor

    @classmethod
    def exact(cls, matrix: Tensor) -> "Enclosure":
        """Enclose matrices (..., M, N) of any floating type exactly."""
        mid = exact64(matrix)
        return cls(mid, mid.new_zeros(mid.shape[:-2]))

    @property
    def size(self) -> Tensor:
        """Frobenius norms (...,) of the midpoints, rounded up."""
        flat = self.mid.flatten(-2)
        entries = flat.shape[-1]
        # Squares of entries are summed in units of the largest: they neither vanish nor overflow.
        largest = flat.abs().amax(-1, keepdim=True) if entries else flat.new_ones(1)
        units = (flat / largest.clamp(min=TINY)).norm(dim=-1)
        return units * largest[..., 0] * (1 + gamma(entries + 8)) + (1 + entries) * TINY

    @property
    def mT(self) -> "Enclosure":
        """The transposed matrices."""
        return Enclosure(self.mid.mT, self.error)

    def __matmul__(self, other: "Enclosure") -> "Enclosure":
        """Multiply; stacks broadcast as in torch."""
        left, right = self.size, other.size
        rounding = 1.01 * gamma(self.mid.shape[-1] + 4) * left * right
        error = rounding + left * other.error + self.error * (right + other.error)
        return Enclosure(self.mid @ other.mid, _up(error))

    def __add__(self, other: object) -> "Enclosure":
        """Add two stacks of one shape."""
        if not isinstance(other, Enclosure):
            return NotImplemented
        total = Enclosure.exact(self.mid + other.mid)
        return total._replace(error=_up(self.error + other.error + 2 * UNIT * total.size))

    def __neg__(self) -> "Enclosure":
        """Change all signs; exact."""
        return Enclosure(-self.mid, self.error)

    def scaled(self, factor: float | Tensor) -> "Enclosure":
        """Multiply by non-negative float64 numbers that broadcast against the matrices.

        One number, one per matrix of a stack (..., 1, 1), or one per row or column. Each may carry
        six roundings.
        """
        factors = torch.as_tensor(factor, dtype=torch.float64).expand_as(self.mid)
        largest = factors.flatten(-2).amax(-1) if factors.numel() else self.error
        scaled = Enclosure.exact(self.mid * factors)
        return scaled._replace(error=_up(self.error * largest + 8 * UNIT * scaled.size))

    def shifted(self, exponent: int) -> "Enclosure":
        """Multiply by ``2^exponent``; what falls below the normal numbers is added to the error."""
        error = times_power(self.error, exponent)
        return Enclosure.exact(times_power(self.mid, exponent))._replace(error=_up(error))

    def gram(self) -> "Enclosure":
        """Return ``A A^T``, symmetric."""
        product = self @ self.mT
        return Enclosure((product.mid + product.mid.mT) / 2, _up(product.error))

    def beside(self) -> "Enclosure":
        """Set the matrices of a stack (H, M, N) side by side: (M, H N)."""
        return Enclosure(self.mid.transpose(0, 1).flatten(1), _up(self.error.norm()))

    def top(self) -> float:
        """Return a bound on the largest eigenvalue of every symmetric matrix enclosed."""
        return certified_top((self.mid + self.mid.mT) / 2, float(self.error))[0]

    def norm(self) -> float:
        """Return a bound on the spectral norm of every matrix enclosed."""
        wide = self if self.mid.shape[-2] <= self.mid.shape[-1] else self.mT
        return round_up(math.sqrt(max(wide.gram().top(), 0.0)))

    def norms(self) -> list[float]:
        """Return the bounds of ``norm`` for each matrix of a stack (H, M, N)."""
        return [Enclosure(mid, error).norm() for mid, error in zip(*self, strict=True)]

    def inverse(self, least: float) -> "Enclosure":
        """Enclose the inverse of the symmetric matrix meant.

        Args:
            least: Positive proved bound on every eigenvalue of that matrix.

        Returns:
            The computed inverse with the error that its residual proves:
            ``|A^-1 - Z| <= |Z| |I - A Z| / (1 - |I - A Z|)``; without a usable one, 0 with the
            error ``1 / least``.
        """
        computed, info = torch.linalg.inv_ex(self.mid)
        if int(info) == 0 and bool(torch.isfinite(computed).all()):
            inverse = Enclosure.exact((computed + computed.mT) / 2)
            identity = torch.eye(self.mid.shape[-1], dtype=torch.float64)
            product = self @ inverse
            residual = Enclosure.exact(identity - product.mid).size + product.error + 2 * UNIT
            if residual < 0.5:
                return inverse._replace(error=_up(inverse.size * residual / (1 - residual)))
        return Enclosure(torch.zeros_like(self.mid), _up(torch.full_like(self.error, 1 / least)))


def _up(error: Tensor) -> Tensor:
    return error * (1 + SLACK) + TINY
