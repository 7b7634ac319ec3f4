"""Zero-sum matrix games as saddle points over probability simplices.

Source: spec halpern_solvers 2.10, 3.1 and 4.4. Letters: M rows (y), N columns (x).
"""

import torch
from torch import Tensor

from common.config import positive
from common.errors import ShapeError
from solvers.resolvents import Simplex
from solvers.saddle import BilinearSaddle, bilinear_saddle
from solvers.scaling import center


def matrix_game(payoff_MN: Tensor, *, centered: bool = True) -> BilinearSaddle:
    """Return the game ``min_x max_y y^T A x`` over probability vectors, from uniform play.

    Args:
        payoff_MN: A; entry (i, j) is what the row player y wins.
        centered: Remove what no strategy can change, which shrinks the Lipschitz constant
            (:func:`solvers.scaling.center`); solutions, gap and value stay the same.

    Raises:
        ConfigError: for payoffs that are not finite.
        ShapeError: for anything but a floating matrix with at least one entry.
    """
    if payoff_MN.ndim != 2 or not payoff_MN.numel():
        raise ShapeError(f"payoff: expected a matrix, got shape {tuple(payoff_MN.shape)}")
    rows, columns = payoff_MN.shape
    game = bilinear_saddle(
        payoff_MN,
        primal=Simplex(),
        dual=Simplex(),
        start=(payoff_MN.new_full((columns,), 1 / columns), payoff_MN.new_full((rows,), 1 / rows)),
        # The norm of the raw payoff is expensive, and centring replaces it.
        lipschitz_bound=0.0 if centered else None,
    )
    return center(game) if centered else game


def policeman_burglar(wealth_N: Tensor, *, theta: float = 0.8) -> Tensor:
    """Return the payoff ``w_j (1 - exp(-theta |i - j|))`` of the policeman and burglar game.

    Args:
        wealth_N: (N,) values of the houses.
        theta: Decay with the distance of the chance to be caught, above 0.

    Returns:
        Matrix (N, N): policeman at house i (row), burglar at house j (column).

    Raises:
        ConfigError: for a theta that is not positive.
    """
    positive("theta", theta)
    place_N = torch.arange(len(wealth_N), dtype=wealth_N.dtype, device=wealth_N.device)
    return wealth_N * (1 - torch.exp(-theta * (place_N[:, None] - place_N).abs()))
