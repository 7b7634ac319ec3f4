"""Multipliers for the multi-head attention bound on the ball of radius R.

Finds positive vectors that make each part of ``L = factor * (tau + scale R^2 (Q + Kq))`` small;
any positive values give a sound bound. Untrusted: the checker evaluates the parts again.
Source: spec bound_tightening 4.3; deviation: the key part uses ``M_h = Wo_h Wv_h`` instead of
``|Wv_h| Wo_h``, which is never larger, and also bounds the query part.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import positive
from common.errors import ConfigError, ShapeError
from common.models.config import LayerConfig
from solvers.bounds.kform import Factor, KForm, Term, minimise

# Shape letters: H query heads, K key/value heads, D head width, C model width.

_DEAD = 40.0  # log multiplier of a head without one of its two sides
_ETA_STEPS = 24  # bisections of an interval of length 2 log 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSolution:
    """Multipliers of one attention block and the bound they give.

    Attributes:
        multipliers: Positive float64 vectors: "tau" (H,) and "headwise" (H + content heads,:
            first the value maps, then the score maps) sum to one; "eta" (content KV heads,),
            "query" and "key" (content heads,) are free.
        value: Bound of the attention map (without residual) at these multipliers, without
            rounding margin.
        dual: Lower bound of the best value of the same formula (its eta part excepted).
        components: "tau", "query", "key", "query_by_key", "headwise" as they enter the formula.
        evals: Eigen-decompositions.
        seconds: Wall time.
    """

    multipliers: dict[str, Tensor]
    value: float
    dual: float
    components: dict[str, float]
    evals: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMatrices:
    """The matrices of one block, float64, one entry per head in the leading axis.

    Attributes:
        query_HDC: (content heads, D, C).
        key_KDC: (content KV heads, D, C).
        value_KDC: (K, D, C).
        output_HCD: (H, C, D).
        factor_HDC: (H, D, C) with ``factor^T factor = M_h M_h^T``, ``M_h = Wo_h Wv_h``.
        group: Query heads per KV head.
    """

    query_HDC: Tensor
    key_KDC: Tensor
    value_KDC: Tensor
    output_HCD: Tensor
    factor_HDC: Tensor
    group: int


@torch.no_grad()
def tighten_attention(
    Wq: Tensor | None,
    Wk: Tensor | None,
    Wv: Tensor,
    Wo: Tensor,
    layer: LayerConfig,
    radius: float,
    *,
    tol: float = 0.01,
    max_evals: int = 200,
    method: str = "halpern_anderson",
) -> AttentionSolution:
    """Minimise the parts of the attention bound over their multipliers.

    Args:
        Wq: (content heads * D, C), or None without content heads.
        Wk: (content KV heads * D, C), or None.
        Wv: (K * D, C).
        Wo: (C, H * D).
        layer: Shapes, softmax scale and attention factor.
        radius: l2 radius R of the tokens entering the block, >= 0.
        tol: Wanted duality gap of each part relative to its first value, > 0.
        max_evals: Budget of eigen-decompositions of each part.
        method: One of ``kform.METHODS``.

    Returns:
        Multipliers with the value they give.

    Raises:
        ShapeError: for weights that do not fit the layer.
        ConfigError: for entries that are not finite, or impossible settings.
    """
    began = time.perf_counter()
    positive("tol", tol)
    positive("radius", radius, zero=True)
    heads = head_matrices(Wq, Wk, Wv, Wo, layer)
    search = _Search(tol=tol, max_evals=max_evals, method=method)
    scale = layer.logit_scale * radius**2
    content = layer.content_heads if scale > 0 else 0
    multipliers = {"eta": heads.value_KDC.new_ones(layer.content_kv_heads)}
    multipliers |= {k: heads.value_KDC.new_ones(layer.content_heads) for k in ("query", "key")}
    parts = dict.fromkeys(("tau", "query", "key", "headwise"), 0.0)
    multipliers["tau"] = search.simplex("tau", heads.factor_HDC)
    kappa_H = heads.value_KDC.new_zeros(layer.content_heads)
    if content:
        eta_K, multipliers["eta"] = eta_bounds(heads.value_KDC[: len(heads.key_KDC)], heads.key_KDC)
        eta_H = eta_K.repeat_interleave(heads.group)
        norm_k_H = _norms(heads.key_KDC).repeat_interleave(heads.group)
        multipliers["query"] = search.pair(
            "query",
            heads.query_HDC * eta_H.sqrt()[:, None, None],
            heads.output_HCD[:content].mT * eta_H.sqrt()[:, None, None],
        )
        multipliers["key"] = search.pair(
            "key",
            heads.query_HDC * norm_k_H.sqrt()[:, None, None],
            heads.factor_HDC[:content] * norm_k_H.sqrt()[:, None, None],
        )
        norm_v_H = _norms(heads.value_KDC).repeat_interleave(heads.group)[:content]
        kappa_H = scale * _norms(heads.query_HDC) * (eta_H + norm_k_H * norm_v_H)
    score_HDC = heads.output_HCD[: layer.content_heads].mT * kappa_H[:, None, None]
    multipliers["headwise"] = search.simplex("headwise", torch.cat([heads.factor_HDC, score_HDC]))
    parts |= search.values
    duals = dict.fromkeys(parts, 0.0) | search.duals
    return AttentionSolution(
        multipliers=multipliers,
        value=layer.attn_factor * _combine(parts, scale),
        dual=layer.attn_factor * _combine(duals, scale),
        components=parts,
        evals=search.evals,
        seconds=time.perf_counter() - began,
    )


def head_matrices(
    Wq: Tensor | None, Wk: Tensor | None, Wv: Tensor, Wo: Tensor, layer: LayerConfig
) -> HeadMatrices:
    """Split the weights of one block by head and convert them to float64 on the CPU.

    Raises:
        ShapeError: for weights that do not fit the layer.
        ConfigError: for entries that are not finite.
    """
    width, dim = Wo.shape[0], layer.head_dim
    wanted = {
        "Wq": (Wq, (layer.content_heads * dim, width)),
        "Wk": (Wk, (layer.content_kv_heads * dim, width)),
        "Wv": (Wv, (layer.kv_heads * dim, width)),
        "Wo": (Wo, (width, layer.heads * dim)),
    }
    ready = {}
    for name, (weight, shape) in wanted.items():
        if weight is None and shape[0] == 0:
            weight = Wo.new_zeros(shape)
        if weight is None or tuple(weight.shape) != shape:
            got = None if weight is None else tuple(weight.shape)
            raise ShapeError(f"{name}: expected {shape}, got {got}; the layer has other heads")
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(f"{name}: expected finite entries; the weights hold NaN or infinity")
        ready[name] = weight.detach().double().cpu()
    value_KDC = ready["Wv"].view(-1, dim, width)
    output_HCD = ready["Wo"].view(width, -1, dim).transpose(0, 1).contiguous()
    # Wv^T = q r, so M M^T = (Wo r^T)(Wo r^T)^T with a factor of D columns.
    r_KDD = torch.linalg.qr(value_KDC.mT, mode="r").R
    factor_HDC = r_KDD.repeat_interleave(layer.group, 0) @ output_HCD.mT
    return HeadMatrices(
        query_HDC=ready["Wq"].view(-1, dim, width),
        key_KDC=ready["Wk"].view(-1, dim, width),
        value_KDC=value_KDC,
        output_HCD=output_HCD,
        factor_HDC=factor_HDC,
        group=layer.group,
    )


def eta_bounds(value_KDC: Tensor, key_KDC: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise ``lambda_max(t Wv^T Wv + Wk^T Wk / t) / 2`` over ``t > 0`` for every KV head.

    Args:
        value_KDC: (K, D, C) float64.
        key_KDC: (K, D, C) float64.

    Returns:
        The minimal values (K,), which bound ``max_u |Wv u| |Wk u|``, and their ``t`` (K,).
    """
    norm_v_K, norm_k_K = _norms(value_KDC), _norms(key_KDC)
    dead_K = (norm_v_K == 0) | (norm_k_K == 0)
    centre_K = torch.where(dead_K, 0.0, norm_k_K.log() - norm_v_K.log())
    low_K, high_K = centre_K - math.log(2), centre_K + math.log(2)
    best_K, best_t_K = torch.full_like(centre_K, math.inf), centre_K.exp()
    for _ in range(_ETA_STEPS):
        middle_K = (low_K + high_K) / 2
        half_K = (middle_K / 2).exp()[:, None, None]
        rows = torch.cat([value_KDC * half_K, key_KDC / half_K], dim=1)
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        top_K = values[:, -1] / 2
        better_K = top_K < best_K
        best_K = torch.where(better_K, top_K, best_K)
        best_t_K = torch.where(better_K, middle_K.exp(), best_t_K)
        # The derivative in log t is the value part's share minus the key part's.
        share_K = vectors[:, : value_KDC.shape[1], -1].square().sum(-1)
        low_K, high_K = (
            torch.where(share_K < 0.5, middle_K, low_K),
            torch.where(share_K < 0.5, high_K, middle_K),
        )
    return torch.where(dead_K, 0.0, best_K), best_t_K


class _Search:
    """Solves the parts one after the other and collects values, duals and evaluations."""

    def __init__(self, *, tol: float, max_evals: int, method: str) -> None:
        self.tol, self.max_evals, self.method = tol, max_evals, method
        self.values: dict[str, float] = {}
        self.duals: dict[str, float] = {}
        self.evals = 0

    def simplex(self, name: str, right_HDC: Tensor) -> Tensor:
        """Return p (sum 1) minimising ``sqrt lambda_max(sum_h R_h^T R_h / p_h)``."""
        theta_H = self._solve(name, right_HDC.new_ones(len(right_HDC), 1, 1), right_HDC)
        return torch.softmax(theta_H, 0)

    def pair(self, name: str, left_HDC: Tensor, right_HDC: Tensor) -> Tensor:
        """Return t minimising the mean of the two eigenvalues, scaled so that they agree."""
        return self._solve(name, left_HDC, right_HDC).exp()

    def _solve(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        size_left, size_right = _norms(left), _norms(right)
        live = (size_left > 0) & (size_right > 0)
        # A dead head contributes nothing; its multiplier keeps it from costing the others.
        theta = torch.full_like(size_left, _DEAD).masked_fill_(size_right == 0, -_DEAD)
        self.values[name] = self.duals[name] = 0.0
        if not bool(live.any()):
            return theta * 0
        start = (size_right[live] / size_left[live]).log()
        form = pair_objective(left[live], right[live])
        gap = self.tol * form.value(start)
        solved = minimise(form, start, gap=gap, max_evals=self.max_evals, method=self.method)
        low, high = form.eigenvalues(solved.theta)
        self.values[name] = math.sqrt(low * high)
        self.duals[name] = min(solved.dual, self.values[name])
        self.evals += form.evals
        theta[live] = solved.theta + 0.5 * math.log(high / low)
        return theta


def pair_objective(left_HDC: Tensor, right_HDC: Tensor) -> KForm:
    """Return ``[lambda_max(sum e^theta_h L_h^T L_h) + lambda_max(sum e^-theta_h R_h^T R_h)] / 2``.

    Args:
        left_HDC: (H, rows, columns) float64.
        right_HDC: (H, rows, columns) float64; the sizes may differ from those of ``left_HDC``.
    """
    terms = []
    for matrix, sign in ((left_HDC, 1), (right_HDC, -1)):
        count, rows, columns = matrix.shape
        factor = Factor(
            rows_RD=matrix.reshape(count * rows, columns).contiguous(),
            group_R=torch.arange(count).repeat_interleave(rows),
            sign=sign,
        )
        terms.append(Term(dim=columns, weight=0.5, constant_DD=None, factors=(factor,)))
    return KForm(tuple(terms), left_HDC.shape[0])


def _combine(parts: dict[str, float], scale: float) -> float:
    """Return the smaller of the shared-query and the head-wise bound, without the factor."""
    shared = parts["tau"] + scale * (min(parts["query"], parts["key"]) + parts["key"])
    return min(shared, parts["headwise"])


def _norms(matrix: Tensor) -> Tensor:
    """Return the spectral norm of each matrix in a batch; an empty batch gives an empty vector."""
    if matrix.shape[0] == 0:
        return matrix.new_zeros(0)
    return torch.linalg.matrix_norm(matrix, 2)
