"""Triton kernel: fill the holes among the first slots with the kept slots above them, in place.

No plan is stored: the ascending list of kept slots answers by binary search which slot is the j-th
hole, and its tail is the list of movers. Sources lie at or above the kept count or in replaced
pages, targets below it in the pages that stay or replace: no order of programs matters.
"""

# Legend: R rows, N table width (blocks), K key/value heads, S kept slots, D elements of a slot.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.errors import ShapeError
from serve.kernels.launch import check_storage, int32
from serve.kernels.tuning import tuning_for


@triton.jit
def _count_below(keep_ptr, kept, limit, SEARCH: tl.constexpr, GAPS: tl.constexpr):
    """Count the entries of the ascending list that are below each limit.

    With GAPS, entry p counts as the number of holes below it, which ascends too.
    """
    count = tl.zeros_like(limit)
    for step in tl.static_range(SEARCH):
        longer = count + (1 << (SEARCH - 1 - step))
        entry = tl.load(keep_ptr + longer - 1, mask=longer <= kept, other=0).to(tl.int32)
        if GAPS:
            entry -= longer - 1
        count = tl.where((longer <= kept) & (entry < limit), longer, count)
    return count


@triton.jit
def _copy_slots(
    pool_ptr,
    src_ptr,
    dst_ptr,
    kv_head,
    source,
    target,
    is_due,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
):
    """Copy whole slots between pages; padding (negative pages) is neither read nor written."""
    from_page = tl.load(src_ptr + source // BLOCK_SIZE, mask=is_due, other=-1).to(tl.int64)
    to_page = tl.load(dst_ptr + target // BLOCK_SIZE, mask=is_due, other=-1).to(tl.int64)
    is_due = is_due & (from_page >= 0) & (to_page >= 0)
    from_line = (from_page * KV_HEADS + kv_head) * BLOCK_SIZE + source % BLOCK_SIZE
    to_line = (to_page * KV_HEADS + kv_head) * BLOCK_SIZE + target % BLOCK_SIZE
    column = tl.arange(0, WIDTH_PADDED)
    mask = is_due[:, None] & (column < WIDTH)[None, :]
    data = tl.load(pool_ptr + from_line[:, None] * WIDTH + column[None, :], mask=mask)
    tl.store(pool_ptr + to_line[:, None] * WIDTH + column[None, :], data, mask=mask)


@triton.jit
def _compact_kernel(
    pool_ptr,
    keep_ptr,
    src_ptr,
    dst_ptr,
    src_stride,
    dst_stride,
    kept,
    move_programs,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    SEARCH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    program = tl.program_id(2)
    keep_ptr += (row * KV_HEADS + kv_head).to(tl.int64) * kept
    src_ptr += row * src_stride
    dst_ptr += row * dst_stride
    if program < move_programs:
        rank = program * ROWS + tl.arange(0, ROWS)
        all_kept = tl.zeros_like(rank) + kept
        mover = _count_below(keep_ptr, kept, all_kept, SEARCH, False) + rank
        is_due = mover < kept
        source = tl.load(keep_ptr + mover, mask=is_due, other=0).to(tl.int32)
        hole = rank + _count_below(keep_ptr, kept, rank + 1, SEARCH, True)
        _copy_slots(
            pool_ptr, src_ptr, dst_ptr, kv_head, source, hole, is_due,
            KV_HEADS, BLOCK_SIZE, WIDTH, WIDTH_PADDED,
        )  # fmt: skip
    else:
        # Slots that keep their index move only where their page is replaced: rarely.
        first = (program - move_programs) * SPAN
        page = (first + tl.arange(0, SPAN)) // BLOCK_SIZE
        exists = first + tl.arange(0, SPAN) < kept
        is_new = tl.load(src_ptr + page, mask=exists, other=0)
        is_new = is_new != tl.load(dst_ptr + page, mask=exists, other=0)
        if tl.max(is_new.to(tl.int32)) > 0:
            for start in range(0, SPAN, ROWS):
                slot = first + start + tl.arange(0, ROWS)
                at = _count_below(keep_ptr, kept, slot, SEARCH, False)
                entry = tl.load(keep_ptr + at, mask=at < kept, other=-1).to(tl.int32)
                place = slot // BLOCK_SIZE
                is_due = (slot < kept) & (entry == slot)
                old = tl.load(src_ptr + place, mask=is_due, other=0)
                is_due = is_due & (old != tl.load(dst_ptr + place, mask=is_due, other=0))
                _copy_slots(
                    pool_ptr, src_ptr, dst_ptr, kv_head, slot, slot, is_due,
                    KV_HEADS, BLOCK_SIZE, WIDTH, WIDTH_PADDED,
                )  # fmt: skip


def compact_kv(
    pools: Sequence[Tensor], src_tables_RN: Tensor, keep_RKS: Tensor, dst_tables_RN: Tensor
) -> None:
    """Launch the kernel on each pool; arguments are those of ``dispatch.compact_kv``.

    Raises:
        ShapeError: if a pool is not contiguous, or a CPU table breaks the rule of destinations.
    """
    rows, heads, kept = keep_RKS.shape
    block_size = pools[0].shape[2]
    keep, src, dst = keep_RKS.contiguous(), int32(src_tables_RN), int32(dst_tables_RN)
    check_storage(pools[0], keep=keep, src_tables=src, dst_tables=dst)
    _check_destinations(pools[0], src, dst, kept)
    tuning = tuning_for(keep.device)
    # No more slots can move than there are slots above the kept count.
    most = min(kept, src.shape[1] * block_size - kept)
    move_programs = triton.cdiv(most, tuning.move_rows)
    span = 16 * tuning.move_rows
    for pool in pools:
        check_storage(keep, pool=pool)
        width = pool[0, 0, 0].numel()
        _compact_kernel[(rows, heads, move_programs + triton.cdiv(kept, span))](
            pool,
            keep,
            src,
            dst,
            src.stride(0),
            dst.stride(0),
            kept,
            move_programs,
            KV_HEADS=heads,
            BLOCK_SIZE=block_size,
            WIDTH=width,
            WIDTH_PADDED=triton.next_power_of_2(width),
            SEARCH=kept.bit_length(),
            ROWS=tuning.move_rows,
            SPAN=span,
            **tuning.options(),
        )


def _check_destinations(pool: Tensor, src: Tensor, dst: Tensor, kept: int) -> None:
    """Refuse destinations that a source still needs; seen only on the CPU."""
    if pool.is_cuda:
        return
    pages = -(-kept // pool.shape[2])
    src_RN, dst_RN = src[:, :pages], dst[:, :pages]
    is_new = src_RN != dst_RN
    if bool(torch.isin(dst_RN[is_new], src[src >= 0]).any()) or bool((dst >= len(pool)).any()):
        raise ShapeError(
            "compact_kv: a destination page lies outside the pool or is a source page elsewhere;"
            " pass the source page of the same index or a fresh one"
        )
