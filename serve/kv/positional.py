"""Purely positional heads: what they will attend to is known from the bias table alone.

Their queries and keys are zero, so a policy that looks at content sees nothing. The weight that
each cached token receives from the queries up to the next compaction is exact instead.
"""

# Legend: L layers, Q requests, R = L * Q rows, H query heads (positional ones only here), K their
# key/value heads, G = H / K, S slots, C distances (context + 1), O future queries.

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.kv.view import CacheView


def future_mass(view: CacheView, interval: int) -> Tensor:
    """Return the attention that each slot of the positional heads will receive.

    Args:
        view: The cache; key/value heads from ``content_heads / group`` on are positional.
        interval: Queries to come before the next compaction, as far as the context reaches.

    Returns:
        Sum over these queries and the query heads of a group of the softmax weights, over all
        cached tokens and those to come: (R, positional K, S), float64; unfilled slots vary.
    """
    spec, layers, context = view.spec, len(view.layers), view.context
    first = spec.content_heads // spec.group
    pos_RKS = view.slot_positions()[:, first:]
    distance_RKS = (view.positions_R[:, None, None] - pos_RKS).clamp(0, context)
    is_filled = (pos_RKS >= 0).double()
    present_RKC = is_filled.new_zeros(*pos_RKS.shape[:2], context + 1)
    present_RKC.scatter_add_(2, distance_RKS, is_filled)
    offset_O = torch.arange(interval, device=pos_RKS.device)
    is_query_RO = (view.positions_R[:, None] + offset_O < context).double()
    factor_LHX = _factors(view, interval)
    mass = []
    for layer in range(layers):
        rows = slice(layer * view.requests, (layer + 1) * view.requests)
        # Entry (c, o): factor of a token at distance c from the next query, seen o queries later.
        factor_KGCO = factor_LHX[layer].unflatten(0, (-1, spec.group)).unfold(-1, interval, 1)
        new_KGO = factor_KGCO[:, :, 0].cumsum(-1)
        total_QKGO = torch.einsum("qkc,kgco->qkgo", present_RKC[rows], factor_KGCO) + new_KGO
        share_QKGO = is_query_RO[rows][:, None, None] / total_QKGO
        mass.append(torch.einsum("qkgo,kgco->qkc", share_QKGO, factor_KGCO))
    return torch.cat(mass).gather(2, distance_RKS)


def _factors(view: CacheView, interval: int) -> Tensor:
    """Return exp(bias - largest) of the positional heads (L, H, C + interval - 1), 0 past it."""
    heads, content = view.spec.heads, view.spec.content_heads
    shape = (len(view.layers), heads - content, view.context)
    if view.bias_LHT is None:
        bias_LHT = torch.zeros(shape, dtype=torch.float64, device=view.k_pool.device)
    else:
        bias_LHT = view.bias_LHT[:, content:, : view.context].double()
    factor_LHT = (bias_LHT - bias_LHT.amax(-1, keepdim=True)).exp()
    # The next query itself is always there: no total can vanish.
    factor_LHT = factor_LHT.clamp(min=torch.finfo(torch.float64).tiny)
    return F.pad(factor_LHT, (0, interval))
