"""Token swaps: pairs of texts, found by exchanging tokens of random ones."""

# Shape letters: B starts, T token, C width, V vocabulary.

import torch
import torch.nn.functional as F
from torch import Tensor

from solvers.bounds.attack_ascent import ROUNDING, Target
from solvers.bounds.attack_settings import Clock

_FARTHEST = (0.02, 0.1, 0.5, 1.0)
"""Quantiles of the distances of the vocabulary up to which a token may be exchanged."""

_MOST_ROWS = 2048
_ROUNDS = 3


@torch.no_grad()
def swap_attack(
    target: Target, rows_VC: Tensor, *, count: int, tokens: int, seed: int, clock: Clock
) -> float:
    """Return the largest ratio of two token sequences.

    At most one token is exchanged at each position, for one that moves the output most to first
    order; what counts is the ratio of the two sequences themselves.

    Args:
        target: The network on embedded sequences.
        rows_VC: Embedding rows, float64; of large vocabularies the first 2048 are used.
        count: Random sequences.
        tokens: Their length.
        seed: Seed of the sequences.
        clock: Ends the search early.

    Returns:
        Ratio of the movement of the last output to the largest distance of exchanged tokens.
    """
    rows_VC = rows_VC[:_MOST_ROWS]
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(len(rows_VC), (count, tokens), generator=generator)
    distance_VV = torch.cdist(rows_VC, rows_VC, compute_mode="donot_use_mm_for_euclid_dist")
    positive = distance_VV[distance_VV > 0]
    if not len(positive):
        return 0.0
    best = 0.0
    for quantile in _FARTHEST:
        rank = int(quantile * (len(positive) - 1)) + 1
        allowed_VV = (distance_VV > 0) & (distance_VV <= positive.kthvalue(rank).values)
        # A start: exchange for any allowed token.
        other_BT = torch.where(allowed_VV, 1.0, 0.0).argmax(-1)[tokens_BT]
        for _ in range(_ROUNDS):
            if clock.share >= 1:
                return best
            best = max(best, _ratio(target, rows_VC[tokens_BT], rows_VC[other_BT]))
            other_BT = _exchange(target, rows_VC, tokens_BT, other_BT, allowed_VV)
        best = max(best, _ratio(target, rows_VC[tokens_BT], rows_VC[other_BT]))
    return best


def _exchange(
    target: Target, rows_VC: Tensor, tokens_BT: Tensor, other_BT: Tensor, allowed_VV: Tensor
) -> Tensor:
    """Return the tokens that move the outputs farthest to first order; unchanged if none may."""
    x_BTC = rows_VC[tokens_BT].requires_grad_()
    with torch.enable_grad():
        output_BO = target.run(x_BTC)[:, -1]
        moved_BO = target.run(rows_VC[other_BT])[:, -1] - output_BO.detach()
        y_BO = F.normalize(moved_BO.detach(), dim=-1)
        (slope_BTC,) = torch.autograd.grad((output_BO * y_BO).sum(), x_BTC)
    gain_BTV = (slope_BTC @ rows_VC.T).masked_fill(~allowed_VV[tokens_BT], -torch.inf)
    values_BT, found_BT = gain_BTV.max(-1)
    return torch.where(torch.isfinite(values_BT), found_BT, tokens_BT)


def _ratio(target: Target, first_BTC: Tensor, second_BTC: Tensor) -> float:
    given_B = (first_BTC - second_BTC).norm(dim=-1).amax(-1)
    moved_B = (target.run(first_BTC) - target.run(second_BTC))[:, -1].norm(dim=-1)
    ratio_B = torch.where(given_B > 0, moved_B / given_B, 0.0)
    return float(ratio_B.max()) * (1 - ROUNDING)
