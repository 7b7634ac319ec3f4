"""Weight constraints applied after an optimizer step, behind one registry.

Every constraint bounds the RMS->RMS operator norm ``sqrt(I/O) sigma_1`` of a matrix (O, I) by
``w_max``; ``row_clip`` bounds the RMS of every row instead (embeddings). None of them certifies
anything: certificates measure the stored weights.

Source: arXiv 2507.13338; deviations: the soft-cap coupling takes the update norm in RMS->RMS units
for every shape and is refused where the published polynomial stops being monotone.
"""

# Legend: N stacked matrices, O/I out/in features; m is a weight in RMS->RMS units, w / sqrt(O/I).

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from common.config import one_of, positive
from common.errors import ConfigError, ShapeError

log = logging.getLogger(__name__)

# Beyond this update / cap ratio (0.3065 exactly) the soft cap is no longer monotone.
SOFT_CAP_LIMIT = 0.3
# Caps aim below w_max by this much, so that float32 rounding cannot climb over it step by step.
MARGIN = 2e-6


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a constraint knows about the step it follows.

    Attributes:
        w_max: Cap on the RMS->RMS norm (row RMS for ``row_clip``), above 0.
        update_norm: Bound on the RMS->RMS norm of the update, the learning rate included.
        decay: Factor by which weight decay shrank the weight, subtracted from 1 (0: none).
        power_iters: Rounds of power iteration.
        vectors: Right singular vectors (N, I, 1) of the previous step, updated in place.
    """

    w_max: float
    update_norm: float | None = None
    decay: float = 0.0
    power_iters: int = 16
    vectors: Tensor | None = None


def project(
    weight_OI: Tensor,
    kind: str,
    w_max: float,
    *,
    update_norm: float | None = None,
    decay: float = 0.0,
    power_iters: int = 16,
    vectors: Tensor | None = None,
) -> Tensor:
    """Return the weight under a constraint; the argument is not modified.

    Args:
        weight_OI: Matrix (O, I) or stack of equal shapes (N, O, I), floating point.
        kind: Name in ``PROJECTIONS``: none, soft_cap, exact_cap, spectral_normalize, row_clip.
        w_max: Cap on the RMS->RMS norm, above 0 (row RMS for ``row_clip``).
        update_norm: ``soft_cap`` only, required there: bound on the RMS->RMS norm of the last
            update. Above ``0.3 w_max`` the exact cap replaces it, with one logged warning.
        decay: ``soft_cap`` only: the weight was multiplied by ``1 - decay`` before the update.
        power_iters: ``spectral_normalize`` only: rounds of power iteration.
        vectors: ``spectral_normalize`` only: start vectors, see ``power_vectors``; updated in
            place. Power iteration under-estimates: cold starts by up to 5 per cent.

    Returns:
        Tensor of the same shape and dtype (computed in float32 at least).

    Raises:
        ConfigError: for an unknown kind, a cap that is not positive, a missing update norm.
        ShapeError: unless there are two or three dimensions.
    """
    one_of("kind", kind, PROJECTIONS)
    positive("w_max", w_max)
    if weight_OI.ndim not in (2, 3):
        raise ShapeError(f"weight: expected (O, I) or (N, O, I), got {tuple(weight_OI.shape)}")
    step = Step(
        w_max=w_max,
        update_norm=update_norm,
        decay=decay,
        power_iters=power_iters,
        vectors=vectors,
    )
    stack_NOI = weight_OI if weight_OI.ndim == 3 else weight_OI[None]
    out_features, in_features = stack_NOI.shape[-2:]
    scale = 1.0 if kind == "row_clip" else (out_features / in_features) ** 0.5
    m_NOI = stack_NOI.to(torch.promote_types(weight_OI.dtype, torch.float32)) / scale
    m_NOI = PROJECTIONS[kind](m_NOI, step) * scale
    return m_NOI.view(weight_OI.shape).to(weight_OI.dtype)


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


def power_vectors(weight_NOI: Tensor) -> Tensor:
    """Return fixed start vectors (N, I, 1) for power iteration, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    shape = (weight_NOI.shape[-1], 1)
    start_I1 = torch.randn(shape, generator=generator, dtype=torch.float32)
    return start_I1.to(weight_NOI.device).expand(weight_NOI.shape[0], *shape).clone()


def _none(m_NOI: Tensor, step: Step) -> Tensor:
    return m_NOI


def _soft_cap(m_NOI: Tensor, step: Step) -> Tensor:
    if step.update_norm is None:
        raise ConfigError("soft_cap: update_norm=None: expected the norm bound of the last update")
    if step.update_norm > SOFT_CAP_LIMIT * step.w_max:
        _warn_fallback(step.update_norm / step.w_max)
        return _exact_cap(m_NOI, step)
    target = step.w_max * (1 - MARGIN)
    growth = step.update_norm + MARGIN * step.w_max * (1 - step.decay)
    alpha = soft_cap_strength(target, growth, step.decay)
    return _odd_cubic(_odd_cubic(m_NOI, -alpha), alpha) if alpha > 0 else m_NOI


def _odd_cubic(m_NOI: Tensor, alpha: float) -> Tensor:
    is_tall = m_NOI.shape[-2] > m_NOI.shape[-1]
    wide = m_NOI.mT if is_tall else m_NOI
    wide = torch.baddbmm(wide, wide @ wide.mT, wide, alpha=alpha)
    return wide.mT if is_tall else wide


_warned: set[str] = set()


def _warn_fallback(ratio: float) -> None:
    if "soft_cap" not in _warned:
        _warned.add("soft_cap")
        log.warning(
            "soft_cap: the update norm is %.3g w_max, above %g w_max: using the exact cap there",
            ratio,
            SOFT_CAP_LIMIT,
        )


def _exact_cap(m_NOI: Tensor, step: Step) -> Tensor:
    u_NOM, sigma_NM, vt_NMI = torch.linalg.svd(m_NOI, full_matrices=False)
    cap = step.w_max * (1 - MARGIN)
    if not bool((sigma_NM > cap).any()):
        return m_NOI
    return (u_NOM * sigma_NM.clamp_max(cap)[:, None, :]) @ vt_NMI


def _spectral_normalize(m_NOI: Tensor, step: Step) -> Tensor:
    vectors_NI1 = power_vectors(m_NOI) if step.vectors is None else step.vectors
    v_NI1 = vectors_NI1.to(m_NOI.dtype)
    tiny = torch.finfo(m_NOI.dtype).tiny
    for _ in range(step.power_iters):
        next_NI1 = m_NOI.mT @ (m_NOI @ v_NI1)
        norm_N11 = torch.linalg.vector_norm(next_NI1, dim=1, keepdim=True)
        # A zero matrix keeps its start vector, so that later steps can still see it grow.
        v_NI1 = torch.where(norm_N11 > tiny, next_NI1 / norm_N11.clamp_min(tiny), v_NI1)
    v_NI1 = v_NI1 / torch.linalg.vector_norm(v_NI1, dim=1, keepdim=True)
    vectors_NI1.copy_(v_NI1)
    sigma_N11 = torch.linalg.vector_norm(m_NOI @ v_NI1, dim=1, keepdim=True)
    return m_NOI * (step.w_max / sigma_N11.clamp_min(tiny)).clamp_max(1.0)


def _row_clip(m_NOI: Tensor, step: Step) -> Tensor:
    rms_NO1 = m_NOI.square().mean(dim=-1, keepdim=True).sqrt()
    tiny = torch.finfo(m_NOI.dtype).tiny
    return m_NOI * (step.w_max * (1 - MARGIN) / rms_NO1.clamp_min(tiny)).clamp_max(1.0)


PROJECTIONS: dict[str, Callable[[Tensor, Step], Tensor]] = {
    "none": _none,
    "soft_cap": _soft_cap,
    "exact_cap": _exact_cap,
    "spectral_normalize": _spectral_normalize,
    "row_clip": _row_clip,
}
