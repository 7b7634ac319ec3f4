"""Discrete perturbations: exchanging a token for one whose embedding is close."""

# Legend: V vocabulary, C width, P text positions.

from typing import Any

import torch
from torch import Tensor

CLOSEST = 10
"""Pairs of tokens that are listed."""

_CHUNK = 512


def closest_swaps(rows_VC: Tensor, radii_P: Tensor, tokenizer: Any = None) -> list[dict[str, Any]]:
    """Return the closest pairs of tokens and how often exchanging them is proved harmless.

    Both embeddings lie in the certified ball, and so does everything between them. Where the
    distance is below a position's radius, exchanging the one for the other at any number of
    places of the context leaves its first class as it is.

    Args:
        rows_VC: Embedding rows, float64.
        radii_P: Certified l2 radius per position, on the ball.
        tokenizer: Anything with ``decode(list of ids)``; adds the tokens' text.

    Returns:
        Closest pair first: ``ids``, ``distance``, ``certified_share`` and, with a tokenizer,
        ``text``.
    """
    rows_VC = rows_VC.detach()
    pairs: list[tuple[float, int, int]] = []
    for start in range(0, len(rows_VC), _CHUNK):
        part_NC = rows_VC[start : start + _CHUNK]
        exact = "donot_use_mm_for_euclid_dist"
        distances_NV = torch.cdist(part_NC, rows_VC, compute_mode=exact)
        index_N = torch.arange(start, start + len(part_NC), device=rows_VC.device)
        others_V = torch.arange(len(rows_VC), device=rows_VC.device)
        distances_NV[index_N[:, None] >= others_V] = torch.inf
        lowest = distances_NV.flatten().topk(min(CLOSEST, distances_NV.numel()), largest=False)
        for value, flat in zip(lowest.values.tolist(), lowest.indices.tolist(), strict=True):
            row, column = divmod(flat, len(rows_VC))
            if value < torch.inf:
                pairs.append((value, start + row, column))
    return [_swap(*pair, radii_P, tokenizer) for pair in sorted(pairs)[:CLOSEST]]


def _swap(
    distance: float, first: int, second: int, radii_P: Tensor, tokenizer: Any
) -> dict[str, Any]:
    # Rounding of the distance is far below what the radii gave up for it.
    proved = float((radii_P > distance).double().mean())
    found = {"ids": [first, second], "distance": distance, "certified_share": proved}
    if tokenizer is not None:
        found["text"] = [tokenizer.decode([first]), tokenizer.decode([second])]
    return found
