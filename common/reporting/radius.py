"""Certified accuracy against radius: how many answers provably survive a change of the input.

A run stores how far its last features may move before a right answer can change
(``margins.json``); divided by the proved constant of its blocks that is a radius of the input, so
that a better certificate needs no new evaluation.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.reporting.frontier import Point, front_of, tones
from common.reporting.page import details, escape, figure, figures, kind, percent, section, table
from common.reporting.proof import certificate
from common.reporting.runs import StageRun
from common.reporting.scatter import Cloud, Curve, curve_chart, marker_key

MARGINS_FILE = "margins.json"
RELATIVE = (0.01, 0.05, 0.1, 0.25)
"""Radii of the table, as shares of the median distance between embedding rows."""

_DECADES, _SMALLEST = 4, 1e-12
_MOST_STRONG, _MOST_ROWS = 5, 12
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Certified:
    """A falling curve that lies nowhere above what is proved of the positions that were read.

    Attributes:
        radii: Increasing, in l2 per token, as shares of ``unit``.
        shares: Of all positions: right, and proved to stay right within the radius.
        positions: How many were read.
    """

    radii: tuple[float, ...]
    shares: tuple[float, ...]
    positions: int

    def at(self, radius: float) -> float:
        """Return a share that is right and certified at a radius; 0 beyond the curve."""
        found = (s for r, s in zip(self.radii, self.shares, strict=True) if r >= radius)
        return next(found, 0.0)


def certified_curve(cell: StageRun) -> Certified | None:
    """Return the curve of a run, or None without margins or a finite constant of its blocks.

    Radii are l2 per token over the median l2 distance of two embedding rows: scaling the logits
    or the embedding changes nothing.
    """
    content = cell.json(MARGINS_FILE)
    if not isinstance(content, dict):
        return None
    stream, unit = _stream_bound(cell, content), content.get("median_embedding_distance")
    radii, shares = content.get("radii"), content.get("shares")
    if not stream or not unit or not radii or not shares or len(radii) != len(shares):
        return None
    return Certified(
        radii=tuple(float(radius) / stream / float(unit) for radius in radii),
        shares=tuple(float(share) for share in shares),
        positions=int(content.get("positions", 0)),
    )


def radius_section(points: Sequence[Point]) -> str:
    """Return certified accuracy against radius for every run; empty when none has margins."""
    curves = [(point, certified_curve(point.cell)) for point in points]
    known = [(point, curve) for point, curve in curves if curve is not None]
    if not known:
        return ""
    lead = (
        "Scaling all logits down makes the constant small and proves nothing more. This figure "
        "does not change with the scale: how far every embedded token may move at once before a "
        "right answer could be lost."
    )
    return section("Certified accuracy", lead, figures(_figure(known)), _table(known))


def _figure(known: Sequence[tuple[Point, Certified]]) -> str:
    colours = tones([point for point, _ in known])
    strong = _strong([point for point, _ in known])
    least = max([curve.radii[-1] for _, curve in known]) / 10**_DECADES or _SMALLEST
    lines = [
        Curve(
            label="",
            x=_cut(curve, least).radii,
            y=_cut(curve, least).shares,
            tone=colours[point.optimizer],
            strong=id(point) in strong,
        )
        for point, curve in known
    ]
    key = [Cloud(label=name, x=(), y=(), tone=tone, marker="s") for name, tone in colours.items()]
    best = ", ".join(
        f"{100 * max(curve.at(radius) for _, curve in known):.3g} % at {100 * radius:g} %"
        for radius in RELATIVE
    )
    chart = curve_chart(
        lines,
        "radius, share of the median embedding distance",
        "right and certified, share of positions",
        f"certified accuracy against radius, {len(known)} models; best: {best}",
    )
    fewest = min(curve.positions for _, curve in known)
    caption = (
        f"<b>Certified accuracy.</b> {kind('proved')} Share of positions whose right answer cannot "
        "change while every embedded token moves by less than the radius (l2, within the "
        f"certificate's ball). {kind('measured')} On {fewest:,} positions of held-out data. Thick: "
        "models on the staircase above."
    )
    return figure(marker_key(key) + chart, caption)


def _strong(points: Sequence[Point]) -> set[int]:
    front = front_of(points)
    step = max(1, math.ceil(len(front) / _MOST_STRONG))
    return {id(point) for point in front[::step]}


def _cut(curve: Certified, least: float) -> Certified:
    """Start the curve at a radius that a logarithmic axis can show."""
    pairs = [(r, s) for r, s in zip(curve.radii, curve.shares, strict=True) if r > least]
    pairs = [(least, curve.at(least)), *pairs]
    radii, shares = zip(*pairs, strict=True)
    return dataclasses.replace(curve, radii=radii, shares=shares)


def _table(known: Sequence[tuple[Point, Certified]]) -> str:
    heads = ["Run", *(f"certified at {100 * radius:g} %" for radius in RELATIVE)]
    order = sorted(known, key=lambda pair: [-pair[1].at(radius) for radius in RELATIVE])
    rows = [
        [escape(point.cell.directory.name), *(percent(curve.at(radius)) for radius in RELATIVE)]
        for point, curve in order
    ]
    return table(heads, rows[:_MOST_ROWS]) + (
        details(f"{len(rows) - _MOST_ROWS} further runs", table(heads, rows[_MOST_ROWS:]))
        if len(rows) > _MOST_ROWS
        else ""
    )


def _stream_bound(cell: StageRun, content: Mapping[str, Any]) -> float | None:
    """Return the proved l2 to l2 constant of all blocks, or None if it overflows."""
    naive = content.get("naive_stream_bound")
    blocks = certificate(cell.artifact("bundle")).get("blocks") or []
    tightened = [block.get("tightened") for block in blocks]
    if tightened and all(isinstance(rho, int | float) for rho in tightened):
        bound = math.prod(float(rho) for rho in tightened) * (1 + _ROUNDING)
        return bound if 0 < bound < math.inf else None
    return float(naive) if isinstance(naive, int | float) and naive > 0 else None
