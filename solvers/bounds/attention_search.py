"""Multipliers for the joint attention bound of ``attention_proof``: one convex problem per block.

The value, query and key path share the output direction, so their multipliers are found together;
a second set makes the value path alone small, for the growth of the tokens. Untrusted.
"""

# Shape letters: H query heads, K key/value heads, D head width, C model width.

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models import LayerConfig
from solvers.bounds.attention_block import HeadMatrices, head_matrices
from solvers.bounds.kform import Factor, KForm, Term, minimise

_FLOOR = 1e-30  # multiplier of a head that contributes nothing: it then costs nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSearch:
    """Multipliers as the checker wants them, and the solver's account.

    Attributes:
        multipliers: Positive float64 vectors: ``value`` (H,), and with content heads ``query``,
            ``key``, ``mixed`` (content heads,).
        growth: (H,) multipliers of the value path alone.
        dual: Lower bound of the best value of the formula at these ``mixed`` (attention map).
        evals: Eigen-decompositions of a whole objective.
        seconds: Wall time.
    """

    multipliers: dict[str, Tensor]
    growth: Tensor
    dual: float
    evals: int
    seconds: float


@torch.no_grad()
def search_attention(
    weights: Sequence[Tensor | None],
    layer: LayerConfig,
    domain_CC: Tensor,
    *,
    tol: float = 0.01,
    max_evals: int = 200,
    method: str = "halpern_anderson",
    warm: Mapping[str, Tensor] | None = None,
) -> AttentionSearch:
    """Find multipliers of one attention block.

    Args:
        weights: Query, key, value and output matrix; the first two None without content heads.
        layer: Shapes and softmax scale.
        domain_CC: Factor X of the domain: tokens are ``X c`` with ``|c| <= 1``.
        tol: Wanted duality gap relative to the first value.
        max_evals: Budget of each of the two searches.
        method: One of ``kform.METHODS``.
        warm: Multipliers of a similar block to start from; those that do not fit are ignored.
    """
    began = time.perf_counter()
    query, key, value, output = weights
    if value is None or output is None:
        raise TypeError("an attention block needs its value and output matrices")
    heads = head_matrices(query, key, value, output, layer)
    ones_H11 = heads.factor_HDC.new_ones(layer.heads, 1, 1)
    families = {"tau": (ones_H11, heads.factor_HDC)}
    warm = dict(warm or {})
    starts = {"tau": warm["growth"]} if "growth" in warm else {}
    found, dual, evals = _minimise(families, tol, max_evals, method, starts)
    growth_H = found.pop("tau")
    if layer.content_heads:
        mixed_H, families = _families(heads, layer, domain_CC)
        starts = {"value": growth_H} | warm
        found, dual, more = _minimise(families, tol, max_evals, method, starts)
        found |= {"mixed": mixed_H}
        evals += more
    return AttentionSearch(
        multipliers=found or {"value": growth_H},
        growth=growth_H,
        dual=dual,
        evals=evals,
        seconds=time.perf_counter() - began,
    )


def _families(
    heads: HeadMatrices, layer: LayerConfig, domain_CC: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return ``mixed`` and per path the matrices (input side, output side) of every head."""
    content, root = layer.content_heads, math.sqrt(layer.logit_scale)
    k_HDC = heads.key_KDC.repeat_interleave(heads.group, 0)
    k_norm_H = _norms(k_HDC)[:, None, None]
    seen_HDC = k_HDC @ domain_CC
    v_HDC = heads.value_KDC.repeat_interleave(heads.group, 0)[:content] @ domain_CC
    reach_H, value_H = _norms(seen_HDC)[:, None, None], _norms(v_HDC)[:, None, None]
    crossed_HDD = seen_HDC @ v_HDC.mT
    size_H = (reach_H * value_H).clamp(min=_FLOOR)
    mixed_H = (_norms(crossed_HDD)[:, None, None] / size_H).clamp(1e-3, 1.0)
    o_HDC = heads.output_HCD[:content].mT
    r_HDD = torch.linalg.qr(v_HDC.mT, mode="r").R
    value_HDC = r_HDD @ o_HDC
    crossed_HDC = crossed_HDD @ o_HDC * (0.5 * (1 + 1 / mixed_H).sqrt())
    plain_HDC = value_HDC * (0.5 * (1 + mixed_H).sqrt() * reach_H)
    query_HDC = heads.query_HDC * root
    return mixed_H.flatten(), {
        "value": (heads.factor_HDC.new_ones(layer.heads, 1, 1), heads.factor_HDC),
        "query": (query_HDC, torch.cat((plain_HDC, crossed_HDC), 1) * root),
        "key": (query_HDC @ domain_CC, value_HDC * (k_norm_H * root)),
    }


def _minimise(
    families: dict[str, tuple[Tensor, Tensor]],
    tol: float,
    max_evals: int,
    method: str,
    warm: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float, int]:
    """Minimise the sum of the families' input sides plus the joint output side.

    Starts from ``warm`` where it fits, else from the ratio of the norms of the two sides.

    Returns:
        The multipliers by family, the dual value and the evaluations.
    """
    terms, outer, starts, live, count = [], [], [], {}, 0
    for name, (left_H, right_H) in families.items():
        size_left_H, size_right_H = _norms(left_H), _norms(right_H)
        live[name] = (size_left_H > 0) & (size_right_H > 0)
        start_H = (size_right_H[live[name]] / size_left_H[live[name]]).log()
        if name in warm and warm[name].shape == live[name].shape:
            start_H = warm[name][live[name]].log()
        if len(start_H):
            terms.append(_term([_factor(left_H[live[name]], count, 1)]))
            outer.append(_factor(right_H[live[name]], count, -1))
        starts.append(start_H)
        count += len(start_H)
    solved, dual, evals = torch.cat(starts), 0.0, 0
    if count:
        form = KForm((*terms, _term(outer)), count)
        gap = tol * form.value(solved)
        solution = minimise(form, solved, gap=gap, max_evals=max_evals, method=method)
        solved, dual, evals = solution.theta, solution.dual, form.evals
    found = {}
    for (name, (_, right_H)), start_H in zip(families.items(), starts, strict=True):
        mine, solved = solved.split([len(start_H), len(solved) - len(start_H)])
        # A head without an output side is free; one without an input side may take anything.
        found[name] = torch.full_like(_norms(right_H), _FLOOR)
        found[name][_norms(right_H) > 0] = 1 / _FLOOR
        found[name][live[name]] = mine.exp()
    return found, dual, evals


def _factor(matrix_HRC: Tensor, first: int, sign: int) -> Factor:
    heads, rows, columns = matrix_HRC.shape
    group = first + torch.arange(heads).repeat_interleave(rows)
    return Factor(matrix_HRC.reshape(-1, columns), group, sign)


def _term(factors: list[Factor]) -> Term:
    return Term(factors[0].rows_RD.shape[1], 0.5, None, tuple(factors))


def _norms(matrix_HRC: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix_HRC, 2)
