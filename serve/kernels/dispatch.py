"""Choice of the backend per call, and the shape contract of every kernel.

``auto`` takes Triton for CUDA tensors where a Triton kernel exists, and torch elsewhere. Triton is
imported only when one of its kernels is about to run.
"""

# Legend: R request rows, N table width (blocks), K key/value heads, H query heads, S slots,
# D head width, F = D / 2 rotary bands, T relative distances.

import importlib.util
import logging

from torch import Tensor

from common.config import one_of
from common.errors import BackendError, ShapeError
from serve.kernels import reference

log = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton")
_warned: set[str] = set()

gather_pages = reference.gather_pages


def score_keys(
    k_pool: Tensor,
    tables_RN: Tensor,
    lengths_R: Tensor,
    u_RHD: Tensor,
    e_RHF: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Score every cached key against one linear form per query head.

    Args:
        k_pool: Keys after RoPE (blocks, K, block_size, D), half pairing: band f is (f, f + F).
        tables_RN: Block indices (R, N), integer; entries past the length are not read.
        lengths_R: Filled slots per row, integer.
        u_RHD: Linear form (R, H, D); query head h reads KV head h // (H / K).
        e_RHF: Weight of each band's modulus (R, H, F).
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        ``<u, k> + sum_f e_f |k_f|`` as (R, H, N * block_size), float32 (float64 for a float64
        pool on the torch backend); -inf at and past the length.

    Raises:
        ShapeError: if the shapes disagree.
        BackendError: if Triton is asked for without a CUDA device or without triton.

    Source:
        arXiv 2604.04921, score with the offset sum folded into ``u``; deviation: none.
    """
    _check_pool(k_pool, tables_RN, lengths_R, u_RHD)
    expected = (*u_RHD.shape[:2], u_RHD.shape[2] // 2)
    if tuple(e_RHF.shape) != expected or k_pool.shape[3] % 2:
        raise ShapeError(
            f"e: expected {expected} and an even head width, got {tuple(e_RHF.shape)} with"
            f" width {k_pool.shape[3]}; pass one weight per query head and rotary band"
        )
    if _use_triton(backend, k_pool, has_kernel=True):
        from serve.kernels import score

        return score.score_keys(k_pool, tables_RN, lengths_R, u_RHD, e_RHF)
    return reference.score_keys(k_pool, tables_RN, lengths_R, u_RHD, e_RHF)


def compact_kv(
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    src_tables_RN: Tensor,
    keep_RKS: Tensor,
    dst_tables_RN: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Move the kept slots of each (row, head) to slots 0, 1, ... of the destination pages.

    The pools are modified in place; source and destination pages of one row may coincide, those of
    different rows must not overlap.

    Args:
        k_pool: Keys (blocks, K, block_size, D), contiguous.
        v_pool: Values, same shape.
        pos_pool: Original positions (blocks, K, block_size), int32.
        src_tables_RN: Source blocks (R, N).
        keep_RKS: Kept slots of each row and head (R, K, kept), int64, ascending.
        dst_tables_RN: Destination blocks (R, at least ceil(kept / block_size)).
        backend: ``auto`` or ``torch``; there is no Triton kernel for this operation yet.

    Raises:
        ShapeError: if the shapes disagree or the destination is too small.
        BackendError: if Triton is asked for.
    """
    rows, heads, kept = keep_RKS.shape
    tables_fit = src_tables_RN.shape[0] == dst_tables_RN.shape[0] == rows
    room = dst_tables_RN.shape[1] * k_pool.shape[2]
    pools_fit = k_pool.shape == v_pool.shape and pos_pool.shape == k_pool.shape[:3]
    if not (tables_fit and pools_fit and heads == k_pool.shape[1] and kept <= room):
        raise ShapeError(
            f"compact_kv: keep {tuple(keep_RKS.shape)} does not fit pools {tuple(k_pool.shape)},"
            f" {tuple(pos_pool.shape)} and {room} destination slots; pass (rows, K, kept)"
        )
    _use_triton(backend, k_pool, has_kernel=False)
    reference.compact_kv(k_pool, v_pool, pos_pool, src_tables_RN, keep_RKS, dst_tables_RN)


def paged_decode(
    q_RHD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    tables_RN: Tensor,
    lengths_R: Tensor,
    positions_R: Tensor,
    scale: float,
    bias_HT: Tensor | None = None,
    *,
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
        lengths_R: Filled slots per row, the query's own key included.
        positions_R: Original position of each query, int64.
        scale: Factor of the dot product.
        bias_HT: Relative-position bias (H, context) or None; every distance must be in the table.
        backend: ``auto`` or ``torch``; there is no Triton kernel for this operation yet.

    Returns:
        Outputs (R, H, D) in the dtype of ``q_RHD`` and log-sum-exp of the logits (R, H) in
        float32 (float64 for a float64 pool); zeros and -inf for rows of length 0.

    Raises:
        ShapeError: if the shapes disagree.
        BackendError: if Triton is asked for.
    """
    _check_pool(k_pool, tables_RN, lengths_R, q_RHD)
    if bias_HT is not None and bias_HT.shape[0] != q_RHD.shape[1]:
        raise ShapeError(
            f"bias: expected ({q_RHD.shape[1]}, context), got {tuple(bias_HT.shape)};"
            " pass one row per query head"
        )
    _use_triton(backend, k_pool, has_kernel=False)
    return reference.paged_decode(
        q_RHD, k_pool, v_pool, pos_pool, tables_RN, lengths_R, positions_R, scale, bias_HT
    )


def _check_pool(k_pool: Tensor, tables_RN: Tensor, lengths_R: Tensor, x_RHD: Tensor) -> None:
    rows = tables_RN.shape[0]
    fits = k_pool.ndim == 4 and x_RHD.ndim == 3 and lengths_R.shape == (rows,)
    if not (
        fits
        and x_RHD.shape[0] == rows
        and x_RHD.shape[2] == k_pool.shape[3]
        and x_RHD.shape[1] % k_pool.shape[1] == 0
    ):
        raise ShapeError(
            f"queries {tuple(x_RHD.shape)}, tables {tuple(tables_RN.shape)}, lengths"
            f" {tuple(lengths_R.shape)} and pool {tuple(k_pool.shape)} disagree; expected"
            " (R, H, D), (R, N), (R,), (blocks, K, block_size, D) with H a multiple of K"
        )


def _use_triton(backend: str, pool: Tensor, *, has_kernel: bool) -> bool:
    one_of("backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and not (pool.is_cuda and has_kernel)):
        return False
    if backend == "triton" and not has_kernel:
        raise BackendError("backend=triton: this operation has no Triton kernel; use auto or torch")
    if backend == "triton" and not pool.is_cuda:
        raise BackendError(
            f"backend=triton: the cache is on {pool.device}, expected a CUDA device;"
            " use backend=auto or backend=torch"
        )
    if importlib.util.find_spec("triton") is not None:
        return True
    if backend == "triton":
        raise BackendError("backend=triton: triton is not installed; pip install triton")
    if "triton" not in _warned:
        _warned.add("triton")
        log.warning("triton is not installed: key scoring runs on torch")
    return False
