"""Torch reference of paged decode attention: CPU product path, the Triton kernel's oracle."""

# Legend: R rows, N table width (blocks), K key/value heads, H query heads, G = H / K,
# S slots of a row (N * block_size), D head width, T relative distances.

import torch
from torch import Tensor

from serve.kernels.reference import accumulator, gather_pages


def paged_decode(
    q_RHD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    tables_RN: Tensor,
    lengths_RK: Tensor,
    positions_R: Tensor,
    scale: float,
    bias_HT: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attend from one query per row to its cached slots; see ``dispatch``."""
    dtype = accumulator(k_pool)
    rows, heads, width = q_RHD.shape
    k_RKSD = gather_pages(k_pool, tables_RN).to(dtype)
    v_RKSD = gather_pages(v_pool, tables_RN).to(dtype)
    kv_heads, slots = k_RKSD.shape[1:3]
    q_RKGD = (q_RHD.to(dtype) * scale).reshape(rows, kv_heads, -1, width)
    z_RKGS = q_RKGD @ k_RKSD.mT
    is_out = torch.arange(slots, device=k_pool.device) >= lengths_RK[..., None]
    # Stale slots may hold anything, NaN included; a zero weight alone would not silence them.
    v_RKSD.masked_fill_(is_out[..., None], 0.0)
    if bias_HT is not None or window is not None:
        distance_RKS = positions_R[:, None, None] - gather_pages(pos_pool, tables_RN)
        if bias_HT is not None:
            z_RKGS += _bias_at(bias_HT.to(dtype), distance_RKS.masked_fill(is_out, 0))
        if window is not None:
            is_out = is_out | (distance_RKS >= window)
    z_RKGS.masked_fill_(is_out[:, :, None], -torch.inf)
    # The largest weight is exp(maximum - log-sum-exp): never small, so its log is accurate.
    top_RKG = z_RKGS.amax(-1)
    weights_RKGS = z_RKGS.softmax(-1)
    lse_RKG = top_RKG - weights_RKGS.amax(-1).log()
    o_RKGD = weights_RKGS @ v_RKSD
    # The softmax of nothing is NaN.
    is_empty = top_RKG == -torch.inf
    o_RKGD.masked_fill_(is_empty[..., None], 0.0)
    lse_RKG.masked_fill_(is_empty, -torch.inf)
    return o_RKGD.view(rows, heads, width).to(q_RHD.dtype), lse_RKG.view(rows, heads)


def _bias_at(bias_HT: Tensor, distance_RKS: Tensor) -> Tensor:
    """Look up the bias of each (query head, slot): (R, K, G, S)."""
    rows, kv_heads, slots = distance_RKS.shape
    heads, context = bias_HT.shape
    group = heads // kv_heads
    index_RKGS = distance_RKS[:, :, None].expand(rows, kv_heads, group, slots)
    table_RKGT = bias_HT.view(1, kv_heads, group, context).expand(rows, -1, -1, -1)
    return table_RKGT.gather(-1, index_RKGS)
