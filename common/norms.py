"""Operator norms: estimates for display and float64 upper bounds that a certificate may use.

A bound holds for the real matrix with exactly the given entries: it is computed in float64 and
confirmed by a Cholesky factorisation with an a-priori rounding margin (backward error bound of
Cholesky, Rump 2006 form), so no eigenvalue routine has to be trusted.
"""

# Shape letters: N rows of a symmetric matrix or of a stack, O/I out/in features of a matrix.

import math

import torch
from torch import Tensor

from common.errors import CertificateError, ShapeError

UNIT = 2.0**-53
"""Unit roundoff of float64."""

SLACK = 1e-12
"""Relative allowance for at most about 4000 roundings of a sum or product of positive floats."""

TINY = 1e-290
"""Absolute allowance for underflow, below anything that matters."""

EIGEN_MARGIN = 1e-9
"""Relative distance between an eigenvalue estimate and the first candidate for its bound."""


_POWER = 1000  # 2^1000 and 2^-1000 are normal numbers
_MOST_POWERS = 3  # more take every float64 beyond its range


def gamma(num_roundings: int) -> float:
    """Return the standard bound ``k u / (1 - k u)`` on ``k`` accumulated roundings."""
    return num_roundings * UNIT / (1.0 - num_roundings * UNIT)


def round_up(value: float) -> float:
    """Return ``value`` moved up by the relative allowance ``SLACK``."""
    return value + abs(value) * SLACK


def times_power(x: Tensor, exponent: int) -> Tensor:
    """Return ``2^exponent x`` for float64 x; exact but for subnormal or infinite results.

    ``torch.ldexp`` overflowed like float32 in earlier versions (issue 133267 of its repository).
    """
    whole, rest = divmod(abs(exponent), _POWER)
    sign = -1 if exponent < 0 else 1
    for _ in range(min(whole, _MOST_POWERS)):
        x = x * 2.0 ** (sign * _POWER)
    return x * 2.0 ** (sign * rest)


def exact64(w: Tensor) -> Tensor:
    """Convert a tensor of any floating type to float64 on the CPU without rounding.

    Args:
        w: Any shape; bfloat16, float16, float32 and float64 convert exactly.

    Raises:
        ShapeError: for an integer or boolean tensor.
        CertificateError: if an entry is NaN or infinite.
    """
    if not w.is_floating_point():
        raise ShapeError(f"tensor of type {w.dtype}: expected a floating type; convert it first")
    w64 = w.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(w64).all()):
        raise CertificateError(
            f"tensor of shape {tuple(w.shape)} holds NaN or infinity: no bound exists; "
            "train again with a smaller learning rate"
        )
    return w64


def rms_norm_factor(w_OI: Tensor) -> float:
    """Return ``sqrt(in / out)``: RMS->RMS norm of a matrix over its spectral norm."""
    return math.sqrt(w_OI.shape[1] / w_OI.shape[0])


def spectral_norm(w_OI: Tensor) -> float:
    """Return the largest singular value in float64: an estimate, for display and solvers.

    Args:
        w_OI: Matrix (out, in), any floating type.
    """
    w64_OI = exact64(_matrix(w_OI))
    return float(torch.linalg.svdvals(w64_OI)[0]) if w64_OI.numel() else 0.0


def spectral_norm_bound(w_OI: Tensor) -> float:
    """Return a certified float64 upper bound on the spectral norm, about 1e-9 above it.

    Args:
        w_OI: Matrix (out, in), any floating type, taken exactly as stored; may be empty.

    Raises:
        ShapeError: if it is not two-dimensional or not of a floating type.
        CertificateError: if an entry is NaN or infinite.

    Source:
        Largest eigenvalue of the smaller Gram matrix; Cholesky test with an a-priori margin.
    """
    w64_OI = exact64(_matrix(w_OI))
    top = float(w64_OI.abs().max()) if w64_OI.numel() else 0.0
    if top == 0.0:
        return 0.0
    # A power of two scales exactly and keeps squares away from overflow and underflow.
    exponent = max(math.frexp(top)[1], -1000)
    w64_OI = times_power(w64_OI, -exponent)
    if w64_OI.shape[0] < w64_OI.shape[1]:
        w64_OI = w64_OI.T
    gram_II, error = weighted_gram(w64_OI)
    return round_up(math.ldexp(math.sqrt(lambda_max_bound(gram_II, error)), exponent))


def weighted_gram(rows_NI: Tensor, weights_N: Tensor | None = None) -> tuple[Tensor, float]:
    """Form ``rows^T diag(weights) rows`` and bound the rounding error made.

    Args:
        rows_NI: Float64 matrix whose entries carry at most three roundings each.
        weights_N: Non-negative float64 weights, one per row; ones when absent.

    Returns:
        Symmetric float64 matrix (I, I) and a bound on the spectral norm of its error.
    """
    magnitude_NI = rows_NI.abs()
    sums_N = magnitude_NI.sum(1)
    weighted_NI = rows_NI
    if weights_N is not None:
        weighted_NI = rows_NI * weights_N[:, None]
        sums_N = sums_N * weights_N
    gram_II = rows_NI.T @ weighted_NI
    row_sum = float((magnitude_NI.T @ sums_N).max()) if gram_II.numel() else 0.0
    return (gram_II + gram_II.T) / 2, 1.01 * gamma(rows_NI.shape[0] + 16) * row_sum


def lambda_max_bound(sym_NN: Tensor, error: float = 0.0) -> float:
    """Return a certified upper bound on the largest eigenvalue, see ``certified_top``."""
    return certified_top(sym_NN, error)[0]


def certified_top(sym_NN: Tensor, error: float = 0.0) -> tuple[float, float]:
    """Bound the largest eigenvalue of a symmetric matrix and say by how much it was rounded up.

    Args:
        sym_NN: Symmetric float64 matrix; only its lower triangle is read.
        error: Bound on the spectral norm of ``sym_NN`` minus the intended matrix.

    Returns:
        A number above the largest eigenvalue of every symmetric matrix within ``error``, and its
        relative distance from the eigenvalue routine's estimate; infinite where the error is not
        finite.

    Source:
        If Cholesky of ``rho I - sym - shift I`` completes with a shift above its backward error,
        ``rho`` is a bound. The last resort is the largest absolute row sum.
    """
    size = sym_NN.shape[0]
    if not bool(torch.isfinite(sym_NN).all()):
        raise CertificateError("a matrix to be bounded overflowed; the weights are too large")
    if not math.isfinite(error):
        return math.inf, math.inf
    if size == 0 or not bool(sym_NN.any()):
        return error, 0.0
    diagonal_N = sym_NN.diagonal()
    top = float(torch.linalg.eigvalsh(sym_NN)[-1])
    rho = top
    rho += EIGEN_MARGIN * abs(rho) + 2 * _shift(rho, diagonal_N, error)
    for attempt in range(20):
        shift = _shift(rho, diagonal_N, error)
        test_NN = -sym_NN
        test_NN.diagonal().add_(rho - shift)
        if int(torch.linalg.cholesky_ex(test_NN).info) == 0:
            return rho, (rho - top) / max(abs(top), TINY)
        rho += 2.0 ** (attempt + 1) * shift
    lower_NN = torch.tril(sym_NN).abs()
    row_sum = float((lower_NN.sum(1) + torch.tril(lower_NN, -1).sum(0)).max())
    rho = round_up(row_sum) + error
    return rho, (rho - top) / max(abs(top), TINY)


def product_norm_bound(left_OM: Tensor, right_MI: Tensor) -> float:
    """Return a certified upper bound on the spectral norm of a product of two matrices.

    Args:
        left_OM: Left factor, any floating type; cheapest when it is tall.
        right_MI: Right factor, any floating type.
    """
    left_OM, right_MI = exact64(_matrix(left_OM)), exact64(_matrix(right_MI))
    if left_OM.shape[0] > left_OM.shape[1]:
        left_OM = square_factor(left_OM)
    rounding = schur_norm(left_OM.abs() @ right_MI.abs())
    norm = spectral_norm_bound(left_OM @ right_MI)
    return round_up(norm + 1.01 * gamma(left_OM.shape[1] + 4) * rounding)


def schur_norm(w_OI: Tensor) -> float:
    """Return ``sqrt(|W|_1 |W|_inf)``, an upper bound on the spectral norm up to rounding."""
    if not w_OI.numel():
        return 0.0
    magnitude_OI = w_OI.abs()
    return math.sqrt(float(magnitude_OI.sum(0).max()) * float(magnitude_OI.sum(1).max()))


def _matrix(w_OI: Tensor) -> Tensor:
    if w_OI.ndim != 2:
        raise ShapeError(f"tensor of shape {tuple(w_OI.shape)}: expected a matrix (out, in)")
    return w_OI


def square_factor(left_OM: Tensor) -> Tensor:
    """Return a square root with ``left^T left <= root^T root`` (as quadratic forms)."""
    gram_MM, error = weighted_gram(left_OM)
    size = gram_MM.shape[0]
    backward = 1.01 * gamma(size + 1) / (1 - gamma(size + 1)) * float(gram_MM.trace()) + error
    # Twice the backward error: once for the inequality, once to keep a singular matrix alive.
    gram_MM.diagonal().add_(2 * backward)
    lower_MM, info = torch.linalg.cholesky_ex(gram_MM)
    return lower_MM.T if int(info) == 0 and backward > TINY else left_OM


def _shift(rho: float, diagonal_N: Tensor, error: float) -> float:
    test_N = rho - diagonal_N
    size = diagonal_N.shape[0]
    factor = 1.01 * gamma(size + 1) / (1 - gamma(size + 1))
    rounding = 4 * UNIT * (abs(rho) + float(test_N.abs().max())) + TINY
    return factor * max(float(test_N.sum()), 0.0) + error + rounding
