"""Group-robust linear heads on frozen features: ``min_w max_q sum_g q_g loss_g(w) + ridge``.

A convex-concave finite sum whose components are examples; q is a distribution over groups, so
that the head is fitted for the group with the largest mean loss. Source: spec halpern_solvers 6.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common.config import one_of, positive
from solvers.finite_sum import FiniteSumInclusion
from solvers.iterate import solve
from solvers.library.features import Examples, read_examples
from solvers.library.known import KnownProblem, problem, zeros
from solvers.resolvents import Identity, Product, Simplex

# Shape letters: N examples (components), D features, G groups, M drawn examples.

Pair = tuple[Tensor, Tensor]

_REFERENCE_TOL = 1e-10  # residual of the point that errors refer to
_HINGE_WIDTH = 0.5  # margin over which the hinge is rounded off


class Loss(NamedTuple):
    """Convex loss of a margin: value, derivative in [-1, 0], largest second derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: float


def _hinge(margin: Tensor) -> Tensor:
    inside = (1 - margin).clamp(0, _HINGE_WIDTH)
    return inside.square() / (2 * _HINGE_WIDTH) + (1 - margin - _HINGE_WIDTH).clamp_min(0)


LOSSES = {
    "logistic": Loss(
        lambda margin: torch.nn.functional.softplus(-margin),
        lambda margin: -torch.sigmoid(-margin),
        0.25,
    ),
    "hinge": Loss(
        _hinge, lambda margin: -((1 - margin) / _HINGE_WIDTH).clamp(0, 1), 1 / _HINGE_WIDTH
    ),
}


@problem("group_dro", size=10, smallest=4)
def group_dro(
    size: int,
    generator: torch.Generator,
    *,
    components: int = 120,
    groups: int = 4,
    head: str = "logistic",
    ridge: float = 0.1,
    data: str = "synthetic",
) -> KnownProblem:
    """A linear head that is fitted for the group with the largest mean loss.

    Args:
        size: Unknowns: weights of the head and the groups' shares (synthetic features only).
        generator: Of the synthetic features.
        components: Examples (synthetic features only).
        groups: Number of groups (synthetic features only).
        head: ``logistic``, or ``hinge`` with a rounded corner.
        ridge: Weight of ``|w|^2 / 2``, above 0.
        data: ``synthetic``; ``digits``, the pixels of the digits, odd against even, a group per
            digit; or the directory of an image classifier: its last hidden layer on the digits.
    """
    one_of("head", head, sorted(LOSSES))
    positive("ridge", ridge)
    examples = read_examples(data, max(1, size - groups), components, groups, generator)
    task = _Task(examples, LOSSES[head], ridge)
    inclusion = task.inclusion()
    reference = solve(inclusion, "extragradient", atol=_REFERENCE_TOL, max_iterations=50_000).value
    least = task.worst(reference[0])

    def span(z: Pair) -> float:
        return float((z[0] - reference[0]).square().sum() + 2) ** 0.5

    return KnownProblem(
        problem=inclusion,
        kind="monotone",
        solution=reference,
        error=lambda z: max(0.0, task.worst(z[0]) - least),
        # P(w) - P(w*) <= <r, (w, q) - (w*, q')> for the worst q', and |q - q'|^2 <= 2.
        allows=lambda z, residual: (residual + _REFERENCE_TOL) * span(z),
    )


class _Task:
    """Losses, gradients and constants of one data set."""

    def __init__(self, examples: Examples, loss: Loss, ridge: float) -> None:
        self.loss = loss
        self.ridge = ridge
        # Margins are linear in w: fold the label into the features.
        self.x_ND = examples.features_ND * examples.label_N[:, None]
        self.group_N = examples.group_N
        self.sizes_G = torch.bincount(self.group_N).double()
        self.count = len(self.x_ND)
        self.scale_N = self.count / self.sizes_G[self.group_N]

    def components(self, z: Pair, index_M: Tensor, weight_M: Tensor) -> Pair:
        """Return the weighted sum of the examples' gradients in w and minus those in q."""
        w, q = z
        x_MD, group_M = self.x_ND[index_M], self.group_N[index_M]
        margin_M = x_MD @ w
        scale_M = self.scale_N[index_M] * weight_M
        towards_w = x_MD.T @ (scale_M * q[group_M] * self.loss.slope(margin_M))
        losses_G = torch.zeros_like(q).index_add_(0, group_M, scale_M * self.loss.value(margin_M))
        return towards_w + weight_M.sum() * self.ridge * w, -losses_G

    def worst(self, w: Tensor) -> float:
        """Return the largest mean loss of a group plus the penalty."""
        losses_N = self.loss.value(self.x_ND @ w)
        losses_G = torch.zeros_like(self.sizes_G).index_add_(0, self.group_N, losses_N)
        return float((losses_G / self.sizes_G).max() + self.ridge / 2 * w.square().sum())

    def inclusion(self) -> FiniteSumInclusion:
        """Return the problem with constants that hold wherever q is a distribution."""
        lengths_N = self.x_ND.norm(dim=1)
        tops_G = torch.stack(
            [torch.linalg.matrix_norm(self.x_ND[self.group_N == g], 2) for g in self._groups()]
        )
        mean_squares_G = tops_G.square() / self.sizes_G
        curved = self.ridge + self.loss.curvature * float(mean_squares_G.max())
        coupling = float(mean_squares_G.sum()) ** 0.5
        of_examples = self.ridge + self.scale_N * (
            self.loss.curvature * lengths_N.square() + lengths_N
        )
        return FiniteSumInclusion(
            components=self.components,
            num_components=self.count,
            start=(zeros(self.x_ND.shape[1]), 1 / torch.full_like(self.sizes_G, len(self.sizes_G))),
            resolvent=Product((Identity(), Simplex())),
            lipschitz_bound=curved + coupling,
            component_lipschitz=of_examples,
            cocoercive=False,
        )

    def _groups(self) -> range:
        return range(len(self.sizes_G))
