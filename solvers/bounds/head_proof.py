"""Trusted: norms of the embedding and the head, with all rounding accounted for.

Source: spec bound_tightening 4.5 (domain), 4.6 (head, differences of its rows).
"""

# Shape letters: C width, V vocabulary.

import math

from torch import Tensor

from common.models import ModelConfig
from common.norms import exact64, gamma, round_up, spectral_norm_bound

LARGEST_EXACT_VOCABULARY = 8192
"""Above this many rows the distances of all pairs are not formed."""

_CHUNK = 512


def head_norms(config: ModelConfig, head_VC: Tensor) -> tuple[float, float]:
    """Bound ``final_scale * |W_head|_2`` and ``final_scale * max_ij |U_i - U_j|_2``.

    Args:
        config: Holds ``final_scale``.
        head_VC: Head weight, any floating type. With many rows the pair norm is bounded by
            ``min(sqrt 2 |W|, sum of the two largest rows)`` instead of over all pairs.
    """
    norm = spectral_norm_bound(head_VC)
    u_VC = exact64(head_VC)
    squares_V = u_VC.square().sum(1)
    largest_V = squares_V.topk(min(2, len(squares_V))).values
    pair = min(math.sqrt(2) * norm, float(largest_V.sqrt().sum()))
    if len(u_VC) <= LARGEST_EXACT_VOCABULARY:
        farthest = max(
            float((rows_NC.square().sum(1)[:, None] + squares_V - 2 * rows_NC @ u_VC.T).max())
            for rows_NC in u_VC.split(_CHUNK)
        )
        rounding = 4 * gamma(u_VC.shape[1] + 4) * float(largest_V[0])
        pair = min(pair, math.sqrt(max(farthest, 0.0) + rounding))
    scale = abs(config.final_scale)
    return round_up(scale * norm), round_up(scale * pair)


def domain_radius(embedding_VC: Tensor) -> float:
    """Bound the l2 norm of every embedding row."""
    return float(exact64(embedding_VC).norm(dim=1).max()) * (1 + 5e-13)
