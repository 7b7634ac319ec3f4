"""What an evaluation found: certified curves, attacked points, and the check between them."""

# Legend: N inputs or text positions.

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import CertificateError

FORMAT_VERSION = 1
_DECADES = 3.0

Certified = Callable[[float], Tensor]
"""Radius to boolean (N,): the first class provably stays for every perturbation of that size."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Shares certified against the radius.

    Attributes:
        norm: ``l2`` or ``linf`` (the l2 radius over the root of the dimension).
        domain: ``ball`` or ``space`` for embeddings, ``input`` for images.
        radius: Radii, ascending from 0.
        accuracy: Share of inputs that are right and certified.
        top1: Share of inputs whose first class is certified, right or wrong.
    """

    norm: str
    domain: str
    radius: tuple[float, ...]
    accuracy: tuple[float, ...]
    top1: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One attacked radius: what was found and what is proved, for the same inputs.

    Attributes:
        norm: ``l2`` or ``linf``.
        domain: As in ``Curve``.
        epsilon: Radius of the attack.
        label: The radius as the settings give it.
        inputs: Number of attacked inputs or text positions.
        clean_acc: Accuracy without perturbation.
        certified_acc: Share that is right and certified at this radius.
        certified_top1: Share whose first class is certified at this radius.
        fgsm_acc: Accuracy under one full step.
        pgd_acc: Accuracy under all attacks tried up to this radius.
        pgd_top1: Share whose first class no attack has changed.
    """

    norm: str
    domain: str
    epsilon: float
    label: float
    inputs: int
    clean_acc: float
    certified_acc: float
    certified_top1: float
    fgsm_acc: float
    pgd_acc: float
    pgd_top1: float

    @property
    def key(self) -> str:
        """How metric names call this point."""
        where = "_space" if self.domain == "space" else ""
        return f"{self.norm}{where}_{self.label:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything an evaluation found.

    Attributes:
        kind: ``transformer`` or ``classifier``.
        inputs: Images or text positions whose radius was computed.
        accuracy: Share of them that is right without perturbation.
        median_radius: Median certified l2 radius; None where it is infinite.
        statement: What the certified figures say, in a sentence or two.
        curves: Certified shares.
        points: Attacked radii.
        figures: Further numbers by the last part of their metric name.
        details: Further content of the file.
    """

    kind: str
    inputs: int
    accuracy: float
    median_radius: float | None
    statement: str
    curves: tuple[Curve, ...]
    points: tuple[Point, ...]
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``robustness.json``."""
        content = dataclasses.asdict(self)
        return {"format_version": FORMAT_VERSION, **content.pop("details"), **content}

    def metrics(self) -> dict[str, float]:
        """Return the figures under their declared names."""
        values = {
            "robust/inputs": float(self.inputs),
            "robust/accuracy": self.accuracy,
        }
        if self.median_radius is not None:
            values["robust/median_radius"] = self.median_radius
        values |= {f"robust/{name}": value for name, value in self.figures.items()}
        for point in self.points:
            values[f"robust/certified_acc/{point.key}"] = point.certified_acc
            values[f"robust/fgsm_acc/{point.key}"] = point.fgsm_acc
            values[f"robust/pgd_acc/{point.key}"] = point.pgd_acc
        return values


def curve(
    norm: str, domain: str, radii: Sequence[float], certified: Certified, hits_N: Tensor
) -> Curve:
    """Return the certified shares at ascending radii."""
    masks = [certified(radius) for radius in radii]
    return Curve(
        norm=norm,
        domain=domain,
        radius=tuple(radii),
        accuracy=tuple(share(mask_N & hits_N) for mask_N in masks),
        top1=tuple(share(mask_N) for mask_N in masks),
    )


def point(
    place: tuple[str, str, float, float],
    hits_N: Tensor,
    certified_N: Tensor,
    fgsm_N: Tensor,
    pgd_N: Tensor,
) -> Point:
    """Return an attacked point, after checking that no attack broke what is proved.

    Args:
        place: Norm, domain, epsilon and label.
        hits_N: Where the first class is the right one.
        certified_N: Where it is proved to stay.
        fgsm_N: Where one step changed it.
        pgd_N: Where any attack changed it.

    Raises:
        CertificateError: if an attack changed a certified first class: the proof is wrong.
    """
    norm, domain, epsilon, label = place
    attacked, proved = share(hits_N & ~pgd_N), share(hits_N & certified_N)
    if refuted := int((certified_N & (pgd_N | fgsm_N)).sum()):
        raise CertificateError(
            f"{norm} radius {epsilon:g} ({domain}): attacks changed {refuted} certified inputs: "
            f"accuracy under attack {attacked:.6g}, certified accuracy {proved:.6g}, expected at "
            "most the former; the proof is wrong, please report it"
        )
    return Point(
        norm=norm,
        domain=domain,
        epsilon=epsilon,
        label=label,
        inputs=len(hits_N),
        clean_acc=share(hits_N),
        certified_acc=proved,
        certified_top1=share(certified_N),
        fgsm_acc=share(hits_N & ~fgsm_N),
        pgd_acc=attacked,
        pgd_top1=share(~pgd_N),
    )


def share(mask_N: Tensor) -> float:
    """Return the share of true entries; 0 of none."""
    return float(mask_N.double().mean()) if mask_N.numel() else 0.0


def grid(largest: float, points: int) -> list[float]:
    """Return 0 and ``points - 1`` radii up to ``largest``, geometrically spaced."""
    low, high = math.log10(largest) - _DECADES, math.log10(largest)
    steps = torch.linspace(low, high, points - 1, dtype=torch.float64)
    return [0.0, *(10.0 ** float(step) for step in steps)]


def median(radii_N: Tensor) -> float | None:
    """Return the (lower) median; None where it is infinite."""
    value = float(radii_N.median())
    return value if math.isfinite(value) else None


def largest_radius(radii_N: Tensor, epsilons: Sequence[float]) -> float:
    """Return where certified curves end: the largest finite radius or attack radius."""
    finite_N = torch.where(radii_N.isfinite(), radii_N, 0.0)
    return max([1e-12, *epsilons, float(finite_N.max())])
