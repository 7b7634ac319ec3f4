"""Triton kernel: score cached keys against one linear form and modulus weights per query head.

Each key is read once and used by all query heads of its group. Vector form in float32: operands
are upcast at the load, so bf16 arithmetic never happens (the interpreter gets it wrong).
"""

# Legend: R rows, N table width (blocks), K key/value heads, H query heads, G = H / K, S slots,
# D head width, F rotary bands, E = D - F weights.

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve.kernels.launch import check_storage, check_tables
from serve.kernels.tuning import tuning_for


@triton.jit
def _score_kernel(
    k_ptr,
    table_ptr,
    length_ptr,
    u_ptr,
    e_ptr,
    out_ptr,
    table_stride,
    length_row_stride,
    length_head_stride,
    slots,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BANDS: tl.constexpr,
    BANDS_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    STEP: tl.constexpr,
    TO_IMAG: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    slot = tl.program_id(2) * TILE_SLOTS + tl.arange(0, TILE_SLOTS)
    band = tl.arange(0, BANDS_PADDED)
    rest = tl.arange(0, REST_PADDED)
    is_band = band < BANDS
    is_rest = rest < WIDTH - 2 * BANDS
    length = tl.load(length_ptr + row * length_row_stride + kv_head * length_head_stride)
    is_filled = slot < length
    page = tl.load(table_ptr + row * table_stride + slot // BLOCK_SIZE, mask=is_filled, other=0)
    line = (page.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    key_ptr = k_ptr + line[:, None] * WIDTH
    real_ptr = key_ptr + band[None, :] * STEP
    in_band = is_filled[:, None] & is_band[None, :]
    real = tl.load(real_ptr, mask=in_band, other=0.0).to(tl.float32)
    imag = tl.load(real_ptr + TO_IMAG, mask=in_band, other=0.0).to(tl.float32)
    modulus = tl.sqrt(real * real + imag * imag)
    in_rest = is_filled[:, None] & is_rest[None, :]
    plain = tl.load(key_ptr + 2 * BANDS + rest[None, :], mask=in_rest, other=0.0).to(tl.float32)
    for member in range(GROUP):
        head = ((row * KV_HEADS + kv_head) * GROUP + member).to(tl.int64)
        u_line = u_ptr + head * WIDTH
        e_line = e_ptr + head * (WIDTH - BANDS)
        u_real = tl.load(u_line + band * STEP, mask=is_band, other=0.0)
        u_imag = tl.load(u_line + band * STEP + TO_IMAG, mask=is_band, other=0.0)
        weight = tl.load(e_line + band, mask=is_band, other=0.0)
        terms = real * u_real[None, :] + imag * u_imag[None, :] + modulus * weight[None, :]
        score = tl.sum(terms, axis=1)
        if WIDTH > 2 * BANDS:
            u_rest = tl.load(u_line + 2 * BANDS + rest, mask=is_rest, other=0.0)
            e_rest = tl.load(e_line + BANDS + rest, mask=is_rest, other=0.0)
            score += tl.sum(plain * u_rest[None, :] + tl.abs(plain) * e_rest[None, :], axis=1)
        score = tl.where(is_filled, score, float("-inf"))
        tl.store(out_ptr + head * slots + slot, score, mask=slot < slots)


def score_keys(
    k_pool: Tensor,
    tables_RN: Tensor,
    lengths_RK: Tensor,
    u_RHD: Tensor,
    e_RHE: Tensor,
    bands: int,
    interleaved: bool,
) -> Tensor:
    """Launch the kernel; arguments and result are those of ``dispatch.score_keys``.

    Raises:
        ShapeError: if the pool is not contiguous, or a CPU table points outside it.
    """
    _, kv_heads, block_size, width = k_pool.shape
    rows, heads, _ = u_RHD.shape
    slots = tables_RN.shape[1] * block_size
    u_RHD, e_RHE = u_RHD.to(torch.float32).contiguous(), e_RHE.to(torch.float32).contiguous()
    tables, lengths = tables_RN.contiguous(), lengths_RK.contiguous()
    check_storage(k_pool, k_pool=k_pool, tables=tables, lengths=lengths, u=u_RHD, e=e_RHE)
    check_tables(k_pool, tables, lengths)
    out_RHS = torch.empty(rows, heads, slots, dtype=torch.float32, device=k_pool.device)
    tuning = tuning_for(k_pool.device)
    tile = min(tuning.score_tile(width), triton.next_power_of_2(slots))
    _score_kernel[(rows, kv_heads, triton.cdiv(slots, tile))](
        k_pool,
        tables,
        lengths,
        u_RHD,
        e_RHE,
        out_RHS,
        tables.stride(0),
        lengths.shape[1],
        int(lengths.shape[1] > 1),
        slots,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        BLOCK_SIZE=block_size,
        WIDTH=width,
        BANDS=bands,
        BANDS_PADDED=triton.next_power_of_2(max(bands, 1)),
        REST_PADDED=triton.next_power_of_2(max(width - 2 * bands, 1)),
        STEP=2 if interleaved else 1,
        TO_IMAG=1 if interleaved else bands,
        TILE_SLOTS=tile,
        **tuning.options(width),
    )
    return out_RHS
