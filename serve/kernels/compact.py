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
from serve.kernels.launch import check_storage
from serve.kernels.tuning import tuning_for

POOLS = 3  # moved by one launch: keys, values, positions


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
def _copy(pool_ptr, from_line, to_line, is_due, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Copy whole slots of one pool; a width of zero means that there is no such pool."""
    if WIDTH > 0:
        column = tl.arange(0, PADDED)
        mask = is_due[:, None] & (column < WIDTH)[None, :]
        data = tl.load(pool_ptr + from_line[:, None] * WIDTH + column[None, :], mask=mask)
        tl.store(pool_ptr + to_line[:, None] * WIDTH + column[None, :], data, mask=mask)


@triton.jit
def _compact_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    keep_ptr,
    src_ptr,
    dst_ptr,
    src_stride,
    dst_stride,
    kept,
    move_programs,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEARCH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    A_WIDTH: tl.constexpr,
    A_PADDED: tl.constexpr,
    B_WIDTH: tl.constexpr,
    B_PADDED: tl.constexpr,
    C_WIDTH: tl.constexpr,
    C_PADDED: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    program = tl.program_id(2)
    keep_ptr += (row * KV_HEADS + kv_head).to(tl.int64) * kept
    src_ptr += row * src_stride
    dst_ptr += row * dst_stride
    first = program * ROWS
    chunks = 1
    if program >= move_programs:
        # Slots that keep their index move only where their page is replaced: rarely.
        first = (program - move_programs) * SPAN
        slot = first + tl.arange(0, SPAN)
        old = tl.load(src_ptr + slot // BLOCK_SIZE, mask=slot < kept, other=0)
        new = tl.load(dst_ptr + slot // BLOCK_SIZE, mask=slot < kept, other=0)
        chunks = tl.max((old != new).to(tl.int32)) * (SPAN // ROWS)
    for chunk in range(chunks):
        target = first + chunk * ROWS + tl.arange(0, ROWS)
        if program < move_programs:
            # The rank-th hole takes the rank-th of the kept slots at or above the kept count.
            rank = target
            mover = rank + _count_below(keep_ptr, kept, tl.zeros_like(rank) + kept, SEARCH, False)
            target = rank + _count_below(keep_ptr, kept, rank + 1, SEARCH, True)
        else:
            mover = _count_below(keep_ptr, kept, target, SEARCH, False)
        is_due = mover < kept
        source = tl.load(keep_ptr + mover, mask=is_due, other=0).to(tl.int32)
        if program >= move_programs:
            is_due = is_due & (source == target) & (target < kept)
        old = tl.load(src_ptr + source // BLOCK_SIZE, mask=is_due, other=-1).to(tl.int64)
        new = tl.load(dst_ptr + target // BLOCK_SIZE, mask=is_due, other=-1).to(tl.int64)
        # Padding is neither read nor written.
        is_due = is_due & (old >= 0) & (new >= 0) & ((source != target) | (old != new))
        from_line = (old * KV_HEADS + kv_head) * BLOCK_SIZE + source % BLOCK_SIZE
        to_line = (new * KV_HEADS + kv_head) * BLOCK_SIZE + target % BLOCK_SIZE
        _copy(a_ptr, from_line, to_line, is_due, A_WIDTH, A_PADDED)
        _copy(b_ptr, from_line, to_line, is_due, B_WIDTH, B_PADDED)
        _copy(c_ptr, from_line, to_line, is_due, C_WIDTH, C_PADDED)


def compact_kv(
    pools: Sequence[Tensor], src_tables_RN: Tensor, keep_RKS: Tensor, dst_tables_RN: Tensor
) -> None:
    """Launch the kernel, three pools at a time; arguments are those of ``dispatch.compact_kv``.

    Raises:
        ShapeError: if a pool is not contiguous, or a CPU table breaks the rule of destinations.
    """
    rows, heads, kept = keep_RKS.shape
    block_size = pools[0].shape[2]
    keep = keep_RKS.contiguous()
    src, dst = src_tables_RN.contiguous(), dst_tables_RN.contiguous()
    check_storage(pools[0], keep=keep, src_tables=src, dst_tables=dst)
    _check_destinations(pools[0], src, dst, kept)
    tuning = tuning_for(keep.device)
    # No more slots can move than there are slots above the kept count.
    most = min(kept, src.shape[1] * block_size - kept)
    move_programs = triton.cdiv(most, tuning.move_rows)
    span = 8 * tuning.move_rows
    for start in range(0, len(pools), POOLS):
        part = list(pools[start : start + POOLS])
        check_storage(keep, **{f"pool {start + i}": pool for i, pool in enumerate(part)})
        widths = [pool[0, 0, 0].numel() for pool in part] + [0] * (POOLS - len(part))
        sizes = [size for width in widths for size in (width, triton.next_power_of_2(width))]
        _compact_kernel[(rows, heads, move_programs + triton.cdiv(kept, span))](
            *(part + part[:1] * (POOLS - len(part))),
            keep,
            src,
            dst,
            src.stride(0),
            dst.stride(0),
            kept,
            move_programs,
            heads,
            block_size,
            kept.bit_length(),
            tuning.move_rows,
            span,
            *sizes,
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
