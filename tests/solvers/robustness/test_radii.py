"""Certified radii against closed forms, and bounds on row differences against brute force."""

import math

import pytest
import torch
from torch import Tensor

from common.errors import CertificateError, ShapeError
from solvers.robustness import PairNorms, certified_radii
from solvers.robustness import radii as radii_module
from solvers.robustness.radii import ROUNDING, linf_radii

# The radius gives up ROUNDING of the largest logit, which may be many times the margin.
TIGHT = 1e-5


def linear(classes: int = 5, size: int = 7, count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, biases and inputs of a random linear classifier, float64."""
    shapes = ((classes, size), (classes,), (count, size))
    rows, bias, x = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return rows, bias, x


def test_radius_of_a_linear_classifier() -> None:
    """Oracle: closed form, min over classes of gap / |w_y - w_v|, with explicit loops."""
    rows, bias, x = linear()
    logits = x @ rows.T + bias
    top, found = certified_radii(logits, PairNorms(rows).of(logits.argmax(-1)))
    for index in range(len(x)):
        first = int(logits[index].argmax())
        gaps = [
            float(logits[index, first] - logits[index, v]) / float((rows[first] - rows[v]).norm())
            for v in range(len(rows))
            if v != first
        ]
        assert int(top[index]) == first
        assert min(gaps) * (1 - TIGHT) - TIGHT < float(found[index]) < min(gaps)


def test_class_changes_just_beyond_the_radius_only() -> None:
    """Oracle: moving towards the nearest decision boundary, whose direction is known."""
    rows, bias, x = linear()
    logits = x @ rows.T + bias
    top, radius = certified_radii(logits, PairNorms(rows).of(logits.argmax(-1)))
    distances = (logits.gather(1, top[:, None]) - logits) / (rows[top][:, None] - rows).norm(dim=-1)
    other = distances.nan_to_num(nan=math.inf).argmin(1)
    normal = torch.nn.functional.normalize(rows[other] - rows[top], dim=-1)
    for factor, changed in ((1 - 1e-6, False), (1 + 1e-3, True)):
        moved = x + normal * (radius * factor + (1e-6 if changed else 0.0))[:, None]
        same = (moved @ rows.T + bias).argmax(-1) == top
        assert bool((same != changed).all())


@pytest.mark.parametrize("exact", [1024, 0])
@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-4])
def test_pair_norms_bound_the_differences(
    exact: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the difference of each pair, formed one by one; both ways of computing them."""
    monkeypatch.setattr(radii_module, "EXACT_CLASSES", exact)
    rows = torch.randn(12, 9, dtype=torch.float64)
    rows[3] = rows[4]
    rows[5] = rows[6] + 1e-9 * torch.randn(9, dtype=torch.float64)
    found = PairNorms(rows, scale).of(torch.arange(12))
    true = abs(scale) * (rows[:, None] - rows[None]).norm(dim=-1)
    assert bool((found >= true).all())
    assert bool((found <= true * (1 + 1e-9) + abs(scale) * 1e-5).all())


def test_differences_are_never_worse_than_the_norm() -> None:
    """Oracle: |U_i - U_j| <= sqrt 2 |U|, strictly for random rows."""
    rows = torch.randn(12, 9, dtype=torch.float64)
    worst = math.sqrt(2) * float(torch.linalg.matrix_norm(rows, 2))
    assert float(PairNorms(rows).of(torch.arange(12)).max()) < worst
    ceiling = PairNorms(rows, ceiling=0.5).of(torch.arange(12))
    assert float(ceiling.max()) == 0.5


def test_ties_and_gaps_that_nothing_closes() -> None:
    """Oracle: a tie has no radius; equal rows with different biases can never cross."""
    rows = torch.ones(2, 3, dtype=torch.float64)
    logits = torch.tensor([[1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    _, radius = certified_radii(logits, PairNorms(rows).of(logits.argmax(-1)))
    assert radius.tolist() == [0.0, math.inf]


def test_rows_whose_differences_underflow_are_refused() -> None:
    """Oracle: squares of 1e-170 are 0 in float64, which would certify any distance."""
    rows = torch.tensor([[1e-170, 0.0], [0.0, 1e-170]], dtype=torch.float64)
    with pytest.raises(CertificateError, match=r"head\.weight"):
        PairNorms(rows)


def test_rounding_is_given_up() -> None:
    """Oracle: a gap below ROUNDING of the largest logit certifies nothing."""
    logits = torch.tensor([[1e6, 1e6 * (1 - ROUNDING / 2)]], dtype=torch.float64)
    assert float(certified_radii(logits, torch.ones_like(logits))[1]) == 0.0


def test_linf_radius_is_inside_the_l2_ball() -> None:
    """Oracle: the corner of the cube has the l2 norm of the ball."""
    radius = linf_radii(torch.tensor([2.0]), 16)
    assert float(torch.full((16,), float(radius)).norm()) == pytest.approx(2.0)


def test_unusable_logits_are_refused() -> None:
    """Oracle: the contract."""
    with pytest.raises(ShapeError, match="double"):
        certified_radii(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ShapeError, match="expected"):
        certified_radii(torch.zeros(2, 3).double(), torch.ones(2, 4))
    with pytest.raises(CertificateError, match="NaN"):
        certified_radii(torch.full((2, 3), math.nan).double(), torch.ones(2, 3))
