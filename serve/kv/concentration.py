"""How concentrated queries are before RoPE: what a report shows of calibration statistics."""

# Legend: H query heads, F rotary bands.

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def resultant_lengths(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Summarise how concentrated the queries are: |E q_f| / E|q_f|, 0 (dispersed) to 1.

    Returns:
        ``mean`` over layers, heads and bands, and ``dominant``: the mean over heads at the band
        with the largest E|q_f|; both 0 for a model without content heads.
    """
    layers = ratios(stats)
    every = [ratio_HF.flatten() for ratio_HF, _ in layers.values()]
    dominant = [_dominant(*entry) for entry in layers.values()]
    if not sum(map(len, every)):
        return {"mean": 0.0, "dominant": 0.0}
    return {"mean": float(torch.cat(every).mean()), "dominant": float(torch.cat(dominant).mean())}


def ratios(stats: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Return resultant lengths (H, F) and E|q_f| (H, F) by layer; layers without bands left out."""
    found = {}
    for key in (key for key in stats if key.endswith(".q_mean")):
        abs_HF = stats[key.replace("q_mean", "q_abs")]
        if abs_HF.numel():
            ratio_HF = stats[key].norm(dim=-1) / abs_HF.clamp(min=torch.finfo(abs_HF.dtype).tiny)
            found[int(key.split(".")[1])] = (ratio_HF, abs_HF)
    return found


def describe(stats: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return plain values for ``concentration.json``.

    Returns:
        ``layers``: per layer its number, and per head the resultant length at the band with the
        largest mean modulus (``dominant``) and the mean over bands (``mean``); ``bands``: per
        place of a band in its head, from 0 (fast) to 1 (slow), quantiles of the resultant length
        over all heads; with the totals of ``resultant_lengths``.
    """
    layers, by_place = [], dict[float, list[Tensor]]()
    for index, (ratio_HF, abs_HF) in sorted(ratios(stats).items()):
        head_means = ratio_HF.mean(1).tolist()
        layers.append(
            {"layer": index, "dominant": _dominant(ratio_HF, abs_HF).tolist(), "mean": head_means}
        )
        bands = ratio_HF.shape[1]
        for band in range(bands):
            place = band / max(bands - 1, 1)
            by_place.setdefault(place, []).append(ratio_HF[:, band])
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rows = []
    for place, parts in sorted(by_place.items()):
        low, median, high = torch.cat(parts).double().quantile(levels).tolist()
        rows.append({"place": place, "low": low, "median": median, "high": high})
    return {"layers": layers, "bands": rows, **resultant_lengths(stats)}


def _dominant(ratio_HF: Tensor, abs_HF: Tensor) -> Tensor:
    return ratio_HF.gather(1, abs_HF.argmax(1, keepdim=True))[:, 0]
