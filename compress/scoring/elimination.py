"""Which components to keep, one decision after the other with exact costs.

``eliminate`` removes the cheapest component again and again (optimal brain surgeon form, pooled
lazy rounds); ``select`` adds the most useful one again and again (orthogonal pivoted form). Both
leave a Schur complement and the weights or pulls that belong to it in place, so that all large
updates are matrix products. Source: own derivation from the Gram identity of linear maps.
"""

# Legend: I inputs, O outputs, U inputs per component, N components, P pooled inputs,
# S inputs selected in the present round.

import torch
from torch import Tensor

from common.errors import ConfigError
from compress.targets import Problem, block_indices, diagonal_blocks

POOL_FACTOR = 4
"""Pool size over round size: smaller pools remove both members of a redundant pair."""
MAX_ROUND = 64
RIDGE_LIMIT = 1e-2
"""Largest ridge tried where a smaller one fails, relative to the mean diagonal."""
LEAST_RIDGE = 1e-12
"""Smallest ridge of the forward selection: gains of exact duplicates stay defined."""
FLOOR = 1e-300
"""Ridge of a Gram that is exactly zero: a layer whose neurons never fire."""


def regular_cholesky(gram_II: Tensor, penalty: float) -> Tensor:
    """Return the Cholesky factor of ``gram + penalty I``, raising the penalty where it fails.

    Raises:
        ConfigError: when even a hundredth of the mean diagonal does not make it definite.
    """
    mean = float(gram_II.diagonal().mean())
    ridge = penalty
    while ridge <= max(RIDGE_LIMIT * mean, penalty, FLOOR):
        factor_II, info = torch.linalg.cholesky_ex(_ridged(gram_II, ridge))
        if not info:
            return factor_II
        ridge = max(10 * ridge, 1e-12 * mean, FLOOR)
    raise ConfigError(
        f"Gram matrix (size {len(gram_II)}) is not positive semi-definite or not finite; "
        "calibrate with more tokens"
    )


def silent_components(problem: Problem) -> Tensor:
    """Return which components are 0 on all data (bool, N)."""
    return problem.gram_II.diagonal().reshape(-1, problem.unit).sum(1) <= 0


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


def eliminate(problem: Problem, keep: int) -> tuple[Tensor, Tensor]:
    """Remove components, the cheapest first, until ``keep`` are left.

    Rounds of a few components: each takes a pool of the cheapest, eliminates exactly inside the
    pool, and then updates everybody else once.

    Args:
        problem: Gram and weight.
        keep: Components that need not be ranked.

    Returns:
        Components in order of removal, silent ones first, and what each removal adds to the
        error of the refitted rest (ridge included).
    """
    unit = problem.unit
    silent_N = silent_components(problem)
    dead, left = silent_N.nonzero().flatten(), (~silent_N).nonzero().flatten()
    order, costs = [dead], [torch.zeros_like(dead, dtype=problem.gram_II.dtype)]
    inputs = block_indices(left, unit)
    weight_IO = problem.weight_IO[inputs]
    if len(left) > keep:
        gram_II = problem.gram_II[inputs][:, inputs]
        inverse_II = torch.cholesky_inverse(regular_cholesky(gram_II, problem.penalty))
    step = min(MAX_ROUND, max(1, problem.components // 16))
    while len(left) > keep:
        chosen, cost = _round(inverse_II, weight_IO, unit, min(step, len(left) - keep))
        order.append(left[chosen])
        costs.append(cost)
        gone = block_indices(chosen, unit)
        rows_PI = inverse_II[gone]
        root_PP = torch.linalg.cholesky(rows_PI[:, gone])
        white_PI = torch.linalg.solve_triangular(root_PP, rows_PI, upper=False)
        white_PO = torch.linalg.solve_triangular(root_PP, weight_IO[gone], upper=False)
        inverse_II.addmm_(white_PI.T, white_PI, alpha=-1)
        weight_IO.addmm_(white_PI.T, white_PO, alpha=-1)
        inverse_II, weight_IO, left = _close_gaps(inverse_II, weight_IO, left, chosen, unit)
    count = max(problem.components - keep, 0)
    return torch.cat(order)[:count], torch.cat(costs)[:count]


def _round(inverse_II: Tensor, weight_IO: Tensor, unit: int, count: int) -> tuple[Tensor, Tensor]:
    """Choose ``count`` components one after the other among the cheapest ``4 count``.

    Only the pool's own rows are kept up to date inside the round. Returns positions (in order of
    removal) and exact costs.
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
        weight_PO.addmm_(ratio_UP.T, weight_PO[rows].clone(), alpha=-1)
        inverse_PP.addmm_(ratio_UP.T, inverse_PP[rows].clone(), alpha=-1)
        inverse_PP[rows] = 0
        inverse_PP[:, rows] = 0
        inverse_PP[rows, rows] = identity
        weight_PO[rows] = 0
        taken[pick] = True
        picks.append(pick)
        costs.append(cost[pick])
    return pool[torch.tensor(picks, device=pool.device)], torch.stack(costs)


def select(problem: Problem) -> Tensor:
    """Order components by forward selection, the most useful first.

    Each step takes the component whose addition lowers the refitted error most, given those
    already taken. The gains of all others are exact at every step; the Schur complement is
    brought up to date only once per round.

    Args:
        problem: Gram and weight.

    Returns:
        All components, first selected first. Those that add nothing come last.
    """
    unit = problem.unit
    silent_N = silent_components(problem)
    left = (~silent_N).nonzero().flatten()
    inputs = block_indices(left, unit)
    least = LEAST_RIDGE * float(problem.gram_II.diagonal().max())
    rest_II = _ridged(problem.gram_II[inputs][:, inputs], max(problem.penalty, least))
    pull_IO = rest_II @ problem.weight_IO[inputs]
    order = []
    while len(left):
        added = _Additions(rest_II, pull_IO, unit, min(MAX_ROUND, len(left)))
        while added.grow():
            pass
        if not added.picks:
            break
        chosen = torch.tensor(added.picks, device=left.device)
        order.append(left[chosen])
        rest_II.addmm_(added.factor_IS, added.factor_IS.T, alpha=-1)
        pull_IO.addmm_(added.factor_IS, added.white_SO, alpha=-1)
        rest_II, pull_IO, left = _close_gaps(rest_II, pull_IO, left, chosen, unit)
    return torch.cat([*order, left, silent_N.nonzero().flatten()])


class _Additions:
    """Some selections in a row, with exact gains, while the large matrices stay as they are.

    Args:
        rest_II: Schur complement of the Gram at the beginning.
        pull_IO: The same of the product of Gram and weights.
        unit: Inputs per component.
        count: Components to select at most.

    Attributes:
        picks: Selected positions.
    """

    def __init__(self, rest_II: Tensor, pull_IO: Tensor, unit: int, count: int):
        self.rest_II, self.pull_IO, self.unit, self.count = rest_II, pull_IO, unit, count
        self.picks: list[int] = []
        self._factor_IS = rest_II.new_empty(len(rest_II), count * unit)
        self._white_SO = pull_IO.new_empty(count * unit, pull_IO.shape[1])
        pull_NUO = pull_IO.reshape(-1, unit, pull_IO.shape[1])
        self._own_NUU = diagonal_blocks(rest_II, unit).clone()
        self._square_NUU = torch.einsum("nuo,nvo->nuv", pull_NUO, pull_NUO)

    @property
    def factor_IS(self) -> Tensor:
        """``F``: the picks change the Schur complement to ``rest - F F'``."""
        return self._factor_IS[:, : len(self.picks) * self.unit]

    @property
    def white_SO(self) -> Tensor:
        """``Z``: and the pull to ``pull - F Z``."""
        return self._white_SO[: len(self.picks) * self.unit]

    def grow(self) -> bool:
        """Select the component with the largest gain; False when done or nothing gains."""
        best = self._best() if len(self.picks) < self.count else None
        if best is None:
            return False
        pick, pull_UO = best
        rows = self._rows(pick)
        factor_IS, white_SO = self.factor_IS, self.white_SO
        column_IU = self.rest_II[rows].T - factor_IS @ factor_IS[rows].T
        root_UU = torch.linalg.cholesky(column_IU[rows])
        column_IU = torch.linalg.solve_triangular(root_UU.T, column_IU, upper=True, left=False)
        white_UO = torch.linalg.solve_triangular(root_UU, pull_UO, upper=False)
        match_IU = self.pull_IO @ white_UO.T - factor_IS @ (white_SO @ white_UO.T)
        self._lower(column_IU, match_IU, white_UO @ white_UO.T)
        now = slice(white_SO.shape[0], white_SO.shape[0] + self.unit)
        self._factor_IS[:, now], self._white_SO[now] = column_IU, white_UO
        self.picks.append(pick)
        return True

    def _rows(self, pick: int) -> slice:
        return slice(pick * self.unit, (pick + 1) * self.unit)

    def _best(self) -> tuple[int, Tensor] | None:
        """Return the best component with its pull: inside a round, norms are differences."""
        gains_N = self._gains(slice(None))
        gains_N[self.picks] = 0
        pick, chosen = int(gains_N.argmax()), -1
        while pick != chosen and gains_N[pick] > 0:
            chosen, rows = pick, self._rows(pick)
            pull_UO = self.pull_IO[rows] - self.factor_IS[rows] @ self.white_SO
            self._square_NUU[pick] = pull_UO @ pull_UO.T
            gains_N[pick] = self._gains(slice(pick, pick + 1))[0]
            pick = int(gains_N.argmax())
        return (pick, pull_UO) if gains_N[pick] > 0 else None

    def _gains(self, part: slice) -> Tensor:
        """Return what adding each single component lowers the error by; 0 where dependent."""
        own_NUU, square_NUU = self._own_NUU[part], self._square_NUU[part]
        if self.unit == 1:
            own_N, square_N = own_NUU.flatten(), square_NUU.flatten()
            return torch.where(own_N > 0, square_N / own_N, 0)
        root_NUU, info_N = torch.linalg.cholesky_ex(own_NUU)
        solved_NUU = torch.cholesky_solve(square_NUU, root_NUU)
        return torch.where(info_N == 0, solved_NUU.diagonal(dim1=1, dim2=2).sum(1), 0)

    def _lower(self, new_IU: Tensor, match_IU: Tensor, white_UU: Tensor) -> None:
        """Subtract what a selection takes from the blocks of both matrices' squares."""
        unit = self.unit
        if unit == 1:
            new_N, match_N = new_IU[:, 0], match_IU[:, 0]
            self._own_NUU[:, 0, 0] -= new_N.square()
            self._square_NUU[:, 0, 0] -= new_N * (2 * match_N - white_UU[0, 0] * new_N)
            return
        new_NUU, match_NUU = new_IU.reshape(-1, unit, unit), match_IU.reshape(-1, unit, unit)
        cross_NUU = match_NUU @ new_NUU.mT
        self._own_NUU -= new_NUU @ new_NUU.mT
        self._square_NUU -= cross_NUU + cross_NUU.mT - new_NUU @ white_UU @ new_NUU.mT


def _close_gaps(
    square_II: Tensor, rows_IO: Tensor, left: Tensor, gone: Tensor, unit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the last survivors onto the positions ``gone``, in place, and return the front part."""
    size = len(left) - len(gone)
    last = torch.ones(len(gone), dtype=torch.bool, device=left.device)
    last[gone[gone >= size] - size] = False
    source, target = last.nonzero().flatten() + size, gone[gone < size]
    left[target] = left[source]
    source, target = block_indices(source, unit), block_indices(target, unit)
    rows_IO[target] = rows_IO[source]
    square_II[target] = square_II[source]
    square_II[:, target] = square_II[:, source]
    front = size * unit
    return square_II[:front, :front], rows_IO[:front], left[:size]


def _ridged(gram_II: Tensor, ridge: float) -> Tensor:
    ridged_II = gram_II.clone()
    ridged_II.diagonal().add_(ridge)
    return ridged_II
