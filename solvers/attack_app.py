"""Command ``attack``: search the largest sensitivity, and with data evaluate robustness."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.bundle import Bundle, load_bundle
from common.config import build
from common.corpus import DataConfig, prepare_corpus
from common.device import resolve_device
from common.errors import CertificateError, ConfigError
from common.files import write_json
from common.images import ImageConfig, load_images
from common.models import LipschitzTransformer
from common.runs import Outcome, Run
from solvers import bounds
from solvers.robustness import Evaluation, ImageEvaluator, RobustnessSettings, TextEvaluator
from solvers.robustness.text import attack_windows

log = logging.getLogger(__name__)

ROBUSTNESS_FILE = "robustness.json"

_Evaluate = Callable[[int], Evaluation]
"""From a seed, everything else is at hand."""


def attack(cfg: Any, run: Run) -> Outcome:
    """Attack the model of ``cfg.bundle``.

    Args:
        cfg: Keys ``bundle``, ``attack`` (budget of the search for large ratios), ``data``,
            ``robustness``, ``seed``, ``device``. Without ``data`` only the Lipschitz constant
            is attacked; with it, inputs of the validation split are certified and
            attacked too.
        run: Where ``robustness.json`` goes.

    Returns:
        The ``attack/*`` and ``robust/*`` metrics; with data the artifact ``robustness``. The
        objective is the largest ratio found.

    Raises:
        CertificateError: if anything found exceeds what is proved.
        LipError: for anything the user can correct.
    """
    search = build(cfg.attack, seed=int(cfg.seed))
    settings: RobustnessSettings = build(cfg.robustness)
    data = build(cfg.data) if cfg.get("data") else None
    bundle = load_bundle(cfg.bundle, device=resolve_device(cfg.device))
    is_text = isinstance(bundle.model, LipschitzTransformer)
    _check_data(bundle, data, is_text=is_text)
    # Before the search, which may take minutes: what cannot be read must not cost its result.
    evaluate = None if data is None else (_text if is_text else _images)(bundle, data, settings)
    artifacts: dict[str, Path] = {}
    metrics = _lipschitz(bundle, search)
    best = metrics["attack/best"]
    if evaluate is None:
        log.info(
            "certified accuracy and attacked accuracy need data: add data=NAME (as in lipllm train)"
        )
    else:
        began = time.perf_counter()
        found = evaluate(int(cfg.seed))
        metrics |= found.metrics() | {"robust/seconds": time.perf_counter() - began}
        artifacts["robustness"] = run.directory / ROBUSTNESS_FILE
        write_json(artifacts["robustness"], found.to_dict())
    return Outcome(metrics=metrics, artifacts=artifacts, objective=best)


def _check_data(bundle: Bundle, data: Any, *, is_text: bool) -> None:
    expected = DataConfig if is_text else ImageConfig
    if data is not None and not isinstance(data, expected):
        raise ConfigError(
            f"data: {type(data).__name__} for a {bundle.kind}, expected "
            f"{'text' if is_text else 'images'}; choose another data=NAME"
        )
    if data is not None and is_text and bundle.certificate is None:
        raise CertificateError(
            f"{bundle.path}: no certificate, expected one to compare attacks with; run: lipllm "
            f"certify bundle={bundle.path}"
        )


def _lipschitz(bundle: Bundle, search: bounds.AttackSettings) -> dict[str, float]:
    began = time.perf_counter()
    result = bounds.attack(bundle.model, bundle.certificate, settings=search)
    if bundle.certificate is not None:
        # For its error alone: a value above a bound refutes the proof.
        bounds.with_attack(bundle.certificate, result)
    kinds = ("random", "power", "gradient", "structured", "swaps")
    found = {f"attack/{kind}": float(getattr(result, kind)) for kind in kinds}
    # A kind that was not run, for this sort of model, has no figure.
    found = {name: value for name, value in found.items() if value}
    log.info("largest sensitivity found: %.6g%s", result.value, _proved(bundle))
    return found | {"attack/best": result.value, "attack/seconds": time.perf_counter() - began}


def _proved(bundle: Bundle) -> str:
    certificate = bundle.certificate
    return "" if certificate is None else f"; proved: at most {certificate.tightened:.6g}"


def _text(bundle: Bundle, data: DataConfig, settings: RobustnessSettings) -> _Evaluate:
    bounds.verify(bundle)
    corpus = prepare_corpus(data, bundle.tokenizer)
    context = bundle.config.context
    limit = None if settings.tokens is None else max(1, settings.tokens // context)
    windows_WT = corpus.windows("val", context, limit)
    chosen_WT = attack_windows(windows_WT, settings.attack_tokens)

    def evaluate(seed: int) -> Evaluation:
        evaluator = TextEvaluator(bundle.model, bundle.certificate, settings)
        return evaluator.evaluate(windows_WT, chosen_WT, seed=seed, tokenizer=bundle.tokenizer)

    return evaluate


def _images(bundle: Bundle, data: ImageConfig, settings: RobustnessSettings) -> _Evaluate:
    images = load_images(data)
    limit = settings.images or len(images.val_labels_N)
    pair = math.inf
    if bundle.certificate is not None:
        bounds.verify(bundle)
        pair = bundle.certificate.pair_l2

    def evaluate(seed: int) -> Evaluation:
        evaluator = ImageEvaluator(bundle.model, settings, pair=pair)
        return evaluator.evaluate(images.val_NI[:limit], images.val_labels_N[:limit], seed=seed)

    return evaluate
