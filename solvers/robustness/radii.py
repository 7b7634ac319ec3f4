"""Certified radii: how far features or inputs may move before the first class could change.

Everything takes plain numbers: logits, rows of the last matrix, bounds. Source: spec
bound_tightening 4.6 (differences of rows, not the norm of the matrix) and 5 (radius).
"""

# Legend: N inputs or positions, V classes or vocabulary, C features that the last matrix reads.

import math

import torch
from torch import Tensor

from common.errors import CertificateError, ShapeError
from common.norms import exact64, gamma
from solvers.bounds.admissible import check_weights

ROUNDING = 1e-9
"""Share of the largest logit (and of a radius) given up for rounding of the float64 forward pass,
whose own error is near 1e-13; the certificate speaks about real arithmetic."""

EXACT_CLASSES = 1024
"""Up to this many rows all differences are formed; beyond, distances come from inner products."""


class PairNorms:
    """Upper bounds on ``scale * |U_u - U_v|_2`` over the rows of a matrix.

    Args:
        rows_VC: Rows U, any floating type.
        scale: Factor on the logits.
        ceiling: Bound on all of them that is already proved, such as ``Certificate.pair_norm``.

    Raises:
        CertificateError: for entries that are not finite, or so small that squares underflow.
    """

    def __init__(self, rows_VC: Tensor, scale: float = 1.0, ceiling: float = math.inf) -> None:
        check_weights({"head.weight": rows_VC})
        device = rows_VC.device
        self._rows_VC = exact64(rows_VC).to(device)
        self._scale, self._ceiling = abs(scale), ceiling
        self._squares_V = self._rows_VC.square().sum(1)
        self._table_VV: Tensor | None = None
        if len(rows_VC) <= EXACT_CLASSES:
            exact = "donot_use_mm_for_euclid_dist"
            self._table_VV = self._bounded(
                torch.cdist(self._rows_VC, self._rows_VC, compute_mode=exact)
            )

    def of(self, top_N: Tensor) -> Tensor:
        """Return the bounds (N, V), float64, for the classes ``top_N``; 0 for a class itself."""
        if self._table_VV is not None:
            return self._table_VV[top_N]
        rows_NC = self._rows_VC[top_N]
        products_NV = rows_NC @ self._rows_VC.T
        squares_NV = self._squares_V[top_N, None] + self._squares_V - 2 * products_NV
        rounding = 4 * gamma(rows_NC.shape[1] + 4) * float(self._squares_V.max())
        return self._bounded((squares_NV.clamp(min=0) + rounding).sqrt())

    def _bounded(self, norms: Tensor) -> Tensor:
        rounding = 1e-12 + gamma(self._rows_VC.shape[1] + 8)
        return (self._scale * norms * (1 + rounding)).clamp(max=self._ceiling)


def certified_radii(
    logits_NV: Tensor, movement_NV: Tensor, error_N1: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the first class and the distance within which it provably stays first.

    Args:
        logits_NV: Float64 logits.
        movement_NV: Bounds on how far ``z_first - z_v`` moves per unit of distance.
        error_N1: Bound on the rounding error of every logit (N, 1), where one is known.

    Returns:
        First class (N,) and radius (N,), in the unit of the distance: for every perturbation
        strictly inside the radius the first class is unchanged. 0 where nothing is certified,
        infinite where no movement can change it.

    Raises:
        ShapeError: for logits that are not float64 or of another shape than the movements.
        CertificateError: for logits that are not finite.
    """
    if logits_NV.dtype != torch.float64 or logits_NV.shape != movement_NV.shape:
        raise ShapeError(
            f"logits of {logits_NV.dtype} {tuple(logits_NV.shape)}: expected torch.float64 "
            f"{tuple(movement_NV.shape)}; convert the model with .double()"
        )
    if not bool(torch.isfinite(logits_NV).all()):
        raise CertificateError("a logit is NaN or infinite: expected finite ones; train again")
    top_N = logits_NV.argmax(dim=-1)
    first_N = logits_NV.gather(-1, top_N[:, None])
    allowance_N1 = ROUNDING * logits_NV.abs().amax(-1, keepdim=True) + 2 * error_N1
    gaps_NV = (first_N - logits_NV - allowance_N1).clamp(min=0)
    # A gap that nothing can close is infinitely far; no gap is no radius, whatever can move.
    radii_NV = torch.where(gaps_NV > 0, gaps_NV / movement_NV, 0.0)
    radii_NV = radii_NV.scatter(-1, top_N[:, None], math.inf)
    return top_N, radii_NV.amin(-1) * (1 - ROUNDING)


def linf_radii(radii_N: Tensor, dimension: int) -> Tensor:
    """Convert l2 radii: a change of every coordinate by at most ``r`` has l2 ``r sqrt(dim)``."""
    return radii_N / math.sqrt(dimension)
