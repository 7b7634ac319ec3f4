"""Attention that cached keys receive from observed queries, for policies and observers."""

# Legend: R rows, T queries, H query heads, K key/value heads, G = H / K (or 1), S slots, D head
# width, C context.

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.kernels import gather_pages
from serve.kv.view import CacheView


def largest_temporary(device: torch.device) -> int:
    """Return how many numbers a temporary should have: within a CPU's cache, or many at once."""
    return 1 << 26 if device.type == "cuda" else 1 << 20


def received(
    q_RTHD: Tensor,
    query_positions_RT: Tensor,
    k_RKSD: Tensor,
    key_positions_RKS: Tensor,
    *,
    scale: float,
    bias_RHC: Tensor | None = None,
    is_key_RKS: Tensor | None = None,
    largest_of_group: bool = False,
) -> Tensor:
    """Sum the attention weights that queries give to each slot.

    Args:
        q_RTHD: Queries after RoPE.
        query_positions_RT: Their positions, -1 for none; they see keys up to their own position.
        k_RKSD: Cached keys after RoPE, anything in unfilled slots.
        key_positions_RKS: Their original positions, -1 in unfilled slots.
        scale: Factor on the query-key product.
        bias_RHC: Relative-position bias by distance, or None.
        is_key_RKS: Slots that take part in the softmax; None for all filled ones.
        largest_of_group: Take the largest logit of the query heads of a group first.

    Returns:
        (R, K, G, S), float32 at least, G = 1 for the largest of the group; zero in slots that do
        not take part. Queries that see no slot give nothing.
    """
    dtype = torch.promote_types(k_RKSD.dtype, torch.float32)
    rows, queries, heads, _ = q_RTHD.shape
    kv_heads, slots = key_positions_RKS.shape[1:]
    is_key_RKS = key_positions_RKS >= 0 if is_key_RKS is None else is_key_RKS
    group = 1 if largest_of_group else heads // kv_heads
    total = torch.zeros(rows, kv_heads, group, slots, dtype=dtype, device=k_RKSD.device)
    for r, t in _parts(rows, queries, heads * slots, largest_temporary(k_RKSD.device)):
        logits_RKGTS = _logits(q_RTHD[r, t].to(dtype), k_RKSD[r].to(dtype), scale)
        distance_RKTS = query_positions_RT[r, None, t, None] - key_positions_RKS[r, :, None]
        if bias_RHC is not None:
            logits_RKGTS += _biases(bias_RHC[r].to(dtype), distance_RKTS)
        if largest_of_group:
            logits_RKGTS = logits_RKGTS.amax(2, keepdim=True)
        is_seen = (is_key_RKS[r, :, None] & (distance_RKTS >= 0))[:, :, None]
        # The smallest number instead of -inf: a row that sees nothing stays finite, then is zero.
        hidden = logits_RKGTS.masked_fill(~is_seen, torch.finfo(dtype).min)
        total[r] += hidden.softmax(-1).masked_fill(~is_seen, 0).sum(3)
    return total


def _parts(rows: int, queries: int, size: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Cut rows, and queries where one row alone is too much; a row's cuts are its own affair."""
    per_row = max(1, min(queries, most // max(size, 1)))
    per_part = max(1, most // max(size * per_row, 1))
    for r in range(0, rows, per_part):
        for t in range(0, queries, per_row):
            yield slice(r, r + per_part), slice(t, t + per_row)


def _logits(q_RTHD: Tensor, k_RKSD: Tensor, scale: float) -> Tensor:
    rows, queries, _, width = q_RTHD.shape
    kv_heads = k_RKSD.shape[1]
    q_RKGTD = q_RTHD.transpose(1, 2).reshape(rows, kv_heads, -1, width)
    return (scale * (q_RKGTD @ k_RKSD.mT)).unflatten(2, (-1, queries))


def _biases(bias_RHC: Tensor, distance_RKTS: Tensor) -> Tensor:
    rows, kv_heads, queries, slots = distance_RKTS.shape
    bias_RKGC = bias_RHC.unflatten(1, (kv_heads, -1))
    group, context = bias_RKGC.shape[2:]
    index_RKTS = distance_RKTS.clamp(0, context - 1)
    index = index_RKTS.flatten(2)[:, :, None].expand(-1, -1, group, -1)
    return bias_RKGC.gather(3, index).view(rows, kv_heads, group, queries, slots)


def recent_attention(
    view: CacheView, *, exclude: int, largest_of_group: bool = False
) -> tuple[Tensor, Tensor]:
    """Average the attention of the observed queries (``QueryWindow``) on older keys.

    Args:
        view: The cache; ``observed`` holds ``queries`` (R, T, H, D) and ``positions`` (R, T).
        exclude: The softmax leaves out this many most recent positions.
        largest_of_group: See ``received``.

    Returns:
        Weights (R, K, G, S), float32 at least, and the slots that took part (R, K, S), bool.
    """
    pos_RKS = view.slot_positions()
    is_past = (pos_RKS >= 0) & (pos_RKS < (view.positions_R - exclude)[:, None, None])
    query_positions_RT = view.observed["positions"]
    total_RKGS = received(
        view.observed["queries"],
        query_positions_RT,
        gather_pages(view.k_pool, view.tables_RN),
        pos_RKS,
        scale=view.spec.scale,
        bias_RHC=None if view.bias_LHT is None else view.rows_of(view.bias_LHT),
        is_key_RKS=is_past,
        largest_of_group=largest_of_group,
    )
    count_R = (query_positions_RT >= 0).sum(1).clamp(min=1)
    return total_RKGS / count_R[:, None, None, None], is_past


def smooth(
    x_RKGS: Tensor, positions_RKS: Tensor, is_in_RKS: Tensor, kernel: int, kind: str
) -> Tensor:
    """Pool over neighbouring positions: slots are not in order once a cache was compacted.

    Args:
        x_RKGS: Values >= 0; zero where ``is_in_RKS`` is False.
        positions_RKS: Original positions.
        is_in_RKS: Slots that take part; the others count as zeros after the newest.
        kernel: Odd number of neighbours, the slot itself included.
        kind: ``mean`` (zeros beyond the ends count) or ``max``.

    Returns:
        Same shape and dtype.
    """
    last = torch.iinfo(positions_RKS.dtype).max
    order = positions_RKS.masked_fill(~is_in_RKS, last).argsort(dim=-1, stable=True)
    order_RKGS = order[:, :, None].expand_as(x_RKGS)
    pool = F.avg_pool1d if kind == "mean" else F.max_pool1d
    ordered = x_RKGS.gather(-1, order_RKGS).flatten(0, 2)[:, None]
    pooled = pool(ordered, kernel, stride=1, padding=kernel // 2)[:, 0]
    return torch.empty_like(x_RKGS).scatter_(-1, order_RKGS, pooled.view(x_RKGS.shape))
