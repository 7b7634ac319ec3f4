"""``unlearn``: from a bundle to a bundle that has forgotten a class, and the account of it."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.bundle import Bundle, save_bundle
from common.errors import BundleError
from common.files import plain
from compress.classifier_report import DOMAIN as IMAGES
from compress.deviation.classifier import classifier_deviation
from compress.deviation.network import certified_deviation
from compress.fit import Fit
from compress.pruner import Pruning
from compress.report import DOMAIN as SEQUENCES
from compress.unlearning.measure import Examined, answers
from compress.unlearning.recovery import guard
from compress.unlearning.samples import ClassData, shuffled
from compress.unlearning.settings import UnlearnConfig
from compress.unlearning.standing import Standing, measure_standing
from compress.unlearning.unlearner import Unlearning, unlearn_model
from solvers.bounds import certify

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UnlearnReport:
    """What was forgotten, what was kept, and how firmly.

    Attributes:
        settings: What was asked for.
        data_rule: Which data are the class and which were held out, in words.
        before: The model as it was.
        after: The new model.
        retrained: A model trained without the class, or None.
        rebound: Share of the forgetting that recovery undid; 0 without recovery.
        naive_before: Naive bound of the parent's certificate, or None.
        naive_after: The re-certified naive bound, or None.
        certified_deviation: Proved bound on the RMS change of the logits, or None.
        holds_for: What that bound holds for, in words; None without one.
        seconds: Wall time of the editing.
        unlearning: The model and the edits.
    """

    settings: UnlearnConfig
    data_rule: str
    before: Standing
    after: Standing
    retrained: Standing | None
    rebound: float
    naive_before: float | None
    naive_after: float | None
    certified_deviation: float | None
    holds_for: str | None
    seconds: float
    unlearning: Unlearning

    @property
    def standings(self) -> dict[str, Standing]:
        """The models that were measured, by ``before``, ``after`` and ``retrained``."""
        found = {"before": self.before, "after": self.after, "retrained": self.retrained}
        return {when: standing for when, standing in found.items() if standing is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the content of ``compression.json`` under ``unlearning``."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "unlearning"]
        maps = [
            {
                "name": found.target.name,
                "kind": found.target.kind,
                "inputs": found.target.inputs,
                "chosen_share": float(found.edit.chosen_IO.double().mean()),
                "change": found.change,
                "norm_growth": found.growth,
            }
            for found in self.unlearning.maps
        ]
        own = {name: plain(getattr(self, name)) for name in names}
        return {"format_version": FORMAT_VERSION, **own, "maps": maps}


def unlearn(
    bundle: Bundle,
    settings: UnlearnConfig,
    data: ClassData,
    *,
    retrained: Bundle | None = None,
    path: str | Path | None = None,
    command: str = "",
) -> tuple[Bundle, UnlearnReport]:
    """Make a bundle's model forget a class and write a new bundle.

    The new bundle carries a naive certificate proved anew where the old one had a valid
    certificate, and none otherwise.

    Args:
        bundle: A transformer or a classifier.
        settings: Method and strength.
        data: The class and the rest, see ``image_classes`` and ``text_classes``.
        retrained: A model trained without the class, to compare with.
        path: New bundle; by default beside the old one, with ``-unlearned`` appended.
        command: The command line, for the manifest.

    Returns:
        The new bundle and the report.

    Raises:
        BundleError: for a bundle of another kind than the data, or one that cannot be written.
        ConfigError: when recovery brought the class back; nothing is written.
        DataError: for data without samples, or activations that are not finite.
    """
    check_kind(bundle, data)
    began = time.perf_counter()
    found = unlearn_model(bundle.model, *_calibration(data, settings), settings)
    seconds = time.perf_counter() - began
    figures = _measured(bundle, found, data, settings, retrained)
    # A void certificate says nothing about the parent, so nothing follows from it.
    proof = bundle.certificate if bundle.void is None else None
    certificate = None if proof is None else certify(found.model, tighten=False)
    report = UnlearnReport(
        settings=settings,
        data_rule=data.rule,
        **figures,
        naive_before=proof and proof.naive,
        naive_after=certificate and certificate.naive,
        certified_deviation=_deviation(bundle, found, proof, certificate),
        holds_for=proof and (SEQUENCES if bundle.kind == "transformer" else IMAGES),
        seconds=seconds,
        unlearning=found,
    )
    saved = save_bundle(
        path or bundle.path.with_name(f"{bundle.path.name}-unlearned"),
        found.model,
        bundle.tokenizer,
        certificate=certificate,
        compression={"unlearning": report.to_dict()},
        parent=bundle,
        command=command,
    )
    return saved, report


def check_kind(bundle: Bundle, data: ClassData) -> None:
    """Raise ``BundleError`` unless the model takes such data."""
    is_text = bundle.kind == "transformer"
    if is_text != data.is_text:
        wanted = "text (data=stdlib or another)" if is_text else "images (data=digits or another)"
        raise BundleError(f"{bundle.path}: a {bundle.kind}; it unlearns {wanted}; set data")
    size = data.forget_train.inputs.shape[1]
    if not is_text and size != bundle.config["sizes"][0]:
        raise BundleError(
            f"{bundle.path}: takes {bundle.config['sizes'][0]} pixels, the images have {size}; "
            "set data to what it was trained on"
        )


def _calibration(data: ClassData, settings: UnlearnConfig) -> tuple[Tensor, Tensor]:
    """Return inputs of the class and of the rest; text was already limited when it was cut."""
    parts = (data.forget_train, data.retain_train)
    count = max(map(len, parts)) if data.is_text else settings.images
    forget, retain = (shuffled(part, count, settings.seed).inputs for part in parts)
    return forget, retain


def _measured(
    bundle: Bundle,
    found: Unlearning,
    data: ClassData,
    settings: UnlearnConfig,
    retrained: Bundle | None,
) -> dict[str, Any]:
    """Measure the class after recovery, refuse if it came back; then all models that there are."""
    dense, now = Examined(bundle.model, data), Examined(found.model, data)
    rebound = 0.0
    if settings.recovery != "none":
        edited = answers(found.edited, data.forget_held).knowledge
        before, after = (each.on("forget_held").knowledge for each in (dense, now))
        rebound = guard(before, edited, after, settings.rebound)
    other = None
    if retrained is not None:
        other = measure_standing(Examined(retrained.model, data), dense, settings)
    return {
        "rebound": rebound,
        "before": measure_standing(dense),
        "after": measure_standing(now, dense, settings),
        "retrained": other,
    }


def _deviation(bundle: Bundle, found: Unlearning, proof: Any, anew: Any) -> float | None:
    """Return the certified deviation, where both networks have a proof."""
    if proof is None:
        return None
    if bundle.kind == "transformer":
        return certified_deviation(
            bundle.model, found.model, None, proof, changed_certificate=anew
        ).logits
    return classifier_deviation(bundle.model, _as_pruning(found), norms=proof.norms).bound


def _as_pruning(found: Unlearning) -> Pruning:
    """Return the edits as a pruning that keeps every component; its errors are not known."""
    fits = (
        Fit(
            target=edited.target,
            kept_K=torch.arange(edited.target.inputs),
            weight_IO=edited.weight_IO.cpu(),
            bias_O=None,
            error=math.nan,
            held_error=math.nan,
        )
        for edited in found.maps
    )
    return Pruning(model=found.model, fits=tuple(fits))
