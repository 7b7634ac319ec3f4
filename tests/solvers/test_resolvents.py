"""Resolvents: membership of the normal, firm nonexpansiveness, Fenchel-Young, closed forms."""

import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers.resolvents import (
    L1,
    Box,
    ElasticNet,
    Identity,
    L2Ball,
    Nonneg,
    Product,
    Simplex,
    SpectralBall,
    project_simplex,
)

ROUNDING = 1e-11  # float64, entries of order 10
FLOAT32 = 2e-5

LOW = torch.linspace(-1.0, 0.5, 12, dtype=torch.float64)
FAMILY = {
    "identity": Identity(),
    "box": Box(-0.5, 0.7),
    "box_tensor": Box(LOW, LOW + 0.3),
    "half_box": Box(high=0.2),
    "fixed": Box(0.25, 0.25),
    "nonneg": Nonneg(),
    "l1": L1(0.8),
    "elastic_net": ElasticNet(0.5, 2.0),
    "ridge": ElasticNet(0.0, 0.3),
    "simplex": Simplex(),
    "simplex_rows": Simplex(),
    "l2_ball": L2Ball(1.5),
    "spectral_ball": SpectralBall(0.9),
}
STEPS = (0.1, 1.0, 10.0)


def points(name, count=8, scale=3.0, dtype=torch.float64):
    """Return random points of the shape that a resolvent expects."""
    g = torch.Generator().manual_seed(len(name))
    shape = (3, 4) if name in ("simplex_rows", "spectral_ball") else (12,)
    return [scale * torch.randn(*shape, generator=g, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("name", FAMILY)
def test_the_step_of_a_resolvent_is_an_element_of_its_operator(name):
    """Oracle: g = (m - z) / step lies in G(z) if and only if J_t(z + t g) = z for every t > 0."""
    resolvent = FAMILY[name]
    for m in points(name):
        for step in STEPS:
            z = resolvent(m, step)
            normal = (m - z) / step
            for t in STEPS:
                assert torch.allclose(resolvent(z + t * normal, t), z, atol=ROUNDING * (1 + t))


@pytest.mark.parametrize("name", FAMILY)
def test_resolvents_are_firmly_nonexpansive(name):
    """Oracle: |Jx - Jy|^2 <= <Jx - Jy, x - y> characterises resolvents of monotone operators."""
    resolvent, many = FAMILY[name], points(name, count=12)
    for x, y in zip(many[::2], many[1::2], strict=True):
        for step in STEPS:
            moved = resolvent(x, step) - resolvent(y, step)
            assert float((moved * moved).sum()) <= float((moved * (x - y)).sum()) + ROUNDING


@pytest.mark.parametrize("name", FAMILY)
def test_conjugate_meets_fenchel_young_with_equality_at_the_normal(name):
    """Oracle: g(z) + g*(v) >= <z, v>, with equality exactly where v is a subgradient at z."""
    resolvent, many = FAMILY[name], points(name)
    for m, other in zip(many, reversed(many), strict=True):
        z = resolvent(m, 0.7)
        normal = (m - z) / 0.7
        product = float((z * normal).sum())
        assert resolvent.value(z) + resolvent.conjugate(normal) == pytest.approx(product, abs=1e-9)
        bound = resolvent.value(z) + resolvent.conjugate(other)
        assert bound >= float((z * other).sum()) - ROUNDING


@pytest.mark.parametrize("name", FAMILY)
def test_diameter_and_tangent_space_cover_the_domain(name):
    """Oracle: distances of many resolvent outputs, and their differences lie in the tangent."""
    resolvent, many = FAMILY[name], points(name, count=20, scale=50.0)
    outputs = [resolvent(m, 1.0) for m in many]
    differences = [a - b for a in outputs for b in outputs]
    diameter = resolvent.diameter(many[0])
    if diameter is not None:
        assert max(float(d.norm()) for d in differences) <= diameter + ROUNDING
    for d in differences:
        assert torch.allclose(resolvent.tangent_projection(d), d, atol=1e-9)
    v = many[0]
    once = resolvent.tangent_projection(v)
    assert torch.allclose(resolvent.tangent_projection(once), once, atol=1e-9)
    assert float((once * (v - once)).sum()) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("name", [n for n, r in FAMILY.items() if r.separable])
def test_separable_resolvents_take_one_step_per_entry(name):
    """Oracle: the same resolvent entry by entry with a scalar step."""
    resolvent, z = FAMILY[name], points(name)[0]
    step = torch.linspace(0.1, 3.0, len(z), dtype=z.dtype)
    together = resolvent(z, step)
    for i in range(len(z)):
        assert together[i] == resolvent(z, float(step[i]))[i]


@pytest.mark.parametrize("name", [n for n in FAMILY if n != "box_tensor"])
def test_float32_stays_float32(name):
    """Oracle: the same resolvent in float64."""
    for m in points(name, dtype=torch.float32):
        out = FAMILY[name](m, 0.5)
        assert out.dtype == torch.float32
        assert torch.allclose(out.double(), FAMILY[name](m.double(), 0.5), atol=FLOAT32)


def test_diameters_have_their_closed_forms():
    """Oracle: closed forms; two far vertices, antipodal points, plus or minus the identity."""
    like = torch.zeros(12, dtype=torch.float64)
    rows = like.view(3, 4)
    assert Simplex().diameter(like) == pytest.approx(math.sqrt(2))
    assert Simplex().diameter(rows) == pytest.approx(math.sqrt(6))
    assert Simplex().diameter(torch.zeros(1)) == 0
    assert Box(0.0, 2.0).diameter(like) == pytest.approx(2 * math.sqrt(12))
    assert Nonneg().diameter(like) is None
    assert L2Ball(1.5).diameter(like) == 3
    assert SpectralBall(0.5).diameter(rows) == pytest.approx(math.sqrt(3))
    pair = Product((Simplex(), L2Ball(1.0)))
    assert pair.diameter((like, like)) == pytest.approx(math.sqrt(6))
    assert Product((Simplex(), Nonneg())).diameter((like, like)) is None


def test_product_acts_part_by_part():
    """Oracle: the parts on their own."""
    x, y = points("simplex", count=2)
    pair = Product((Simplex(), Nonneg()))
    moved = pair((x, y), 0.3)
    assert torch.equal(moved[0], project_simplex(x))
    assert torch.equal(moved[1], y.clamp_min(0))
    tangent = pair.tangent_projection((x, y))
    assert torch.allclose(tangent[0], x - x.mean())
    assert torch.equal(tangent[1], y)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_project_simplex_meets_the_optimality_conditions(size):
    """Oracle: the result is max(point - shift, 0) of mass 1, and batched rows equal single ones."""
    g = torch.Generator().manual_seed(size)
    many = 4 * torch.randn(9, size, generator=g, dtype=torch.float64)
    many[0] = 0.0
    batched = project_simplex(many)
    for row, out in zip(many, batched, strict=True):
        assert torch.equal(project_simplex(row), out)
        assert float(out.sum()) == pytest.approx(1, abs=ROUNDING)
        assert float(out.min()) >= 0
        shift = (row - out)[out > 0]
        assert float(shift.max() - shift.min()) <= ROUNDING
        assert bool((row[out == 0] <= shift.max() + ROUNDING).all())


def test_project_simplex_survives_huge_and_equal_entries():
    """Oracle: the largest entry wins; equal entries share."""
    assert project_simplex(torch.tensor([1e30, 0.0, -1e30])).tolist() == [1.0, 0.0, 0.0]
    assert torch.allclose(project_simplex(torch.full((5,), 1e6)), torch.full((5,), 0.2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Box(1.0, 0.0),
        lambda: Box(math.nan, 1.0),
        lambda: Box(math.inf, math.inf),
        lambda: Box(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])),
        lambda: L1(-1.0),
        lambda: ElasticNet(1.0, 0.0),
        lambda: L2Ball(0.0),
        lambda: SpectralBall(math.inf),
    ],
)
def test_impossible_sets_are_refused(make):
    """Each describes an empty set or no convex function."""
    with pytest.raises(ConfigError):
        make()


def test_spectral_ball_refuses_a_vector():
    """Oracle: the message names the shape."""
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        SpectralBall(1.0)(torch.zeros(3), 1.0)
