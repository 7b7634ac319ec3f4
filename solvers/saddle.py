"""Bilinear saddle points ``min_x max_y g(x) + <c, x> + <y, A x> - <b, y> - h(y)``.

The inclusion has ``F(x, y) = (c + A^T y, b - A x)`` and ``G = (dg, dh)``; F is skew up to a
constant, hence never cocoercive. Source: spec halpern_solvers 1.1, 1.4 and 2.8.
Letters: M entries of y (rows of A), N entries of x (columns).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError, ShapeError
from common.norms import spectral_norm_bound
from solvers.bilinear import bilinear_sum
from solvers.finite_sum import FiniteSumInclusion
from solvers.problem import Inclusion
from solvers.resolvents import ConvexResolvent, Identity, Product
from solvers.structure import inner, norm

Point = tuple[Tensor, Tensor]
LinearMap = Callable[[Tensor], Tensor]

_EXACT_SIDE = 1024  # largest smaller side of a matrix whose norm is computed without being asked
_POWER_STEPS = 50
_POWER_ROOM = 1.02  # allowance on a norm that a power iteration approaches from below


@dataclass(frozen=True, kw_only=True, eq=False)
class BilinearSaddle(Inclusion):
    """An inclusion whose parts a primal-dual method can use one at a time.

    Build it with :func:`bilinear_saddle`, :func:`solvers.games.matrix_game` or
    :func:`solvers.linear_program.linear_program`.

    Attributes:
        start: First point ``(x, y)``.
        forward: ``x -> A x``.
        adjoint: ``y -> A^T y``.
        matrix: A as a dense or sparse tensor (M, N) where it is known.
        cost: c, of the shape of x.
        offset: b, of the shape of y.
        primal: Resolvent of g.
        dual: Resolvent of h.
        constant: Number that is added to the saddle function.
    """

    start: Point
    forward: LinearMap
    adjoint: LinearMap
    matrix: Tensor | None
    cost: Tensor
    offset: Tensor
    primal: ConvexResolvent
    dual: ConvexResolvent
    constant: float = 0.0

    @property
    def is_dense(self) -> bool:
        """Whether A is known as a dense matrix."""
        return self.matrix is not None and self.matrix.layout is torch.strided

    @property
    def is_separable(self) -> bool:
        """Whether both resolvents act entry by entry, which preconditioning needs."""
        return self.primal.separable and self.dual.separable

    def gradient_x(self, y: Tensor) -> Tensor:
        """Return the first part of F, ``c + A^T y``."""
        return self.cost + self.adjoint(y)

    def gradient_y(self, x: Tensor) -> Tensor:
        """Return the second part of F, ``b - A x``."""
        return self.offset - self.forward(x)

    def primal_value(self, x: Tensor) -> float:
        """Return ``max_y`` of the saddle function at ``x`` in the domain of g; may be infinite."""
        return (
            self.constant
            + inner(self.cost, x)
            + self.primal.value(x)
            + self.dual.conjugate(-self.gradient_y(x))
        )

    def dual_value(self, y: Tensor) -> float:
        """Return ``min_x`` of the saddle function at ``y`` in the domain of h; may be infinite."""
        return (
            self.constant
            - inner(self.offset, y)
            - self.dual.value(y)
            - self.primal.conjugate(-self.gradient_x(y))
        )

    def duality_gap(self, point: Point) -> float:
        """Return ``primal_value(x) - dual_value(y)``: at least 0, and 0 exactly at solutions."""
        return self.primal_value(point[0]) - self.dual_value(point[1])

    def finite_sum(self, sampling: str = "auto") -> FiniteSumInclusion:
        """Return the same inclusion as a sum over rows and columns of A, on packed points (N + M,).

        Args:
            sampling: As in :func:`solvers.bilinear.bilinear_sum`.

        Raises:
            ConfigError: when A is not known as a dense matrix.
        """
        if not self.is_dense:
            raise ConfigError("finite_sum: needs A as a dense matrix; give it in that form")
        assert self.matrix is not None
        sizes = (self.cost.numel(), self.offset.numel())

        def resolvent(z: Tensor, step: float) -> Tensor:
            x, y = z.split(sizes)
            return torch.cat((self.primal(x, step), self.dual(y, step)))

        return bilinear_sum(
            self.matrix,
            sampling=sampling,
            start=torch.cat(self.start),
            primal_C=self.cost,
            dual_R=self.offset,
            resolvent=resolvent,
        )


def bilinear_saddle(
    coupling: Tensor | tuple[LinearMap, LinearMap],
    *,
    cost: Tensor | None = None,
    offset: Tensor | None = None,
    primal: ConvexResolvent | None = None,
    dual: ConvexResolvent | None = None,
    start: Point | None = None,
    lipschitz_bound: float | None = None,
    constant: float = 0.0,
) -> BilinearSaddle:
    """Return the saddle point problem of a matrix or of a pair of products.

    Args:
        coupling: A as a dense or sparse tensor (M, N), or the maps ``x -> A x``, ``y -> A^T y``.
        cost: c; zeros when omitted. One of ``cost`` and ``start`` gives the shape of x where the
            coupling is a pair, and ``offset`` or ``start`` that of y.
        offset: b; zeros when omitted.
        primal: Resolvent of g; omitted for ``g = 0``.
        dual: Resolvent of h; omitted for ``h = 0``.
        start: First point ``(x, y)``; zeros when omitted.
        lipschitz_bound: Spectral norm of A; computed for dense matrices up to 1024 on their
            smaller side, estimated by a power iteration otherwise.
        constant: Number that is added to the saddle function.

    Raises:
        ConfigError: for data that are not finite, or shapes that cannot be inferred.
        ShapeError: for vectors that do not fit the matrix.
    """
    forward, adjoint, matrix, shapes = _maps(coupling)
    cost = _vector("cost", cost, start and start[0], shapes and shapes[1], coupling)
    offset = _vector("offset", offset, start and start[1], shapes and shapes[0], coupling)
    primal, dual = primal or Identity(), dual or Identity()
    estimate = None
    if lipschitz_bound is None:
        size, is_bound = coupling_norm(forward, adjoint, cost, matrix)
        lipschitz_bound, estimate = (size, None) if is_bound else (None, size)
    return BilinearSaddle(
        operator=lambda z: (cost + adjoint(z[1]), offset - forward(z[0])),
        start=start or (torch.zeros_like(cost), torch.zeros_like(offset)),
        resolvent=Product((primal, dual)),
        lipschitz_bound=lipschitz_bound,
        lipschitz_est=estimate,
        cocoercive=False,
        forward=forward,
        adjoint=adjoint,
        matrix=matrix,
        cost=cost,
        offset=offset,
        primal=primal,
        dual=dual,
        constant=constant,
    )


def coupling_norm(
    forward: LinearMap, adjoint: LinearMap, like: Tensor, matrix: Tensor | None
) -> tuple[float, bool]:
    """Return the spectral norm of a coupling, and whether it is a bound rather than an estimate.

    Args:
        forward: ``x -> A x``.
        adjoint: ``y -> A^T y``.
        like: Any x.
        matrix: A where it is known; a dense one with a side of at most 1024 is decomposed.
    """
    is_dense = matrix is not None and matrix.layout is torch.strided
    if matrix is not None and is_dense and min(matrix.shape) <= _EXACT_SIDE:
        return spectral_norm_bound(matrix), True
    return _POWER_ROOM * power_iteration(forward, adjoint, like), False


def power_iteration(
    forward: LinearMap, adjoint: LinearMap, like: Tensor, steps: int = _POWER_STEPS
) -> float:
    """Return an estimate of the spectral norm of A from below; deterministic.

    Args:
        forward: ``x -> A x``.
        adjoint: ``y -> A^T y``.
        like: Any x.
        steps: Products with ``A^T A``.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    size = 0.0
    for _ in range(steps):
        if not (length := norm(x)):
            break
        image = forward(x / length)
        size = max(size, norm(image))
        x = adjoint(image)
    return size


def _maps(coupling: Any) -> tuple[LinearMap, LinearMap, Tensor | None, tuple[int, int] | None]:
    if not isinstance(coupling, Tensor):
        forward, adjoint = coupling
        return forward, adjoint, None, None
    if coupling.ndim != 2 or not coupling.is_floating_point():
        raise ShapeError(
            f"coupling: expected a floating-point matrix, got shape {tuple(coupling.shape)} of "
            f"{coupling.dtype}"
        )
    is_dense = coupling.layout is torch.strided
    matrix = coupling if is_dense else coupling.to_sparse_coo().coalesce()
    if not bool(torch.isfinite(matrix if is_dense else matrix.values()).all()):
        raise ConfigError("coupling: expected finite entries; remove NaN and infinity")
    transposed = matrix.T if is_dense else matrix.T.coalesce()
    rows, columns = matrix.shape
    return matrix.__matmul__, transposed.__matmul__, matrix, (rows, columns)


def _vector(
    name: str, given: Tensor | None, start: Tensor | None, size: int | None, coupling: Any
) -> Tensor:
    """Return a cost or offset of the right shape, zeros where it is not given."""
    like = given if given is not None else start
    if like is None:
        if size is None:
            raise ConfigError(f"{name}: give it or start, for the coupling does not tell its shape")
        return coupling.new_zeros(size, dtype=coupling.dtype)
    if size is not None and like.shape != (size,):
        raise ShapeError(f"{name}: expected shape ({size},), got {tuple(like.shape)}")
    if not bool(torch.isfinite(like).all()):
        raise ConfigError(f"{name}: expected finite entries; remove NaN and infinity")
    return torch.zeros_like(like) if given is None else given
