"""Caps on every singular value: soft, hard and exact cap, Stiefel, clipped rows.

All functions take N stacked matrices (N, O, I) in units of their caps and keep them at most 1.
"""

# Legend: N stacked matrices, O/I out/in features, M the smaller side.

import logging
from functools import lru_cache

import torch
from torch import Tensor

from common.errors import ConfigError, ConvergenceError
from train.orthogonalize import odd_step, orthogonalize, overshoot
from train.projections.step import Step, per_matrix

log = logging.getLogger(__name__)

# Beyond this update / cap ratio (0.3065 exactly) the soft cap is no longer monotone.
SOFT_CAP_LIMIT = 0.3
_MONOTONE = 1.306
# Rounding of bfloat16 products, measured: of a soft cap relative to alpha k^2, of a hard cap.
_SOFT_CAP_ROUNDING = 0.02
_HARD_CAP_ROUNDING = 3e-3
# The four quintics of the hard cap stay below this for inputs up to HARD_CAP_RANGE (0.034 from
# min(1, x) there): without dividing by it the published hard cap is not a cap.
HARD_CAP_OVERSHOOT = 1.0109
HARD_CAP_RANGE = 3.0
_HARD_CAP = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)
# Largest norm from which three Newton-Schulz steps return to the Stiefel manifold.
_NEAR = 1.3
# Squarings of the Gram matrix that bound a norm: at most n^(1/32), 1.24 at 1024 features, too big.
_SQUARINGS = 3


@lru_cache(maxsize=4096)
def soft_cap_strength(w_max: float, update_norm: float, decay: float = 0.0) -> float:
    """Return the smallest alpha for which the soft cap maps every reachable value below the cap.

    With ``k = w_max (1 - decay) + update_norm`` it solves ``p2(p1(k)) = w_max`` for
    ``p1(x) = x - alpha x^3``, ``p2(y) = y + alpha y^3``; substituting ``t = alpha k^2`` gives
    ``3 t^2 - 3 t^3 + t^4 = 1 - w_max / k``, monotone on [0, 1/3], solved by bisection in float64.

    Args:
        w_max: Cap, above 0.
        update_norm: Bound on the update in the same units, at least 0.
        decay: Relative shrinkage before the update, 0 to 1.

    Returns:
        alpha >= 0; exactly 0 when nothing can exceed the cap.

    Raises:
        ConfigError: when ``k`` is beyond the range on which the cap is monotone.
    """
    largest = w_max * (1 - decay) + update_norm
    excess = 1 - w_max / largest
    if excess <= 0:
        return 0.0
    if excess > _coupling(1 / 3):
        raise ConfigError(
            f"update_norm={update_norm:g}: expected at most {SOFT_CAP_LIMIT} w_max "
            f"(w_max={w_max:g}) for soft_cap; lower lr or target, or use constraint=exact_cap"
        )
    low, high = 0.0, 1 / 3
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _coupling(middle) < excess else (low, middle)
    return high / largest**2


def _coupling(t: float) -> float:
    return t * t * (3 - 3 * t + t * t)


def soft_cap(m_NOI: Tensor, step: Step) -> Tensor:
    """Apply two odd cubics whose strength is the least that caps ``step.largest``.

    Matrices that may exceed ``1 + SOFT_CAP_LIMIT`` get the exact cap, with one logged warning.

    Raises:
        ConfigError: if ``step.largest`` is unknown.

    Source:
        arXiv 2507.13338; deviations: the update norm is in RMS->RMS units for every shape, and the
        range in which the published polynomial is not monotone is refused.
    """
    strengths, beyond = [], []
    for index, largest in enumerate(step.largest):
        if largest is None:
            raise ConfigError("soft_cap: largest=None: expected the norm before the constraint")
        strength = _strength(largest, step)
        strengths.append(strength or 0.0)
        beyond += [index] if strength is None else []
    alpha = per_matrix(strengths, m_NOI)
    capped_NOI = m_NOI
    if any(strengths):
        capped_NOI = odd_step(m_NOI, 1.0, -alpha, step.dtype)
        capped_NOI = odd_step(capped_NOI, 1.0, alpha, step.dtype)
    return _with_exact(capped_NOI, m_NOI, beyond, step, "soft_cap", 1 + SOFT_CAP_LIMIT)


def _strength(largest: float, step: Step) -> float | None:
    """Return the alpha that brings ``largest`` to the cap less its roundings, None if none does."""
    alpha, rounding = 0.0, _SOFT_CAP_ROUNDING if step.dtype == torch.bfloat16 else 0.0
    # The allowance depends on alpha and alpha on the allowance, weakly: four rounds suffice.
    for _ in range(4 if rounding else 1):
        target = 1 - step.margin - rounding * alpha * largest**2
        if largest > min(1 + SOFT_CAP_LIMIT, _MONOTONE * target):
            return None
        alpha = soft_cap_strength(target, largest - target)
    return alpha


def hard_cap(m_NOI: Tensor, step: Step) -> Tensor:
    """Apply four odd quintics close to ``min(1, sigma)``.

    It holds for norms up to ``HARD_CAP_RANGE``. An unknown ``step.largest`` is bounded by the
    Frobenius norm of a power of the Gram matrix; matrices beyond get the exact cap, with one
    logged warning. Small singular values shrink by 5 per cent, so it is not idempotent.

    Source:
        arXiv 2507.13338's trainer; deviation: divided by the overshoot, so that it is a cap.
    """
    rounding = _HARD_CAP_ROUNDING if step.dtype == torch.bfloat16 else 0.0
    gain = HARD_CAP_OVERSHOOT / (1 - step.margin - rounding)
    limit = HARD_CAP_RANGE / gain
    bounds = list(step.largest)
    if any(largest is None for largest in bounds):
        bounds = norm_bounds(m_NOI)
    beyond = [index for index, largest in enumerate(bounds) if not largest <= limit]
    x_NOI = gain * m_NOI
    for a, b, c in _HARD_CAP:
        x_NOI = odd_step(x_NOI, a, b, step.dtype, c)
    return _with_exact(x_NOI / gain, m_NOI, beyond, step, "hard_cap", limit)


def norm_bounds(m_NOI: Tensor) -> list[float]:
    """Return an upper bound on the largest singular value of each matrix (up to rounding).

    It exceeds the value by at most a factor ``M^(1/32)``, M the smaller side.
    """
    wide = m_NOI.mT if m_NOI.shape[-2] > m_NOI.shape[-1] else m_NOI
    wide = wide.to(torch.promote_types(m_NOI.dtype, torch.float32))
    power_NMM = wide @ wide.mT
    tiny = torch.finfo(power_NMM.dtype).tiny
    log_N = torch.zeros(len(wide), dtype=torch.float64, device=wide.device)
    for exponent in range(_SQUARINGS + 1):
        norm_N = torch.linalg.matrix_norm(power_NMM).clamp_min(tiny)
        log_N += norm_N.double().log() / 2 ** (exponent + 1)
        power_NMM = power_NMM / norm_N[:, None, None]
        power_NMM = power_NMM @ power_NMM
    return log_N.exp().tolist()


def exact_cap(m_NOI: Tensor, step: Step) -> Tensor:
    """Clamp the singular values by SVD; matrices below the cap come back bit for bit.

    Raises:
        ConvergenceError: if a weight is not finite.
    """
    try:
        u_NOM, sigma_NM, vt_NMI = torch.linalg.svd(m_NOI, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise ConvergenceError(
            "exact_cap: a weight matrix holds NaN or infinity, so the training has diverged; "
            "lower optim.lr"
        ) from error
    cap = 1 - step.margin
    exceeds_N11 = (sigma_NM > cap).any(dim=-1)[:, None, None]
    if not bool(exceeds_N11.any()):
        return m_NOI
    capped_NOI = (u_NOM * sigma_NM.clamp_max(cap)[:, None, :]) @ vt_NMI
    return torch.where(exceeds_N11, capped_NOI, m_NOI)


def stiefel(m_NOI: Tensor, step: Step) -> Tensor:
    """Replace each matrix by its polar factor: every singular value ends near 1, and below.

    The six-step polynomial takes values from a hundredth of the Frobenius norm up to 0.995 or
    more, smaller ones less far; a zero matrix stays zero, so what starts at zero jumps to the cap
    with its first update. Where every ``step.largest`` says that the weights were there a small
    update ago, three Newton-Schulz steps, which never exceed 1, lead back: cheaper and closer.
    """
    is_exact = step.dtype != torch.bfloat16
    near = [is_exact and k is not None and k <= _NEAR for k in step.largest]
    if all(near):
        return _retracted(m_NOI, step)
    out_NOI = _polar(m_NOI, step)
    # Each matrix by its own history, so that a batch of others cannot change its result.
    for index in (i for i, is_near in enumerate(near) if is_near):
        out_NOI[index] = _retracted(m_NOI[index : index + 1], step)[0]
    return out_NOI


def _polar(m_NOI: Tensor, step: Step) -> Tensor:
    gain = (1 - step.margin) / overshoot("six_step", step.dtype)
    return gain * orthogonalize(m_NOI, "six_step", step.dtype)


def _retracted(m_NOI: Tensor, step: Step) -> Tensor:
    x_NOI = (1 - step.margin) * m_NOI
    for _ in range(3):
        x_NOI = odd_step(x_NOI, 1.5, -0.5, step.dtype)
    return (1 - step.margin) * x_NOI


def row_clip(m_NOI: Tensor, step: Step) -> Tensor:
    """Scale rows of RMS above 1 down to it."""
    rms_NO1 = m_NOI.square().mean(dim=-1, keepdim=True).sqrt()
    tiny = torch.finfo(m_NOI.dtype).tiny
    return m_NOI * ((1 - step.margin) / rms_NO1.clamp_min(tiny)).clamp_max(1.0)


_warned: set[str] = set()


def _with_exact(
    capped_NOI: Tensor, m_NOI: Tensor, beyond: list[int], step: Step, kind: str, limit: float
) -> Tensor:
    """Replace the matrices listed in ``beyond`` by their exact caps."""
    if not beyond:
        return capped_NOI
    if kind not in _warned:
        _warned.add(kind)
        log.warning("%s: a norm may exceed %.3g w_max: using the exact cap there", kind, limit)
    index = torch.tensor(beyond, device=m_NOI.device)
    return capped_NOI.index_copy(0, index, exact_cap(m_NOI[index], step))
