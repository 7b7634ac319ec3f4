"""Command ``unlearn``: make a bundle's model forget a class; the result is a new bundle."""

import logging
from typing import Any

import torch
from omegaconf import DictConfig

from common.bundle import Bundle, load_bundle
from common.config import build
from common.device import resolve_device
from common.document_classes import document_classes
from common.errors import BundleError, ConfigError, DataError
from common.files import write_json
from common.images import ImageConfig, load_images
from common.runs import Outcome, Run, hydra_command
from compress.unlearning.record import UnlearnReport, check_kind, unlearn
from compress.unlearning.samples import ClassData, image_classes, text_classes
from compress.unlearning.settings import UnlearnConfig

log = logging.getLogger(__name__)


def unlearn_bundle(cfg: DictConfig, run: Run) -> Outcome:
    """Let the bundle that ``cfg.bundle`` names forget the class ``cfg.unlearn.forget``.

    Args:
        cfg: Keys ``bundle``, ``unlearn``, ``data`` (what the bundle was trained on), ``seed``,
            ``device``.
        run: Where to write: ``bundle/`` and ``unlearning.json``.

    Returns:
        The ``unlearn/*`` metrics; artifacts ``bundle`` and ``unlearning``. The objective of
        sweeps is what was lost on retained held-out data: accuracy, or bits per byte gained.

    Raises:
        LipError: for anything the user can correct; then nothing is written.
    """
    settings: UnlearnConfig = build(cfg.unlearn, seed=cfg.seed)
    source = build(cfg.data)
    device = resolve_device(cfg.device)
    bundle = load_bundle(cfg.bundle, device=device)
    data = _data(source, bundle, settings)
    check_kind(bundle, data)
    retrained = None
    if settings.retrained is not None:
        retrained = _load_twin(settings.retrained, bundle, device)
    forgotten, report = unlearn(
        bundle,
        settings,
        data,
        retrained=retrained,
        path=run.directory / "bundle",
        command=run.command,
    )
    record = run.directory / "unlearning.json"
    write_json(record, report.to_dict())
    metrics = _metrics(report)
    kind = "bits_per_byte" if data.is_text else "acc"
    name = f"retain_{kind}_held"
    loss = report.after.figures[name] - report.before.figures[name]
    return Outcome(
        metrics=metrics,
        artifacts={"bundle": forgotten.path, "unlearning": record},
        objective=loss if data.is_text else -loss,
        notes=_notes(report),
    )


def _data(source: Any, bundle: Bundle, settings: UnlearnConfig) -> ClassData:
    if isinstance(source, ImageConfig):
        return image_classes(load_images(source), settings)
    if bundle.tokenizer is None:
        raise ConfigError(
            f"bundle={bundle.path}: a {bundle.kind}, and data is text; choose "
            "data=digits or other images"
        )
    context = bundle.config.context
    length = settings.length or context
    if length > context:
        raise DataError(
            f"unlearn.length={length}: expected at most the model's context of {context}; lower it"
        )
    texts = document_classes(source, str(settings.forget))
    return text_classes(texts, bundle.tokenizer, length, settings)


def _load_twin(name: str, bundle: Bundle, device: torch.device) -> Bundle:
    """Load the model to compare with; refuse one that reads other inputs."""
    try:
        retrained = load_bundle(name, device=device)
    except BundleError as error:
        raise BundleError(f"unlearn.retrained: {error}") from None
    old, new = (b.tokenizer and b.tokenizer.to_json() for b in (bundle, retrained))
    if bundle.kind != retrained.kind or old != new:
        raise ConfigError(
            f"unlearn.retrained={retrained.path}: another kind of model or tokenizer than bundle; "
            "give a model that was trained like it, without the class"
        )
    return retrained


def _metrics(report: UnlearnReport) -> dict[str, float]:
    """Return the figures that exist; a return that the limit of steps did not reach has none."""
    metrics: dict[str, float | None] = {}
    for when, standing in report.standings.items():
        metrics |= {f"unlearn/{name}_{when}": value for name, value in standing.figures.items()}
        metrics[f"unlearn/probe_acc_{when}"] = standing.probe
        if standing.membership is not None:
            metrics[f"unlearn/membership_auc_{when}"] = standing.membership.auc
        if standing.relearning is not None:
            metrics[f"unlearn/relearn_retain_steps_{when}"] = standing.relearning.retain
            metrics[f"unlearn/relearn_forget_steps_{when}"] = standing.relearning.forget
    if report.retrained is not None:
        for name, value in report.retrained.figures.items():
            part, _, rest = name.partition("_")
            if rest.endswith("held"):
                metrics[f"unlearn/{part}_gap"] = report.after.figures[name] - value
    maps = report.unlearning.maps
    metrics["unlearn/change"] = max(found.change for found in maps)
    metrics["unlearn/norm_growth"] = max(found.growth for found in maps)
    metrics["unlearn/naive_before"] = report.naive_before
    metrics["unlearn/naive_after"] = report.naive_after
    metrics["unlearn/certified_deviation"] = report.certified_deviation
    metrics["unlearn/rebound"] = report.rebound
    metrics["unlearn/seconds"] = report.seconds
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _notes(report: UnlearnReport) -> dict[str, str]:
    """Return sentences for people: what the figures do and do not show."""
    notes = {
        "data": report.data_rule,
        "erasure": "forgetting is measured at the output; it is not erasure: see the relearning "
        "steps and the probe",
        "membership": _membership_note(report),
    }
    steps = [found.relearning for found in report.standings.values() if found.relearning]
    if any(None in (found.retain, found.forget) for found in steps):
        notes["relearning"] = (
            f"where no number of steps is given, {report.settings.relearn_steps} did not bring "
            "half of the class back"
        )
    return notes


def _membership_note(report: UnlearnReport) -> str:
    attack = report.before.membership
    if attack is None:
        return "the model has seen all of the class: nothing to infer from"
    if not attack.is_attackable:
        return (
            f"the model was not attackable before (AUC {attack.auc:.3f}, standard error "
            f"{attack.error:.3f}): the figure afterwards shows no protection"
        )
    note = f"the model was attackable before (AUC {attack.auc:.3f})"
    if report.retrained is None or report.retrained.membership is None:
        return f"{note}, unless held-out samples are harder by themselves: set unlearn.retrained"
    control = report.retrained.membership.auc
    return f"{note}; a model that saw neither part has {control:.3f}, which is no membership"


main = hydra_command("unlearn", unlearn_bundle)
