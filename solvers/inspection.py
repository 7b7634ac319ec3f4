"""Tests of a problem before it is solved: is F a function, is J a resolvent?

Source: spec halpern_solvers 7.2.
"""

import torch
from torch import Tensor

from common.errors import ConfigError
from solvers.oracle import Oracle
from solvers.sampling import Draw
from solvers.structure import inner, norm

_PAIRS = 8
_FIRM_ROOM = 1e-9  # relative rounding allowance of firm nonexpansiveness (spec 7.2)
_STEPS = (0.1, 1.0, 10.0)


def check_repeatable(oracle: Oracle, lipschitz: float) -> None:
    """Refuse an operator that gives two values at the start.

    Args:
        oracle: The problem, with ``F`` evaluated at the start; asks once more, a finite sum only
            for one of its components (twice).
        lipschitz: Scale of the rounding that is allowed.

    Raises:
        ConfigError: with the likely reason.
    """
    if oracle.first is None:
        return
    point, first = oracle.first
    if hasattr(oracle.problem, "components"):
        first, second = _first_component(oracle, point), _first_component(oracle, point)
    else:
        second = oracle.full(point)
    size = norm(first) + lipschitz * norm(point)
    if norm(first - second) > torch.finfo(point.dtype).eps ** 0.5 * size:
        raise ConfigError(
            "operator: two evaluations at one point differ, so it is random; call eval() on its "
            "modules, or give it as a finite sum"
        )


def check_resolvent(oracle: Oracle, point: Tensor) -> None:
    """Refuse a resolvent that is not firmly nonexpansive on random pairs.

    Args:
        oracle: The problem.
        point: Centre of the pairs.

    Raises:
        ConfigError: naming the step at which the resolvent fails.
    """
    if not oracle.has_resolvent:
        return
    generator = torch.Generator().manual_seed(0)
    room = max(_FIRM_ROOM, 2**8 * torch.finfo(point.dtype).eps)
    for number in range(_PAIRS):
        step = _STEPS[number % len(_STEPS)]
        pair = torch.randn(2, *point.shape, generator=generator, dtype=torch.float64).to(point)
        left, right = (point + (1 + norm(point)) * each for each in pair)
        moved = oracle.resolvent(left, step) - oracle.resolvent(right, step)
        apart = left - right
        if not norm(moved) ** 2 <= inner(moved, apart) + room * norm(apart) ** 2:
            raise ConfigError(
                f"resolvent: not firmly nonexpansive at step={step}, so it is the resolvent of "
                "no monotone operator; correct it"
            )


def bad_component(oracle: Oracle, point: Tensor) -> int | None:
    """Return the first component that is not finite at a point, by bisection; None if none is.

    Only sums with one block of components are searched.
    """
    is_sum = hasattr(oracle.problem, "components")
    if not is_sum or len(getattr(oracle.problem, "laws", None) or (0,)) > 1:
        return None

    def is_bad(low: int, high: int) -> bool:
        draw = Draw(torch.arange(low, high), torch.ones(high - low))
        return not bool(torch.isfinite(oracle.batch(point, draw)).all())

    low, high = 0, oracle.num_components
    if not is_bad(low, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_bad(low, middle) else (middle, high)
    return low


def _first_component(oracle: Oracle, point: Tensor) -> Tensor:
    blocks = len(getattr(oracle.problem, "laws", None) or (0,))
    shape = (1,) if blocks == 1 else (1, blocks)
    index_M = torch.zeros(shape, dtype=torch.int64)
    return oracle.batch(point, Draw(index_M, torch.ones(shape)))
