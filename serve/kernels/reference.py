"""Torch reference of every kernel: vectorised over rows, any device, any floating dtype.

These functions are the product path on the CPU and the oracle of the Triton kernels. Arithmetic is
float32, or float64 when the pool is float64.
"""

# Legend: R request rows, N table width (blocks), K key/value heads, H query heads, G = H / K,
# S slots of a row (N * block_size), D head width, F = D / 2 rotary bands, T relative distances.

import torch
from torch import Tensor


def gather_pages(pool: Tensor, tables_RN: Tensor) -> Tensor:
    """Copy the pages of each row into one dense tensor.

    Args:
        pool: (blocks, K, block_size, ...) contiguous, any dtype.
        tables_RN: Block indices (R, N), integer; negative entries (padding) read block 0.

    Returns:
        (R, K, N * block_size, ...) of the pool's dtype.
    """
    return _take_pages(pool, _page_index(tables_RN, pool.shape[1]))


def _page_index(tables_RN: Tensor, heads: int) -> Tensor:
    """Return the index (R, K, N) of every page in a pool flattened over blocks and heads."""
    head_K1 = torch.arange(heads, device=tables_RN.device)[:, None]
    return tables_RN.long().clamp(min=0)[:, None, :] * heads + head_K1


def _take_pages(pool: Tensor, index_RKN: Tensor) -> Tensor:
    rows, heads, width = index_RKN.shape
    _, _, block_size, *rest = pool.shape
    # One row per (block, head) turns the gather into plain memory copies.
    pages = pool.view(-1, block_size, *rest).index_select(0, index_RKN.flatten())
    return pages.view(rows, heads, width * block_size, *rest)


def score_keys(
    k_pool: Tensor, tables_RN: Tensor, lengths_R: Tensor, u_RHD: Tensor, e_RHF: Tensor
) -> Tensor:
    """Score cached keys: <u, k> + sum_f e_f |k_f| for every query head; see ``dispatch``."""
    dtype = _accumulator(k_pool)
    k_RKSD = gather_pages(k_pool, tables_RN).to(dtype)
    rows, kv_heads, slots, width = k_RKSD.shape
    abs_RKSF = torch.hypot(k_RKSD[..., : width // 2], k_RKSD[..., width // 2 :])
    u_RKGD = u_RHD.to(dtype).reshape(rows, kv_heads, -1, width)
    e_RKGF = e_RHF.to(dtype).reshape(rows, kv_heads, -1, width // 2)
    raw_RKGS = u_RKGD @ k_RKSD.mT + e_RKGF @ abs_RKSF.mT
    is_pad_RS = torch.arange(slots, device=k_pool.device) >= lengths_R[:, None]
    return raw_RKGS.flatten(1, 2).masked_fill(is_pad_RS[:, None], -torch.inf)


def compact_kv(
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    src_tables_RN: Tensor,
    keep_RKS: Tensor,
    dst_tables_RN: Tensor,
) -> None:
    """Move the kept slots of each head to the front of the destination pages, in order."""
    rows, heads, kept = keep_RKS.shape
    block_size = k_pool.shape[2]
    slot_S = torch.arange(kept, device=keep_RKS.device).expand(rows, heads, kept)
    source = _flat_slots(src_tables_RN, keep_RKS, heads, block_size)
    target = _flat_slots(dst_tables_RN, slot_S, heads, block_size)
    for pool in (k_pool, v_pool, pos_pool):
        flat = pool.view(-1, *pool.shape[3:])
        # The gather is a copy, so that overlapping sources and targets cannot clobber each other.
        flat.index_copy_(0, target, flat.index_select(0, source))


def paged_decode(
    q_RHD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    tables_RN: Tensor,
    lengths_R: Tensor,
    positions_R: Tensor,
    scale: float,
    bias_HT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from one query per row to its cached slots; see ``dispatch``."""
    dtype = _accumulator(k_pool)
    rows, heads, width = q_RHD.shape
    index_RKN = _page_index(tables_RN, k_pool.shape[1])
    k_RKSD = _take_pages(k_pool, index_RKN).to(dtype)
    v_RKSD = _take_pages(v_pool, index_RKN).to(dtype)
    kv_heads, slots = k_RKSD.shape[1:3]
    q_RKGD = q_RHD.to(dtype).view(rows, kv_heads, -1, width)
    z_RKGS = (q_RKGD * scale) @ k_RKSD.mT
    is_pad_RS = torch.arange(slots, device=k_pool.device) >= lengths_R[:, None]
    if bias_HT is not None:
        pos_RKS = _take_pages(pos_pool, index_RKN)
        distance_RKS = positions_R[:, None, None] - pos_RKS.long()
        z_RKGS += _bias_at(bias_HT.to(dtype), distance_RKS, is_pad_RS)
    # Slots that every row fills need no mask; on a GPU finding them would cost a synchronisation.
    first = int(lengths_R.min()) if rows and not k_pool.is_cuda else 0
    is_pad_RS = is_pad_RS[:, first:]
    z_RKGS[..., first:].masked_fill_(is_pad_RS[:, None, None], -torch.inf)
    # Stale slots may hold anything, NaN included; a zero weight alone would not silence them.
    v_RKSD[:, :, first:].masked_fill_(is_pad_RS[:, None, :, None], 0.0)
    # An empty row has a maximum of -inf; a finite stand-in keeps its weights at exactly zero.
    top_RKG1 = z_RKGS.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
    weights_RKGS = z_RKGS.sub_(top_RKG1).exp_()
    total_RKG1 = weights_RKGS.sum(-1, keepdim=True)
    o_RKGD = (weights_RKGS @ v_RKSD) / total_RKG1.clamp(min=torch.finfo(dtype).tiny)
    lse_RKG1 = total_RKG1.log() + top_RKG1
    return o_RKGD.reshape(rows, heads, width).to(q_RHD.dtype), lse_RKG1.reshape(rows, heads)


def _bias_at(bias_HT: Tensor, distance_RKS: Tensor, is_pad_RS: Tensor) -> Tensor:
    """Look up the bias of each (query head, slot): (R, K, G, S); padded slots read distance 0."""
    rows, kv_heads, slots = distance_RKS.shape
    heads, context = bias_HT.shape
    group = heads // kv_heads
    distance_RKS = distance_RKS.masked_fill(is_pad_RS[:, None], 0)
    index_RKGS = distance_RKS[:, :, None].expand(rows, kv_heads, group, slots)
    table_RKGT = bias_HT.view(1, kv_heads, group, context).expand(rows, -1, -1, -1)
    return table_RKGT.gather(-1, index_RKGS)


def _flat_slots(tables_RN: Tensor, slots_RKS: Tensor, heads: int, block_size: int) -> Tensor:
    """Return the index of each (row, head, slot) in a pool flattened over its first three axes."""
    block_index = (slots_RKS // block_size).flatten(1)
    block_RKS = tables_RN.long().gather(1, block_index).view_as(slots_RKS)
    head_K1 = torch.arange(heads, device=slots_RKS.device)[:, None]
    return ((block_RKS * heads + head_K1) * block_size + slots_RKS % block_size).flatten()


def _accumulator(pool: Tensor) -> torch.dtype:
    return torch.float64 if pool.dtype == torch.float64 else torch.float32
