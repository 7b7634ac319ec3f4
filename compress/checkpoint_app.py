"""``compress`` for checkpoints of ``transformers``: nothing is proved, everything is measured."""

# Legend: N calibration inputs, B sequences, T tokens.

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from common.config import build
from common.corpus import Corpus, prepare_corpus
from common.device import resolve_device
from common.errors import ConfigError
from common.files import plain
from common.pretrained import load_tokenizer
from common.runs import Outcome, Run
from compress.adapters import adapter_for
from compress.checkpoints.checkpoint import load_hf, save_hf
from compress.frontier import metrics_point, prunings, write_frontier
from compress.measure import Reference
from compress.pruner import Pruning, prune_model
from compress.record import check_model
from compress.report import FORMAT_VERSION
from compress.settings import CompressConfig
from compress.statistics.calibration import calibration_tokens
from compress.statistics.collect import batches
from compress.timing import compare

log = logging.getLogger(__name__)

LENGTH = 1024
"""Tokens per calibration sequence unless stated: the paper's."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def compress_checkpoint(cfg: DictConfig, settings: CompressConfig, run: Run) -> Outcome:
    """Prune a decoder model of ``transformers``.

    Args:
        cfg: Keys ``bundle`` (a folder), ``data``, ``device``.
        settings: What to do.
        run: Where to write: ``checkpoint/``.

    Returns:
        The ``compress/*`` metrics that can be measured; artifacts ``checkpoint`` and ``frontier``.
        With a tokenizer in the folder the objective is the pruned model's bits per byte, else its
        reconstruction error.

    Raises:
        LipError: for anything the user can correct.
    """
    dense = load_hf(cfg.bundle, device=str(resolve_device(cfg.device)))
    check_model(dense, settings)
    corpus = _corpus(cfg, settings)
    length = settings.length or min(LENGTH, dense.config.max_position_embeddings)
    count = max(1, settings.tokens // length)
    tokens_NT = calibration_tokens(
        settings.calibration, dense, count, length, seed=settings.seed, corpus=corpus
    )
    reference = None
    if corpus is not None:
        windows_BT = corpus.windows("val", length, max(1, settings.eval_tokens // length))
        reference = Reference(dense, windows_BT, corpus.bytes_per_token)
    pruning = prune_model(dense, tokens_NT, settings)
    metrics = _metrics(dense, pruning, tokens_NT, settings) | _quality(reference, pruning.model)
    if reference is not None:
        before = reference.quality(dense).bits_per_byte
        metrics["compress/val_bits_per_byte_before"] = before
    objective = metrics.get("compress/val_bits_per_byte", 1 - metrics["compress/fidelity"])
    folder = run.directory / "checkpoint"
    save_hf(
        pruning.model,
        folder,
        parent=cfg.bundle,
        compression=_record(settings, pruning, metrics),
    )
    points = [metrics_point(settings, metrics)]
    del pruning  # further ones need its memory
    for other, pruning in prunings(dense, tokens_NT, settings, order=settings.order):
        found = _metrics(dense, pruning, tokens_NT, other) | _quality(reference, pruning.model)
        points.append(metrics_point(other, found))
        del pruning
    frontier = run.directory / "frontier.json"
    write_frontier(frontier, points)
    return Outcome(
        metrics=metrics,
        artifacts={"checkpoint": folder, "frontier": frontier},
        objective=objective,
    )


def _corpus(cfg: DictConfig, settings: CompressConfig) -> Corpus | None:
    """Return the text in the checkpoint's own tokens, or None where it has no tokenizer."""
    folder = Path(cfg.bundle).expanduser()
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return prepare_corpus(build(cfg.data), load_tokenizer(str(folder)))
    if settings.calibration == "data":
        raise ConfigError(
            f"{folder}: no tokenizer.json in it, so text cannot be read; add the file, or set "
            "compress.calibration=model or random"
        )
    log.warning("%s: no tokenizer.json in it, so nothing is measured on text", folder)
    return None


def _record(
    settings: CompressConfig, pruning: Pruning, metrics: dict[str, float]
) -> dict[str, Any]:
    """Return the content of ``compression.json``: nothing in it is proved, and it says so."""
    return {
        "format_version": FORMAT_VERSION,
        "settings": plain(settings),
        "tau": plain(pruning.tau),
        "measured": metrics,
        "certified_deviation": None,
        "layers": [fit.to_dict() for fit in pruning.fits],
    }


def _metrics(
    dense: Any, pruning: Pruning, tokens_NT: Tensor, settings: CompressConfig
) -> dict[str, float]:
    batch_BT = batches(tokens_NT)[0].to(dense.device)
    speed = compare(
        lambda: dense(batch_BT),
        lambda: pruning.model(batch_BT),
        device=dense.device,
        rounds=settings.rounds,
    )
    operations = [adapter_for(model).flops(batch_BT) for model in (dense, pruning.model)]
    before, after = (
        sum(tensor.numel() for tensor in model.parameters()) for model in (dense, pruning.model)
    )
    return {
        "compress/removed_fraction": pruning.removed_fraction,
        "compress/mlp_neurons_removed": pruning.removed("mlp"),
        "compress/heads_removed": pruning.removed("heads"),
        "compress/params": after,
        "compress/params_before": before,
        "compress/flops_fraction": operations[1] / operations[0],
        "compress/fidelity": pruning.fidelity,
        "compress/forward_speedup": speed.ratio,
    }


def _quality(reference: Reference | None, pruned: Any) -> dict[str, float]:
    """Return what is measured on text; nothing where there is none."""
    if reference is None:
        return {}
    quality = reference.quality(pruned)
    return {
        "compress/val_bits_per_byte": quality.bits_per_byte,
        "compress/kl_nats": quality.kl_nats,
        "compress/top1_agreement": quality.top1_agreement,
        "compress/measured_deviation": quality.deviation,
    }
