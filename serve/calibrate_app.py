"""Command ``calibrate``: measure a bundle's queries and keys on text and store the statistics."""

# Legend: W windows, T token.

import sys
import time
from collections.abc import Iterable

from omegaconf import DictConfig
from torch import Tensor

from common.bundle import Bundle, extend_bundle, load_bundle
from common.config import build
from common.corpus import prepare_corpus
from common.device import resolve_device
from common.errors import BundleError
from common.runs import Outcome, Run
from serve.kv.calibrate import (
    CalibrateConfig,
    centre_cosine,
    merge,
    resultant_lengths,
)
from serve.kv.calibrate import calibrate as collect


def calibrate(cfg: DictConfig, run: Run) -> Outcome:
    """Calibrate the bundle that ``cfg.bundle`` names; it is extended in place (shipped: a copy).

    Args:
        cfg: Keys ``bundle``, ``calibrate``, ``data``, ``device``.
        run: The run directory; only the copy of a shipped model is written there.

    Returns:
        The ``serve/calibration_*`` metrics; artifact ``bundle``. ``calibration_stability`` is
        the mean cosine between the query centres of two interleaved halves of the text.

    Raises:
        LipError: for anything the user can correct.
    """
    settings: CalibrateConfig = build(cfg.calibrate)
    bundle = load_bundle(cfg.bundle, device=resolve_device(cfg.device))
    if bundle.kind != "transformer":
        raise BundleError(f"{bundle.path}: a {bundle.kind} has no KV cache; give a language model")
    corpus = prepare_corpus(build(cfg.data), bundle.tokenizer)
    context = bundle.config.context
    windows_WT = corpus.windows(settings.split, context, max(2, settings.tokens // context))
    start = time.perf_counter()
    stats, stability = calibrate_bundle(bundle, windows_WT[:, :-1], settings)
    seconds = time.perf_counter() - start
    extended = extend_bundle(
        bundle.path, kv_stats=stats, command=run.command, copy_to=run.directory / "bundle"
    )
    metrics = {
        "serve/calibration_tokens": float(stats["tokens"]),
        "serve/calibration_seconds": seconds,
        "serve/calibration_stability": stability,
        "serve/concentration": resultant_lengths(stats)["mean"],
    }
    return Outcome(metrics=metrics, artifacts={"bundle": extended.path})


def calibrate_bundle(
    bundle: Bundle, tokens_WT: Tensor, settings: CalibrateConfig
) -> tuple[dict[str, Tensor], float]:
    """Return the statistics of all windows and the stability between their two halves.

    Args:
        bundle: A language model.
        tokens_WT: Windows (W, T), integer, T at most the context.
        settings: Batch size and skipped positions.

    Raises:
        DataError: if the windows are no longer than the skipped positions.
    """
    halves = [half for half in (tokens_WT[::2], tokens_WT[1::2]) if len(half)]
    parts = [collect(bundle.model, _batches(half, settings), skip=settings.skip) for half in halves]
    if len(parts) == 1:
        return parts[0], 1.0
    return merge(*parts), centre_cosine(*parts)


def _batches(tokens_WT: Tensor, settings: CalibrateConfig) -> Iterable[Tensor]:
    from rich.progress import track

    batches = tokens_WT.split(settings.batch)
    return track(batches, description="calibrate", disable=not sys.stdout.isatty(), transient=True)
