"""Which method is best at each budget of a study, among those that keep the certificate."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.study.config import ROTATION

KEPT = 1e-6
"""Relative growth of the bound up to which a certificate counts as kept: rounding."""
TIE = 0.002
"""Bits per byte within which two methods are tied."""


def mark(
    points: Sequence[dict[str, Any]], dense: Mapping[str, Any], default: str
) -> list[dict[str, Any]]:
    """Mark every row and judge the default method at every budget.

    Only one-shot rows compete: all of them saw the same activations. The rotation does not: it
    removes something else; how far ahead of the default it is at equal parameters is said.

    Args:
        points: Rows of a study; ``keeps_certificate`` and ``mark`` (``best``, ``tied`` or empty)
            are set.
        dense: Figures of the dense model. A row keeps the certificate when its tightened bound,
            or without one the bound from norms, is at most the dense one.
        default: The default method, ``SCORE+COMP``.

    Returns:
        Per budget: ``best`` (method), ``bits`` of it, ``gap`` of the default in bits per byte,
        whether it ``keeps_certificate`` and, if so, is ``tied`` (or best itself);
        ``sequential_gap`` of the default in that order;
        ``rotation_gap`` of the default to the rotation, negative where the default is better.
    """
    for point in points:
        point["keeps_certificate"] = growth(point, dense) <= 1 + KEPT
        point["mark"] = ""
    verdicts = []
    for kind, keep in sorted({(p["kind"], p["keep"]) for p in points}, key=_by_budget):
        group = [p for p in points if (p["kind"], p["keep"]) == (kind, keep)]
        rivals = [p for p in group if _competes(p)]
        if not rivals:
            continue
        best = min(rivals, key=lambda point: point["val_bits_per_byte"])
        bits = best["val_bits_per_byte"]
        for point in rivals:
            point["mark"] = "tied" if point["val_bits_per_byte"] <= bits + TIE else ""
        best["mark"] = "best"
        own = {p["order"]: p for p in group if method(p) == default}
        gaps = {order: point["val_bits_per_byte"] - bits for order, point in own.items()}
        gap = gaps.get("one_shot")
        is_kept = "one_shot" in own and own["one_shot"]["keeps_certificate"]
        turned = [p["val_bits_per_byte"] - bits for p in group if p["score"] == ROTATION]
        verdicts.append(
            {
                "kind": kind,
                "keep": keep,
                "best": method(best),
                "bits": bits,
                "gap": gap,
                "keeps_certificate": is_kept,
                "tied": is_kept and gap is not None and gap <= TIE,
                "sequential_gap": gaps.get("sequential"),
                "rotation_gap": gap - turned[0] if turned and gap is not None else None,
            }
        )
    return verdicts


def growth(point: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """Return by what factor a row's bound has grown: the tightened one, or without one by norms."""
    name = "cert_naive" if point["cert_tightened"] is None else "cert_tightened"
    return float(point[name] / dense[name])


def method(point: Mapping[str, Any]) -> str:
    """Return score and compensation of a row."""
    return f"{point['score']}+{point['comp']}"


def _competes(point: Mapping[str, Any]) -> bool:
    is_rotation = point["score"] == ROTATION
    return point["keeps_certificate"] and point["order"] == "one_shot" and not is_rotation


def _by_budget(budget: tuple[str, float]) -> tuple[bool, float]:
    kind, keep = budget
    return kind == "heads", -keep
