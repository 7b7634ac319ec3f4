"""Enclosures hold the exact results: rational arithmetic, and errors put in on purpose."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from solvers.bounds.enclosure import Enclosure

SIZE = 5


def exact_product(left: Tensor, right: Tensor) -> list[list[Fraction]]:
    """Multiply in rational numbers."""
    rows = [[Fraction(x) for x in row] for row in left.tolist()]
    columns = [[Fraction(x) for x in row] for row in right.T.tolist()]
    return [[sum(a * b for a, b in zip(r, c, strict=True)) for c in columns] for r in rows]


def distance(found: Tensor, exact: list[list[Fraction]]) -> float:
    """Frobenius distance, exact until the last conversion."""
    pairs = zip(found.flatten().tolist(), (x for row in exact for x in row), strict=True)
    return float(sum((Fraction(a) - b) ** 2 for a, b in pairs)) ** 0.5


@pytest.mark.parametrize("seed", range(5))
def test_products_and_grams_hold_the_exact_ones(seed: int) -> None:
    """Oracle: fractions; scales from 1e-8 to 1e8 in one matrix, so that sums cancel."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64) for _ in range(2))
    left = left * torch.logspace(-8, 8, SIZE, dtype=torch.float64)
    product = Enclosure.exact(left) @ Enclosure.exact(right)
    assert distance(product.mid, exact_product(left, right)) <= float(product.error)
    gram = Enclosure.exact(left).gram()
    assert distance(gram.mid, exact_product(left, left.T)) <= float(gram.error)
    assert torch.equal(gram.mid, gram.mid.mT)


@pytest.mark.parametrize("seed", range(5))
def test_errors_are_carried_through_every_operation(seed: int) -> None:
    """Oracle: members of the enclosures on their very edge, put through the same operations."""
    g = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        return torch.randn(3, SIZE, SIZE, generator=g, dtype=torch.float64)

    def edge(enclosure: Enclosure) -> Tensor:
        push = random()
        return enclosure.mid + enclosure.error[:, None, None] * push / torch.linalg.matrix_norm(
            push, 2, keepdim=True
        )

    errors = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    a, b = Enclosure(random(), errors), Enclosure(random(), errors.flip(0))
    factor = torch.rand(3, SIZE, 1, generator=g, dtype=torch.float64) + 0.1
    for _ in range(20):
        x, y = edge(a), edge(b)
        for found, member in (
            (a @ b, x @ y),
            (a + b, x + y),
            (-a, -x),
            (a.scaled(factor), factor * x),
            (a.gram(), x @ x.mT),
        ):
            gaps = torch.linalg.matrix_norm(found.mid - member, 2)
            assert bool((gaps <= found.error * (1 + 1e-9) + 1e-12).all())
        wide = torch.linalg.matrix_norm(a.beside().mid - x.transpose(0, 1).flatten(1), 2)
        assert float(wide) <= float(a.beside().error) * (1 + 1e-9)
        assert all(
            float(torch.linalg.matrix_norm(m, 2)) <= n for m, n in zip(x, a.norms(), strict=True)
        )


def test_inverses_hold_those_of_all_members() -> None:
    """Oracle: inverses of members; an ill-conditioned or uncertain matrix falls back to 1/least."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(SIZE, dtype=torch.float64)
    push = root + root.T
    push = push / torch.linalg.matrix_norm(push, 2)
    for error in (0.0, 1e-8, 1e-3):
        enclosed = Enclosure(matrix, torch.tensor(error, dtype=torch.float64)).inverse(0.5)
        for sign in (-1.0, 1.0):
            member = torch.linalg.inv(matrix + sign * error * push)
            gap = torch.linalg.matrix_norm(enclosed.mid - member, 2)
            assert float(gap) <= float(enclosed.error) + 1e-12
    vague = Enclosure(matrix, torch.tensor(2.0, dtype=torch.float64)).inverse(0.25)
    assert not bool(vague.mid.any())
    assert float(vague.error) >= 4.0


@pytest.mark.parametrize("scale", [1e-280, 1e-200, 1.0, 1e160, 1e300])
def test_sizes_hold_where_squares_leave_the_range(scale: float) -> None:
    """Oracle: fractions; a size of 0 would hide the rounding of all later products."""
    g = torch.Generator().manual_seed(0)
    entries = scale * torch.randn(3, SIZE, SIZE, generator=g, dtype=torch.float64)
    for found, matrix in zip(Enclosure.exact(entries).size, entries, strict=True):
        exact = sum(Fraction(x) ** 2 for x in matrix.flatten().tolist())
        assert exact <= Fraction(float(found)) ** 2 <= exact * (1 + Fraction(1, 10**6))


def test_shifts_hold_the_exact_ones_at_every_exponent() -> None:
    """Oracle: fractions; below the normal numbers the error takes what is lost."""
    matrix = torch.tensor([[1.0, -3.7], [2.0**-60, 0.0]], dtype=torch.float64)
    for exponent in (-1500, -1070, -1000, -3, 0, 7, 150, 1000):
        found, power = Enclosure.exact(matrix).shifted(exponent), Fraction(2) ** exponent
        exact = [[Fraction(x) * power for x in row] for row in matrix.tolist()]
        assert distance(found.mid, exact) <= float(found.error)


def test_an_error_beyond_all_numbers_bounds_by_infinity() -> None:
    """Oracle: no number is a bound; NaN would compare as one."""
    for error in (float("inf"), float("nan")):
        vague = Enclosure(torch.eye(2).double(), torch.tensor(error, dtype=torch.float64))
        assert vague.top() == vague.norm() == float("inf")
