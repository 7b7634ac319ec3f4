"""Settings of the robustness evaluation."""

import dataclasses

from common.config import check_types, one_of, positive
from common.errors import ConfigError

NORMS = ("l2", "linf")
DOMAINS = ("ball", "space")
LOSSES = ("margin", "cross_entropy")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RobustnessSettings:
    """What is certified and what is attacked; the configuration group ``robustness``.

    Attributes:
        tokens: Text positions whose certified radius is computed; None for all of them.
        attack_tokens: Text positions that are attacked.
        images: Images whose certified radius is computed; None for all of them.
        attack_images: Images that are attacked.
        norms: Of the perturbations: ``l2``, ``linf``; of each token for text.
        domains: Where perturbed embeddings of attacks may lie: ``ball`` (the certified domain),
            ``space`` (anywhere). The certified figures always name both.
        text_epsilons: Attack radii as shares of the median distance between embedding rows; in
            ``linf`` the cube inside the l2 ball of that radius.
        l2_epsilons: Attack radii of images, l2 over all pixels.
        linf_epsilons: Attack radii of images, largest pixel.
        box: Whether perturbed images stay in [0, 1].
        steps: Gradient steps of PGD per restart.
        restarts: Starts of PGD: the input itself, then random points.
        loss: What attacks descend: ``margin`` or ``cross_entropy`` of the predicted class.
        batch: Inputs (text positions) per pass.
        points: Radii per certified curve.
    """

    tokens: int | None = 16384
    attack_tokens: int = 512
    images: int | None = None
    attack_images: int = 512
    norms: tuple[str, ...] = NORMS
    domains: tuple[str, ...] = ("ball",)
    text_epsilons: tuple[float, ...] = (0.01, 0.05, 0.1, 0.25)
    l2_epsilons: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    linf_epsilons: tuple[float, ...] = (0.01, 0.03, 0.06, 0.12)
    box: bool = True
    steps: int = 10
    restarts: int = 2
    loss: str = "margin"
    batch: int = 2048
    points: int = 41

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("attack_tokens", "attack_images", "steps", "restarts", "batch"):
            positive(f"robustness.{name}", getattr(self, name))
        for name in ("tokens", "images"):
            if getattr(self, name) is not None:
                positive(f"robustness.{name}", getattr(self, name))
        if self.points < 2:
            raise ConfigError(f"robustness.points={self.points}: expected at least 2")
        one_of("robustness.loss", self.loss, LOSSES)
        for name, options in (("norms", NORMS), ("domains", DOMAINS)):
            if not getattr(self, name):
                raise ConfigError(
                    f"robustness.{name}=[]: expected at least one of {', '.join(options)}"
                )
            for value in getattr(self, name):
                one_of(f"robustness.{name}", value, options)
        for name in ("text_epsilons", "l2_epsilons", "linf_epsilons"):
            for value in getattr(self, name):
                positive(f"robustness.{name}", value)
