"""Trusted: the bound of an attention block on a ball of tokens, with all rounding accounted for.

Nothing is assumed about the attention weights: any context length, causal or sliding mask,
position bias, RoPE base and grouping of heads is covered.
Source: spec bound_tightening 4.1 to 4.5 and 7; lipschitz_training 5.3, 5.4.
"""

# Shape letters: C width, H query heads, K key/value heads, D head width, X = H * D; HC and KC are
# the content heads among H and K.

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.models import LayerConfig
from common.norms import (
    EIGEN_MARGIN,
    certified_top,
    exact64,
    gamma,
    lambda_max_bound,
    product_norm_bound,
    round_up,
    spectral_norm_bound,
    weighted_gram,
)
from solvers.bounds.mlp_proof import BlockBound


class Heads(NamedTuple):
    """Float64 weights of an attention block split by head, and certified norms of the parts."""

    q: Tensor  # (HC, D, C)
    k: Tensor  # (KC, D, C)
    v: Tensor  # (H, D, C), shared value heads repeated
    o: Tensor  # (H, C, D)
    query_norm: float
    output_norm: float
    q_norms: list[float]
    k_norms: list[float]
    v_norms: list[float]
    value_path: float


def split_heads(tensors: Mapping[str, Tensor], layer: LayerConfig) -> Heads:
    """Split the matrices of an attention block by head and bound their norms."""
    dim, group = layer.head_dim, layer.group
    v_KDC = exact64(tensors["value.weight"]).unflatten(0, (-1, dim))
    o_CX = exact64(tensors["output.weight"])
    width = o_CX.shape[0]
    o_HCD = o_CX.unflatten(1, (-1, dim)).transpose(0, 1)
    q_HDC = k_KDC = v_KDC.new_zeros(0, dim, width)
    if layer.content_heads:
        q_HDC = exact64(tensors["query.weight"]).unflatten(0, (-1, dim))
        k_KDC = exact64(tensors["key.weight"]).unflatten(0, (-1, dim))
    v_norms = [spectral_norm_bound(v) for v in v_KDC for _ in range(group)]
    v_HDC = v_KDC.repeat_interleave(group, 0)
    output_norm = spectral_norm_bound(o_CX)
    spread = output_norm * math.sqrt(math.fsum(n * n for n in v_norms))
    separate = math.fsum(product_norm_bound(o, v) for o, v in zip(o_HCD, v_HDC, strict=True))
    return Heads(
        q=q_HDC,
        k=k_KDC,
        v=v_HDC,
        o=o_HCD,
        query_norm=spectral_norm_bound(q_HDC.flatten(0, 1)),
        output_norm=output_norm,
        q_norms=[spectral_norm_bound(q) for q in q_HDC],
        k_norms=[spectral_norm_bound(k) for k in k_KDC for _ in range(group)],
        v_norms=v_norms,
        value_path=round_up(min(spread, separate)),
    )


def naive_attention(heads: Heads, layer: LayerConfig, radius: float) -> float:
    """Bound the attention map on the ball of ``radius`` by operator norms, without its factor.

    Source:
        The smallest of lipschitz_training 5.4 (both forms) and the shared form of
        bound_tightening 4.3 with every multiplier replaced by the norm of the full matrix.
    """
    score = layer.logit_scale * radius * radius
    logits = [2 * score * q * k for q, k in zip(heads.q_norms, heads.k_norms, strict=True)]
    logits += [0.0] * (layer.heads - len(logits))
    pairs = list(zip(heads.v_norms, logits, strict=True))
    spread = heads.output_norm * math.sqrt(math.fsum((v * (1 + t)) ** 2 for v, t in pairs))
    products = [k * v for k, v in zip(heads.k_norms, heads.v_norms, strict=False)]
    shared = 2 * score * heads.query_norm * heads.output_norm * max(products, default=0.0)
    return round_up(min(spread, heads.value_path + shared))


def attention_bound(
    heads: Heads, layer: LayerConfig, radius: float, multipliers: Mapping[str, Tensor]
) -> dict[str, float]:
    """Bound the attention map on the ball of ``radius`` from multipliers, without its factor.

    With ``u_h = Wo_h^T y`` for a unit output direction y, ``b_h = Wv_h^T u_h`` and the score
    factor ``s = |c| / D * R^2``, the differential is at most

    ``sum_h |b_h| + s sum_h (|Wk_h||b_h| + |Wk_h b_h|) / 2 |Wq_h dx| + s sum_h |Wk_h||b_h||Wq_h x|``

    (value, query and key path) for unit dx and x. Every product is split by a multiplier.

    Args:
        heads: From ``split_heads``.
        layer: Head counts and softmax scale.
        radius: l2 bound R on every token.
        multipliers: Positive vectors ``value`` (H), and ``query``, ``key``, ``mixed`` (HC).

    Returns:
        ``lipschitz``; ``tau``, the value path alone; and ``margin``.

    Source:
        bound_tightening 4.3; deviation: the query path keeps the direction of ``b_h`` (a
        covariance of ``a_j.x_j`` and ``b.x_j`` is at most ``R^2 (|a||b| + |a.b|) / 2``), the key
        path uses ``|b_h|`` for ``|Wv_h||u_h|``, and all paths share one output direction.
    """
    value_H = multipliers["value"]
    gram_HDD = heads.v @ heads.v.mT
    size_HDD = heads.v.abs() @ heads.v.abs().mT
    total = math.fsum(value_H.tolist())
    inner = (gram_HDD / value_H[:, None, None], size_HDD / value_H[:, None, None])
    tau = math.sqrt(total * _output_top(heads, *inner)[0])
    if not layer.content_heads or layer.logit_scale == 0:
        return {"tau": round_up(tau), "lipschitz": round_up(tau), "margin": EIGEN_MARGIN}
    score, content = layer.logit_scale * radius * radius, layer.content_heads
    k_norm_H = torch.tensor(heads.k_norms, dtype=torch.float64)
    theta_H, query_H, key_H = (multipliers[name] for name in ("mixed", "query", "key"))
    plain_H = k_norm_H**2 * ((1 + theta_H) / 4 / query_H + 1 / key_H) * score
    cross_H = (1 + 1 / theta_H) / 4 / query_H * score
    k_HDC, v_HDC = heads.k.repeat_interleave(layer.group, 0), heads.v[:content]
    mixed_HDD = k_HDC @ v_HDC.mT
    mixed_size_HDD = k_HDC.abs() @ v_HDC.abs().mT
    for part, mixed, gram in zip(
        inner, (mixed_HDD, mixed_size_HDD), (gram_HDD, size_HDD), strict=True
    ):
        part[:content] += plain_H[:, None, None] * gram[:content]
        part[:content] += cross_H[:, None, None] * (mixed.mT @ mixed)
    output, margin = _output_top(heads, *inner)
    rows = heads.q.flatten(0, 1)
    dim = layer.head_dim
    query = lambda_max_bound(*weighted_gram(rows, query_H.repeat_interleave(dim)))
    key = lambda_max_bound(*weighted_gram(rows, key_H.repeat_interleave(dim)))
    return {
        "tau": round_up(tau),
        "lipschitz": round_up((output + total + score * (query + key)) / 2),
        "margin": margin,
    }


def _output_top(heads: Heads, inner_HDD: Tensor, size_HDD: Tensor) -> tuple[float, float]:
    """Bound ``lambda_max(sum_h Wo_h inner_h Wo_h^T)``; ``size_HDD`` dominates ``inner_HDD``."""
    outer_CX = heads.o.transpose(0, 1).flatten(1)
    left_CX = (heads.o @ inner_HDD).transpose(0, 1).flatten(1)
    y_CC = left_CX @ outer_CX.T
    sums_HD1 = heads.o.abs().mT.sum(-1, keepdim=True)
    row_sum = float((heads.o.abs() @ (size_HDD @ sums_HD1)).sum(0).max())
    num_roundings = 2 * heads.v.shape[2] + 2 * heads.v.shape[1] + outer_CX.shape[1] + 32
    error = 1.01 * gamma(num_roundings) * row_sum
    return certified_top((y_CC + y_CC.T) / 2, error)


def prove_attention(
    tensors: Mapping[str, Tensor],
    layer: LayerConfig,
    radius: float,
    naive_radius: float,
    multipliers: Mapping[str, Tensor],
) -> BlockBound:
    """Prove the constants of an attention block; arguments as in ``prove_block``."""
    heads, a = split_heads(tensors, layer), layer.attn_residual
    skip, factor = 1 - a, a * layer.attn_factor
    naive = round_up(skip + factor * naive_attention(heads, layer, naive_radius))
    lipschitz, tau = naive_attention(heads, layer, radius), heads.value_path
    components, margin = {}, EIGEN_MARGIN
    if multipliers:
        components = attention_bound(heads, layer, radius, multipliers)
        margin = components.pop("margin")
        lipschitz, tau = min(lipschitz, components["lipschitz"]), min(tau, components["tau"])
    return BlockBound(
        naive=naive,
        tightened=min(naive, round_up(skip + factor * lipschitz)),
        radius_out=round_up(radius * (skip + factor * tau)),
        naive_radius_out=round_up(naive_radius * (skip + factor * heads.value_path)),
        components={"tau": tau, "lipschitz": lipschitz},
        margin=margin,
    )
