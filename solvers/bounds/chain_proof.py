"""Trusted: the bound of a chain of matrices and activations, for any depth, by one Cholesky test.

Difference quotients of each activation are ``phi(z) - phi(z') = m dz + r w`` with ``|w| <= |dz|``
entry by entry, so everything is linear in ``v = (x, w)``: ``dz = N v`` (one row per w) and
``df = Q v``. For multipliers ``lambda > 0`` with
``M = diag(rho^2, lambda) - N^T diag(lambda) N - Q^T Q >= 0`` it follows that
``|df|^2 <= rho^2 |x|^2 + sum_i lambda_i (w_i^2 - dz_i^2) <= rho^2 |x|^2``, on all inputs.

Source: LipSDP in loop-transformed form; MaxMin as sums and absolute differences of its pairs.
"""

# Shape letters: I input features, F hidden width, P entries of w of one layer, D = I + all P.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.norms import UNIT, exact64, gamma, square_factor

LONGEST_CHAIN = 4
"""Matrices per chain: rounding errors grow with it, and products of weights must not underflow."""

CHAIN_RANGE = (1e-60, 1e60)
"""Sizes of multipliers and of ``rho^2`` for which underflow stays below ``_UNDERFLOW``."""

_UNDERFLOW = 1e-150
_LARGEST_SCALE = 2.0**110


class ChainForm(NamedTuple):
    """The chain as linear maps of v, with entrywise magnitudes for the rounding analysis."""

    n_PD: Tensor
    q_OD: Tensor
    n_size_PD: Tensor
    q_size_OD: Tensor
    inputs: int
    roundings: int


def multiplier_lengths(weights: Sequence[Tensor], activation: str) -> list[int]:
    """Return the number of multipliers of each activation in a chain."""
    pair = 2 if activation == "maxmin" else 1
    return [weight.shape[0] // pair for weight in weights[:-1]]


def chain_form(weights: Sequence[Tensor], activation: str) -> ChainForm:
    """Write a chain ``W_n phi W_(n-1) ... phi W_1`` as linear maps of ``v = (x, w)``.

    Args:
        weights: Float64 matrices (out, in) that fit together, first to last, at most
            ``LONGEST_CHAIN``.
        activation: ``relu``, ``tanh``, ``abs`` or ``maxmin``; biases cancel in differences.

    Returns:
        Float64 matrices; a wide first matrix is replaced by a square root of at least its Gram
        matrix, which can only enlarge the bound.
    """
    first_FI = weights[0]
    if first_FI.shape[1] > first_FI.shape[0]:
        first_FI = square_factor(first_FI.T).T
    inputs = first_FI.shape[1]
    lengths = multiplier_lengths(weights, activation)
    total = inputs + sum(lengths)
    h_FD = torch.eye(inputs, total, dtype=torch.float64)
    size_FD, rows, row_sizes, offset, roundings = h_FD.clone(), [], [], inputs, 0
    for weight, count in zip([first_FI, *weights[1:-1]][: len(lengths)], lengths, strict=True):
        z_FD, z_size_FD = weight @ h_FD, weight.abs() @ size_FD
        roundings += weight.shape[1] + 2
        w_PD = torch.zeros(count, total, dtype=torch.float64)
        w_PD.diagonal(offset).fill_(1.0)
        offset += count
        if activation == "maxmin":
            rows.append(z_FD[::2] - z_FD[1::2])
            row_sizes.append(z_size_FD[::2] + z_size_FD[1::2])
            s_PD, s_size_PD = z_FD[::2] + z_FD[1::2], row_sizes[-1]
            # max and min are (sum +- |difference|) / 2; w and sums live in different columns.
            h_FD = torch.stack(((s_PD + w_PD) / 2, (s_PD - w_PD) / 2), 1).flatten(0, 1)
            size_FD = ((s_size_PD + w_PD) / 2).repeat_interleave(2, 0)
        else:
            rows.append(z_FD)
            row_sizes.append(z_size_FD)
            half = 0.5 if activation in ("relu", "tanh") else 0.0  # slopes from 0
            h_FD = half * z_FD + (1 - half) * w_PD
            size_FD = half * z_size_FD + (1 - half) * w_PD
    last = weights[-1] if lengths else first_FI
    empty = torch.zeros(0, total, dtype=torch.float64)
    return ChainForm(
        n_PD=torch.cat([empty, *rows]),
        q_OD=last @ h_FD,
        n_size_PD=torch.cat([empty, *row_sizes]),
        q_size_OD=last.abs() @ size_FD,
        inputs=inputs,
        roundings=roundings + last.shape[1] + 2,
    )


def chain_proves(form: ChainForm, lambda_P: Tensor, rho: float) -> float | None:
    """Prove with these multipliers that the chain's l2 constant is at most ``rho``.

    Args:
        form: From ``chain_form``.
        lambda_P: Positive float64 multipliers of all activations, first to last.
        rho: The claim, above 0.

    Returns:
        None where the proof fails; otherwise the share of the (unit) diagonal that was kept back
        for rounding.

    Source:
        Positive definiteness by Cholesky after scaling the diagonal to about 1 by powers of two;
        the shift covers its backward error (Rump 2006 form) and all rounding in the matrix.
    """
    if not rho > 0:
        return None
    low, high = CHAIN_RANGE
    p = rho * rho * (1 - 4 * UNIT)
    lambda_P = exact64(lambda_P)
    if not low <= p <= high or bool(((lambda_P < low) | (lambda_P > high)).any()):
        return None
    ends_D = torch.cat((torch.full((form.inputs,), p, dtype=torch.float64), lambda_P))
    m_DD = torch.diag(ends_D) - _gram(form.n_PD, form.q_OD, lambda_P)
    size_DD = torch.diag(ends_D) + _gram(form.n_size_PD, form.q_size_OD, lambda_P)
    diagonal_D = m_DD.diagonal()
    if not bool(torch.isfinite(size_DD).all()) or not bool((diagonal_D > 0).all()):
        return None
    scale_D = torch.exp2(torch.round(-0.5 * torch.log2(diagonal_D)))
    if float(scale_D.max()) > _LARGEST_SCALE or float(scale_D.min()) < 1 / _LARGEST_SCALE:
        return None
    m_DD = scale_D[:, None] * (m_DD + m_DD.T) / 2 * scale_D
    size_DD = scale_D[:, None] * size_DD * scale_D
    dim, inner = len(ends_D), len(lambda_P) + len(form.q_OD)
    error = 1.02 * gamma(2 * form.roundings + inner + 24) * float(size_DD.sum(1).max())
    backward = 1.01 * gamma(dim + 1) / (1 - gamma(dim + 1)) * float(m_DD.diagonal().sum())
    shift = backward + error + 8 * UNIT * float(m_DD.diagonal().max()) + _UNDERFLOW
    m_DD.diagonal().sub_(shift)
    return shift if int(torch.linalg.cholesky_ex(m_DD).info) == 0 else None


def _gram(n_PD: Tensor, q_OD: Tensor, lambda_P: Tensor) -> Tensor:
    return n_PD.T @ (lambda_P[:, None] * n_PD) + q_OD.T @ q_OD
