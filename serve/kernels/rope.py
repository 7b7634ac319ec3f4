"""Triton kernel: rotate new queries and keys, and write keys, values and positions to their slots.

A program handles one token and a few of its heads: first programs the query heads, the rest the
key/value heads. Arithmetic is float32 with one rounding at the store.
"""

# Legend: N tokens, H query heads, K key/value heads, D head width, F rotary bands.

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.errors import ShapeError
from serve.kernels.launch import check_storage
from serve.kernels.tuning import tuning_for


@triton.jit
def _turn(
    x_line,
    out_line,
    is_due,
    cos_ptr,
    sin_ptr,
    WIDTH: tl.constexpr,
    BANDS: tl.constexpr,
    BANDS_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    STEP: tl.constexpr,
    TO_IMAG: tl.constexpr,
):
    """Rotate the bands of some heads, copy the components past them."""
    out_dtype = out_line.dtype.element_ty
    if BANDS > 0:
        band = tl.arange(0, BANDS_PADDED)
        is_band = band < BANDS
        mask = is_due[:, None] & is_band[None, :]
        cos = tl.load(cos_ptr + band, mask=is_band, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + band, mask=is_band, other=0.0).to(tl.float32)[None, :]
        at = band[None, :] * STEP
        real = tl.load(x_line[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        imag = tl.load(x_line[:, None] + at + TO_IMAG, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_line[:, None] + at, (real * cos - imag * sin).to(out_dtype), mask=mask)
        turned = (imag * cos + real * sin).to(out_dtype)
        tl.store(out_line[:, None] + at + TO_IMAG, turned, mask=mask)
    if WIDTH > 2 * BANDS:
        rest = 2 * BANDS + tl.arange(0, REST_PADDED)[None, :]
        mask = is_due[:, None] & (rest < WIDTH)
        plain = tl.load(x_line[:, None] + rest, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_line[:, None] + rest, plain.to(out_dtype), mask=mask)


@triton.jit
def _write_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, k_pool_ptr, v_pool_ptr, pos_pool_ptr,
    position_ptr, slot_ptr, q_token_stride, q_head_stride, k_token_stride, k_head_stride,
    v_token_stride, v_head_stride, query_programs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, BANDS: tl.constexpr,
    BANDS_PADDED: tl.constexpr, REST_PADDED: tl.constexpr, STEP: tl.constexpr,
    TO_IMAG: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    cos_ptr += token * BANDS
    sin_ptr += token * BANDS
    if program < query_programs:
        head = program * TILE + tl.arange(0, TILE)
        _turn(
            q_ptr + token * q_token_stride + head * q_head_stride,
            out_ptr + (token * HEADS + head) * WIDTH,
            head < HEADS,
            cos_ptr, sin_ptr, WIDTH, BANDS, BANDS_PADDED, REST_PADDED, STEP, TO_IMAG,
        )  # fmt: skip
    else:
        head = (program - query_programs) * TILE + tl.arange(0, TILE)
        # As a vector: the interpreter gets a vector "and" a scalar wrong.
        slot = tl.load(slot_ptr + token).to(tl.int64) + tl.zeros([TILE], dtype=tl.int64)
        is_due = (head < KV_HEADS) & (slot >= 0)
        line = (slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
        _turn(
            k_ptr + token * k_token_stride + head * k_head_stride,
            k_pool_ptr + line * WIDTH,
            is_due,
            cos_ptr, sin_ptr, WIDTH, BANDS, BANDS_PADDED, REST_PADDED, STEP, TO_IMAG,
        )  # fmt: skip
        # Values are not rotated: no bands, all rest.
        _turn(
            v_ptr + token * v_token_stride + head * v_head_stride,
            v_pool_ptr + line * WIDTH,
            is_due,
            cos_ptr, sin_ptr, WIDTH, 0, 1, WIDTH_PADDED, STEP, TO_IMAG,
        )  # fmt: skip
        position = tl.load(position_ptr + token).to(tl.int32) + tl.zeros([TILE], dtype=tl.int32)
        tl.store(pos_pool_ptr + line, position, mask=is_due)


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
    """Launch the kernel; arguments and result are those of ``dispatch.rope_write``.

    Raises:
        ShapeError: if a pool is not contiguous, or a CPU slot lies outside it.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_NHD, k_NKD, v_NKD))
    if cos_NF is None or sin_NF is None:
        bands, out_NHD = 0, q
        cos_NF = sin_NF = k_pool  # not read
    else:
        bands = cos_NF.shape[1]
        out_NHD = torch.empty_like(q, memory_format=torch.contiguous_format)
        cos_NF, sin_NF = cos_NF.contiguous(), sin_NF.contiguous()
    places = (positions_N.contiguous(), slots_N.contiguous())
    pools = (k_pool, v_pool, pos_pool)
    check_storage(k_pool, k_pool=k_pool, v_pool=v_pool, pos_pool=pos_pool)
    check_storage(k_pool, positions=places[0], slots=places[1], cos=cos_NF, sin=sin_NF)
    _check_slots(k_pool, slots_N)
    tuning = tuning_for(k_pool.device)
    heads, kv_heads = q.shape[1], k.shape[1]
    # Without rotation the queries are returned as they are.
    query_programs = triton.cdiv(heads, tuning.write_heads) if bands else 0
    programs = query_programs + triton.cdiv(kv_heads, tuning.write_heads)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    _write_kernel[(len(q), programs)](
        *(q, k, v, cos_NF, sin_NF, out_NHD, *pools, *places, *strides, query_programs),
        HEADS=heads,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=k_pool.shape[2],
        TILE=tuning.write_heads,
        **_layout(q.shape[2], bands, interleaved),
        **tuning.options(),
    )
    return out_NHD


def _layout(width: int, bands: int, interleaved: bool) -> dict[str, int]:
    """Return the sizes that say where bands and other components are."""
    return {
        "WIDTH": width,
        "WIDTH_PADDED": triton.next_power_of_2(width),
        "BANDS": bands,
        "BANDS_PADDED": triton.next_power_of_2(max(bands, 1)),
        "REST_PADDED": triton.next_power_of_2(max(width - 2 * bands, 1)),
        "STEP": 2 if interleaved else 1,
        "TO_IMAG": 1 if interleaved else bands,
    }


def _check_slots(k_pool: Tensor, slots_N: Tensor) -> None:
    """Refuse slots outside the pool; seen only on the CPU."""
    slots = k_pool.shape[0] * k_pool.shape[2]
    if not k_pool.is_cuda and bool((slots_N >= slots).any()):
        raise ShapeError(
            f"slots: expected less than {slots}, got {int(slots_N.max())};"
            " pass block * block_size + offset"
        )
