"""Command ``compress``: prune a certified bundle, bound what that changed, write a new bundle."""

# Legend: B sequences, T tokens.

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from common.bundle import Bundle, load_bundle
from common.bundle_format import WEIGHTS
from common.config import build
from common.corpus import Corpus, prepare_corpus
from common.device import resolve_device
from common.files import write_json
from common.runs import Outcome, Run, hydra_command
from compress.adapters import adapter_for
from compress.frontier import frontier_point, frontier_points
from compress.measure import bits_per_byte
from compress.pruner import Survey, survey
from compress.record import PruneReport, check_model, prune, require_certificate
from compress.settings import CompressConfig
from compress.timing import mlp_speedup

log = logging.getLogger(__name__)


def compress(cfg: DictConfig, run: Run) -> Outcome:
    """Prune the bundle that ``cfg.bundle`` names.

    Args:
        cfg: Keys ``bundle``, ``compress``, ``data``, ``seed``, ``device``.
        run: Where to write: ``bundle/`` and ``frontier.json``.

    Returns:
        The ``compress/*`` metrics; artifacts ``bundle`` and ``frontier``. The objective of
        sweeps is the pruned model's bits per byte.

    Raises:
        LipError: for anything the user can correct.
    """
    settings: CompressConfig = build(cfg.compress, seed=cfg.seed)
    bundle = load_bundle(cfg.bundle, device=resolve_device(cfg.device))
    certificate = require_certificate(bundle)
    check_model(bundle.config, settings)
    corpus = prepare_corpus(build(cfg.data), bundle.tokenizer)
    tokens_BT, windows_BT = texts(corpus, bundle, settings)
    found = _survey(bundle, tokens_BT, settings)
    pruned, report = prune(
        bundle,
        settings,
        tokens_BT,
        held_BT=windows_BT[:, :-1],
        path=run.directory / "bundle",
        found=found,
        command=run.command,
    )
    metrics = _metrics(bundle, pruned, report, windows_BT, corpus.bytes_per_token)
    points = [frontier_point(report, metrics["compress/val_bits_per_byte"])]
    if found is not None:
        pair = (tokens_BT, windows_BT)
        points += frontier_points(
            bundle.model, certificate, found, pair, corpus.bytes_per_token, report
        )
    frontier = run.directory / "frontier.json"
    write_json(frontier, sorted(points, key=lambda point: -point["keep"]))
    return Outcome(
        metrics=metrics,
        artifacts={"bundle": pruned.path, "frontier": frontier},
        objective=metrics["compress/val_bits_per_byte"],
    )


def texts(corpus: Corpus, bundle: Bundle, settings: CompressConfig) -> tuple[Tensor, Tensor]:
    """Return calibration sequences, shuffled, and validation windows with their targets."""
    length = settings.length or bundle.config.context
    count = max(1, settings.tokens // length)
    windows_BT = corpus.windows("train", length, count)
    order = torch.randperm(len(windows_BT), generator=torch.Generator().manual_seed(settings.seed))
    tokens_BT = windows_BT[order, :-1]
    held = max(1, settings.eval_tokens // length)
    return tokens_BT, corpus.windows("val", length, held)


def _survey(bundle: Bundle, tokens_BT: Tensor, settings: CompressConfig) -> Survey | None:
    if not settings.frontier:
        return None
    return survey(adapter_for(bundle.model), tokens_BT, settings, keeps=settings.frontier)


def _metrics(
    dense: Bundle,
    pruned: Bundle,
    report: PruneReport,
    windows_BT: Tensor,
    bytes_per_token: float,
) -> dict[str, float]:
    # The bundle came back on the CPU; the model that was measured is the one still in memory.
    model: Any = report.pruning.model
    fits = report.pruning.fits
    return {
        "compress/removed_fraction": report.removed_fraction,
        "compress/mlp_neurons_removed": report.pruning.removed("mlp"),
        "compress/params": model.num_parameters,
        "compress/params_before": dense.model.num_parameters,
        "compress/bundle_bytes": _weight_bytes(pruned.path) / _weight_bytes(dense.path),
        "compress/mlp_speedup": mlp_speedup(dense.model, model),
        "compress/fidelity": 1 - sum(fit.held_error for fit in fits) / len(fits),
        "compress/val_bits_per_byte": bits_per_byte(model, windows_BT, bytes_per_token),
        "compress/val_bits_per_byte_before": bits_per_byte(
            dense.model, windows_BT, bytes_per_token
        ),
        "compress/top1_agreement": report.top1_agreement,
        "compress/certified_top1": report.certified_top1,
        "compress/measured_deviation": report.measured_deviation,
        "compress/semi_empirical_deviation": report.semi_empirical_deviation,
        "compress/certified_deviation": report.certified_deviation,
    }


def _weight_bytes(path: Path) -> int:
    return (path / WEIGHTS).stat().st_size


main = hydra_command("compress", compress)
