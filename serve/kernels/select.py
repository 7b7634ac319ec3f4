"""Triton kernel: the slots of the highest scores, by radix selection; one program per (row, head).

A slot's key is one int64: its score, mapped to an integer of the same order, above its position.
Eight passes of eight bits find the key of the last slot that is kept; equal keys (unfilled slots)
go by index.
"""

# Legend: R rows, K key/value heads, S slots.

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve.kernels.launch import check_storage
from serve.kernels.tuning import tuning_for

BINS = tl.constexpr(256)


@triton.jit
def _keys(score_ptr, position_ptr, base, slot, slots):
    """Return the ordered keys of a tile of slots."""
    is_real = slot < slots
    score = tl.load(score_ptr + base + slot, mask=is_real, other=float("-inf")).to(tl.float32)
    position = tl.load(position_ptr + base + slot, mask=is_real, other=-1).to(tl.int64)
    # Minus zero equals zero; negative numbers order backwards.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (position + 1)


@triton.jit
def _select_kernel(score_ptr, position_ptr, out_ptr, slots, budget, num_tiles, TILE: tl.constexpr):
    line = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    base = line * slots
    offset = tl.arange(0, TILE)
    digits = tl.arange(0, BINS)
    threshold = tl.zeros([], dtype=tl.int64)
    need = budget
    for step in tl.static_range(8):
        shift = 56 - 8 * step
        flip = 128 if step == 0 else 0  # the sign bit orders the other way round
        counts = tl.zeros([BINS], dtype=tl.int32)
        for tile in range(num_tiles):
            slot = tile * TILE + offset
            key = _keys(score_ptr, position_ptr, base, slot, slots)
            differs = ((key ^ threshold) >> shift) >> 8
            differs = differs & ((1 << (8 * step)) - 1)
            digit = ((key >> shift) & 255).to(tl.int32) ^ flip
            counts += tl.histogram(digit, BINS, mask=(slot < slots) & (differs == 0))
        at_least = tl.cumsum(counts, 0, reverse=True)
        chosen = tl.sum((at_least >= need).to(tl.int32)) - 1
        need -= tl.sum(tl.where(digits == chosen, at_least - counts, 0))
        threshold |= (chosen ^ flip).to(tl.int64) << shift
    done = 0
    equal_done = 0
    for tile in range(num_tiles):
        slot = tile * TILE + offset
        key = _keys(score_ptr, position_ptr, base, slot, slots)
        is_equal = ((key == threshold) & (slot < slots)).to(tl.int32)
        rank = equal_done + tl.cumsum(is_equal, 0)
        is_kept = (key > threshold) & (slot < slots) | (is_equal > 0) & (rank <= need)
        place = done + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        tl.store(out_ptr + line * budget + place, slot.to(tl.int64), mask=is_kept)
        done += tl.sum(is_kept.to(tl.int32))
        equal_done += tl.sum(is_equal)


def select_slots(scores_RKS: Tensor, positions_RKS: Tensor, budget: int) -> Tensor:
    """Launch the kernel; arguments and result are those of ``dispatch.select_slots``."""
    rows, heads, slots = scores_RKS.shape
    scores, positions = scores_RKS.contiguous(), positions_RKS.contiguous()
    check_storage(scores, positions=positions)
    keep_RKS = torch.empty(rows, heads, budget, dtype=torch.int64, device=scores.device)
    tuning = tuning_for(scores.device)
    tile = min(tuning.select_tile, triton.next_power_of_2(slots))
    tiles = triton.cdiv(slots, tile)
    options = tuning.options()
    _select_kernel[(rows, heads)](
        scores, positions, keep_RKS, slots, budget, tiles, TILE=tile, **options
    )
    return keep_RKS
