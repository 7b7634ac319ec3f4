"""Approximate polar factors by odd matrix polynomials (Newton-Schulz and relatives).

Only the six-step table never exceeds 1 on a normalised input, so that the norm of a Muon update is
a bound; every other table states its largest output, which the soft cap multiplies in.
"""

# Legend: N stacked matrices, O/I out/in features, M the smaller side.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import one_of
from common.errors import ShapeError

# Arithmetics that the iterations may use.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Polynomial:
    """One odd polynomial schedule x <- a x + b x^3 + c x^5.

    Attributes:
        steps: One (a, b, c) per step.
        overshoot: Largest output on inputs in (0, 1], exact arithmetic, rounded up.
        bfloat16_overshoot: Largest spectral norm measured in bfloat16 over families of spectra
            (flat, Gaussian, geometric, one large value ...) and shapes up to 256 x 256, plus half
            a per cent. Measured, not proved.
        inflation: The input is divided by this times its Frobenius norm.
    """

    steps: tuple[tuple[float, float, float], ...]
    overshoot: float
    bfloat16_overshoot: float
    inflation: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the schedule on scalars (any shape, any float dtype)."""
        for a, b, c in self.steps:
            square = x * x
            x = x * (a + square * (b + square * c))
        return x


_SIX = ((3955, -8306, 5008), (3735, -6681, 3463), (3799, -6499, 3211))
_SIX += ((4019, -6385, 2906), (2677, -3029, 1162), (2172, -1833, 682))

TABLES: dict[str, Polynomial] = {
    "six_step": Polynomial(
        steps=tuple((a / 1024, b / 1024, c / 1024) for a, b, c in _SIX),
        overshoot=0.99934,
        bfloat16_overshoot=1.01,
    ),
    "five_step": Polynomial(
        steps=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        overshoot=1.14503,
        bfloat16_overshoot=1.158,
    ),
    "classic": Polynomial(
        steps=((3.4445, -4.7750, 2.0315),) * 5, overshoot=1.20238, bfloat16_overshoot=1.215
    ),
    "polar_express": Polynomial(
        steps=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        overshoot=1.14114,
        bfloat16_overshoot=1.152,
        inflation=1.02,
    ),
}


def overshoot(table: str, dtype: torch.dtype = torch.float32) -> float:
    """Return the factor by which an update can exceed norm 1 (at least 1, dimensionless).

    Args:
        table: Name in ``TABLES``.
        dtype: Arithmetic of the iteration; a measured figure for bfloat16.

    Raises:
        ConfigError: for an unknown table.
    """
    one_of("table", table, TABLES)
    polynomial = TABLES[table]
    is_coarse = dtype == torch.bfloat16
    return max(polynomial.bfloat16_overshoot if is_coarse else polynomial.overshoot, 1.0)


def orthogonalize(
    g_NOI: Tensor, table: str = "six_step", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return an approximation of the polar factor: same singular vectors, values near 1.

    Args:
        g_NOI: Matrix (O, I) or stack of equal shapes (N, O, I); any scale, zero gives zero.
        table: Name in ``TABLES``.
        dtype: Arithmetic of the iteration, float32 or bfloat16 (float64 for oracles).

    Returns:
        Tensor of the same shape and dtype; spectral norm at most ``overshoot(table, dtype)``.

    Raises:
        ConfigError: for an unknown table.
        ShapeError: unless there are two or three dimensions.

    Source:
        arXiv 2507.13338 (six-step table of its trainer); deviation: the input is first divided by
        its largest entry, so that gradients near the smallest floats keep their direction.
    """
    one_of("table", table, TABLES)
    if g_NOI.ndim not in (2, 3):
        raise ShapeError(f"g_NOI: expected (O, I) or (N, O, I), got {tuple(g_NOI.shape)}")
    polynomial = TABLES[table]
    x_NOI = _normalise(g_NOI, polynomial.inflation).to(dtype).view(-1, *g_NOI.shape[-2:])
    for a, b, c in polynomial.steps:
        x_NOI = odd_step(x_NOI, a, b, dtype, c)
    return x_NOI.view(g_NOI.shape).to(g_NOI.dtype)


def odd_step(x_NOI: Tensor, a: float, b: Any, dtype: torch.dtype, c: float = 0.0) -> Tensor:
    """Return the matrices whose singular values x have become ``a x + b x^3 + c x^5``.

    Args:
        x_NOI: Stack (N, O, I).
        a: Coefficient of the matrix itself.
        b: Coefficient of the cube, a number or (N, 1, 1) with ``c = 0``.
        dtype: Arithmetic of the products where it is coarser than that of ``x_NOI``; the sum
            keeps the dtype of ``x_NOI``.
        c: Coefficient of the fifth power.
    """
    is_tall = x_NOI.shape[-2] > x_NOI.shape[-1]
    wide = x_NOI.mT if is_tall else x_NOI
    factor = wide.to(dtype) if dtype.itemsize < wide.dtype.itemsize else wide
    gram_NMM = factor @ factor.mT
    if c:
        gram_NMM = torch.baddbmm(gram_NMM, gram_NMM, gram_NMM, beta=b, alpha=c)
    else:
        gram_NMM = (b * gram_NMM).to(factor.dtype)
    if factor.dtype == wide.dtype:
        out = torch.baddbmm(wide, gram_NMM, wide, beta=a)
    else:
        out = a * wide + (gram_NMM @ factor).to(wide.dtype)
    return out.mT if is_tall else out


def _normalise(g_NOI: Tensor, inflation: float) -> Tensor:
    # In float32 at least: the squares of a bfloat16 gradient would lose the norm.
    g_NOI = g_NOI.to(torch.promote_types(g_NOI.dtype, torch.float32))
    tiny = torch.finfo(g_NOI.dtype).tiny
    g_NOI = g_NOI / g_NOI.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    return g_NOI / (inflation * torch.linalg.matrix_norm(g_NOI, keepdim=True)).clamp_min(tiny)
