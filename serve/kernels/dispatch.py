"""The kernels: what each computes, its shapes, and the choice of the backend per call.

``auto`` takes Triton for CUDA tensors and torch elsewhere; float64 always runs on torch. ``triton``
also runs on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1). Triton is imported only
when one of its kernels is about to run.
"""

# Legend: R rows (a request, or one layer of it), N table width (blocks) or tokens, K key/value
# heads, H query heads, S slots, D head width, F rotary bands, E = D - F score weights, T distances.

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.kernels import contract, reference, reference_decode
from serve.kernels.backend import use_triton

gather_pages = reference.gather_pages


def score_keys(
    k_pool: Tensor,
    tables_RN: Tensor,
    lengths: Tensor,
    u_RHD: Tensor,
    e_RHE: Tensor,
    *,
    bands: int | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Score every cached key against one linear form per query head.

    Args:
        k_pool: Keys after RoPE (blocks, K, block_size, D).
        tables_RN: Block indices (R, N), integer; entries past the length are not read.
        lengths: Filled slots, integer: (R,), or (R, K) one per head.
        u_RHD: Linear form (R, H, D); query head h reads KV head h // (H / K).
        e_RHE: Weights (R, H, E): of each band's modulus, then of each unrotated component's.
        bands: Rotated bands F; default D / 2. The first 2 F components are rotated.
        interleaved: Band f is components (2 f, 2 f + 1); else (f, f + F).
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        ``<u, k> + sum_f e_f |k_f| + sum_j e_{F+j} |k_{2F+j}|`` as (R, H, N * block_size), float32
        (float64 for a float64 pool); -inf at and past the length.

    Raises:
        ShapeError: if the shapes disagree.
        BackendError: if Triton is asked for where it cannot run.

    Source:
        arXiv 2604.04921, score with the offset sum folded into ``u``; deviation: none.
    """
    lengths_RK = contract.per_head(lengths)
    contract.check_rows(k_pool, tables_RN, lengths_RK, u_RHD)
    bands = k_pool.shape[3] // 2 if bands is None else bands
    contract.check_bands(bands, tuple(e_RHE.shape), u_RHD)
    arguments = (k_pool, tables_RN, lengths_RK, u_RHD, e_RHE, bands, interleaved)
    if use_triton(backend, k_pool):
        from serve.kernels import score

        with torch.cuda.device_of(k_pool):
            return score.score_keys(*arguments)
    return reference.score_keys(*arguments)


def select_slots(
    scores_RKS: Tensor, positions_RKS: Tensor, budget: int, *, backend: str = "auto"
) -> Tensor:
    """Return the slots that survive: those of the highest scores.

    Args:
        scores_RKS: Score of each slot (R, K, S), not NaN; +inf for protected, -inf for unfilled.
        positions_RKS: Original positions, same shape, integer; -1 in unfilled slots.
        budget: Slots kept, 1 to S.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        Slot indices (R, K, budget), int64, ascending. Exact ties go to the larger position, then
        to the smaller index: a row shorter than the budget keeps all its slots and unfilled ones.

    Raises:
        ShapeError: if the shapes differ or the budget does not fit.
        BackendError: if Triton is asked for where it cannot run.
    """
    contract.check_selection(scores_RKS, positions_RKS, budget)
    if use_triton(backend, scores_RKS):
        from serve.kernels import select

        with torch.cuda.device_of(scores_RKS):
            return select.select_slots(scores_RKS, positions_RKS, budget)
    return reference.select_slots(scores_RKS, positions_RKS, budget)


def compact_kv(
    pools: Sequence[Tensor],
    src_tables_RN: Tensor,
    keep_RKS: Tensor,
    dst_tables_RN: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Move the kept slots of each (row, head) into its first slots, touching as few as possible.

    Kept slots below the kept count stay at their index; the holes among the first slots are filled,
    in ascending order, by the kept slots above. Hence nothing that is read is ever overwritten,
    and attention, which does not depend on the order of slots, is unchanged.

    Args:
        pools: Tensors (blocks, K, block_size, ...), contiguous, changed in place.
        src_tables_RN: Source blocks (R, N).
        keep_RKS: Kept slots of each row and head (R, K, kept), int64, ascending.
        dst_tables_RN: Destination blocks (R, at least ceil(kept / block_size)). Page i is source
            page i, or a page outside every source table: then its kept slots are copied along.
        backend: ``auto``, ``torch`` or ``triton``.

    Raises:
        ShapeError: if the shapes disagree or the destination is too small.
        BackendError: if Triton is asked for where it cannot run.

    Source:
        arXiv 2604.04921, its released code's fill-hole; copied pages are our own.
    """
    contract.check_compaction(pools, src_tables_RN, keep_RKS, dst_tables_RN)
    if use_triton(backend, pools[0]):
        from serve.kernels import compact

        with torch.cuda.device_of(pools[0]):
            compact.compact_kv(pools, src_tables_RN, keep_RKS, dst_tables_RN)
    else:
        reference.compact_kv(pools, src_tables_RN, keep_RKS, dst_tables_RN)


def paged_decode(
    q_RHD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    tables_RN: Tensor,
    lengths: Tensor,
    positions_R: Tensor,
    scale: float,
    bias_HT: Tensor | None = None,
    *,
    window: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from one query per row to the filled slots of its pages.

    The logit of a slot is ``scale * q.k + bias[h, position - slot position]``.

    Args:
        q_RHD: Queries after RoPE (R, H, D).
        k_pool: Keys after RoPE (blocks, K, block_size, D).
        v_pool: Values, same shape.
        pos_pool: Original positions (blocks, K, block_size), int32.
        tables_RN: Block indices (R, N).
        lengths: Filled slots, the query's own key included: (R,), or (R, K) one per head.
        positions_R: Original position of each query, int64.
        scale: Factor of the dot product.
        bias_HT: Relative-position bias (H, context) or None; every distance must be in the table.
        window: Only keys less than this many positions before the query count; None: all.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        Outputs (R, H, D) in the dtype of ``q_RHD`` and log-sum-exp of the logits (R, H) in
        float32 (float64 for a float64 pool); zeros and -inf where no key counts.

    Raises:
        ShapeError: if the shapes disagree.
        BackendError: if Triton is asked for where it cannot run.
    """
    lengths_RK = contract.per_head(lengths)
    contract.check_rows(k_pool, tables_RN, lengths_RK, q_RHD)
    contract.check_pools(k_pool, v_pool, pos_pool)
    contract.check_bias(bias_HT, q_RHD.shape[1])
    cache = (k_pool, v_pool, pos_pool, tables_RN, lengths_RK, positions_R)
    if use_triton(backend, k_pool):
        from serve.kernels import decode

        with torch.cuda.device_of(k_pool):
            return decode.paged_decode(q_RHD, *cache, scale, bias_HT, window)
    return reference_decode.paged_decode(q_RHD, *cache, scale, bias_HT, window)


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
    *,
    interleaved: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rotate new queries and keys, and write keys, values and positions to their slots.

    Args:
        q_NHD: Queries before RoPE (N, H, D).
        k_NKD: Keys before RoPE (N, K, D).
        v_NKD: Values (N, K, D).
        cos_NF: Cosine of each band's angle at each token (N, F); None with ``sin_NF``: no rotation.
        sin_NF: Sine, same shape.
        k_pool: Keys (blocks, K, block_size, D), changed in place.
        v_pool: Values, same shape.
        pos_pool: Original positions (blocks, K, block_size), int32.
        positions_N: Original position of each token.
        slots_N: ``block * block_size + offset``, distinct; negative: padding, nothing is written.
        interleaved: Band f is components (2 f, 2 f + 1); else (f, f + F).
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        Rotated queries (N, H, D); arithmetic in float32 (float64 for float64), one rounding.

    Raises:
        ShapeError: if the shapes disagree.
        BackendError: if Triton is asked for where it cannot run.
    """
    contract.check_pools(k_pool, v_pool, pos_pool)
    turns, places = (cos_NF, sin_NF), (positions_N, slots_N)
    contract.check_write(q_NHD, k_NKD, v_NKD, turns, k_pool, places)
    arguments = (q_NHD, k_NKD, v_NKD, *turns, k_pool, v_pool, pos_pool, *places, interleaved)
    if use_triton(backend, k_pool):
        from serve.kernels import rope

        with torch.cuda.device_of(k_pool):
            return rope.rope_write(*arguments)
    return reference.rope_write(*arguments)
