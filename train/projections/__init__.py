"""Weight constraints applied after an optimizer step, behind one registry.

Every constraint speaks about the RMS->RMS operator norm ``sqrt(I/O) sigma_1`` of a matrix (O, I),
``row_clip`` about the RMS of every row instead (embeddings). All are written for a cap of 1:
``project`` alone converts units and ``w_max``. None of them certifies anything: certificates
measure the stored weights.

Source: arXiv 2507.13338; deviations are listed with each method.
"""

# Legend: N stacked matrices, O/I out/in features; m is a weight in units of its cap.

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import one_of, positive, within
from common.errors import ConfigError, ShapeError
from train.projections import caps, power
from train.projections.caps import soft_cap_strength as soft_cap_strength
from train.projections.power import power_vectors as power_vectors
from train.projections.step import Step, per_matrix, storage_margin


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One weight constraint.

    Attributes:
        apply: Function of stacked matrices (N, O, I), in units of their caps, and a ``Step``.
        caps: Whether every norm is at most the cap afterwards, whatever came in.
        needs_largest: Whether ``Step.largest`` must be known.
        uses_vectors: Whether it iterates on start vectors, to be kept from step to step.
    """

    apply: Callable[[Tensor, Step], Tensor]
    caps: bool = True
    needs_largest: bool = False
    uses_vectors: bool = False


def _none(m_NOI: Tensor, step: Step) -> Tensor:
    return m_NOI


PROJECTIONS: dict[str, Projection] = {
    "none": Projection(apply=_none, caps=False),
    "soft_cap": Projection(apply=caps.soft_cap, needs_largest=True),
    "hard_cap": Projection(apply=caps.hard_cap),
    "exact_cap": Projection(apply=caps.exact_cap),
    "stiefel": Projection(apply=caps.stiefel),
    "spectral_normalize": Projection(apply=power.spectral_normalize, caps=False, uses_vectors=True),
    "spectral_hammer": Projection(apply=power.spectral_hammer, caps=False, uses_vectors=True),
    "spectral_weight_decay": Projection(
        apply=power.spectral_weight_decay, caps=False, uses_vectors=True
    ),
    "row_clip": Projection(apply=caps.row_clip),
}


def project(
    weight_OI: Tensor,
    kind: str,
    w_max: float | Sequence[float],
    *,
    largest: float | Sequence[float | None] | None = None,
    spectral_decay: float = 0.1,
    power_iters: int = 16,
    vectors: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight under a constraint; the argument is not modified.

    Args:
        weight_OI: Matrix (O, I) or stack of equal shapes (N, O, I), floating point.
        kind: Name in ``PROJECTIONS``.
        w_max: Cap on the RMS->RMS norm (row RMS for ``row_clip``), above 0; one for all or one
            per matrix.
        largest: Bound on that norm before the constraint, in the same units: the last step's
            bound, shrunk by weight decay, plus the norm of the update. ``soft_cap`` requires it
            (above ``1.3 w_max`` the exact cap replaces it, with one logged warning); ``hard_cap``
            measures where it is ``None``; the others ignore it.
        spectral_decay: ``spectral_weight_decay`` only: share of the largest singular value that
            is removed, above 0 to 1.
        power_iters: Rounds of power iteration, where there is one.
        vectors: Start vectors of power iteration (N, I, 1), see ``power_vectors``; updated in
            place. Cold starts under-estimate a norm by up to 5 per cent.
        dtype: Arithmetic of matrix polynomials, float32 or bfloat16; sums stay in float32.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ConfigError: for an unknown kind, a cap that is not positive, a missing ``largest``.
        ConvergenceError: if an exact cap meets a weight that is not finite.
        ShapeError: unless there are two or three dimensions.
    """
    one_of("kind", kind, PROJECTIONS)
    if weight_OI.ndim not in (2, 3):
        raise ShapeError(f"weight: expected (O, I) or (N, O, I), got {tuple(weight_OI.shape)}")
    stack_NOI = weight_OI if weight_OI.ndim == 3 else weight_OI[None]
    count, out_features, in_features = stack_NOI.shape
    maxima, bounds = _repeated(w_max, count), _repeated(largest, count)
    _check(maxima, spectral_decay)
    step = Step(
        largest=tuple(k if k is None else k / cap for k, cap in zip(bounds, maxima, strict=True)),
        spectral_decay=spectral_decay,
        power_iters=power_iters,
        vectors=vectors,
        dtype=dtype,
        margin=storage_margin(weight_OI.dtype),
    )
    unit = 1.0 if kind == "row_clip" else (out_features / in_features) ** 0.5
    m_NOI = stack_NOI.to(torch.promote_types(weight_OI.dtype, torch.float32))
    scale = per_matrix([unit * cap for cap in maxima], m_NOI)
    before_NOI = m_NOI / scale
    after_NOI = PROJECTIONS[kind].apply(before_NOI, step)
    if after_NOI is before_NOI:
        return weight_OI.clone()
    return (after_NOI * scale).view(weight_OI.shape).to(weight_OI.dtype)


def _check(maxima: Sequence[float | None], spectral_decay: float) -> None:
    for cap in maxima:
        positive("w_max", cap)
    positive("spectral_decay", spectral_decay)
    within("spectral_decay", spectral_decay, 0.0, 1.0)


def _repeated(value: float | Sequence[float | None] | None, count: int) -> list[float | None]:
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ConfigError(f"expected one number or {count}, one per matrix, got {len(values)}")
    return values
