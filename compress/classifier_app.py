"""``compress`` for image classifiers: the calibration images are the training part, or noise."""

# Legend: N images, I pixels.

import functools
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from common.bundle import Bundle
from common.config import build
from common.errors import ConfigError
from common.images import ImageConfig, Images, load_images
from common.runs import Outcome, Run
from compress.adapters import adapter_for
from compress.classifier_report import ClassifierReport, classifier_report
from compress.frontier import metrics_point, prunings, write_frontier
from compress.pruner import Survey, survey
from compress.record import prune, require_certificate, weight_bytes
from compress.settings import CompressConfig
from compress.statistics.calibration import gaussian_images, image_moments
from compress.statistics.collect import batches
from compress.timing import compare


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
        The ``compress/*`` metrics; artifacts ``bundle`` and ``frontier``. The objective is the
        share of validation images that the pruned classifier gets wrong.

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
    found = None
    if settings.frontier:
        found = survey(adapter_for(bundle.model), inputs_NI, settings, keeps=settings.frontier)
    pruned, report = prune(
        bundle,
        settings,
        inputs_NI,
        held=images,
        path=run.directory / "bundle",
        found=found,
        command=run.command,
    )
    metrics = _metrics(bundle, report, inputs_NI)
    points = [metrics_point(settings, metrics)]
    if found is not None:
        points += _frontier(bundle, settings, inputs_NI, images, found)
    for point in points:
        point["cert_tightened_before"] = bundle.certificate.tightened
    frontier = run.directory / "frontier.json"
    write_frontier(frontier, points)
    return Outcome(
        metrics=metrics | {"compress/bundle_bytes": weight_bytes(pruned, bundle)},
        artifacts={"bundle": pruned.path, "frontier": frontier},
        objective=1 - report.seen.accuracy,
    )


def _frontier(
    bundle: Bundle, settings: CompressConfig, inputs_NI: Tensor, images: Images, found: Survey
) -> list[dict[str, Any]]:
    """Prune at every further budget, one-shot; nothing of it is kept but the records."""
    model, certificate, points = bundle.model, require_certificate(bundle), []
    gains = adapter_for(model).amplifications(certificate)
    how = {"gains": gains, "found": found}
    for other, pruning in prunings(model, inputs_NI, settings, order="one_shot", **how):
        report = classifier_report(model, pruning, images, certificate, other)
        points.append(metrics_point(other, _metrics(bundle, report, inputs_NI)))
    return points


def _metrics(bundle: Bundle, report: ClassifierReport, inputs_NI: Tensor) -> dict[str, float]:
    batch_NI = batches(inputs_NI)[0]
    models = (bundle.model, report.pruning.model)
    speed = compare(
        *(functools.partial(model, batch_NI) for model in models),
        device=batch_NI.device,
        rounds=report.settings.rounds,
    )
    return report.metrics() | {"compress/forward_speedup": speed.ratio}


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
