"""Packing of tuples and the checks of a start."""

import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers import SOLVERS, Inclusion, solve
from solvers.structure import Structure, check_start, inner, norm


@pytest.mark.parametrize("shapes", [[(2, 3)], [(2, 3), (4,)], [(), (1,)], [(0,), (2, 2, 2)]])
def test_unpack_inverts_pack(shapes):
    """Oracle: the parts themselves, entry by entry, and the number of entries."""
    g = torch.Generator().manual_seed(0)
    parts = tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    structure = Structure.of(parts)
    packed = structure.pack(parts, "test")
    assert packed.shape == (sum(part.numel() for part in parts),)
    for part, back in zip(parts, structure.unpack(packed), strict=True):
        assert torch.equal(part, back)
    assert norm(packed) == pytest.approx(math.sqrt(sum(float((p**2).sum()) for p in parts)))
    assert inner(packed, packed) == pytest.approx(norm(packed) ** 2)


def test_plain_tensor_keeps_its_shape():
    """Oracle: the tensor itself."""
    tensor = torch.zeros(2, 3)
    structure = Structure.of(tensor)
    assert structure.pack(tensor, "test") is tensor
    assert structure.unpack(tensor) is tensor


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(5),
        (torch.zeros(2),),
        (torch.zeros(2), torch.zeros(4)),
        (torch.zeros(2), torch.zeros(3), torch.zeros(1)),
    ],
)
def test_pack_refuses_another_structure(wrong):
    """Oracle: the message names what was expected, in one line."""
    structure = Structure.of((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ShapeError, match=r"who.*\(\(2,\), \(3,\)\)") as caught:
        structure.pack(wrong, "who")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [torch.zeros(2), (torch.zeros(2), torch.zeros(3))])
@pytest.mark.parametrize("wrong", [None, 1.0, [1.0, 2.0]])
def test_pack_refuses_what_is_no_tensor(start, wrong):
    """Oracle: the type is named instead of an error from within."""
    with pytest.raises(ShapeError, match=f"who.*tensor.*got {type(wrong).__name__}"):
        Structure.of(start).pack(wrong, "who")


@pytest.mark.parametrize(
    ("start", "error"),
    [
        ((torch.zeros(2), torch.zeros(2, dtype=torch.float64)), ShapeError),
        ((torch.zeros(2), torch.zeros(2, dtype=torch.long)), ShapeError),
        ((), ShapeError),
        ((torch.zeros(0),), ShapeError),
        ([torch.zeros(2)], ShapeError),
        ((torch.zeros(2), torch.tensor([math.inf])), ConfigError),
    ],
)
def test_check_start_refuses_what_cannot_be_packed(start, error):
    """Mixed dtypes, integers, nothing at all, lists, infinities."""
    with pytest.raises(error, match="start"):
        check_start(start)


@pytest.mark.parametrize("method", sorted(set(SOLVERS) - {"pdhg"}))
def test_every_method_solves_a_problem_of_tuples(method):
    """Oracle: the same problem on one packed vector, step for step; and its zero (1, 2)."""
    scale = torch.tensor([1.0, 0.5, 0.8, 1.0, 0.7], dtype=torch.float64)
    target = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    packed = Inclusion(
        operator=lambda u: scale * (u - target),
        start=torch.zeros(5, dtype=torch.float64),
        lipschitz_bound=1.0,
    )
    of_parts = Inclusion(
        operator=lambda u: (scale[:2] * (u[0] - 1), scale[2:].view(3, 1) * (u[1] - 2)),
        start=(torch.zeros(2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)),
        lipschitz_bound=1.0,
    )
    expected = solve(packed, method, atol=1e-2)
    result = solve(of_parts, method, atol=1e-2)
    assert result.converged
    assert isinstance(result.value, tuple)
    assert [tuple(part.shape) for part in result.value] == [(2,), (3, 1)]
    assert torch.equal(torch.cat([part.flatten() for part in result.value]), expected.value)
    assert result.trace == expected.trace
