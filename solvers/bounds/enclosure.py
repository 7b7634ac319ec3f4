"""Trusted: matrices with a proved bound on their rounding error, and the operations on them.

An ``Enclosure`` stands for every matrix within ``error`` (spectral norm) of its midpoint; each
operation returns an enclosure of all results. Source: midpoint-radius arithmetic (Rump 1999), with
Frobenius norms in place of entrywise radii, and the a-priori error of a product of float64
matrices, ``|fl(A B) - A B| <= gamma_k |A| |B|``, in any order of summation.
"""

# Shape letters: M, K, N sizes of matrices; leading axes hold stacks, and the error is that of each.

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.norms import TINY, UNIT, certified_top, exact64, gamma, round_up


class Enclosure(NamedTuple):
    """All matrices whose distance from ``mid`` (..., M, N), float64, is at most ``error``."""

    mid: Tensor
    error: float

    @classmethod
    def exact(cls, matrix: Tensor) -> "Enclosure":
        """Enclose a matrix of any floating type exactly."""
        return cls(exact64(matrix), 0.0)

    @property
    def size(self) -> float:
        """Frobenius norm of the largest midpoint of the stack, rounded up."""
        if not self.mid.numel():
            return 0.0
        entries = self.mid.shape[-1] * self.mid.shape[-2]
        return float(self.mid.flatten(-2).norm(dim=-1).max()) * (1 + gamma(entries + 8)) + TINY

    @property
    def mT(self) -> "Enclosure":
        """The transposed matrices."""
        return Enclosure(self.mid.mT, self.error)

    def __matmul__(self, other: "Enclosure") -> "Enclosure":
        """Multiply; stacks broadcast as in torch."""
        left, right = self.size, other.size
        rounding = 1.01 * gamma(self.mid.shape[-1] + 4) * left * right
        error = rounding + left * other.error + self.error * (right + other.error)
        return Enclosure(self.mid @ other.mid, round_up(error) + TINY)

    def __add__(self, other: object) -> "Enclosure":
        """Add two matrices of one shape."""
        if not isinstance(other, Enclosure):
            return NotImplemented
        mid = self.mid + other.mid
        total = Enclosure(mid, 0.0)
        return Enclosure(mid, round_up(self.error + other.error + 2 * UNIT * total.size))

    def scaled(self, factor: float | Tensor) -> "Enclosure":
        """Multiply by non-negative float64 numbers that broadcast against the matrices.

        A factor per row or column, or one for each matrix of a stack; it may carry three roundings.
        """
        factors = torch.as_tensor(factor, dtype=torch.float64)
        largest = float(factors.max()) if factors.numel() else 0.0
        scaled = Enclosure(self.mid * factors, 0.0)
        return Enclosure(scaled.mid, round_up(self.error * largest + 5 * UNIT * scaled.size) + TINY)

    def gram(self) -> "Enclosure":
        """Return ``A A^T``, symmetric."""
        product = self @ self.mT
        return Enclosure((product.mid + product.mid.mT) / 2, round_up(product.error))

    def beside(self) -> "Enclosure":
        """Set the matrices of a stack (H, M, N) side by side: (M, H N)."""
        heads = self.mid.shape[0]
        return Enclosure(
            self.mid.transpose(0, 1).flatten(1), round_up(math.sqrt(heads) * self.error)
        )

    def top(self) -> float:
        """Return a bound on the largest eigenvalue of every symmetric matrix enclosed."""
        return certified_top((self.mid + self.mid.mT) / 2, self.error)[0]

    def norm(self) -> float:
        """Return a bound on the spectral norm of every matrix enclosed."""
        wide = self if self.mid.shape[-2] <= self.mid.shape[-1] else self.mT
        return round_up(math.sqrt(max(wide.gram().top(), 0.0)))

    def norms(self) -> list[float]:
        """Return the bounds of ``norm`` for each matrix of a stack (H, M, N)."""
        return [Enclosure(mid, self.error).norm() for mid in self.mid]

    def inverse(self, least: float) -> "Enclosure":
        """Enclose the inverses of symmetric matrices that are at least ``least`` times I.

        Args:
            least: Positive proved bound on every eigenvalue of every matrix enclosed.

        Returns:
            The computed inverse with the error that its residual ``I - A Z`` proves:
            ``|A^-1 - Z| <= |Z| |I - A Z| / (1 - |I - A Z|)``; without a usable one, 0 with the
            error ``1 / least``.
        """
        computed, info = torch.linalg.inv_ex(self.mid)
        if int(info) == 0 and bool(torch.isfinite(computed).all()):
            inverse = Enclosure((computed + computed.mT) / 2, 0.0)
            identity = torch.eye(self.mid.shape[-1], dtype=torch.float64)
            product = self @ inverse
            residual = Enclosure(identity - product.mid, 0.0).size + product.error + 2 * UNIT
            if residual < 0.5:
                return Enclosure(
                    inverse.mid, round_up(inverse.size * residual / (1 - residual)) + TINY
                )
        return Enclosure(torch.zeros_like(self.mid), round_up(1 / least))
