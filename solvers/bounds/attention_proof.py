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
    spread = output_norm * math.hypot(*v_norms)
    separate = sum(product_norm_bound(o, v) for o, v in zip(o_HCD, v_HDC, strict=True))
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
    spread = heads.output_norm * math.hypot(*(v * (1 + t) for v, t in pairs))
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

    Query path: RoPE makes ``a_j = Wk^T Rot_j w``, ``w = Wq dx``, differ per key, but all have
    ``|a_j| <= p = |Wk||w|`` and ``|a_j.b| <= |Wk b||w|``. Subtracting the mean of ``b.x`` only
    lowers its second moment, so ``cov(a_j.x_j, b.x_j)^2 <= E(a_j.x_j)^2 E(b.x_j)^2``. With
    ``t = |b| / p``, the root of that is at most ``E(t (a_j.x_j)^2 + (b.x_j)^2 / t) / 2``; each
    term is a form in x_j with top eigenvalue at most ``p |b| + max|a_j.b|``, and ``|x_j| <= R``.
    Key path: ``|ds_j| <= |Wk||Wq x_i|`` and ``var(b.x) <= R^2 |b|^2``, by Cauchy-Schwarz.

    Args:
        heads: From ``split_heads``.
        layer: Head counts and softmax scale.
        radius: l2 bound R on every token.
        multipliers: Positive vectors ``tau`` (H), and with content heads ``value`` (H), ``query``,
            ``key``, ``mixed`` (HC).

    Returns:
        ``lipschitz``; ``tau``, the value path alone; and ``margin``.

    Source:
        bound_tightening 4.3; deviation: the query path keeps the direction of ``b_h`` (a
        covariance of ``a_j.x_j`` and ``b.x_j`` is at most ``R^2 (|a||b| + |a.b|) / 2``), the key
        path uses ``|b_h|`` for ``|Wv_h||u_h|``, and all paths share one output direction.
    """
    gram_HDD = heads.v @ heads.v.mT
    size_HDD = heads.v.abs() @ heads.v.abs().mT
    tau_H11 = multipliers["tau"][:, None, None]
    top, margin = _output_top(heads, gram_HDD / tau_H11, size_HDD / tau_H11)
    tau = round_up(math.sqrt(_total(tau_H11) * top))
    if not layer.content_heads:
        return {"tau": tau, "lipschitz": tau, "margin": margin}
    score, dim = layer.logit_scale * radius * radius, layer.head_dim
    query_H, key_H = multipliers["query"], multipliers["key"]
    value_H11 = multipliers["value"][:, None, None]
    inner_HDD = gram_HDD / value_H11 + score * _score_gram(heads, gram_HDD, layer, multipliers)
    absolute = heads._replace(k=heads.k.abs(), v=heads.v.abs())
    bound_HDD = size_HDD / value_H11 + score * _score_gram(absolute, size_HDD, layer, multipliers)
    output, margin = _output_top(heads, inner_HDD, bound_HDD)
    rows_XC = heads.q.flatten(0, 1)
    query = lambda_max_bound(*weighted_gram(rows_XC, query_H.repeat_interleave(dim)))
    key = lambda_max_bound(*weighted_gram(rows_XC, key_H.repeat_interleave(dim)))
    lipschitz = round_up((output + _total(value_H11) + score * (query + key)) / 2)
    return {"tau": tau, "lipschitz": lipschitz, "margin": margin}


def _score_gram(
    heads: Heads, gram_HDD: Tensor, layer: LayerConfig, multipliers: Mapping[str, Tensor]
) -> Tensor:
    """Return, per head, the form ``(|Wk||b| + |Wk b|)^2 / 4 query + |Wk|^2 |b|^2 / key`` in u.

    The square of the sum is split as ``(1 + mixed) |Wk|^2 |b|^2 + (1 + 1 / mixed) |Wk b|^2``.
    """
    content = layer.content_heads
    mixed_H, query_H, key_H = (multipliers[name] for name in ("mixed", "query", "key"))
    k_norm_H = torch.tensor(heads.k_norms, dtype=torch.float64)
    plain_H = k_norm_H**2 * ((1 + mixed_H) / (4 * query_H) + 1 / key_H)
    cross_H = (1 + 1 / mixed_H) / (4 * query_H)
    cross_HDD = heads.k.repeat_interleave(layer.group, 0) @ heads.v[:content].mT
    form_HDD = torch.zeros_like(gram_HDD)
    form_HDD[:content] = plain_H[:, None, None] * gram_HDD[:content]
    form_HDD[:content] += cross_H[:, None, None] * (cross_HDD.mT @ cross_HDD)
    return form_HDD


def _total(multipliers: Tensor) -> float:
    return sum(multipliers.flatten().tolist())


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
