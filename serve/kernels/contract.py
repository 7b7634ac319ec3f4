"""Shape contracts of the kernels: a mistake is one line that names the shapes and the remedy."""

# Legend: R rows, N table width (blocks) or tokens, K key/value heads, H query heads, D head width,
# F rotary bands, S slots.

from collections.abc import Sequence

from torch import Tensor

from common.errors import ShapeError


def per_head(lengths: Tensor) -> Tensor:
    """Return lengths as a matrix (R, K) or, one length for all heads, (R, 1)."""
    return lengths[:, None] if lengths.ndim == 1 else lengths


def check_rows(pool: Tensor, tables_RN: Tensor, lengths_RK: Tensor, x_RHD: Tensor) -> None:
    """Check queries (or linear forms), tables and lengths against a pool of keys.

    Raises:
        ShapeError: if they disagree.
    """
    fits = pool.ndim == 4 and x_RHD.ndim == 3 and tables_RN.ndim == 2 and lengths_RK.ndim == 2
    if not (
        fits
        and x_RHD.shape[0] == tables_RN.shape[0] == lengths_RK.shape[0]
        and tables_RN.shape[1] > 0
        and lengths_RK.shape[1] in (1, pool.shape[1])
        and x_RHD.shape[2] == pool.shape[3]
        and x_RHD.shape[1] % pool.shape[1] == 0
    ):
        raise ShapeError(
            f"queries {tuple(x_RHD.shape)}, tables {tuple(tables_RN.shape)}, lengths"
            f" {tuple(lengths_RK.shape)} and pool {tuple(pool.shape)} disagree; expected (R, H, D),"
            " (R, N), (R,) or (R, K), (blocks, K, block_size, D) with H a multiple of K, N > 0"
        )


def check_pools(k_pool: Tensor, v_pool: Tensor, pos_pool: Tensor) -> None:
    """Check that values and positions go with the keys.

    Raises:
        ShapeError: if they do not.
    """
    if v_pool.shape != k_pool.shape or pos_pool.shape != k_pool.shape[:3]:
        raise ShapeError(
            f"pools: keys {tuple(k_pool.shape)}, values {tuple(v_pool.shape)}, positions"
            f" {tuple(pos_pool.shape)}; expected equal keys and values, positions without the width"
        )


def check_bands(bands: int, weights: tuple[int, ...], u_RHD: Tensor) -> None:
    """Check the score's modulus weights: one per band, then one per unrotated component.

    Raises:
        ShapeError: if their number is wrong or the bands do not fit the head width.
    """
    rows, heads, width = u_RHD.shape
    if not 0 <= 2 * bands <= width or weights != (rows, heads, width - bands):
        raise ShapeError(
            f"e: expected {(rows, heads, width - bands)} for {bands} bands in a head width of"
            f" {width}, got {weights}; pass one weight per query head and band, then one per"
            " component that is not rotated"
        )


def check_bias(bias_HT: Tensor | None, heads: int) -> None:
    """Check that a relative-position bias has a row per query head.

    Raises:
        ShapeError: if not.
    """
    if bias_HT is not None and (bias_HT.ndim != 2 or bias_HT.shape[0] != heads):
        raise ShapeError(
            f"bias: expected ({heads}, context), got {tuple(bias_HT.shape)};"
            " pass one row per query head"
        )


def check_selection(scores_RKS: Tensor, positions_RKS: Tensor, budget: int) -> None:
    """Check scores against positions and the budget against the slots.

    Raises:
        ShapeError: if the shapes differ or the budget is not 1 to S.
    """
    if scores_RKS.ndim != 3 or scores_RKS.shape != positions_RKS.shape:
        raise ShapeError(
            f"select_slots: scores {tuple(scores_RKS.shape)}, positions"
            f" {tuple(positions_RKS.shape)}; expected equal shapes (rows, K, slots)"
        )
    if not 1 <= budget <= scores_RKS.shape[2]:
        raise ShapeError(
            f"select_slots: budget {budget} of {scores_RKS.shape[2]} slots; expected 1 to the"
            " number of slots: widen the tables or lower the budget"
        )


def check_compaction(
    pools: Sequence[Tensor], src_tables_RN: Tensor, keep_RKS: Tensor, dst_tables_RN: Tensor
) -> None:
    """Check that the kept slots exist, fit the destination and match every pool.

    Raises:
        ShapeError: if not.
    """
    shapes = [tuple(pool.shape) for pool in pools]
    if not pools or keep_RKS.ndim != 3 or any(shape[:3] != shapes[0][:3] for shape in shapes):
        raise ShapeError(
            f"compact_kv: keep {tuple(keep_RKS.shape)}, pools {shapes}; expected (rows, K, kept)"
            " and at least one pool, all with the same (blocks, K, block_size)"
        )
    rows, heads, kept = keep_RKS.shape
    tables_fit = src_tables_RN.shape[0] == dst_tables_RN.shape[0] == rows
    room = min(src_tables_RN.shape[1], dst_tables_RN.shape[1]) * shapes[0][2]
    if not (tables_fit and heads == shapes[0][1] and kept <= room):
        raise ShapeError(
            f"compact_kv: keep {tuple(keep_RKS.shape)} does not fit pools {shapes[0]}, tables"
            f" {tuple(src_tables_RN.shape)} -> {tuple(dst_tables_RN.shape)}; pass (rows, K, kept)"
            f" with at most {room} source and destination slots"
        )


def check_write(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    turns: tuple[Tensor | None, Tensor | None],
    k_pool: Tensor,
    places: tuple[Tensor, Tensor],
) -> None:
    """Check new queries, keys and values against the pool, the angles and the slots.

    Raises:
        ShapeError: if they disagree.
    """
    tokens, kv_heads, width = k_NKD.shape
    cos, sin = turns
    fits = k_NKD.shape == v_NKD.shape and q_NHD.shape[::2] == (tokens, width)
    fits = fits and k_pool.shape[1::2] == (kv_heads, width)
    fits = fits and all(place.shape == (tokens,) for place in places)
    if not fits:
        raise ShapeError(
            f"rope_write: q {tuple(q_NHD.shape)}, k {tuple(k_NKD.shape)}, v {tuple(v_NKD.shape)},"
            f" pool {tuple(k_pool.shape)}, positions and slots"
            f" {[tuple(place.shape) for place in places]} disagree; expected (N, H, D), (N, K, D),"
            " (N, K, D), (blocks, K, block_size, D), (N,), (N,)"
        )
    if cos is None and sin is None:
        return
    if cos is None or sin is None or cos.shape != sin.shape or 2 * cos.shape[-1] > width:
        shapes = [None if turn is None else tuple(turn.shape) for turn in turns]
        raise ShapeError(
            f"rope_write: cos and sin {shapes}; expected both ({tokens}, F) with 2 F <= {width},"
            " or neither"
        )
