"""Trusted: the bound of an attention block on a set of tokens, with all rounding accounted for.

Nothing is assumed about the attention weights: any context length, causal or sliding mask,
position bias, RoPE base and grouping of heads is covered.
Source: spec bound_tightening 4.1 to 4.5 and 7; lipschitz_training 5.3, 5.4; the ellipsoids in
place of balls are our own.
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
    SLACK,
    exact64,
    product_norm_bound,
    round_up,
    spectral_norm_bound,
)
from solvers.bounds.ellipsoid import Ellipsoid, Tokens
from solvers.bounds.enclosure import Enclosure
from solvers.bounds.mlp_proof import BlockBound, grown, part


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


class _Forms(NamedTuple):
    """What multipliers make of the differential: quadratic forms of its three variables.

    With y the output direction, u the changes' coordinates (``|u| <= 1``) and x a token, the
    differential without its factor is at most ``(y^T Y y + u^T U u + rest) / 2``.
    """

    output_CC: Enclosure
    change_CC: Enclosure | None
    rest: float


def attention_bound(
    heads: Heads, layer: LayerConfig, domain: Ellipsoid, multipliers: Mapping[str, Tensor]
) -> float:
    """Bound the l2 constant of the attention map on a domain, without its factor.

    Args:
        heads: From ``split_heads``.
        layer: Head counts and softmax scale.
        domain: Holds every token.
        multipliers: Positive vectors ``value`` (H) and, with content heads, ``query``, ``key``,
            ``mixed`` (HC); any are sound.
    """
    changes = Ellipsoid.ball(heads.o.shape[1], 1.0)
    forms = _forms(heads, layer, changes.scaled, domain, multipliers)
    change = forms.change_CC.top() if forms.change_CC else 0.0
    return round_up((forms.output_CC.top() + change + forms.rest) / 2)


def attention_image(
    heads: Heads,
    layer: LayerConfig,
    changes: Ellipsoid,
    domain: Ellipsoid,
    multipliers: Mapping[str, Tensor],
) -> Ellipsoid:
    """Return an ellipsoid that holds the change of every output of the block.

    Skip connection and query path share the change of their own token, ``2^e F u``. With
    ``s I > U`` the support function ``h(y)`` of all output changes is at most ``(y^T S y + t) / 2``
    for ``S = Y + (1 - a)^2 F (s I - U)^-1 F^T`` and ``t = s + rest``; as h is homogeneous,
    ``h(y)^2 <= t y^T S y``, the ellipsoid of ``t S``.

    Args:
        heads: From ``split_heads``.
        layer: Head counts, softmax scale, residual weight and factor.
        changes: Holds the change of every token.
        domain: Holds every token.
        multipliers: As in ``attention_bound``, and ``skip`` (1), the excess of s over U.
    """
    a = layer.attn_residual
    forms = _forms(heads, layer, changes.enclosed, domain, multipliers)
    return _image(forms, changes, 1 - a, a * layer.attn_factor, float(multipliers["skip"]))


def attention_domain(
    heads: Heads, layer: LayerConfig, domain: Ellipsoid, multipliers: Mapping[str, Tensor]
) -> Ellipsoid:
    """Return an ellipsoid that holds every token after the block.

    A token is ``(1 - a) x`` plus a sum over heads of ``M_h`` times points of the domain.

    Args:
        heads: From ``split_heads``.
        layer: Residual weight and factor.
        domain: Holds every token before the block.
        multipliers: Positive vectors ``value`` (H) and ``skip`` (1).
    """
    a, inner = layer.attn_residual, _value_forms(heads, domain.enclosed, multipliers["value"])
    forms = _Forms(_outer(heads, inner), None, _total(multipliers["value"]))
    return _image(forms, domain, 1 - a, a * layer.attn_factor, float(multipliers["skip"]))


def value_path(heads: Heads, multipliers: Mapping[str, Tensor]) -> float:
    """Bound ``|sum_h M_h z_h|`` over unit z_h of any directions, from ``value`` (H)."""
    identity_CC = Enclosure.exact(torch.eye(heads.o.shape[1], dtype=torch.float64))
    inner_HDD = _value_forms(heads, identity_CC, multipliers["value"])
    top = max(_outer(heads, inner_HDD).top(), 0.0)
    return round_up(math.sqrt(_total(multipliers["value"]) * top))


def _image(
    forms: _Forms, changes: Ellipsoid, skip: float, factor: float, excess: float
) -> Ellipsoid:
    """Return the ellipsoid of ``t S``, see ``attention_image``."""
    width = changes.factor_CC.shape[0]
    identity_CC = Enclosure.exact(torch.eye(width, dtype=torch.float64))
    shift, room_CC = excess, identity_CC.scaled(excess)
    if forms.change_CC is not None:
        change_CC = forms.change_CC.scaled(factor)
        shift = round_up(max(change_CC.top(), 0.0) + excess)
        room_CC = identity_CC.scaled(shift) + -change_CC
    total = round_up(shift + factor * forms.rest)
    shape_CC = forms.output_CC.scaled(factor)
    if skip:
        kept_CC = changes.enclosed.scaled(abs(skip))
        # Slightly below the excess: the shift itself was rounded.
        middle_CC = room_CC.inverse(excess / 2)
        shape_CC = shape_CC + kept_CC @ middle_CC @ kept_CC.mT
    return Ellipsoid.covering(shape_CC.scaled(total), changes.exponent)


def _forms(
    heads: Heads,
    layer: LayerConfig,
    move: Enclosure,
    domain: Ellipsoid,
    multipliers: Mapping[str, Tensor],
) -> _Forms:
    """Split the differential into quadratic forms by Cauchy-Schwarz and the multipliers.

    Let the change of a token be ``F u_j`` and a token ``X c_j``, ``|u_j|, |c_j| <= 1``. With
    ``w_h = Wo_h^T y``, ``b_h = F^T Wv_h^T w_h``, ``d_h = X^T Wv_h^T w_h`` and ``g = |c| / D`` the
    differential is at most

    ``sum_h |b_h| + g sum_h (|Wk_h X||d_h| + |Wk_h X d_h|) / 2 |Wq_h F u_i|
    + g sum_h |Wk_h F||d_h||Wq_h X c_i|`` (value, query and key path), each product split by one
    multiplier.

    Query path: RoPE makes ``a_j = Wk^T Rot_j w``, ``w = Wq F u``, differ per key, but all have
    ``|X^T a_j| <= p = |Wk X||w|`` and ``|X^T a_j . d| <= |Wk X d||w|``. Subtracting the mean of
    ``d.c`` only lowers its second moment, so ``cov(a_j.x_j, d.c_j)^2 <= E(a_j.x_j)^2 E(d.c_j)^2``.
    With ``t = |d| / p``, the root of that is at most ``E(t (a_j.x_j)^2 + (d.c_j)^2 / t) / 2``; each
    term is a form in c_j with top eigenvalue at most ``p |d| + max |X^T a_j . d|``.
    Key path: ``|ds_j| <= g |Wk F||Wq x_i|`` and ``var(d.c) <= |d|^2``, by Cauchy-Schwarz.

    Source:
        bound_tightening 4.3; deviations: the query path keeps the direction of ``d_h``, the key
        path uses ``|d_h|`` for ``|Wv_h||w_h|``, all paths share one output direction.
    """
    inner_HDD = _value_forms(heads, move, multipliers["value"])
    rest = _total(multipliers["value"])
    if not layer.content_heads:
        return _Forms(_outer(heads, inner_HDD), None, rest)
    tokens, scale, content = domain.scaled, layer.logit_scale, layer.content_heads
    query_H, key_H, mixed_H = (_column(multipliers[name]) for name in ("query", "key", "mixed"))
    k_HDC = Enclosure.exact(heads.k.repeat_interleave(layer.group, 0))
    q_HDC = Enclosure.exact(heads.q)
    seen_HDC = Enclosure.exact(heads.v[:content]) @ tokens
    k_HDX = k_HDC @ tokens
    reach_H, moved_H = _squares(k_HDX), _squares(k_HDC @ move)
    plain_H = scale * (reach_H * (1 + mixed_H) / (4 * query_H) + moved_H / key_H)
    crossed_HDD = seen_HDC @ k_HDX.mT
    cross_H = scale * (1 + 1 / mixed_H) / (4 * query_H)
    score_HDD = seen_HDC.gram().scaled(plain_H) + crossed_HDD.gram().scaled(cross_H)
    inner_HDD = _add_first(inner_HDD, score_HDD)
    change_CX = (q_HDC @ move).scaled((scale * query_H).sqrt()).mT.beside()
    token_CX = (q_HDC @ tokens).scaled((scale * key_H).sqrt()).mT.beside()
    key = token_CX.norm()
    return _Forms(_outer(heads, inner_HDD), change_CX.gram(), round_up(rest + key * key))


def _value_forms(heads: Heads, move: Enclosure, value_H: Tensor) -> Enclosure:
    """Return per head the form ``|F^T Wv^T w|^2 / value`` in w."""
    return (Enclosure.exact(heads.v) @ move).gram().scaled(1 / _column(value_H))


def _outer(heads: Heads, inner_HDD: Enclosure) -> Enclosure:
    """Return ``sum_h Wo_h inner_h Wo_h^T``."""
    o_HCD = Enclosure.exact(heads.o)
    product_CC = (o_HCD @ inner_HDD).beside() @ o_HCD.beside().mT
    return Enclosure((product_CC.mid + product_CC.mid.mT) / 2, product_CC.error)


def _add_first(all_HDD: Enclosure, first_HDD: Enclosure) -> Enclosure:
    """Add the forms of the content heads, which come first."""
    rest = [torch.zeros_like(part[len(first_HDD.mid) :]) for part in all_HDD]
    return all_HDD + Enclosure(
        torch.cat((first_HDD.mid, rest[0])), torch.cat((first_HDD.error, rest[1]))
    )


def _squares(matrices_HDC: Enclosure) -> Tensor:
    """Return the bounds on the squared spectral norms, shape (H, 1, 1)."""
    return _column(torch.tensor(matrices_HDC.norms(), dtype=torch.float64)) ** 2 * (1 + SLACK)


def _column(vector_H: Tensor) -> Tensor:
    return vector_H[:, None, None]


def _total(multipliers: Tensor) -> float:
    return round_up(sum(multipliers.flatten().tolist()))


def prove_attention(
    tensors: Mapping[str, Tensor],
    layer: LayerConfig,
    tokens: Tokens,
    multipliers: Mapping[str, Tensor],
) -> BlockBound:
    """Prove the constants of an attention block; arguments as in ``prove_block``."""
    heads, a = split_heads(tensors, layer), layer.attn_residual
    skip, factor = abs(1 - a), a * layer.attn_factor
    naive = grown(naive_attention(heads, layer, tokens.naive_radius), factor, skip)
    lipschitz = naive_attention(heads, layer, tokens.radius)
    growth = grown(heads.value_path, factor, skip)
    radius = grown(tokens.radius, growth)
    domain, tau = Ellipsoid.ball(heads.o.shape[1], radius), heads.value_path
    if multipliers:
        lipschitz = min(lipschitz, attention_bound(heads, layer, tokens.domain, multipliers))
        own = part(multipliers, "domain")
        domain, tau = attention_domain(heads, layer, tokens.domain, own), value_path(heads, own)
    return BlockBound(
        naive=naive,
        tightened=min(naive, grown(lipschitz, factor, skip)),
        tokens=Tokens(domain, min(radius, domain.radius), grown(tokens.naive_radius, growth)),
        components={"lipschitz": lipschitz, "tau": min(heads.value_path, tau)},
        margin=EIGEN_MARGIN,
    )
