"""Robustness of an image classifier in input space: certified radii and attacks per image."""

# Legend: N images, I pixels, V classes.

import copy
import math

import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from common.models import LipschitzMLP
from common.norms import gamma, round_up, spectral_norm_bound
from solvers.robustness.pgd import attacked
from solvers.robustness.radii import PairNorms, certified_radii, linf_radii
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
from solvers.robustness.threat import Threat

_STATEMENT = (
    "Every pixel may move, by at most the radius: l2 over the {pixels} pixels, or the largest "
    "pixel (linf, the l2 radius over the root of their number). The whole input space is covered."
)


def feature_bound(model: LipschitzMLP) -> float:
    """Bound the l2 Lipschitz constant from the input to what the last matrix reads.

    The product of operator norms; activations have slope at most 1.
    """
    bound = 1.0
    for linear in list(model.linears)[:-1]:
        assert isinstance(linear, torch.nn.Linear)
        bound = round_up(bound * spectral_norm_bound(linear.weight))
    return bound


def forward_error(model: LipschitzMLP, x_BI: Tensor) -> Tensor:
    """Bound the rounding error (B, 1) of every logit that a float64 model computes.

    Source:
        The standard bound on inner products, entry by entry: magnitudes pass through the network
        beside the values, and no activation makes an error larger (tanh adds its own, counted
        as 64 roundings). Biases that cancel need it.
    """
    size_BF, roundings = x_BI.double().abs(), 0
    for index, linear in enumerate(model.linears):
        assert isinstance(linear, torch.nn.Linear)
        if index and model.activation == "maxmin":
            # Either of a pair may come out first.
            size_BF = size_BF.unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1)
        size_BF = size_BF @ linear.weight.abs().T
        if linear.bias is not None:
            size_BF = size_BF + linear.bias.abs()
        roundings += linear.in_features + 2 + 64 * (model.activation == "tanh")
    return 1.01 * gamma(roundings) * size_BF.amax(-1, keepdim=True)


class ImageEvaluator:
    """Certified radii and attacks of one classifier.

    Args:
        model: Copied to float64 on its device; not modified.
        settings: What to evaluate.
        pair: A proved bound on how far any difference of two logits moves per l2 of the input,
            such as ``ClassifierCertificate.pair_l2``; used where that of a pair's own rows and
            the norms of the other matrices is larger.
    """

    def __init__(
        self, model: LipschitzMLP, settings: RobustnessSettings, *, pair: float = math.inf
    ) -> None:
        self.settings, self.ceiling = settings, pair
        self.features = feature_bound(model)
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        last = self.model.linears[-1]
        assert isinstance(last, torch.nn.Linear)
        self.pairs = PairNorms(last.weight)

    def evaluate(self, images_NI: Tensor, labels_N: Tensor, *, seed: int = 0) -> Evaluation:
        """Return certified curves on all images and attacks on some.

        Args:
            images_NI: Pixels, of any floating type; in [0, 1] when the settings ask for the box.
            labels_N: Classes, int64.
            seed: Of the attacks.

        Raises:
            ConfigError: for the box and pixels outside it.
            DataError: for images of another size than the model's, or none.
            CertificateError: if an attack breaks a certified image.
        """
        device = next(self.model.parameters()).device
        images_NI, labels_N = images_NI.to(device).double(), labels_N.to(device)
        self._check(images_NI)
        top_N, radii_N = self._radii(images_NI)
        hits_N = top_N == labels_N
        keep = _even(len(hits_N), self.settings.attack_images)
        points = self._attack(images_NI[keep], top_N[keep], hits_N[keep], radii_N[keep], seed)
        return Evaluation(
            kind="classifier",
            inputs=len(hits_N),
            accuracy=share(hits_N),
            median_radius=median(radii_N),
            statement=_STATEMENT.format(pixels=images_NI.shape[1]),
            curves=tuple(self._curves(radii_N, hits_N, images_NI.shape[1])),
            points=points,
            details={"unit": 1.0, "dimension": images_NI.shape[1]},
        )

    def _check(self, images_NI: Tensor) -> None:
        expected = self.model.sizes[0]
        if images_NI.ndim != 2 or images_NI.shape[1] != expected or not len(images_NI):
            raise DataError(
                f"images of shape {tuple(images_NI.shape)}: expected (N, {expected}) as the "
                "model's input; give the data that it was trained on"
            )
        low, high = float(images_NI.min()), float(images_NI.max())
        if self.settings.box and not 0 <= low <= high <= 1:
            raise ConfigError(
                f"robustness.box=true: pixels from {low:g} to {high:g}, expected 0 to 1; set "
                "robustness.box=false"
            )

    @torch.no_grad()
    def _radii(self, images_NI: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for part_BI in images_NI.split(self.settings.batch):
            logits_BV = self.model(part_BI)
            movement_BV = self.pairs.of(logits_BV.argmax(-1)) * self.features
            error_B1 = forward_error(self.model, part_BI)
            parts.append(certified_radii(logits_BV, movement_BV.clamp(max=self.ceiling), error_B1))
        return torch.cat([top for top, _ in parts]), torch.cat([radius for _, radius in parts])

    def _curves(self, radii_N: Tensor, hits_N: Tensor, pixels: int) -> list[Curve]:
        curves = []
        for norm in self.settings.norms:
            own_N = radii_N if norm == "l2" else linf_radii(radii_N, pixels)
            radii = grid(largest_radius(own_N, self._epsilons(norm)), self.settings.points)
            curves.append(curve(norm, "input", radii, _within(own_N), hits_N))
        return curves

    def _attack(
        self, images_NI: Tensor, top_N: Tensor, hits_N: Tensor, radii_N: Tensor, seed: int
    ) -> tuple[Point, ...]:
        points = []
        for norm in self.settings.norms:
            threats = [
                Threat(norm=norm, epsilon=epsilon, box=self.settings.box)
                for epsilon in self._epsilons(norm)
            ]
            masks = attacked(self.model, images_NI, top_N, threats, self.settings, seed)
            for threat, (fgsm_N, pgd_N) in zip(threats, masks, strict=True):
                proved_N = _within(radii_N)(threat.l2_radius(images_NI.shape[1]))
                place = (norm, "input", threat.epsilon, threat.epsilon)
                points.append(point(place, hits_N, proved_N, fgsm_N, pgd_N))
        return tuple(points)

    def _epsilons(self, norm: str) -> list[float]:
        chosen = self.settings.l2_epsilons if norm == "l2" else self.settings.linf_epsilons
        return sorted(chosen)


def _within(radii_N: Tensor) -> Certified:
    return lambda radius: (radii_N > radius) | (radius == 0)


def _even(count: int, wanted: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, wanted)).round().long().tolist()
