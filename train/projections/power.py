"""Constraints on the largest singular value alone, found by power iteration.

Power iteration under-estimates, so nothing here is a cap; certificates measure the weights.
"""

# Legend: N stacked matrices, O/I out/in features, P probes.

import torch
from torch import Tensor

from train.projections.step import Step


def power_vectors(weight_NOI: Tensor, seed: int = 0) -> Tensor:
    """Return fixed start vectors (N, I, 1) for power iteration, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    shape = (weight_NOI.shape[-1], 1)
    start_I1 = torch.randn(shape, generator=generator, dtype=torch.float32)
    return start_I1.to(weight_NOI.device).expand(weight_NOI.shape[0], *shape).clone()


def top_singular(m_NOI: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate the largest singular value and its vectors; update ``step.vectors`` in place.

    A second probe starts afresh every time: the stored vector alone would never leave a direction
    that was the largest once, because the others are orthogonal to it.

    Returns:
        Value (N, 1, 1) at most the true one, left vectors (N, O, 1) and right vectors (N, I, 1) of
        length 1; the left vector of a zero matrix is zero.
    """
    stored_NI1 = power_vectors(m_NOI) if step.vectors is None else step.vectors
    v_NIP = torch.cat([stored_NI1, power_vectors(m_NOI, seed=1)], dim=-1).to(m_NOI.dtype)
    tiny = torch.finfo(m_NOI.dtype).tiny
    for _ in range(step.power_iters):
        next_NIP = m_NOI.mT @ (m_NOI @ v_NIP)
        norm_N1P = torch.linalg.vector_norm(next_NIP, dim=1, keepdim=True)
        # A zero matrix keeps its start vectors, so that later steps can still see it grow.
        v_NIP = torch.where(norm_N1P > tiny, next_NIP / norm_N1P.clamp_min(tiny), v_NIP)
    v_NIP = v_NIP / torch.linalg.vector_norm(v_NIP, dim=1, keepdim=True)
    u_NOP = m_NOI @ v_NIP
    sigma_N1P = torch.linalg.vector_norm(u_NOP, dim=1, keepdim=True)
    sigma_N11, best_N11 = sigma_N1P.max(dim=-1, keepdim=True)
    v_NI1 = v_NIP.gather(-1, best_N11.expand(-1, v_NIP.shape[1], 1))
    u_NO1 = u_NOP.gather(-1, best_N11.expand(-1, u_NOP.shape[1], 1))
    stored_NI1.copy_(v_NI1)
    return sigma_N11, u_NO1 / sigma_N11.clamp_min(tiny), v_NI1


def spectral_normalize(m_NOI: Tensor, step: Step) -> Tensor:
    """Divide by the estimated norm where it exceeds 1."""
    sigma_N11, _, _ = top_singular(m_NOI, step)
    return m_NOI * sigma_N11.clamp_min(1.0).reciprocal()


def spectral_hammer(m_NOI: Tensor, step: Step) -> Tensor:
    """Set the largest singular value to 1, raising it where it is smaller.

    One direction per step: made for AdamW, whose updates have a low stable rank. On a flat spectrum
    the second value stays where it is, whatever the cap. Zero matrices stay zero.
    """
    sigma_N11, u_NO1, v_NI1 = top_singular(m_NOI, step)
    return m_NOI + (1 - sigma_N11) * u_NO1 * v_NI1.mT


def spectral_weight_decay(m_NOI: Tensor, step: Step) -> Tensor:
    """Shrink the largest singular value by the share ``step.spectral_decay``; caps nothing."""
    sigma_N11, u_NO1, v_NI1 = top_singular(m_NOI, step)
    return m_NOI - step.spectral_decay * sigma_N11 * u_NO1 * v_NI1.mT
