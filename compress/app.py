"""Command ``compress``: prune a model, bound what that changed, write a new one."""

# Legend: N calibration inputs, B sequences, T tokens.

import logging
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from common.bundle import Bundle, load_bundle
from common.checkpoints import is_checkpoint
from common.config import build
from common.corpus import Corpus, prepare_corpus
from common.device import resolve_device
from common.runs import Outcome, Run, hydra_command
from compress.adapters import adapter_for
from compress.checkpoint_app import compress_checkpoint
from compress.classifier_app import compress_classifier
from compress.frontier import frontier_point, frontier_points, speeds, write_frontier
from compress.measure import Reference
from compress.pruner import Survey, survey
from compress.record import PruneReport, check_model, prune, require_certificate, weight_bytes
from compress.settings import CompressConfig
from compress.statistics.calibration import calibration_tokens
from compress.timing import mlp_speedup

log = logging.getLogger(__name__)


def compress(cfg: DictConfig, run: Run) -> Outcome:
    """Prune the model that ``cfg.bundle`` names: a bundle, or a checkpoint of ``transformers``.

    Args:
        cfg: Keys ``bundle``, ``compress``, ``data``, ``seed``, ``device``.
        run: Where to write.

    Returns:
        The ``compress/*`` metrics; artifacts ``bundle`` or ``checkpoint``, and ``frontier``. The
        objective of sweeps is the pruned model's bits per byte (of a classifier, its errors).

    Raises:
        LipError: for anything the user can correct.
    """
    settings: CompressConfig = build(cfg.compress, seed=cfg.seed)
    if isinstance(cfg.bundle, str) and is_checkpoint(cfg.bundle):
        return compress_checkpoint(cfg, settings, run)
    bundle = load_bundle(cfg.bundle, device=resolve_device(cfg.device))
    require_certificate(bundle)
    if bundle.kind == "classifier":
        return compress_classifier(cfg, settings, bundle, run)
    return _compress_transformer(cfg, settings, bundle, run)


def texts(corpus: Corpus, bundle: Bundle, settings: CompressConfig) -> tuple[Tensor, Tensor]:
    """Return calibration sequences and validation windows with their targets."""
    length = settings.length or bundle.config.context
    tokens_NT = calibration_tokens(
        settings.calibration,
        bundle.model,
        max(1, settings.tokens // length),
        length,
        seed=settings.seed,
        corpus=corpus,
    )
    return tokens_NT, corpus.windows("val", length, max(1, settings.eval_tokens // length))


def _compress_transformer(
    cfg: DictConfig, settings: CompressConfig, bundle: Bundle, run: Run
) -> Outcome:
    check_model(bundle.model, settings)
    corpus = prepare_corpus(build(cfg.data), bundle.tokenizer)
    tokens_NT, windows_BT = texts(corpus, bundle, settings)
    found = _survey(bundle, tokens_NT, settings)
    pruned, report = prune(
        bundle,
        settings,
        tokens_NT,
        held=windows_BT[:, :-1],
        path=run.directory / "bundle",
        found=found,
        command=run.command,
    )
    reference = Reference(bundle.model, windows_BT, corpus.bytes_per_token)
    quality = reference.quality(report.pruning.model)
    metrics = _metrics(bundle, pruned, report)
    metrics |= {
        "compress/val_bits_per_byte": quality.bits_per_byte,
        "compress/val_bits_per_byte_before": reference.quality(bundle.model).bits_per_byte,
        "compress/kl_nats": quality.kl_nats,
    }
    frontier = run.directory / "frontier.json"
    times = {name: metrics[f"compress/{name}"] for name in ("forward_speedup", "decode_speedup")}
    points = [frontier_point(report, quality, times)]
    if found is not None:
        pair = (tokens_NT, windows_BT)
        points += frontier_points(bundle.model, bundle.certificate, found, pair, reference, report)
    write_frontier(frontier, points)
    return Outcome(
        metrics=metrics,
        artifacts={"bundle": pruned.path, "frontier": frontier},
        objective=quality.bits_per_byte,
    )


def _survey(bundle: Bundle, tokens_NT: Tensor, settings: CompressConfig) -> Survey | None:
    if not settings.frontier:
        return None
    return survey(adapter_for(bundle.model), tokens_NT, settings, keeps=settings.frontier)


def _metrics(dense: Bundle, pruned: Bundle, report: PruneReport) -> dict[str, float]:
    # The bundle came back on the CPU; the model that was measured is the one still in memory.
    model: Any = report.pruning.model
    flops = report.size["flops_per_token"]["model"]
    rounds = report.settings.rounds
    times = speeds(dense.model, model, rounds)
    return {
        "compress/removed_fraction": report.removed_fraction,
        "compress/mlp_neurons_removed": report.pruning.removed("mlp"),
        "compress/heads_removed": report.pruning.removed("heads"),
        "compress/params": model.num_parameters,
        "compress/params_before": dense.model.num_parameters,
        "compress/flops_fraction": flops["after"] / flops["before"],
        "compress/bundle_bytes": weight_bytes(pruned, dense),
        "compress/mlp_speedup": mlp_speedup(dense.model, model, rounds=rounds),
        **{f"compress/{name}": ratio for name, ratio in times.items()},
        "compress/fidelity": report.pruning.fidelity,
        "compress/top1_agreement": report.top1_agreement,
        "compress/certified_top1": report.certified_top1,
        "compress/text_top1": report.text_top1,
        "compress/measured_deviation": report.measured_deviation,
        "compress/semi_empirical_deviation": report.semi_empirical_deviation,
        "compress/certified_deviation": report.certified_deviation,
        "compress/naive": report.after.naive,
        "compress/tightened": report.after.tightened,
    }


main = hydra_command("compress", compress)
