"""Torch reference of the kernels that keep the cache: pages, scores, selection, moves, writes.

With ``reference_decode.py`` this is the product path on the CPU and the oracle of the Triton
kernels: vectorised over rows, any floating dtype. Arithmetic is float32, float64 for a float64
pool. Off the CPU some functions wait for the device.
"""

# Legend: R rows, N table width (blocks) or tokens, K key/value heads, H query heads, G = H / K,
# S slots of a row (N * block_size), D head width, F rotary bands, E = D - F score weights.

from collections.abc import Sequence

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
    return take_pages(pool, page_index(tables_RN, pool.shape[1]))


def page_index(tables_RN: Tensor, heads: int) -> Tensor:
    """Return the index (R, K, N) of every page in a pool flattened over blocks and heads."""
    head_K1 = torch.arange(heads, device=tables_RN.device)[:, None]
    return tables_RN.long().clamp(min=0)[:, None] * heads + head_K1


def take_pages(pool: Tensor, index_RKN: Tensor) -> Tensor:
    """Copy pages into one dense tensor (R, K, N * block_size, ...)."""
    rows, heads, width = index_RKN.shape
    _, _, block_size, *rest = pool.shape
    # One row per (block, head) turns the gather into plain memory copies.
    pages = pool.view(-1, block_size, *rest).index_select(0, index_RKN.flatten())
    return pages.view(rows, heads, width * block_size, *rest)


def score_keys(
    k_pool: Tensor,
    tables_RN: Tensor,
    lengths_RK: Tensor,
    u_RHD: Tensor,
    e_RHE: Tensor,
    bands: int,
    interleaved: bool,
) -> Tensor:
    """Score cached keys against a linear form and modulus weights; see ``dispatch``."""
    dtype = accumulator(k_pool)
    k_RKSD = gather_pages(k_pool, tables_RN).to(dtype)
    rows, kv_heads, slots, width = k_RKSD.shape
    group = u_RHD.shape[1] // kv_heads
    u_RKGD = u_RHD.to(dtype).reshape(rows, kv_heads, group, width)
    e_RKGE = e_RHE.to(dtype).reshape(rows, kv_heads, group, width - bands)
    raw_RKGS = u_RKGD @ k_RKSD.mT + e_RKGE @ _moduli(k_RKSD, bands, interleaved).mT
    is_pad = torch.arange(slots, device=k_pool.device) >= lengths_RK[..., None]
    return raw_RKGS.masked_fill_(is_pad[:, :, None], -torch.inf).flatten(1, 2)


def _moduli(x_RKSD: Tensor, bands: int, interleaved: bool) -> Tensor:
    """Return the modulus of every band, then of every component that is not rotated."""
    parts = rotary_parts(x_RKSD, bands, interleaved)
    abs_RKSF = torch.hypot(*parts)
    rest = x_RKSD[..., 2 * bands :]
    return torch.cat((abs_RKSF, rest.abs()), dim=-1) if rest.shape[-1] else abs_RKSF


def rotary_parts(x: Tensor, bands: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the real and the imaginary parts (..., F) of the rotated bands."""
    if interleaved:
        return x[..., 0 : 2 * bands : 2], x[..., 1 : 2 * bands : 2]
    return x[..., :bands], x[..., bands : 2 * bands]


def select_slots(scores_RKS: Tensor, positions_RKS: Tensor, budget: int) -> Tensor:
    """Return the slots of the highest scores, ascending; see ``dispatch``."""
    if not scores_RKS.is_cuda:
        # A threshold decides unless some, but not all, of the slots that meet it fit.
        rank = scores_RKS.shape[-1] - budget + 1
        is_kept = scores_RKS >= scores_RKS.kthvalue(rank, dim=-1, keepdim=True).values
        if int(is_kept.sum()) == is_kept[..., 0].numel() * budget:
            return is_kept.nonzero()[:, 2].view(*scores_RKS.shape[:2], budget)
    # Two stable sorts are a lexicographic one: by score, then by position, both descending.
    by_position = positions_RKS.argsort(dim=-1, descending=True, stable=True)
    ranked = scores_RKS.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
    return by_position.gather(-1, ranked[..., :budget]).sort(dim=-1).values


def compact_kv(
    pools: Sequence[Tensor], src_tables_RN: Tensor, keep_RKS: Tensor, dst_tables_RN: Tensor
) -> None:
    """Fill the holes below the kept count with the kept slots above it; see ``dispatch``."""
    rows, heads, kept = keep_RKS.shape
    block_size = pools[0].shape[2]
    slot_RKS = torch.arange(kept, device=keep_RKS.device).expand(rows, heads, kept)
    source = _flat_slots(src_tables_RN, _fill_holes(keep_RKS), heads, block_size)
    target = _flat_slots(dst_tables_RN, slot_RKS, heads, block_size)
    # Padding (negative blocks) has negative indices.
    is_moved = (source != target) & (torch.minimum(source, target) >= 0)
    moves = is_moved.nonzero()[:, 0]
    source, target = source[moves], target[moves]
    for pool in pools:
        flat = pool.view(-1, *pool.shape[3:])
        # The gather is a copy, so that overlapping sources and targets cannot clobber each other.
        flat.index_copy_(0, target, flat.index_select(0, source))


def _fill_holes(keep_RKS: Tensor) -> Tensor:
    """Return the source slot of each of the first slots: itself if kept, else the next mover."""
    rows, heads, kept = keep_RKS.shape
    slot_S = torch.arange(kept, device=keep_RKS.device)
    is_kept = torch.zeros(rows, heads, kept + 1, dtype=torch.bool, device=keep_RKS.device)
    is_kept = is_kept.scatter_(2, keep_RKS.clamp(max=kept), True)[..., :kept]
    # Movers are the tail of the ascending list; the holes take them in order.
    first_mover_RK1 = is_kept.sum(-1, keepdim=True)
    mover_RKS = first_mover_RK1 + (~is_kept).cumsum(-1) - 1
    moved_RKS = keep_RKS.gather(2, mover_RKS.clamp(0, kept - 1))
    return torch.where(is_kept, slot_S, moved_RKS)


def rope_write(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    cos_NF: Tensor | None,
    sin_NF: Tensor | None,
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    positions_N: Tensor,
    slots_N: Tensor,
    interleaved: bool,
) -> Tensor:
    """Rotate queries and keys and write keys, values and positions; see ``dispatch``."""
    if cos_NF is not None and sin_NF is not None:
        q_NHD = _rotate(q_NHD, cos_NF, sin_NF, interleaved)
        k_NKD = _rotate(k_NKD, cos_NF, sin_NF, interleaved)
    if bool((slots_N < 0).any()):
        real = (slots_N >= 0).nonzero()[:, 0]
        k_NKD, v_NKD, positions_N, slots_N = (
            x.index_select(0, real) for x in (k_NKD, v_NKD, positions_N, slots_N)
        )
    block_size = k_pool.shape[2]
    where = (slots_N // block_size, slice(None), slots_N % block_size)
    k_pool[where] = k_NKD.to(k_pool.dtype)
    v_pool[where] = v_NKD.to(v_pool.dtype)
    pos_pool[where] = positions_N[:, None].to(pos_pool.dtype)
    return q_NHD


def _rotate(x_NHD: Tensor, cos_NF: Tensor, sin_NF: Tensor, interleaved: bool) -> Tensor:
    """Turn each band by its angle; the components past the bands stay. One rounding, at the end."""
    dtype = accumulator(x_NHD)
    bands = cos_NF.shape[1]
    cos_N1F, sin_N1F = cos_NF.to(dtype)[:, None], sin_NF.to(dtype)[:, None]
    real, imag = rotary_parts(x_NHD.to(dtype), bands, interleaved)
    parts = (real * cos_N1F - imag * sin_N1F, imag * cos_N1F + real * sin_N1F)
    turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    turned = turned.to(x_NHD.dtype)
    rest = x_NHD[..., 2 * bands :]
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype of arithmetic on ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _flat_slots(tables_RN: Tensor, slots_RKS: Tensor, heads: int, block_size: int) -> Tensor:
    """Return the index of each (row, head, slot) in a pool flattened over its first three axes."""
    block_index = (slots_RKS // block_size).flatten(1)
    block_RKS = tables_RN.long().gather(1, block_index).view(slots_RKS.shape)
    head_K1 = torch.arange(heads, device=slots_RKS.device)[:, None]
    return ((block_RKS * heads + head_K1) * block_size + slots_RKS % block_size).flatten()
