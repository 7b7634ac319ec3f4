"""Symmetric matrices that are posynomial in positive multipliers, as terms of an objective.

``K(theta) = constant + sum_factors rows^T diag(e^(sign theta_group)) rows``, each factor placed at
an offset of the diagonal. Both block bounds are weighted sums of largest eigenvalues of such terms.
"""

# Shape letters: D dimension of a term, R rows of a factor, N multipliers, K columns of a block.

from typing import NamedTuple

import torch
from torch import Tensor

_STRIP = 192  # columns per product of a Gram matrix


class Factor(NamedTuple):
    """``rows^T diag(e^(sign theta_group)) rows`` placed at ``offset`` in the term's matrix."""

    rows_RD: Tensor
    group_R: Tensor
    sign: int
    offset: int = 0


class Term(NamedTuple):
    """One eigenvalue: its weight, the constant part (or None) and the factors."""

    dim: int
    weight: float
    constant_DD: Tensor | None
    factors: tuple[Factor, ...]

    def to(self, dtype: torch.dtype) -> "Term":
        """Return the term with its matrices in another floating type."""
        constant_DD = None if self.constant_DD is None else self.constant_DD.to(dtype)
        factors = tuple(f._replace(rows_RD=f.rows_RD.to(dtype)) for f in self.factors)
        return self._replace(constant_DD=constant_DD, factors=factors)

    def matrix(self, theta_N: Tensor) -> Tensor:
        """Return the symmetric matrix (D, D)."""
        like = self.factors[0].rows_RD
        if self.constant_DD is None:
            k_DD = like.new_zeros(self.dim, self.dim)
        else:
            k_DD = self.constant_DD.clone()
        for rows_RD, group_R, sign, offset in self.factors:
            scaled_RD = rows_RD * torch.exp(0.5 * sign * theta_N[group_R]).to(like)[:, None]
            stop = offset + rows_RD.shape[1]
            k_DD[offset:stop, offset:stop] += _gram(scaled_RD)
        return k_DD

    def product(self, theta_N: Tensor, block_DK: Tensor) -> Tensor:
        """Return the matrix times a block (D, K) of the factors' type, without forming it."""
        # Few rows times a wide matrix is several times faster than the transposed product.
        block_KD = block_DK.mT.contiguous()
        if self.constant_DD is None:
            result_KD = torch.zeros_like(block_KD)
        else:
            result_KD = block_KD @ self.constant_DD
        for rows_RD, group_R, sign, offset in self.factors:
            part = slice(offset, offset + rows_RD.shape[1])
            scale_R = torch.exp(sign * theta_N[group_R]).to(block_KD)
            result_KD[:, part] += (scale_R * (block_KD[:, part] @ rows_RD.mT)) @ rows_RD
        return result_KD.mT

    @property
    def is_coupled(self) -> bool:
        """Whether it is ``[[X, C^T], [C, Y]]`` with X of sign 1 only and Y of sign -1 only.

        Rescaling one block against the other then leaves the best dual value unchanged.
        """
        split = self.split
        fits = all(
            factor.sign == (-1 if factor.offset else 1)
            and factor.offset in (0, split)
            and factor.offset + factor.rows_RD.shape[1] == (self.dim if factor.offset else split)
            for factor in self.factors
        )
        if not split or not fits or self.constant_DD is None:
            return False
        k_DD = self.constant_DD
        return not bool(k_DD[:split, :split].any() or k_DD[split:, split:].any())

    @property
    def split(self) -> int:
        """Where the last block starts."""
        return max(factor.offset for factor in self.factors)


def _gram(rows_RD: Tensor) -> Tensor:
    """Return ``rows^T rows`` from its lower triangle, in strips: a third less work when wide."""
    size = rows_RD.shape[1]
    if size < 2 * _STRIP:
        return rows_RD.mT @ rows_RD
    gram_DD = rows_RD.new_empty(size, size)
    for start in range(0, size, _STRIP):
        strip = slice(start, min(size, start + _STRIP))
        gram_DD[strip, : strip.stop] = rows_RD[:, strip].mT @ rows_RD[:, : strip.stop]
        gram_DD[: strip.start, strip] = gram_DD[strip, : strip.start].mT
    return gram_DD
