"""Robustness of a language model in embedding space: certified radii and attacks per position.

A perturbation moves every token of the context by at most the radius (largest token l2), all at
once. Source: spec bound_tightening 5, lipschitz_training 10 point 1.
"""

# Legend: W windows, T token position, C width, V vocabulary, P = W * T positions.

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.certificate import Certificate
from common.errors import CertificateError
from common.models import LipschitzTransformer
from solvers.robustness.domain import StreamBound, median_row_distance
from solvers.robustness.pgd import attacked
from solvers.robustness.radii import PairNorms, certified_radii
from solvers.robustness.record import (
    Certified,
    Curve,
    Evaluation,
    Point,
    curve,
    grid,
    largest_radius,
    median,
    point,
    share,
)
from solvers.robustness.settings import RobustnessSettings
from solvers.robustness.swaps import closest_swaps
from solvers.robustness.threat import Threat

SHARES = (0.01, 0.05, 0.10, 0.25)
"""Radii of the headline figures, as shares of the median distance between embedding rows."""

_PROOFS = 6
# Pairs of a position and a token compared at once: temporaries of 64 MiB.
_ELEMENTS = 2**23

_STATEMENT = (
    "The embedding of every token of the context moves by at most the radius (l2 per token, all "
    "tokens at once). Domain ball: perturbed embeddings stay in the certified ball of l2 radius "
    "{radius:.6g}; embeddings lie up to {room:.3g} (median) below its surface, and a perturbation "
    "that leaves it is not covered. Domain space: no such condition; beyond the surface the "
    "constants are re-proved on a larger ball."
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Positions:
    """Per position (P,): whether top-1 is the next token, and distances in the stream or ball."""

    top: Tensor
    hits: Tensor
    stream: Tensor  # how far the final stream may move
    room: Tensor  # distance of the context's tokens from the surface of the certified ball


class TextEvaluator:
    """Certified radii and attacks of one language model.

    Args:
        model: Copied to float64 on its device; not modified.
        certificate: Of exactly these weights, and accepted by the checker.
        settings: What to evaluate.

    Raises:
        CertificateError: if the certificate proves no finite constant.
    """

    def __init__(
        self, model: LipschitzTransformer, certificate: Certificate, settings: RobustnessSettings
    ) -> None:
        self.bound = StreamBound(model, certificate)
        if not math.isfinite(self.bound.ball):
            raise CertificateError(
                f"tightened=1e{certificate.log10_tightened:.0f}: the bound overflows, expected a "
                "finite one; no radius can be certified; train under a constraint"
            )
        self.certificate, self.settings = certificate, settings
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        scale, rows_VC = self.model.config.final_scale, self.model.head.weight
        rows_VC = rows_VC[: self.model.config.vocab_size]
        self.pairs = PairNorms(rows_VC, scale, certificate.pair_norm)
        self.unit = median_row_distance(model)
        self._beyond: dict[float, float] = {}

    def logits(self, x_BTC: Tensor) -> Tensor:
        """Return the logits (B, T, V) of embedded sequences (B, T, C)."""
        return self.model.logits(self.model.stream(x_BTC))

    def evaluate(
        self, windows_WT: Tensor, attacked_WT: Tensor, *, seed: int = 0, tokenizer: Any = None
    ) -> Evaluation:
        """Return certified curves on all windows and attacks on some.

        Args:
            windows_WT: Ids (W, T + 1): inputs and next tokens; radii of every position.
            attacked_WT: The same, of the windows to attack.
            seed: Of the attacks.
            tokenizer: Names tokens in the file; ids alone without it.

        Raises:
            CertificateError: if an attack breaks a certified position.
        """
        found = self._survey(windows_WT)
        radii_P = found.stream / self.bound.ball
        shares = {f"certified_top1_{100 * p:g}": ("ball", p) for p in SHARES}
        shares |= {f"certified_top1_space_{100 * p:g}": ("space", p) for p in SHARES}
        figures = {
            name: share(self._certified(domain, found)(p * self.unit))
            for name, (domain, p) in shares.items()
        }
        swaps = closest_swaps(self.model.embedding.weight, radii_P, tokenizer)
        figures["median_row_distance"] = self.unit
        figures["certified_swap"] = swaps[0]["certified_share"] if swaps else 0.0
        room = float(found.room.median())
        radius = self.certificate.radius
        return Evaluation(
            kind="transformer",
            inputs=len(found.hits),
            accuracy=share(found.hits),
            median_radius=median(radii_P),
            statement=_STATEMENT.format(radius=radius, room=room),
            curves=self._curves(found, radii_P),
            points=self._attack(attacked_WT, seed),
            figures=figures,
            details={"unit": self.unit, "dimension": self.model.config.width, "swaps": swaps},
        )

    @torch.no_grad()
    def _survey(self, windows_WT: Tensor) -> _Positions:
        device = self.model.embedding.weight.device
        rows = max(1, self.settings.batch // (windows_WT.shape[1] - 1))
        parts: list[tuple[Tensor, ...]] = []
        for ids_BT in windows_WT.to(device).split(rows):
            x_BTC = self.model.embed(ids_BT[:, :-1])
            top_P, stream_P = self._stream_radii(self.logits(x_BTC).flatten(0, 1))
            norms_BT = x_BTC.norm(dim=-1).cummax(dim=1).values
            room_P = (self.certificate.radius - norms_BT).clamp(min=0).flatten()
            parts.append((top_P, top_P == ids_BT[:, 1:].flatten(), stream_P, room_P))
        return _Positions(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _stream_radii(self, logits_PV: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, _ELEMENTS // logits_PV.shape[1])
        found = [
            certified_radii(part_MV, self.pairs.of(part_MV.argmax(-1)))
            for part_MV in logits_PV.split(rows)
        ]
        return torch.cat([top for top, _ in found]), torch.cat([radius for _, radius in found])

    def _certified(self, domain: str, found: _Positions) -> Certified:
        """Return the mask of positions whose top-1 is proved to stay, as a function of radius."""
        radii_P = found.stream / self.bound.ball
        if domain == "ball":
            return lambda radius: (radii_P > radius) | (radius == 0)
        proofs = self._beyond = self._beyond or self._proofs(radii_P)

        def certified(radius: float) -> Tensor:
            inside_P = (radii_P > radius) & (found.room >= radius)
            wide = min((r for r in proofs if r >= radius), default=None)
            beyond_P = inside_P
            if wide is not None:
                beyond_P = found.stream / proofs[wide] > radius
            return inside_P | beyond_P | (radius == 0)

        return certified

    def _proofs(self, radii_P: Tensor) -> dict[float, float]:
        """Return the factors on some balls larger than the certified one, by the excess."""
        finite_P = torch.where(radii_P.isfinite(), radii_P, 0.0)
        steps = [float(finite_P.max()) * (index + 1) / _PROOFS for index in range(_PROOFS)]
        chosen = (*SHARES, *self.settings.text_epsilons)
        # A little more than asked for, so that rounding of a radius finds its proof.
        radii = sorted({r * (1 + 1e-9) for r in (*steps, *(p * self.unit for p in chosen))})
        return dict(zip(radii, self.bound.beyond(radii), strict=True))

    def _curves(self, found: _Positions, radii_P: Tensor) -> tuple[Curve, ...]:
        epsilons = [share_ * self.unit for share_ in self.settings.text_epsilons]
        radii = grid(largest_radius(radii_P, epsilons), self.settings.points)
        return tuple(
            curve("l2", domain, radii, self._certified(domain, found), found.hits)
            for domain in ("ball", "space")
        )

    def _attack(self, windows_WT: Tensor, seed: int) -> tuple[Point, ...]:
        found = self._survey(windows_WT)
        x_WTC = self.model.embed(windows_WT[:, :-1].to(found.top.device))
        top_WT = found.top.view(x_WTC.shape[:2])
        labels = sorted(self.settings.text_epsilons)
        width, points = x_WTC.shape[-1], []
        for domain in self.settings.domains:
            certified = self._certified(domain, found)
            for norm in self.settings.norms:
                threats = [self._threat(norm, domain, label) for label in labels]
                masks = attacked(self.logits, x_WTC, top_WT, threats, self.settings, seed)
                for label, threat, (fgsm_P, pgd_P) in zip(labels, threats, masks, strict=True):
                    proved_P = certified(threat.l2_radius(width))
                    place = (norm, domain, threat.epsilon, label)
                    points.append(point(place, found.hits, proved_P, fgsm_P, pgd_P))
        return tuple(points)

    def _threat(self, norm: str, domain: str, label: float) -> Threat:
        width = self.model.config.width
        epsilon = label * self.unit / (math.sqrt(width) if norm == "linf" else 1.0)
        ball = self.certificate.radius if domain == "ball" else None
        return Threat(norm=norm, epsilon=epsilon, ball=ball)


def attack_windows(windows_WT: Tensor, tokens: int) -> Tensor:
    """Return evenly chosen windows (and the start of one) with about ``tokens`` positions.

    Args:
        windows_WT: Ids (W, T + 1).
        tokens: Wanted positions; fewer than T shorten the windows, which changes no position.
    """
    length = min(windows_WT.shape[1] - 1, tokens)
    count = min(len(windows_WT), max(1, tokens // length))
    keep: Sequence[int] = torch.linspace(0, len(windows_WT) - 1, count).round().long().tolist()
    return windows_WT[keep, : length + 1]
