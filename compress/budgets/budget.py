"""What a budget means: parameters, operations or measured seconds, of which whole.

``share`` is all that a pruner calls: it says what each target's components are worth, how much
has to go, and lets ``allocate`` decide where.
Source: own derivation; counting conventions are those of ``Target``.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from common.config import check_types, one_of
from common.errors import ConfigError
from compress.budgets.allocate import Curve, allocate
from compress.targets import Target

KINDS = ("params", "flops", "latency")
WHOLES = ("prunable", "model")
WIDTHS = 5
"""Widths that are timed per shape, the full one among them."""
WARM_UPS = 10
ROUNDS = 50

Seconds = Callable[[Target, int], float]
"""Times one run of the stages that narrow with the target, with so many components kept."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What ``keep`` is a fraction of.

    Attributes:
        kind: ``params``, ``flops`` (2 per multiply-add, per token or image) or ``latency``
            (seconds measured on the device at hand).
        of: ``prunable``: what all components in scope hold together; ``model``: the whole model,
            so that everything outside the scope counts as kept.
    """

    kind: str = "params"
    of: str = "prunable"

    def __post_init__(self) -> None:
        """Check both names."""
        check_types(self)
        one_of("compress.budget.kind", self.kind, KINDS)
        one_of("compress.budget.of", self.of, WHOLES)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """A target and what limits the choice of how many components it keeps.

    Attributes:
        target: The place.
        errors: Root of the mean squared error after removing r = 0, 1, ... components; where it
            ends, nothing more may be removed. None for ``uniform``, which does not look at it.
        amplification: Output deviation per unit of error, ``D_l``; 1 without a certificate.
        least: Components that stay at least.
        align: The kept number is a multiple of this, unless all stay.
        allowed: The only admissible kept numbers besides all; None admits every one.
    """

    target: Target
    errors: Sequence[float] | None = None
    amplification: float = 1.0
    least: int = 1
    align: int = 1
    allowed: frozenset[int] | None = None

    @property
    def most(self) -> int:
        """Largest number of components that may be removed, before ``align`` and ``allowed``."""
        most = max(self.target.components - self.least, 0)
        return most if self.errors is None else min(most, len(self.errors) - 1)

    def curve(self, cost: float | Sequence[float]) -> Curve:
        """Return the error curve together with what removals free."""
        errors = [0.0] * (self.most + 1) if self.errors is None else self.errors[: self.most + 1]
        return Curve(
            components=self.target.components,
            cost=cost,
            errors=errors,
            amplification=self.amplification,
            align=self.align,
            allowed=self.allowed,
        )


def share(
    candidates: Sequence[Candidate],
    keep: float,
    method: str = "uniform",
    *,
    budget: Budget | None = None,
    keep_heads: float | None = None,
    model_total: float | None = None,
    seconds: Seconds | None = None,
) -> dict[str, int]:
    """Return the number of components that every target keeps.

    Args:
        candidates: The targets in scope; all but ``uniform`` need their ``errors``.
        keep: Fraction of the budget's whole that may stay, in (0, 1].
        method: Name in ``allocate.ALLOCATORS``.
        budget: What ``keep`` is a fraction of; parameters of the prunable part by default.
        keep_heads: A budget of its own for the targets of kind ``heads``; ``keep`` is then that
            of the others. With ``of=model`` only 1, which leaves the heads alone. None shares
            one budget among all.
        model_total: Parameters, operations per token or seconds of the whole dense model, in the
            unit of ``budget.kind``; needed for ``of=model``.
        seconds: Times a target at a kept number, one run per call; needed for ``latency``.

    Returns:
        Kept components per target name, never over the budget. Equal targets with equal limits
        keep equally many under ``uniform``.

    Raises:
        ConfigError: for an unknown method, two reductions of one model, ``keep_heads``
            without heads, or a budget that the least kept numbers put out of reach.
    """
    budget = Budget() if budget is None else budget
    assert method == "uniform" or all(c.errors is not None for c in candidates), "errors needed"
    assert budget.of == "prunable" or model_total is not None, "of=model needs the model's total"
    _check_heads(candidates, keep_heads, budget)
    curves = _curves(candidates, budget, seconds)
    groups = [("compress.keep", keep, list(curves))]
    if keep_heads is not None:
        heads = [c.target.name for c in candidates if c.target.kind == "heads"]
        others = [name for name in curves if name not in heads]
        groups = [("compress.keep", keep, others), ("compress.keep_heads", keep_heads, heads)]
    kept: dict[str, int] = {}
    for setting, fraction, names in groups:
        if not names:
            continue
        chosen = [curves[name] for name in names]
        total = model_total if budget.of == "model" else None
        counts = allocate(chosen, fraction, method, total=total, name=setting)
        kept |= dict(zip(names, counts, strict=True))
    return {candidate.target.name: kept[candidate.target.name] for candidate in candidates}


def latency_table(candidate: Candidate, seconds: Seconds) -> list[float]:
    """Return the seconds that removing r = 0 .. all components saves, from a few timed widths.

    Every round times all widths once, so that a clock that drifts meets all of them; a width's
    latency is the median of its ratio to the full width in the same round. In between it is
    interpolated; where a narrower map ran slower than a wider one, the wider one counts as slow.

    Args:
        candidate: The target and its admissible kept numbers, among which the widths are chosen.
        seconds: Times one run.

    Returns:
        Estimates, never falling, 0 first; the last one, with nothing kept, is the full latency.

    Raises:
        ConfigError: when a timing is not positive.
    """
    target = candidate.target
    kept = target.components - candidate.curve(1).options()[::-1]
    places = np.linspace(0, len(kept) - 1, min(WIDTHS, len(kept))).round().astype(int)
    widths = [int(width) for width in kept[places]]
    rounds = [[seconds(target, width) for width in widths] for _ in range(WARM_UPS + ROUNDS)]
    times_RW = np.array(rounds[WARM_UPS:])
    if not (times_RW > 0).all():
        raise ConfigError(
            f"{target.name}: a timing of {times_RW.min()} s, expected above 0; the clock is too "
            "coarse for maps this small, choose compress.budget.kind=flops"
        )
    full = statistics.median(times_RW[:, -1].tolist())
    latency_W = full * np.median(times_RW / times_RW[:, -1:], axis=0)
    latency_W = np.minimum(np.maximum.accumulate(latency_W), full)
    grid = np.arange(target.components, -1, -1)
    latency = np.interp(grid, [0, *widths], [0.0, *latency_W])
    return [float(value) for value in full - latency]


def _check_heads(candidates: Sequence[Candidate], keep_heads: float | None, budget: Budget) -> None:
    if keep_heads is None:
        return
    if budget.of == "model" and keep_heads < 1:
        raise ConfigError(
            f"compress.keep_heads={keep_heads}: expected 1 or null with compress.budget.of=model, "
            "whose one fraction is of everything; change it, or set compress.budget.of=prunable"
        )
    if all(candidate.target.kind != "heads" for candidate in candidates):
        raise ConfigError(
            f"compress.keep_heads={keep_heads}: expected heads among the prunable places, found "
            "none; remove it"
        )


def _curves(
    candidates: Sequence[Candidate], budget: Budget, seconds: Seconds | None
) -> Mapping[str, Curve]:
    """Return the curve of every target; equal shapes are timed once."""
    tables: dict[tuple[object, ...], list[float]] = {}
    curves = {}
    for candidate in candidates:
        target = candidate.target
        cost: float | Sequence[float] = target.params if budget.kind == "params" else target.flops
        if budget.kind == "latency":
            assert seconds is not None, "a latency budget needs a clock"
            shape = dataclasses.replace(target, name="", layer=0)
            key = (shape, candidate.most, candidate.align, candidate.allowed)
            if key not in tables:
                tables[key] = latency_table(candidate, seconds)
            cost = tables[key]
        curves[target.name] = candidate.curve(cost)
    return curves
