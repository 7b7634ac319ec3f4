"""Scores of components that need one pass over the Gram matrix; higher is kept longer.

Every function takes ``(problem, seed)`` and returns one value per component. The paper
(arXiv 2511.19566) scores pairs of input and output channel; here a component has one score for
the whole layer: the similarity matrix of the paper, summed over outputs. Where it gives four
different formulas, each is here under its own name.
"""

# Legend: I inputs, O outputs, U inputs per component, N components.

from collections.abc import Callable

import torch
from torch import Tensor

from compress.scoring.elimination import regular_cholesky
from compress.targets import Problem, diagonal_blocks

VOTE_SHARE = 0.1
"""Part of the components that each output channel votes for."""
ROUNDING = 1e-13
"""An output whose parts cancel to this fraction of their energies is 0."""

Values = Callable[[Problem, int], Tensor]


def similarity(problem: Problem) -> Tensor:
    """Return the component similarity matrix, summed over outputs.

    Args:
        problem: Gram and weight.

    Returns:
        ``Q_ij = sum_c E[A_ci A_cj]`` with ``A_ci`` the part of output ``c`` that comes from
        component ``i`` (N, N).

    Source:
        arXiv 2511.19566, definition of the CSM; the Gram form is our derivation.
    """
    products_II = problem.gram_II * (problem.weight_IO @ problem.weight_IO.T)
    if problem.unit == 1:
        return products_II
    count, unit = problem.components, problem.unit
    return products_II.reshape(count, unit, count, unit).sum((1, 3))


def singleton(problem: Problem, seed: int = 0) -> Tensor:
    """Fidelity of each component alone, times the energy of the output (paper, main text)."""
    together_NUO = _pull(problem)
    return (together_NUO * _solve_own(problem, together_NUO)).sum((1, 2))


def alpha(problem: Problem, seed: int = 0) -> Tensor:
    """Best common factor of each component alone (paper, vision models): row sum over energy."""
    energy_N = energy(problem)
    return torch.where(energy_N > 0, rowsum(problem) / energy_N, -torch.inf)


def rowsum(problem: Problem, seed: int = 0) -> Tensor:
    """Inner product of each component's part with the whole output (paper, appendix D.2)."""
    return (_blocks(problem) * _pull(problem)).sum((1, 2))


def cholesky(problem: Problem, seed: int = 0) -> Tensor:
    """Squared row norms of the Cholesky factor of the similarity matrix (paper, for LLMs).

    Read literally, as here, they are the diagonal of the factored matrix: ``energy`` plus a
    constant ridge, without any information on correlations.
    """
    similarity_NN = similarity(problem)
    penalty = problem.ridge * float(similarity_NN.diagonal().mean())
    return regular_cholesky(similarity_NN, penalty).square().sum(1)


def energy(problem: Problem, seed: int = 0) -> Tensor:
    """Mean square of each component's own part of the output."""
    blocks_NUO = _blocks(problem)
    own_NUU = diagonal_blocks(problem.gram_II, problem.unit)
    return (blocks_NUO * (own_NUU @ blocks_NUO)).sum((1, 2))


def vote(problem: Problem, seed: int = 0) -> Tensor:
    """Number of output channels that have the component among their top tenth (paper, pruning).

    The paper takes the union over channels of each one's top singleton scores, which fixes no
    number of components; counting does. Ties are broken by the sum of the scores.
    """
    together_NUO = _pull(problem)
    score_NO = (together_NUO * _solve_own(problem, together_NUO)).sum(1)
    energies_O = output_energies(problem)
    alive_O = energies_O > 0
    share_NO = score_NO[:, alive_O] / energies_O[alive_O]
    top = max(1, round(VOTE_SHARE * problem.components))
    votes_N = score_NO.new_zeros(problem.components)
    chosen = share_NO.topk(top, dim=0).indices.flatten()
    votes_N.index_add_(0, chosen, torch.ones_like(chosen, dtype=votes_N.dtype))
    place_N = share_NO.sum(1).argsort(stable=True).argsort()
    return votes_N + place_N / problem.components


def wanda(problem: Problem, seed: int = 0) -> Tensor:
    """Root mean square of each input times the l1 norm of its weights (Wanda-sp)."""
    scale_I = problem.gram_II.diagonal().clamp(min=0).sqrt()
    return _per_component(problem, scale_I * problem.weight_IO.abs().sum(1))


def flap(problem: Problem, seed: int = 0) -> Tensor:
    """Variance of each input times the squared norm of its weights (FLAP, WIFV metric)."""
    variance_I = problem.gram_II.diagonal()
    if problem.mean_I is not None:
        variance_I = (variance_I - problem.mean_I.square()).clamp(min=0)
    return _per_component(problem, variance_I * problem.weight_IO.square().sum(1))


def magnitude(problem: Problem, seed: int = 0) -> Tensor:
    """Squared norm of each component's weights."""
    return _per_component(problem, problem.weight_IO.square().sum(1))


def random(problem: Problem, seed: int = 0) -> Tensor:
    """Uniform noise from ``seed``, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    noise_N = torch.rand(problem.components, generator=generator, dtype=torch.float64)
    return noise_N.to(problem.gram_II.device)


def output_energies(problem: Problem) -> Tensor:
    """Return the mean square of every complete output; exactly 0 where it is only rounding (O)."""
    energies_O = (problem.weight_IO * (problem.gram_II @ problem.weight_IO)).sum(0)
    parts_O = problem.gram_II.diagonal() @ problem.weight_IO.square()
    return torch.where(energies_O > ROUNDING * parts_O, energies_O, 0)


def _blocks(problem: Problem) -> Tensor:
    return problem.weight_IO.reshape(problem.components, problem.unit, -1)


def _pull(problem: Problem) -> Tensor:
    """Return the correlation of every input with the output, ``G W`` (N, U, O)."""
    return (problem.gram_II @ problem.weight_IO).reshape(problem.components, problem.unit, -1)


def _solve_own(problem: Problem, right_NUO: Tensor) -> Tensor:
    """Multiply by the pseudo-inverse of each component's own Gram."""
    own_NUU = diagonal_blocks(problem.gram_II, problem.unit)
    return torch.linalg.pinv(own_NUU, hermitian=True) @ right_NUO


def _per_component(problem: Problem, values_I: Tensor) -> Tensor:
    return values_I.reshape(problem.components, problem.unit).sum(1)


ONE_PASS: dict[str, Values] = {
    "singleton": singleton,
    "alpha": alpha,
    "rowsum": rowsum,
    "cholesky": cholesky,
    "energy": energy,
    "vote": vote,
    "wanda": wanda,
    "flap": flap,
    "magnitude": magnitude,
    "random": random,
}
