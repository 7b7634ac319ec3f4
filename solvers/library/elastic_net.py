"""Elastic net: a sum over rows plus a penalty that is known through its resolvent."""

import torch

from solvers.finite_sum import FiniteSumInclusion
from solvers.library.known import KnownProblem, distance_to, normal, problem, uniform, zeros
from solvers.library.least_squares import row_mean, row_sum
from solvers.resolvents import ElasticNet

# Shape letters: N rows (components), D unknowns.


@problem("elastic_net", size=40)
def elastic_net(
    size: int,
    generator: torch.Generator,
    *,
    components: int = 128,
    lasso: float = 0.1,
    ridge: float = 0.05,
) -> KnownProblem:
    """``min mean_i (a_i^T x - b_i)^2 / 2 + lasso |x|_1 + ridge |x|^2 / 2`` with a planted solution.

    Args:
        size: Unknowns, a third of which are not zero.
        generator: Of the data.
        components: Rows; at least as many as unknowns.
        lasso: Weight of the absolute values, above 0.
        ridge: Weight of the squares, above 0.
    """
    components = max(components, size)
    a_ND = normal(generator, components, size)
    solution = normal(generator, size)
    solution = solution + 0.2 * solution.sign()
    sign = solution.sign()
    support = torch.arange(size) % 3 == 0
    # Off the support any subgradient strictly inside (-1, 1) makes the zero optimal.
    sign = torch.where(support, sign, 1.6 * uniform(generator, size) - 0.8)
    solution = torch.where(support, solution, 0.0)
    # The data's misfit is chosen so that its gradient cancels the penalty's subgradient.
    wanted = -(lasso * sign + ridge * solution) * components
    b_N = a_ND @ solution - torch.linalg.lstsq(a_ND.T, wanted[:, None]).solution[:, 0]
    sizes = torch.linalg.svdvals(a_ND)
    inclusion = FiniteSumInclusion(
        components=row_sum(a_ND, b_N),
        num_components=components,
        start=zeros(size),
        resolvent=ElasticNet(lasso, ridge),
        lipschitz_bound=float(sizes[0]) ** 2 / components,
        component_lipschitz=a_ND.square().sum(1),
        cocoercive=True,
        mean=row_mean(a_ND, b_N),
    )
    modulus = ridge + float(sizes[-1]) ** 2 / components
    return KnownProblem(problem=inclusion, kind="cocoercive", **distance_to(solution, modulus))
