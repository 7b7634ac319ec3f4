"""Which components to keep: subset-fidelity scores on the Gram matrix of a linear map.

Every score is a function ``(problem, keep, seed) -> Ranking`` in ``SCORES``. The default ``obs``
is backward elimination with exact costs (optimal brain surgeon form), in pooled lazy blocks;
``singleton`` is the published score. Source: arXiv 2511.19566, with block components and the
backward form of our own.
"""

# Legend: I inputs, O outputs, U inputs per component, N components, P pooled inputs.

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import one_of
from common.errors import ConfigError
from compress.targets import Problem, block_indices, diagonal_blocks

POOL_FACTOR = 4
"""Pool size over block size: smaller pools remove both members of a redundant pair."""
MAX_BLOCK = 64
RIDGE_LIMIT = 1e-2
"""Largest ridge tried where a smaller one fails, relative to the mean diagonal."""
FLOOR = 1e-300
"""Ridge of a Gram that is exactly zero: a layer whose neurons never fire."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ranking:
    """An order of removal and the error it costs.

    Attributes:
        components: Number of components of the problem.
        order: Component indices, first removed first; may stop early.
        curve: Mean squared output error after removing the first ``r`` components and refitting
            the rest by (ridge) least squares; ``len(order) + 1`` values, the first one 0.
    """

    components: int
    order: Tensor
    curve: Tensor

    def kept(self, keep: int) -> Tensor:
        """Return the component indices that remain when ``keep`` are kept, ascending.

        Raises:
            ConfigError: if the ranking stopped before that many were removed.
        """
        removed = self.components - keep
        if not 0 <= removed <= len(self.order):
            raise ConfigError(
                f"keep={keep}: the ranking covers {self.components - len(self.order)} to "
                f"{self.components} components; rank again with a smaller keep"
            )
        mask = torch.ones(self.components, dtype=torch.bool)
        mask[self.order[:removed].cpu()] = False
        return mask.nonzero().flatten()


Score = Callable[[Problem, int, int], Ranking]
SCORES: dict[str, Score] = {}


def rank(problem: Problem, score: str = "obs", *, keep: int = 0, seed: int = 0) -> Ranking:
    """Order the components of a problem for removal.

    Args:
        problem: Gram and weight, float64.
        score: Name in ``SCORES``.
        keep: Components that need not be ranked any more (the smallest number to be kept).
        seed: Used by ``random`` only.

    Returns:
        The order and its error curve. Components without any energy come first, at no cost.

    Raises:
        ConfigError: for an unknown score.
    """
    one_of("compress.score", score, SCORES)
    return SCORES[score](problem, keep, seed)


def regular_cholesky(gram_II: Tensor, penalty: float) -> Tensor:
    """Return the Cholesky factor of ``gram + penalty I``, raising the penalty where it fails.

    Raises:
        ConfigError: when even a hundredth of the mean diagonal does not make it definite.
    """
    mean = float(gram_II.diagonal().mean())
    identity = torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    ridge = penalty
    while ridge <= max(RIDGE_LIMIT * mean, penalty, FLOOR):
        factor_II, info = torch.linalg.cholesky_ex(gram_II + ridge * identity)
        if not info:
            return factor_II
        ridge = max(10 * ridge, 1e-12 * mean, FLOOR)
    raise ConfigError(
        f"Gram matrix (size {len(gram_II)}) is not positive semi-definite or not finite; "
        "calibrate with more tokens"
    )


def block_costs(inverse_II: Tensor, weight_IO: Tensor, unit: int) -> Tensor:
    """Return the exact error increase of removing each single component.

    Args:
        inverse_II: Inverse of the (ridged) Gram of the remaining inputs.
        weight_IO: Their current, already compensated weights.
        unit: Inputs per component.

    Returns:
        ``tr(V_h' H_hh^{-1} V_h)`` per component (N).
    """
    if unit == 1:
        return weight_IO.square().sum(1) / inverse_II.diagonal()
    factors_NUU = torch.linalg.cholesky(diagonal_blocks(inverse_II, unit))
    blocks_NUO = weight_IO.reshape(-1, unit, weight_IO.shape[1])
    white_NUO = torch.linalg.solve_triangular(factors_NUU, blocks_NUO, upper=False)
    return white_NUO.square().sum((1, 2))


def exact_curve(problem: Problem, order: Tensor) -> Tensor:
    """Return the refitted error after each removal of a given complete order.

    One Cholesky factorisation in the opposite order does it: with ``G = L L'`` the rows of
    ``L' W`` hold what each component adds to the ones kept before it.

    Args:
        problem: Gram and weight.
        order: Every component once, first removed first.

    Returns:
        Error after removing the first ``r`` components, r = 0 .. N.
    """
    inputs = block_indices(order.flip(0), problem.unit)
    factor_II = regular_cholesky(problem.gram_II[inputs][:, inputs], problem.penalty)
    added_I = (factor_II.T @ problem.weight_IO[inputs]).square().sum(1)
    added_N = added_I.reshape(-1, problem.unit).sum(1).flip(0)
    return torch.cat([added_N.new_zeros(1), added_N.cumsum(0)])


def _eliminate_obs(problem: Problem, keep: int, seed: int) -> Ranking:
    """Backward elimination in rounds of a few components (see ``_round``)."""
    dead = _dead_components(problem)
    alive = torch.ones(problem.components, dtype=torch.bool, device=dead.device)
    alive[dead] = False
    left = alive.nonzero().flatten()
    order, costs = [dead], [torch.zeros_like(dead, dtype=problem.gram_II.dtype)]
    inputs = block_indices(left, problem.unit)
    weight_IO = problem.weight_IO[inputs]
    if len(left) > keep:
        gram_II = problem.gram_II[inputs][:, inputs]
        inverse_II = torch.cholesky_inverse(regular_cholesky(gram_II, problem.penalty))
    step = min(MAX_BLOCK, max(1, problem.components // 16))
    while len(left) > keep:
        chosen, cost = _round(inverse_II, weight_IO, problem.unit, min(step, len(left) - keep))
        order.append(left[chosen])
        costs.append(cost)
        stay = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stay[chosen] = False
        inverse_II, weight_IO = _remove(inverse_II, weight_IO, stay, problem.unit)
        left = left[stay]
    count = max(problem.components - keep, 0)
    curve = torch.cat(costs)[:count].cumsum(0)
    return Ranking(
        components=problem.components,
        order=torch.cat(order)[:count],
        curve=torch.cat([curve.new_zeros(1), curve]),
    )


def _round(inverse_II: Tensor, weight_IO: Tensor, unit: int, count: int) -> tuple[Tensor, Tensor]:
    """Choose ``count`` components one after the other among the cheapest ``4 count``.

    Only the pool's own rows are kept up to date inside the round; the caller updates the rest
    once. Returns positions (in order of removal) and exact costs.
    """
    pool = block_costs(inverse_II, weight_IO, unit).argsort(stable=True)[: POOL_FACTOR * count]
    inputs = block_indices(pool, unit)
    inverse_PP = inverse_II[inputs][:, inputs]
    weight_PO = weight_IO[inputs]
    taken = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
    identity = torch.eye(unit, dtype=inverse_PP.dtype, device=inverse_PP.device)
    picks, costs = [], []
    for _ in range(count):
        cost = block_costs(inverse_PP, weight_PO, unit).masked_fill(taken, torch.inf)
        pick = int(cost.argmin())
        rows = slice(pick * unit, (pick + 1) * unit)
        ratio_UP = torch.linalg.solve(inverse_PP[rows, rows], inverse_PP[rows])
        weight_PO -= ratio_UP.T @ weight_PO[rows]
        inverse_PP -= ratio_UP.T @ inverse_PP[rows].clone()
        inverse_PP[rows] = 0
        inverse_PP[:, rows] = 0
        inverse_PP[rows, rows] = identity
        weight_PO[rows] = 0
        taken[pick] = True
        picks.append(pick)
        costs.append(cost[pick])
    return pool[torch.tensor(picks, device=pool.device)], torch.stack(costs)


def _remove(
    inverse_II: Tensor, weight_IO: Tensor, stay: Tensor, unit: int
) -> tuple[Tensor, Tensor]:
    """Eliminate the components outside ``stay`` and return the state of the others."""
    gone = block_indices((~stay).nonzero().flatten(), unit)
    rest = block_indices(stay.nonzero().flatten(), unit)
    cross = inverse_II[gone][:, rest]
    factor = torch.linalg.cholesky(inverse_II[gone][:, gone])
    ratio = torch.cholesky_solve(cross, factor)
    return inverse_II[rest][:, rest] - cross.T @ ratio, weight_IO[rest] - ratio.T @ weight_IO[gone]


def _dead_components(problem: Problem) -> Tensor:
    silent_N = problem.gram_II.diagonal().reshape(-1, problem.unit).sum(1) <= 0
    return silent_N.nonzero().flatten()


def _by_score(values: Callable[[Problem, int], Tensor]) -> Score:
    """Turn a score per component (higher is kept longer) into a ranking."""

    def ranking(problem: Problem, keep: int, seed: int) -> Ranking:
        score_N = values(problem, seed).clone()
        score_N[_dead_components(problem)] = -torch.inf
        order = score_N.argsort(stable=True)
        curve = exact_curve(problem, order)
        return Ranking(components=problem.components, order=order, curve=curve)

    return ranking


def _singleton(problem: Problem, seed: int) -> Tensor:
    """Fidelity of each component alone, over the whole layer: correlation with the output."""
    together_NUO = (problem.gram_II @ problem.weight_IO).reshape(
        problem.components, problem.unit, -1
    )
    own_NUU = torch.linalg.pinv(diagonal_blocks(problem.gram_II, problem.unit), hermitian=True)
    return torch.einsum("nuo,nuv,nvo->n", together_NUO, own_NUU, together_NUO)


def _energy(problem: Problem, seed: int) -> Tensor:
    """Mean square of each component's own contribution."""
    blocks_NUO = problem.weight_IO.reshape(problem.components, problem.unit, -1)
    own_NUU = diagonal_blocks(problem.gram_II, problem.unit)
    return torch.einsum("nuo,nuv,nvo->n", blocks_NUO, own_NUU, blocks_NUO)


def _magnitude(problem: Problem, seed: int) -> Tensor:
    return problem.weight_IO.square().sum(1).reshape(-1, problem.unit).sum(1)


def _random(problem: Problem, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(problem.components, generator=generator, dtype=torch.float64)
    return noise.to(problem.gram_II.device)


SCORES.update(
    obs=_eliminate_obs,
    singleton=_by_score(_singleton),
    energy=_by_score(_energy),
    magnitude=_by_score(_magnitude),
    random=_by_score(_random),
)
