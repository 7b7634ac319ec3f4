"""Triton kernel: score cached keys against one linear form and one norm weight per query head.

Each key is read once and used by all query heads of its group. Vector form in float32: operands
are upcast at the load, so bf16 arithmetic never happens (the interpreter gets it wrong).
"""

# Legend: R request rows, N table width (blocks), K key/value heads, H query heads, G = H / K,
# S slots, D head width, F = D / 2 rotary bands.

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.errors import ShapeError

TILE = 64  # slots per program; a tile spans TILE / block_size pages


@triton.jit
def _score_kernel(
    k_ptr,
    table_ptr,
    length_ptr,
    u_ptr,
    e_ptr,
    out_ptr,
    table_stride,
    slots,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BANDS: tl.constexpr,
    BANDS_PADDED: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    slot = tl.program_id(2) * TILE_SLOTS + tl.arange(0, TILE_SLOTS)
    band = tl.arange(0, BANDS_PADDED)
    is_filled = slot < tl.load(length_ptr + row)
    page = tl.load(table_ptr + row * table_stride + slot // BLOCK_SIZE, mask=is_filled, other=0)
    line = (page.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    key_ptr = k_ptr + line[:, None] * (2 * BANDS) + band[None, :]
    is_real = is_filled[:, None] & (band < BANDS)[None, :]
    real = tl.load(key_ptr, mask=is_real, other=0.0).to(tl.float32)
    imag = tl.load(key_ptr + BANDS, mask=is_real, other=0.0).to(tl.float32)
    modulus = tl.sqrt(real * real + imag * imag)
    for member in range(GROUP):
        head = (row * KV_HEADS + kv_head) * GROUP + member
        u_line = u_ptr + head * (2 * BANDS) + band
        u_real = tl.load(u_line, mask=band < BANDS, other=0.0)
        u_imag = tl.load(u_line + BANDS, mask=band < BANDS, other=0.0)
        weight = tl.load(e_ptr + head * BANDS + band, mask=band < BANDS, other=0.0)
        terms = real * u_real[None, :] + imag * u_imag[None, :] + modulus * weight[None, :]
        score = tl.where(is_filled, tl.sum(terms, axis=1), float("-inf"))
        out_line = out_ptr + head.to(tl.int64) * slots + slot
        tl.store(out_line, score, mask=slot < slots)


def score_keys(
    k_pool: Tensor, tables_RN: Tensor, lengths_R: Tensor, u_RHD: Tensor, e_RHF: Tensor
) -> Tensor:
    """Launch the kernel on CUDA tensors (or CPU tensors under the Triton interpreter).

    Arguments and result are those of ``serve.kernels.score_keys``; the result is float32.

    Raises:
        ShapeError: if the pool is not contiguous, float64, or a CPU table points outside it.
    """
    _, kv_heads, block_size, width = k_pool.shape
    rows, heads, _ = u_RHD.shape
    slots = tables_RN.shape[1] * block_size
    _check_bounds(k_pool, tables_RN, lengths_R)
    u = u_RHD.to(torch.float32).contiguous()
    e = e_RHF.to(torch.float32).contiguous()
    tables = tables_RN.to(torch.int32).contiguous()
    out_RHS = torch.empty(rows, heads, slots, dtype=torch.float32, device=k_pool.device)
    grid = (rows, kv_heads, triton.cdiv(slots, TILE))
    _score_kernel[grid](
        k_pool,
        tables,
        lengths_R.to(torch.int32).contiguous(),
        u,
        e,
        out_RHS,
        tables.stride(0),
        slots,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        BLOCK_SIZE=block_size,
        BANDS=width // 2,
        BANDS_PADDED=triton.next_power_of_2(width // 2),
        TILE_SLOTS=TILE,
    )
    return out_RHS


def _check_bounds(k_pool: Tensor, tables_RN: Tensor, lengths_R: Tensor) -> None:
    """Refuse what the kernel cannot address; values are checked only where that needs no sync."""
    if not k_pool.is_contiguous() or k_pool.dtype == torch.float64:
        raise ShapeError(
            f"k_pool: expected a contiguous float32, float16 or bfloat16 pool, got {k_pool.dtype}"
            f" with strides {k_pool.stride()}; use backend=torch"
        )
    if k_pool.is_cuda:
        return
    block_size = k_pool.shape[2]
    used = torch.arange(tables_RN.shape[1]) * block_size < lengths_R[:, None]
    pages = tables_RN[used]
    too_long = bool((lengths_R > tables_RN.shape[1] * block_size).any())
    if too_long or bool(((pages < 0) | (pages >= k_pool.shape[0])).any()):
        raise ShapeError(
            f"tables: a used entry lies outside 0..{k_pool.shape[0] - 1} or a length exceeds"
            f" {tables_RN.shape[1] * block_size} slots; fix the block table"
        )
