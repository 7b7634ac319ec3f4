"""Problems with known solutions, and the registry that the command and the tests go over."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.config import one_of, positive
from common.errors import ConfigError
from solvers.finite_sum import FiniteSumInclusion
from solvers.problem import Problem
from solvers.structure import Structure, Value

_LARGEST = 5000  # unknowns; the problems hold dense matrices of this side

Kind = Literal["cocoercive", "monotone", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class KnownProblem:
    """A problem, what is known of its solution, and how far a point is from it.

    Attributes:
        problem: The inclusion.
        kind: What its operator is: ``cocoercive`` (a gradient, a fixed-point map), ``bilinear``
            (a skew linear part, nothing else) or merely ``monotone``.
        solution: One solution, structured like the start; None where none has a closed form.
        error: Error of a point, zero at every solution and only there.
        allows: ``allows(value, residual)``: the largest error that a residual allows at this
            point, up to rounding; the certificate of spec halpern_solvers 1.4 for this problem.
        sampled: The same problem on packed points as a sum over rows and columns, for the
            methods that sample; None where the problem itself is the sum, or is none.
    """

    problem: Problem
    kind: Kind
    solution: Value | None
    error: Callable[[Any], float]
    allows: Callable[[Any, float], float]
    sampled: FiniteSumInclusion | None = None

    @property
    def num_components(self) -> int:
        """Component calls that an evaluation of the operator costs; 1 for no sum."""
        return (self.sampled or self.problem).num_components

    def as_sum(self) -> "KnownProblem":
        """Return the problem as a finite sum, itself where it has no other form."""
        if self.sampled is None:
            return self
        unpack = Structure.of(self.problem.start).unpack
        return replace(
            self,
            problem=self.sampled,
            sampled=None,
            solution=None if self.solution is None else torch.cat(tuple(self.solution)),
            error=lambda value: self.error(unpack(value)),
            allows=lambda value, residual: self.allows(unpack(value), residual),
        )


class Entry(NamedTuple):
    """A problem of the registry: its builder, default and admissible sizes, one line on it."""

    build: Callable[..., KnownProblem]
    size: int
    smallest: int
    largest: int
    about: str

    @property
    def options(self) -> dict[str, Any]:
        """Options of the builder and their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


PROBLEMS: dict[str, Entry] = {}


def problem(
    name: str, *, size: int, smallest: int = 2, largest: int = _LARGEST
) -> Callable[[Callable[..., KnownProblem]], Callable[..., KnownProblem]]:
    """Return a decorator that registers ``build(size, generator, *, option=default, ...)``.

    Args:
        name: What the command line calls it.
        size: Unknowns when none are asked for.
        smallest: Fewest unknowns that make sense.
        largest: Most unknowns.
    """

    def decorate(build: Callable[..., KnownProblem]) -> Callable[..., KnownProblem]:
        about = (build.__doc__ or "").strip().partition("\n")[0]
        PROBLEMS[name] = Entry(build, size, smallest, largest, about)
        return build

    return decorate


def standard_problem(
    name: str, *, size: int | None = None, seed: int = 0, **options: Any
) -> KnownProblem:
    """Return a standard problem by name.

    Args:
        name: A key of ``PROBLEMS``.
        size: Number of unknowns, of both players together in the games; None for the problem's
            own. Some problems round it to the next possible number.
        seed: Of the random data, drawn on the CPU in float64.
        **options: Of the problem, such as ``components=256`` for the number of components.

    Raises:
        ConfigError: for an unknown name or option, or an impossible size.
    """
    one_of("problem", name, sorted(PROBLEMS))
    entry = PROBLEMS[name]
    size = entry.size if size is None else size
    if not entry.smallest <= size <= entry.largest:
        raise ConfigError(
            f"size={size}: problem={name} expected {entry.smallest} to {entry.largest} unknowns"
        )
    known = entry.options
    for key, value in options.items():
        if key not in known:
            names = ", ".join(sorted(known)) or "no options"
            raise ConfigError(f"{key}={value}: problem={name} does not know it; it has {names}")
        _check_option(name, key, value, known[key])
    return entry.build(size, torch.Generator().manual_seed(seed), **options)


def _check_option(name: str, key: str, value: Any, default: Any) -> None:
    kind = float if isinstance(default, float) else type(default)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or isinstance(value, bool) != (kind is bool):
        raise ConfigError(f"{key}={value!r}: problem={name} expected {kind.__name__}; correct it")
    if kind is float:
        positive(key, value, zero=True)
    if kind is int and value < 1:
        raise ConfigError(f"{key}={value}: problem={name} expected at least 1; correct it")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Return numbers drawn uniformly from [0, 1) in float64."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def zeros(size: int) -> Tensor:
    """Return a float64 vector of zeros."""
    return torch.zeros(size, dtype=torch.float64)


def spectral(matrix: Tensor) -> float:
    """Return the largest singular value of a matrix."""
    return float(torch.linalg.matrix_norm(matrix, 2))


def distance_to(solution: Tensor, modulus: float) -> dict[str, Any]:
    """Return error and certificate of a problem with one solution and a known modulus.

    Args:
        solution: The only solution.
        modulus: ``mu`` with ``residual(u) >= mu |u - solution|`` everywhere, above 0: the modulus
            of strong monotonicity, or the smallest singular value of an affine operator.

    Raises:
        ConfigError: for a modulus that is not above 0, as options far from the defaults give.
    """
    if not modulus > 0:
        raise ConfigError(
            f"problem: these options give data with modulus {modulus:.3g}, expected above 0: their "
            "solution is not unique; choose options or a size nearer to the defaults"
        )
    return {
        "solution": solution,
        "error": lambda value: float((value - solution).norm()),
        "allows": lambda value, residual: residual / modulus,
    }
