"""Matrix games ``min_x max_y y^T A x`` over two simplices.

The error is the duality gap, which is zero at the equilibria and only there, so that it needs no
known solution. Source: spec halpern_solvers 3.1, 4.4, 7.1.
"""

from dataclasses import replace

import torch
from torch import Tensor

from solvers.games import matrix_game as zero_sum_game
from solvers.games import policeman_burglar as policeman_burglar_payoff
from solvers.library.known import KnownProblem, normal, problem, spectral, uniform
from solvers.saddle import Point

# Shape letters: R rows (moves of y), C columns (moves of x).

_DIAMETER = 2.0  # of a product of two simplices
_NOISE = 0.01  # of the low-rank games, relative to the mean entry


@problem("matching_pennies", size=4, smallest=4, largest=4)
def matching_pennies(size: int, generator: torch.Generator) -> KnownProblem:
    """Matching pennies: value 0, both play heads and tails equally."""
    a_RC = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return _game(a_RC, _uniform_play(a_RC), start=_corner(a_RC))


@problem("rock_paper_scissors", size=6, smallest=6, largest=6)
def rock_paper_scissors(size: int, generator: torch.Generator) -> KnownProblem:
    """Rock, paper, scissors: value 0, both play uniformly."""
    beats = [[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]
    a_RC = torch.tensor(beats, dtype=torch.float64)
    return _game(a_RC, _uniform_play(a_RC), start=_corner(a_RC))


@problem("matrix_game", size=50, smallest=4)
def matrix_game(size: int, generator: torch.Generator) -> KnownProblem:
    """A random rectangular game of value 0 with planted optimal strategies on part of the moves."""
    rows, columns = size // 2, size - size // 2
    (x, use_x), (y, use_y) = _strategy(columns, generator), _strategy(rows, generator)
    a_RC = normal(generator, rows, columns)
    a_RC = a_RC - (a_RC @ x)[:, None] - (y @ a_RC) + y @ a_RC @ x
    # Now A x = 0 and A^T y = 0; slack makes each unused move strictly worse for its player.
    a_RC = a_RC - torch.where(use_y, 0.0, 0.1 + uniform(generator, rows))[:, None]
    a_RC = a_RC + torch.where(use_x, 0.0, 0.1 + uniform(generator, columns))
    return _game(a_RC, (x, y))


@problem("low_rank_game", size=200, smallest=8)
def low_rank_game(size: int, generator: torch.Generator, *, rank: int = 3) -> KnownProblem:
    """A centred game of low rank with 1 % noise and norm sqrt(n); uniform play is optimal.

    Args:
        size: Moves of both players together.
        generator: Of the matrix.
        rank: Of the game without noise.
    """
    half = size // 2
    a_RC = normal(generator, half, rank) @ normal(generator, rank, half)
    a_RC = a_RC + _NOISE * a_RC.abs().mean() * normal(generator, half, half)
    a_RC = a_RC - a_RC.mean(0) - a_RC.mean(1, keepdim=True) + a_RC.mean()
    a_RC = a_RC * (half**0.5 / spectral(a_RC))
    return _game(a_RC, _uniform_play(a_RC), start=_corner(a_RC))


@problem("policeman_burglar", size=400, smallest=4)
def policeman_burglar(
    size: int, generator: torch.Generator, *, centered: bool = True
) -> KnownProblem:
    """The paper's game ``A_ij = w_j (1 - exp(-0.8 |i - j|))`` with ``w_j = |N(0, 1)|``.

    Args:
        size: Moves of both players together; the start is uniform play.
        generator: Of the values w.
        centered: Whether the part of A that no strategy can change is removed, which shrinks its
            norm about fifty times; the authors' scripts keep it.
    """
    payoff_RC = policeman_burglar_payoff(normal(generator, size // 2).abs())
    return _game(payoff_RC, None, centered=centered)


def _game(
    a_RC: Tensor, solution: Point | None, *, start: Point | None = None, centered: bool = True
) -> KnownProblem:
    saddle = zero_sum_game(a_RC, centered=centered)
    saddle = saddle if start is None else replace(saddle, start=start)
    return KnownProblem(
        problem=saddle,
        sampled=saddle.finite_sum(),
        kind="bilinear",
        solution=solution,
        error=saddle.duality_gap,
        allows=lambda z, residual: _DIAMETER * residual,
    )


def _uniform_play(a_RC: Tensor) -> Point:
    rows, columns = a_RC.shape
    return a_RC.new_full((columns,), 1 / columns), a_RC.new_full((rows,), 1 / rows)


def _corner(a_RC: Tensor) -> Point:
    """Return the first pure strategy of both players."""
    rows, columns = a_RC.shape
    x, y = a_RC.new_zeros(columns), a_RC.new_zeros(rows)
    x[0] = y[0] = 1.0
    return x, y


def _strategy(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a strategy that uses about half of the moves, and which it uses."""
    order = torch.randperm(size, generator=generator)
    used = torch.zeros(size, dtype=torch.bool)
    used[order[: max(1, size // 2)]] = True
    weight = torch.where(used, 0.2 + uniform(generator, size), 0.0)
    return weight / weight.sum(), used
