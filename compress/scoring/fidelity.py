"""Which components to keep, and how much of a layer's output a set of them can rebuild.

Every score is a function ``(problem, keep, seed) -> Ranking`` in ``SCORES``. The default ``obs``
is backward elimination with exact costs; ``singleton`` is the published score. Source: arXiv
2511.19566, with block components and the eliminations of our own.
"""

# Legend: I inputs, O outputs, K kept inputs, N components.

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from common.config import one_of
from common.errors import ConfigError
from compress.compensate import compensate, output_errors
from compress.scoring.elimination import eliminate, regular_cholesky, select, silent_components
from compress.scoring.scores import ONE_PASS, Values, output_energies
from compress.targets import Problem, block_indices


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
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


def output_fidelity(problem: Problem, kept_N: Tensor) -> Tensor:
    """Return the share of each output's mean square that some components can rebuild.

    Compensation is the best there is, whatever the problem's ridge.

    Args:
        problem: Gram and weight.
        kept_N: Indices of the kept components, in any order.

    Returns:
        Subset fidelity per output (O), in [0, 1]; 1 for outputs that are always 0.

    Source:
        arXiv 2511.19566, definition of FS; its factor per input and output is least squares.
    """
    free = dataclasses.replace(problem, ridge=0.0)
    kept_K = block_indices(kept_N.to(problem.gram_II.device).sort().values, problem.unit)
    errors_O = output_errors(free, kept_K, compensate(free, kept_K, "lsq"))
    energies_O = output_energies(problem)
    share_O = torch.where(energies_O > 0, errors_O / energies_O, 0)
    return (1 - share_O).clamp(0, 1)


def subset_fidelity(problem: Problem, kept_N: Tensor) -> float:
    """Return the share of the layer's mean square output that some components can rebuild.

    Args:
        problem: Gram and weight.
        kept_N: Indices of the kept components, in any order.

    Returns:
        Mean of ``output_fidelity`` weighted by the outputs' energies; 1 for a silent layer.
    """
    energies_O = output_energies(problem)
    total = float(energies_O.sum())
    if total == 0:
        return 1.0
    return float(output_fidelity(problem, kept_N) @ energies_O) / total


def _backward(problem: Problem, keep: int, seed: int) -> Ranking:
    order, costs = eliminate(problem, keep)
    curve = torch.cat([costs.new_zeros(1), costs.cumsum(0)])
    return Ranking(components=problem.components, order=order, curve=curve)


def _forward(problem: Problem, keep: int, seed: int) -> Ranking:
    return _ordered(problem, select(problem).flip(0))


def _by_score(values: Values) -> Score:
    """Turn a score per component (higher is kept longer) into a ranking."""

    def ranking(problem: Problem, keep: int, seed: int) -> Ranking:
        score_N = values(problem, seed).clone()
        score_N[silent_components(problem)] = -torch.inf
        return _ordered(problem, score_N.argsort(stable=True))

    return ranking


def _ordered(problem: Problem, order: Tensor) -> Ranking:
    curve = exact_curve(problem, order)
    return Ranking(components=problem.components, order=order, curve=curve)


SCORES: dict[str, Score] = {
    "obs": _backward,
    "greedy": _forward,
    **{name: _by_score(values) for name, values in ONE_PASS.items()},
}
