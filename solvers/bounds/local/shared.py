"""Multipliers of local MLP bounds that all tokens of a sequence share; untrusted.

``min_theta (1/M) sum_t lambda_max(K_t(theta))`` over some tokens: a finite sum of convex terms, one
eigen-decomposition each. Source: spec bound_tightening 6.4.
"""

# Legend: N neurons or MaxMin pairs, M cells (tokens), C width.

from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.bounds.admissible import MULTIPLIER_RANGE
from solvers.bounds.kform import METHODS, Factor, KForm, Term, minimise
from solvers.bounds.local.blocks import MlpKnown
from solvers.finite_sum import FiniteSumInclusion
from solvers.iterate import solve

SHARED_METHODS = (*METHODS, "vr_halpern")
"""Solvers of the shared multipliers; the last samples tokens."""

_WORTH = 0.9  # of the certified constant: above it a K-form per token is not worth its time
_SMOOTHING = 0.02  # mu of the sampled solver, relative to the first value


def shared_multipliers(
    known: MlpKnown,
    start_N: Tensor,
    tokens_M: Tensor,
    ceiling: float,
    *,
    method: str,
    tol: float,
    max_evals: int,
) -> Tensor | None:
    """Return multipliers that make the mean K-form of some tokens small.

    Args:
        known: An MLP block while its tokens stay within reach.
        start_N: First multipliers, positive float64.
        tokens_M: Tokens whose mean counts.
        ceiling: Certified constant of the block.
        method: One of ``SHARED_METHODS``.
        tol: Wanted duality gap relative to the first value; of ``vr_halpern`` the residual.
        max_evals: Eigen-decompositions of all cells.

    Returns:
        Positive float64 multipliers (N,), or None where the certified constant is as good.
    """
    forms = [token_form(known, t) for t in tokens_M.tolist()]
    # No multipliers bring a K-form below the norm of its constant part.
    floor = [float(torch.linalg.matrix_norm(_centre(known, t), 2)) for t in tokens_M.tolist()]
    if sum(floor) / len(floor) > _WORTH * ceiling:
        return None
    form, theta_N = joined(forms), start_N.log()
    first = form.value(theta_N)
    if method == "vr_halpern":
        problem = shared_sum(forms, theta_N, _SMOOTHING * first)
        result = solve(problem, method, rtol=tol, max_calls=max_evals * len(forms))
        form.value(result.value)
        theta_N, value = form.best_theta, form.best
    else:
        found = minimise(form, theta_N, gap=tol * first, max_evals=max_evals, method=method)
        theta_N, value = found.theta, found.primal
    if value > _WORTH * ceiling:
        return None
    return theta_N.exp().clamp(*MULTIPLIER_RANGE)


def token_form(known: MlpKnown, t: int) -> KForm:
    """Return the K-form of one token: largest eigenvalue as a function of log multipliers."""
    block, root_N1 = known.around.map, known.slopes.spread_TN[t].sqrt()[:, None]
    width, count = block.linear_CC.shape[0], len(block.inner_NC)
    c_CC, index_N = _centre(known, t), torch.arange(count)
    zeros_CC = torch.zeros_like(c_CC)
    constant = torch.cat((torch.cat((zeros_CC, c_CC.T), 1), torch.cat((c_CC, zeros_CC), 1)))
    factors = (
        Factor((block.inner_NC * root_N1).contiguous(), index_N, 1, 0),
        Factor((block.outer_CN.T * root_N1).contiguous(), index_N, -1, width),
    )
    return KForm((Term(2 * width, 1.0, constant, factors),), count)


def joined(forms: Sequence[KForm]) -> KForm:
    """Return the mean of some forms in the same multipliers as one objective."""
    terms = tuple(
        term._replace(weight=term.weight / len(forms)) for form in forms for term in form.terms
    )
    return KForm(terms, forms[0].num_multipliers)


def shared_sum(forms: Sequence[KForm], theta_N: Tensor, mu: float) -> FiniteSumInclusion:
    """Return ``0 = mean of the smoothed gradients`` as a sum whose components can be sampled.

    Args:
        forms: One per token.
        theta_N: Start, log multipliers.
        mu: Smoothing.
    """

    def components(point_N: Tensor, index_M: Tensor, weight_M: Tensor) -> Tensor:
        total_N = torch.zeros_like(point_N)
        for index, weight in zip(index_M.tolist(), weight_M.tolist(), strict=True):
            total_N += weight * forms[index].gradient(point_N, mu)
        return total_N

    curvature = []
    for form in forms:
        p_N, q_N = form.moments(theta_N, mu)
        curvature.append(4 * float((theta_N.exp() * p_N + (-theta_N).exp() * q_N).max()) or 1.0)
    return FiniteSumInclusion(
        components=components,
        num_components=len(forms),
        start=theta_N,
        lipschitz_est=sum(curvature) / len(curvature),
        component_lipschitz=torch.tensor(curvature, dtype=torch.float64),
        cocoercive=True,
    )


def _centre(known: MlpKnown, t: int) -> Tensor:
    block = known.around.map
    return block.linear_CC + (block.outer_CN * known.slopes.mid_TN[t]) @ block.inner_NC
