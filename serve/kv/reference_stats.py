"""Importer of calibration files of the published TriAttention code.

Such a file is a torch archive ``{"metadata", "stats"}`` with three float32 vectors per query
head. It is read with ``weights_only=True``; frequencies come from the model and are never guessed.
"""

# Legend: H query heads, F rotary bands.

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import BundleError
from common.models import LipschitzTransformer
from serve.decoder import Decoder, LayerSpec
from serve.kv.calibrate import specs_of

VECTORS = ("q_mean_real", "q_mean_imag", "q_abs_mean")
STYLES = {"half": False, "interleaved": True}
THETA_TOLERANCE = 1e-4  # relative; frequencies are float32 there
CONCENTRATED = 1 + 1e-4  # |E q| may exceed E|q| by the rounding of float32 sums


def import_reference(path: str | Path, model: LipschitzTransformer | Decoder) -> dict[str, Tensor]:
    """Return the statistics of a reference file for a model.

    The file states no number of tokens (``tokens`` is 0 here), no key statistics and no second
    moments; policies that need those refuse it. Where the rotation of the model scales (YaRN) the
    published script multiplies queries with that factor once more, so that they may be too large
    by one factor for all bands, which changes no ranking.

    Args:
        path: The ``.pt`` file.
        model: The model it was made for; a head of a full-attention layer that the file lacks is
            an error.

    Returns:
        Statistics as ``calibrate`` names them: ``q_mean``, ``q_abs``, ``inv_freq`` per layer.

    Raises:
        BundleError: for an unreadable file, another rotary pairing, other heads or widths, or
            frequencies that are stated and differ from the model's.

    Source:
        WeianMao/triattention, calibration files (format of revision c3744ee6).
    """
    metadata, heads = _read(Path(path).expanduser())
    specs = specs_of(model)
    layers = 1 + max((layer for layer, _ in heads), default=-1)
    if layers != len(specs):
        raise _error(path, f"{layers} layers, the model has {len(specs)}")
    stats: dict[str, Tensor] = {"tokens": torch.tensor(0)}
    for index, spec in enumerate(specs):
        if not spec.content_heads:
            continue
        found = [head for layer, head in heads if layer == index]
        if not found and spec.sliding_window is not None:
            continue
        _check_rotation(path, metadata, spec)
        if extra := [head for head in found if head >= spec.content_heads]:
            raise _error(path, f"layer {index} has head {extra[0]} of {spec.content_heads}")
        rows = [_head(path, heads, index, head, spec.bands) for head in range(spec.content_heads)]
        real_HF, imag_HF, abs_HF = (torch.stack(part).double() for part in zip(*rows, strict=True))
        q_mean_HF2 = torch.stack((real_HF, imag_HF), dim=-1)
        if not bool((q_mean_HF2.norm(dim=-1) <= CONCENTRATED * abs_HF).all()):
            raise _error(path, f"layer {index} has mean queries longer than their mean length")
        stats[f"layers.{index}.q_mean"] = q_mean_HF2
        stats[f"layers.{index}.q_abs"] = abs_HF
        stats[f"layers.{index}.inv_freq"] = spec.inverse_frequency.clone()
    return stats


def _read(path: Path) -> tuple[Mapping[str, Any], dict[tuple[int, int], Mapping[str, Tensor]]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = getattr(error, "strerror", None) or "no torch archive of plain values"
        raise _error(path, f"cannot be read ({reason})") from None
    try:
        metadata, stats = dict(content["metadata"]), dict(content["stats"])
        heads = {_parse(name): vectors for name, vectors in stats.items()}
    except (KeyError, TypeError, ValueError):
        raise _error(path, "expected 'metadata', and 'stats' of layerLL_headHH") from None
    return metadata, heads


def _parse(name: str) -> tuple[int, int]:
    layer, head = name.removeprefix("layer").split("_head")
    return int(layer), int(head)


def _head(
    path: str | Path,
    heads: Mapping[tuple[int, int], Mapping[str, Tensor]],
    layer: int,
    head: int,
    bands: int,
) -> list[Tensor]:
    place = f"head {head} of layer {layer}"
    if (layer, head) not in heads:
        raise _error(path, f"lacks {place}")
    vectors = [heads[layer, head].get(name) for name in VECTORS]
    for name, vector in zip(VECTORS, vectors, strict=True):
        if not isinstance(vector, Tensor) or vector.shape != (bands,):
            found = tuple(vector.shape) if isinstance(vector, Tensor) else vector
            raise _error(path, f"{name} of {place}: shape {found}, expected {(bands,)}")
        if not bool(vector.isfinite().all()):
            raise _error(path, f"{name} of {place} is not finite")
    return [vector for vector in vectors if vector is not None]


def _check_rotation(path: str | Path, metadata: Mapping[str, Any], spec: LayerSpec) -> None:
    style = metadata.get("rope_style")
    if style not in STYLES or STYLES[style] != spec.interleaved:
        own = "interleaved" if spec.interleaved else "half"
        raise _error(path, f"rope_style {style!r}, the model pairs components {own!r}")
    width = metadata.get("head_dim")
    if width != spec.head_dim:
        raise _error(path, f"head_dim {width!r}, the model has {spec.head_dim}")
    if spec.head_dim > 2 * spec.bands:
        raise _error(path, "it knows rotated components only, the model leaves some unrotated")
    theta = metadata.get("rope_theta")
    if theta is not None and metadata.get("rope_type", "default") == "default":
        slowest = float(theta) ** (1 / spec.bands - 1)
        own_slowest = float(spec.inverse_frequency[-1])
        if not math.isclose(slowest, own_slowest, rel_tol=THETA_TOLERANCE):
            raise _error(path, f"rope_theta {theta}, the model's frequencies differ")


def _error(path: str | Path, reason: str) -> BundleError:
    return BundleError(
        f"calibrate.reference={path}: {reason}; give the file of this model, or leave it out and "
        "calibrate on text"
    )
