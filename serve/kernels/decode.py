"""Triton kernels: split-K decode attention over pages, and the combination of the splits.

A program attends from the query heads of one key/value head to one part of one row's slots, tile by
tile with a running softmax in base 2; so each key and value is read once. Dots are in the dtype of
the pool with float32 sums (float32 operands under the interpreter, which gets bf16 dots wrong).
"""

# Legend: R rows, N table width (blocks), K key/value heads, H query heads, G = H / K, P splits,
# D head width, T relative distances.

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve.kernels.launch import INTERPRETED, check_storage, check_tables
from serve.kernels.tuning import tuning_for

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _share(length, SPLIT: tl.constexpr, MOST_SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Return the slots of a program: they follow from the row's length alone, in every batch."""
    return tl.cdiv(tl.maximum(SPLIT, tl.cdiv(length, MOST_SPLITS)), TILE) * TILE


@triton.jit
def _adjusted(
    z,
    is_in,
    is_head,
    line,
    query_pos,
    pos_ptr,
    bias_line,
    window,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Add position biases to logits (G, tile) in base 2; hide slots outside row and window."""
    if HAS_BIAS or HAS_WINDOW:
        distance = query_pos - tl.load(pos_ptr + line, mask=is_in, other=0)
        if HAS_BIAS:
            in_bias = is_head[:, None] & is_in[None, :]
            bias = tl.load(bias_line[:, None] + distance[None, :], mask=in_bias, other=0.0)
            z += bias.to(tl.float32) * LOG2_E
        if HAS_WINDOW:
            is_in = is_in & (distance < window)
    return tl.where(is_in[None, :], z, float("-inf"))


@triton.jit
def _fold(z, v, top, total, mixed):
    """Take a tile's logits and values into the running maximum, sum and mixture."""
    new_top = tl.maximum(top, tl.max(z, axis=1))
    # Before the first key the maximum is -inf: a finite stand-in keeps the weights at zero.
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(z - safe_top[:, None])
    shrink = tl.exp2(top - safe_top)
    total = total * shrink + tl.sum(weight, axis=1)
    mixed = mixed * shrink[:, None]
    mixed += tl.dot(weight.to(v.dtype), v, input_precision="tf32x3")
    return new_top, total, mixed


@triton.jit
def _write(o_ptr, lse_ptr, out, column, in_query, is_head, top, total, mixed, WIDTH: tl.constexpr):
    """Store the mixture of one split and its log-sum-exp."""
    some = tl.where(total > 0, total, 1.0)
    o = mixed / some[:, None]
    o_line = o_ptr + out[:, None] * WIDTH + column[None, :]
    tl.store(o_line, o.to(o_ptr.dtype.element_ty), mask=in_query)
    lse = tl.where(total > 0, (top + tl.log2(some)) * LN_2, float("-inf"))
    tl.store(lse_ptr + out, lse, mask=is_head)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, pos_ptr, table_ptr, length_ptr, query_pos_ptr, bias_ptr, o_ptr, lse_ptr,
    scale, window, table_stride, length_row_stride, length_head_stride, bias_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, MOST_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length_ptr += row * length_row_stride + kv_head * length_head_stride
    length = tl.load(length_ptr).to(tl.int32)
    share = _share(length, SPLIT, MOST_SPLITS, TILE)
    begin = split * share
    end = tl.minimum(begin + share, length)
    member = tl.arange(0, GROUP_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    head = (row * KV_HEADS + kv_head).to(tl.int64) * GROUP + member
    is_head = member < GROUP
    in_width = column < WIDTH
    in_query = is_head[:, None] & in_width[None, :]
    q = tl.load(q_ptr + head[:, None] * WIDTH + column[None, :], mask=in_query, other=0.0)
    q = q.to(tl.float32) if UPCAST else q.to(k_ptr.dtype.element_ty)
    bias_line = bias_ptr + (kv_head * GROUP + member).to(tl.int64) * bias_stride
    query_pos = tl.load(query_pos_ptr + row).to(tl.int32)
    table_ptr += row * table_stride
    top = tl.full([GROUP_PADDED], float("-inf"), dtype=tl.float32)
    total = tl.zeros([GROUP_PADDED], dtype=tl.float32)
    mixed = tl.zeros([GROUP_PADDED, WIDTH_PADDED], dtype=tl.float32)
    for start in tl.range(begin, end, TILE):
        slot = start + tl.arange(0, TILE)
        is_in = slot < end
        page = tl.load(table_ptr + slot // BLOCK_SIZE, mask=is_in, other=0).to(tl.int64)
        line = (page * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        place = line[:, None] * WIDTH + column[None, :]
        in_tile = is_in[:, None] & in_width[None, :]
        k = tl.load(k_ptr + place, mask=in_tile, other=0.0)
        v = tl.load(v_ptr + place, mask=in_tile, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        z = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (scale * LOG2_E)
        z = _adjusted(
            z, is_in, is_head, line, query_pos, pos_ptr, bias_line, window, HAS_BIAS, HAS_WINDOW
        )
        top, total, mixed = _fold(z, v, top, total, mixed)
    out = head * tl.num_programs(2) + split
    _write(o_ptr, lse_ptr, out, column, in_query, is_head, top, total, mixed, WIDTH)


@triton.jit
def _combine_kernel(
    part_ptr,
    part_lse_ptr,
    o_ptr,
    lse_ptr,
    splits,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    is_split = split < splits
    part_lse = tl.load(part_lse_ptr + head * splits + split, mask=is_split, other=float("-inf"))
    top = tl.max(part_lse, axis=0)
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_lse - safe_top)
    total = tl.sum(weight, axis=0)
    line = part_ptr + (head * splits + split)[:, None] * WIDTH + column[None, :]
    in_part = is_split[:, None] & (column < WIDTH)[None, :]
    part = tl.load(line, mask=in_part, other=0.0)
    some = tl.where(total > 0, total, 1.0)
    o = tl.sum(part * weight[:, None], axis=0) / some
    tl.store(o_ptr + head * WIDTH + column, o.to(o_ptr.dtype.element_ty), mask=column < WIDTH)
    lse = tl.where(total > 0, safe_top + tl.log(some), float("-inf"))
    tl.store(lse_ptr + head, lse)


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
    """Launch the kernels; arguments and results are those of ``dispatch.paged_decode``.

    Raises:
        ShapeError: if a pool is not contiguous, or a CPU table points outside it.
    """
    rows, heads, width = q_RHD.shape
    q_RHD, positions_R = q_RHD.contiguous(), positions_R.contiguous()
    tables, lengths = tables_RN.contiguous(), lengths_RK.contiguous()
    bias = q_RHD if bias_HT is None else bias_HT.contiguous()
    check_storage(k_pool, q=q_RHD, k_pool=k_pool, v_pool=v_pool, pos_pool=pos_pool)
    check_storage(k_pool, tables=tables, lengths=lengths, positions=positions_R, bias=bias)
    check_tables(k_pool, tables, lengths)
    slots = tables.shape[1] * k_pool.shape[2]
    splits = tuning_for(k_pool.device).splits(slots)
    o_RHPD = q_RHD.new_empty(
        rows, heads, splits, width, dtype=q_RHD.dtype if splits == 1 else torch.float32
    )
    lse_RHP = q_RHD.new_empty(rows, heads, splits, dtype=torch.float32)
    cache = (k_pool, v_pool, pos_pool, tables, lengths)
    masks = (bias_HT is not None, window)
    _attend(q_RHD, cache, positions_R, scale, bias, masks, o_RHPD, lse_RHP)
    return _combine(o_RHPD, lse_RHP, q_RHD.dtype)


def _attend(
    q_RHD: Tensor,
    cache: tuple[Tensor, ...],
    positions_R: Tensor,
    scale: float,
    bias: Tensor,
    masks: tuple[bool, int | None],
    o_RHPD: Tensor,
    lse_RHP: Tensor,
) -> None:
    """Fill the outputs and log-sum-exps of all splits."""
    k_pool, _, _, tables, lengths = cache
    _, kv_heads, block_size, width = k_pool.shape
    rows, heads, splits = lse_RHP.shape
    has_bias, window = masks
    tuning = tuning_for(k_pool.device)
    _decode_kernel[(rows, kv_heads, splits)](
        q_RHD,
        *cache,
        positions_R,
        bias,
        o_RHPD,
        lse_RHP,
        scale,
        window or 0,
        tables.stride(0),
        lengths.shape[1],
        int(lengths.shape[1] > 1),
        bias.shape[-1],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_PADDED=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_SIZE=block_size,
        WIDTH=width,
        WIDTH_PADDED=max(16, triton.next_power_of_2(width)),
        TILE=tuning.tile(width, k_pool.element_size()),
        SPLIT=tuning.split_slots,
        MOST_SPLITS=tuning.most_splits,
        HAS_BIAS=has_bias,
        HAS_WINDOW=window is not None,
        UPCAST=INTERPRETED,
        **tuning.options(width, stages=True),
    )


def _combine(o_RHPD: Tensor, lse_RHP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp over all splits."""
    rows, heads, splits, width = o_RHPD.shape
    if splits == 1:
        return o_RHPD[:, :, 0], lse_RHP[:, :, 0]
    tuning = tuning_for(o_RHPD.device)
    o_RHD = o_RHPD.new_empty(rows, heads, width, dtype=dtype)
    lse_RH = lse_RHP.new_empty(rows, heads)
    _combine_kernel[(rows * heads,)](
        o_RHPD,
        lse_RHP,
        o_RHD,
        lse_RH,
        splits,
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
        # Always the same, so that the sum has the same order.
        SPLITS_PADDED=tuning.most_splits,
        **tuning.options(width),
    )
    return o_RHD, lse_RH
