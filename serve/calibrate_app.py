"""Command ``calibrate``: measure a model's queries and keys on text and store the statistics."""

# Legend: W windows, T token.

import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from common.bundle import Bundle, extend_bundle
from common.bundle_format import KV_STATS
from common.config import build
from common.device import resolve_device
from common.errors import BundleError
from common.files import write_json
from common.models import LipschitzTransformer
from common.runs import Outcome, Run
from serve.decoder import Decoder, as_decoder
from serve.kv.calibrate import CalibrateConfig, centre_cosine, merge
from serve.kv.calibrate import calibrate as collect
from serve.kv.concentration import describe, resultant_lengths
from serve.kv.reference_stats import import_reference
from serve.kv.stats_file import write_stats
from serve.loading import Served, load_served
from serve.texts import served_text

log = logging.getLogger(__name__)


def calibrate(cfg: DictConfig, run: Run) -> Outcome:
    """Calibrate the model that ``cfg.bundle`` names, and store the statistics beside its weights.

    Args:
        cfg: Keys ``bundle`` (a bundle is extended in place, a shipped one as a copy; into a
            folder of ``transformers`` goes one more file), ``calibrate``, ``data``, ``device``.
        run: The run directory; statistics go there where the model's folder is not writable.

    Returns:
        The ``serve/calibration_*`` metrics; artifacts ``bundle`` (or ``kv_stats``) and
        ``concentration``. ``calibration_stability`` is the mean cosine between the query centres
        of two interleaved halves of the text.

    Raises:
        LipError: for anything the user can correct.
    """
    settings: CalibrateConfig = build(cfg.calibrate)
    served = load_served(cfg.bundle, device=resolve_device(cfg.device))
    if served.kind != "transformer":
        raise BundleError(f"{served.path}: a {served.kind} has no KV cache; give a language model")
    start = time.perf_counter()
    metrics: dict[str, float] = {}
    if settings.reference is not None:
        stats, origin = import_reference(settings.reference, served.model), settings.reference
    else:
        stats, metrics["serve/calibration_stability"] = _measured(cfg, served, settings)
        metrics["serve/calibration_tokens"] = float(stats["tokens"])
        origin = run.command
    metrics["serve/calibration_seconds"] = time.perf_counter() - start
    metrics["serve/concentration"] = resultant_lengths(stats)["mean"]
    artifacts = {"concentration": run.directory / "concentration.json"}
    write_json(artifacts["concentration"], describe(stats))
    artifacts |= _store(served, stats, origin, run)
    return Outcome(metrics=metrics, artifacts=artifacts)


def _measured(
    cfg: DictConfig, served: Served, settings: CalibrateConfig
) -> tuple[dict[str, Tensor], float]:
    decoder = as_decoder(served.model)
    length = min(decoder.context, settings.length)
    text = served_text(build(cfg.data), served)
    windows_WT = text.windows(settings.split, length, max(2, settings.tokens // length))
    return calibrate_windows(decoder, windows_WT[:, :-1], settings)


def _store(served: Served, stats: dict[str, Tensor], origin: str, run: Run) -> dict[str, Path]:
    """Write the statistics and return the artifacts that hold them."""
    if isinstance(served, Bundle):
        target = run.directory / "bundle"
        extended = extend_bundle(served.path, kv_stats=stats, command=run.command, copy_to=target)
        return {"bundle": extended.path}
    place, fingerprint = served.path / KV_STATS, served.fingerprint
    try:
        write_stats(place, stats, fingerprint, origin)
    except OSError as error:
        own = run.directory / KV_STATS
        write_stats(own, stats, fingerprint, origin)
        log.warning(
            "%s cannot be written (%s): the statistics are in %s; give that as kv_stats=FILE",
            place,
            error.strerror,
            own,
        )
        place = own
    return {"kv_stats": place}


def calibrate_windows(
    model: LipschitzTransformer | Decoder, tokens_WT: Tensor, settings: CalibrateConfig
) -> tuple[dict[str, Tensor], float]:
    """Return the statistics of all windows and the stability between their two halves.

    Args:
        model: A language model.
        tokens_WT: Windows (W, T), integer, T at most the context.
        settings: Batch size and skipped positions.

    Raises:
        DataError: if the windows are no longer than the skipped positions.
    """
    halves = [half for half in (tokens_WT[::2], tokens_WT[1::2]) if len(half)]
    parts = [collect(model, _batches(half, settings), skip=settings.skip) for half in halves]
    if len(parts) == 1:
        return parts[0], 1.0
    return merge(*parts), centre_cosine(*parts)


def _batches(tokens_WT: Tensor, settings: CalibrateConfig) -> Iterable[Tensor]:
    from rich.progress import track

    batches = tokens_WT.split(settings.batch)
    return track(batches, description="calibrate", disable=not sys.stdout.isatty(), transient=True)
