"""``compress`` for image classifiers: the calibration images are the training part, or noise."""

# Legend: N images, I pixels.

import torch
from omegaconf import DictConfig
from torch import Tensor

from common.bundle import Bundle
from common.bundle_format import WEIGHTS
from common.config import build
from common.errors import ConfigError
from common.images import ImageConfig, Images, load_images
from common.runs import Outcome, Run
from compress.record import prune
from compress.settings import CompressConfig
from compress.statistics.calibration import gaussian_images, image_moments


def compress_classifier(
    cfg: DictConfig, settings: CompressConfig, bundle: Bundle, run: Run
) -> Outcome:
    """Prune a certified classifier.

    Args:
        cfg: Key ``data``: images of the classifier's shape.
        settings: What to do.
        bundle: The classifier with its certificate.
        run: Where to write: ``bundle/``.

    Returns:
        The ``compress/*`` metrics and the artifact ``bundle``; the objective is the share of
        validation images that the pruned classifier gets wrong.

    Raises:
        ConfigError: for text, for images of another size, or a source that images do not have.
    """
    config = build(cfg.data)
    if not isinstance(config, ImageConfig):
        raise ConfigError(
            f"data: text, expected images for the classifier {bundle.path}; choose data=digits or "
            "another source of images"
        )
    images = load_images(config)
    if images.inputs != bundle.model.sizes[0]:
        raise ConfigError(
            f"data: images of {images.inputs} pixels, expected {bundle.model.sizes[0]}; choose the "
            "images that the classifier was trained on"
        )
    inputs_NI = _calibration_images(images, settings).to(next(bundle.model.parameters()).device)
    pruned, report = prune(
        bundle,
        settings,
        inputs_NI,
        held=images,
        path=run.directory / "bundle",
        command=run.command,
    )
    size = [(path / WEIGHTS).stat().st_size for path in (bundle.path, pruned.path)]
    metrics = report.metrics() | {"compress/bundle_bytes": size[1] / size[0]}
    return Outcome(
        metrics=metrics,
        artifacts={"bundle": pruned.path},
        objective=1 - report.seen.accuracy,
    )


def _calibration_images(images: Images, settings: CompressConfig) -> Tensor:
    """Return images in random order: of the training part, or noise with their moments."""
    count = max(1, settings.tokens // images.inputs)
    if settings.calibration == "data":
        generator = torch.Generator().manual_seed(settings.seed)
        return images.train_NI[torch.randperm(len(images.train_NI), generator=generator)[:count]]
    if settings.calibration == "random":
        mean, std = image_moments(images.train_NI)
        return gaussian_images(count, (images.inputs,), mean=mean, std=std, seed=settings.seed)
    raise ConfigError(
        f"compress.calibration={settings.calibration}: a classifier samples no images; choose "
        "data or random"
    )
