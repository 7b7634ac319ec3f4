"""Certified accuracy against radius: how many answers provably survive a change of the input.

A run stores how far its last features may move before a right answer can change
(``margins.json``); divided by the proved constant of what comes before, that is a radius of the
input, so that a better certificate needs no new evaluation.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.reporting.frontier import Point, front_of, group, tones
from common.reporting.page import details, escape, figure, figures, kind, percent, section, table
from common.reporting.proof import certificate
from common.reporting.runs import StageRun
from common.reporting.scatter import Cloud, Curve, curve_chart, marker_key

MARGINS_FILE = "margins.json"
_DECADES, _SMALLEST = 4, 1e-12
_MOST_STRONG, _MOST_ROWS = 5, 12
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """How radii of one kind of input are told.

    Attributes:
        shown: Radii of the table, with their names.
        axis: What the horizontal axis shows.
        lead: What the section is about.
        inputs: What is counted.
        moves: What stays true while what moves.
    """

    shown: Mapping[float, str]
    axis: str
    lead: str
    inputs: str
    moves: str


UNITS = {
    "embedding": Unit(
        shown={share: f"{100 * share:g} %" for share in (0.01, 0.05, 0.1, 0.25)},
        axis="radius, share of the median embedding distance",
        lead=(
            "Scaling all logits down makes the constant small and proves nothing more. This "
            "figure does not change with the scale: how far every embedded token may move at "
            "once before a right answer could be lost."
        ),
        inputs="positions",
        moves=(
            "every embedded token moves by less than the radius (l2, within the certificate's "
            "ball of embeddings)"
        ),
    ),
    "pixels": Unit(
        shown={radius: f"{radius:g}" for radius in (0.1, 0.25, 0.5, 1.0)},
        axis="radius, l2 over all pixels",
        lead="How far the pixels may move before a right answer could be lost.",
        inputs="images",
        moves="the pixels move by less than the radius (l2)",
    ),
}
"""By the unit that ``margins.json`` names."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Certified:
    """A falling curve that lies nowhere above what is proved of the positions that were read.

    Attributes:
        radii: Increasing, in l2 per token, as shares of ``unit``.
        shares: Of all positions: right, and proved to stay right within the radius.
        inputs: How many positions or images were read.
        unit: ``embedding`` or ``pixels``.
    """

    radii: tuple[float, ...]
    shares: tuple[float, ...]
    inputs: int
    unit: str

    def at(self, radius: float) -> float:
        """Return a share that is right and certified at a radius; 0 beyond the curve."""
        found = (s for r, s in zip(self.radii, self.shares, strict=True) if r >= radius)
        return next(found, 0.0)


def certified_curve(cell: StageRun) -> Certified | None:
    """Return the curve of a run, or None without margins or a finite constant of its blocks.

    Radii of text are l2 per token over the median l2 distance of two embedding rows, so that
    scaling the logits or the embedding changes nothing.
    """
    content = cell.json(MARGINS_FILE)
    if not isinstance(content, dict) or content.get("unit") not in UNITS:
        return None
    before, length = _bound_before_head(cell, content), content.get("unit_length")
    radii, shares = content.get("radii"), content.get("shares")
    if not before or not length or not radii or not shares or len(radii) != len(shares):
        return None
    return Certified(
        radii=tuple(float(radius) / before / float(length) for radius in radii),
        shares=tuple(float(share) for share in shares),
        inputs=int(content.get("inputs", 0)),
        unit=content["unit"],
    )


def radius_section(points: Sequence[Point]) -> str:
    """Return certified accuracy against radius for every run; empty when none has margins."""
    curves = [(point, certified_curve(point.cell)) for point in points]
    known = [(point, curve) for point, curve in curves if curve is not None]
    if not known:
        return ""
    first = known[0][1].unit
    known = [(point, curve) for point, curve in known if curve.unit == first]
    unit = UNITS[first]
    return section(
        "Certified accuracy", unit.lead, figures(_figure(known, unit)), _table(known, unit)
    )


def _figure(known: Sequence[tuple[Point, Certified]], unit: Unit) -> str:
    points = [point for point, _ in known]
    colours, strong = tones(points), _strong(points)
    least = max(curve.radii[-1] for _, curve in known) / 10**_DECADES or _SMALLEST
    lines = []
    for point, curve in known:
        x, y = _cut(curve, least)
        tone, is_strong = colours[group(point, points)], id(point) in strong
        lines.append(Curve(x=x, y=y, tone=tone, strong=is_strong))
    key = [Cloud(label=name, x=(), y=(), tone=tone, marker="s") for name, tone in colours.items()]
    best = ", ".join(
        f"{100 * max(curve.at(radius) for _, curve in known):.3g} % at {name}"
        for radius, name in unit.shown.items()
    )
    words = f"certified accuracy against radius, {len(known)} models; best: {best}"
    chart = curve_chart(lines, unit.axis, f"right and certified, share of {unit.inputs}", words)
    fewest = min(curve.inputs for _, curve in known)
    caption = (
        f"<b>Certified accuracy.</b> {kind('proved')} Share of {unit.inputs} whose right answer "
        f"cannot change while {unit.moves}. {kind('measured')} On {fewest:,} {unit.inputs} of "
        "held-out data. Thick: models on the staircase above."
    )
    return figure(marker_key(key) + chart, caption)


def _strong(points: Sequence[Point]) -> set[int]:
    front = front_of(points)
    step = max(1, math.ceil(len(front) / _MOST_STRONG))
    return {id(point) for point in front[::step]}


def _cut(curve: Certified, least: float) -> tuple[list[float], list[float]]:
    """Return the curve from a radius on that a logarithmic axis can show."""
    pairs = [(r, s) for r, s in zip(curve.radii, curve.shares, strict=True) if r > least]
    pairs = [(least, curve.at(least)), *pairs]
    return [radius for radius, _ in pairs], [share for _, share in pairs]


def _table(known: Sequence[tuple[Point, Certified]], unit: Unit) -> str:
    heads = ["Run", *(f"certified at {name}" for name in unit.shown.values())]
    order = sorted(known, key=lambda pair: [-pair[1].at(radius) for radius in unit.shown])
    rows = [
        [escape(point.cell.directory.name), *(percent(curve.at(radius)) for radius in unit.shown)]
        for point, curve in order
    ]
    markup, rest = table(heads, rows[:_MOST_ROWS]), rows[_MOST_ROWS:]
    return markup + (details(f"{len(rest)} further runs", table(heads, rest)) if rest else "")


def _bound_before_head(cell: StageRun, content: Mapping[str, Any]) -> float | None:
    """Return the proved l2 constant of all but the last matrix, or None if it overflows."""
    naive = content.get("naive_bound")
    blocks = certificate(cell.artifact("bundle")).get("blocks") or []
    tightened = [block.get("tightened") for block in blocks]
    is_stored = tightened and all(isinstance(rho, int | float) for rho in tightened)
    if is_stored and content["unit"] == "embedding":
        bound = math.prod(float(rho) for rho in tightened) * (1 + _ROUNDING)
        return bound if 0 < bound < math.inf else None
    return float(naive) if isinstance(naive, int | float) and naive > 0 else None
