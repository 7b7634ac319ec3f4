"""Ellipsoids hold what they say: points on the surface, sums, and all scales."""

import math

import pytest
import torch
from torch import Tensor

from solvers.bounds.ellipsoid import Ellipsoid, Tokens
from solvers.bounds.enclosure import Enclosure

WIDTH, INSIDE = 6, 1 + 1e-9


def gauge(ellipsoid: Ellipsoid, points_NC: Tensor) -> Tensor:
    """Return the smallest multiple of the ellipsoid that holds each point."""
    return torch.linalg.solve(ellipsoid.scaled.mid, points_NC.T).norm(dim=0)


def random_shape(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a factor and points on the surface of its ellipsoid."""
    g = torch.Generator().manual_seed(seed)
    factor = scale * torch.randn(WIDTH, WIDTH, generator=g, dtype=torch.float64)
    units = torch.randn(200, WIDTH, generator=g, dtype=torch.float64)
    return factor, (units / units.norm(dim=1, keepdim=True)) @ factor.T


@pytest.mark.parametrize("scale", [1e-120, 1e-3, 1.0, 1e7, 1e120])
def test_covering_holds_the_shape_at_every_scale(scale: float) -> None:
    """Oracle: points of the surface; little more than the shape is covered."""
    factor, points = random_shape(0, scale)
    found = Ellipsoid.covering(Enclosure.exact(factor).gram())
    sizes = gauge(found, points)
    assert float(sizes.max()) <= INSIDE
    assert float(sizes.min()) >= 1 - 1e-6
    assert found.radius >= float(torch.linalg.matrix_norm(factor, 2)) * (1 - 1e-12)


def test_covering_includes_the_error() -> None:
    """Oracle: the shape moved by its whole error in one direction."""
    factor, _ = random_shape(1)
    direction = torch.randn(WIDTH, 1, dtype=torch.float64)
    direction = direction / direction.norm()
    error = torch.tensor(0.3, dtype=torch.float64)
    found = Ellipsoid.covering(Enclosure(factor @ factor.T, error)).scaled.mid
    moved = factor @ factor.T + 0.3 * direction @ direction.T
    assert float(torch.linalg.eigvalsh(found @ found.T - moved)[0]) >= -1e-12


def test_a_shape_that_is_not_definite_becomes_a_ball() -> None:
    """Oracle: the largest eigenvalue."""
    shape = torch.diag(torch.tensor([4.0, 1.0, -5.0], dtype=torch.float64))
    found = Ellipsoid.covering(Enclosure.exact(shape))
    assert found.radius == pytest.approx(2.0, rel=1e-6)
    assert torch.equal(
        found.factor_CC, found.factor_CC.diagonal()[0] * torch.eye(3, dtype=torch.float64)
    )


@pytest.mark.parametrize("radius", [0.0, 1e-30, 0.5, 3.0, 1e40])
def test_sums_with_balls_and_segments(radius: float) -> None:
    """Oracle: sums of surface points with the farthest points of the other set."""
    factor, points = random_shape(2)
    ellipsoid = Ellipsoid.covering(Enclosure.exact(factor).gram())
    wider = ellipsoid.plus_ball(radius)
    outward = points + radius * points / points.norm(dim=1, keepdim=True)
    assert float(gauge(wider, outward).max()) <= INSIDE
    assert wider.radius <= (ellipsoid.radius + radius) * (1 + 1e-6)
    segment = torch.ones(WIDTH, 1, dtype=torch.float64) * radius
    shifted = ellipsoid.plus(Enclosure.exact(segment))
    for sign in (-1, 1):
        assert float(gauge(shifted, points + sign * segment.T).max()) <= INSIDE


def test_images_and_balls_have_the_radius_they_say() -> None:
    """Oracle: scaling by hand."""
    assert Ellipsoid.ball(3, 0.75).radius == 0.75
    factor, points = random_shape(3)
    image = Ellipsoid.covering(Enclosure.exact(factor).gram()).times(2.5)
    assert float(gauge(image, 2.5 * points).max()) <= INSIDE
    assert math.isclose(
        image.radius, 2.5 * float(torch.linalg.matrix_norm(factor, 2)), rel_tol=1e-6
    )


@pytest.mark.parametrize("exponent", [-2500, -1100, 0, 800])
def test_sums_of_sets_of_very_different_scales(exponent: int) -> None:
    """Oracle: the points of either set alone, in units of the larger one."""
    factor, _ = random_shape(4)
    thin = Ellipsoid.covering(Enclosure.exact(factor).gram(), exponent)
    found = thin.plus_ball(1.0)
    points = torch.cat((torch.eye(WIDTH), factor.T)).double()
    for point, own in zip(points, [0] * WIDTH + [exponent] * WIDTH, strict=True):
        unit = torch.linalg.solve(found.factor_CC, point).norm()
        assert math.log2(float(unit)) + own - found.exponent <= 1e-9


def test_a_radius_never_vanishes() -> None:
    """Oracle: an ellipsoid that is not a point has a positive radius."""
    assert Ellipsoid.ball(2, 1.0)._replace(exponent=-4000).radius > 0
    assert Ellipsoid.ball(2, 0.0).radius == 0


def test_tokens_lie_in_the_ellipsoid_and_in_the_ball() -> None:
    """Oracle: the larger of the two gauges, by hand on the axes."""
    shape = torch.diag(torch.tensor([9.0, 1.0], dtype=torch.float64))
    tokens = Tokens(Ellipsoid.covering(Enclosure.exact(shape)), 2.0, 2.0)
    points = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    assert tokens.gauge(points).tolist() == pytest.approx([1.5, 1.0, 0.5], rel=1e-6)
