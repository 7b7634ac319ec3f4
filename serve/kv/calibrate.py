"""Calibration: the mean queries and keys before RoPE, per layer, head and rotary band.

They are a property of the weights, not of a prompt. Statistics are plain tensors keyed
``layers.{l}.{name}``; those of disjoint texts merge by token count.
"""

# Legend: B batch, T token, C width, H query heads with content, K key heads with content,
# D head width, F = D / 2 rotary bands.

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config import check_types, positive
from common.errors import BundleError, DataError
from common.models import LipschitzTransformer, ModelConfig
from common.models.rope import inverse_frequencies

FREQUENCY_TOLERANCE = 1e-6  # relative; a wrong frequency scores wrongly without any other sign
NAMES = ("q_mean", "q_abs", "q_sq", "k_mean", "k_abs")


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """How much of which text calibrates the cache policies.

    Attributes:
        tokens: Number of tokens, at most; the published results are flat from 50,000 on.
        batch: Windows per forward pass.
        split: Part of the corpus.
        skip: First positions of each window that are left out (they are outliers).
    """

    tokens: int = 100_000
    batch: int = 16
    split: Literal["train", "val"] = "train"
    skip: int = 4

    def __post_init__(self) -> None:
        check_types(self)
        positive("calibrate.tokens", self.tokens)
        positive("calibrate.batch", self.batch)
        positive("calibrate.skip", self.skip, zero=True)


@torch.no_grad()
def calibrate(
    model: LipschitzTransformer, token_batches: Iterable[Tensor], *, skip: int = 0
) -> dict[str, Tensor]:
    """Average queries and keys before RoPE over a text.

    Args:
        model: Model in evaluation mode.
        token_batches: Integer tokens (B, T), T at most the context; any B and T.
        skip: First positions of each row that are left out.

    Returns:
        ``tokens`` (int64 scalar) and per layer with content heads, float64 on the CPU:
        ``q_mean`` (H, F, 2), ``q_abs`` and ``q_sq`` (H, F), ``k_mean`` (K, F, 2), ``k_abs``
        (K, F), ``inv_freq`` (F,); moduli and squares are those of the complex band values.

    Raises:
        DataError: if no token is left to average over.

    Source:
        arXiv 2604.04921, calibration; deviation: queries are read before RoPE, sums are float64.
    """
    device = model.embedding.weight.device
    sums: dict[str, Tensor] = {}
    count = 0
    for tokens_BT in token_batches:
        x_BTC = model.embed(tokens_BT.to(device))
        count += tokens_BT[:, skip:].numel()
        for index, layer in enumerate(model.layers):
            if layer.layer.content_heads:
                q_BHTD, k_BKTD, _ = layer.attention.project(x_BTC)
                q = _band_sums(q_BHTD[:, : layer.layer.content_heads, skip:])
                k = _band_sums(k_BKTD[:, : layer.layer.content_kv_heads, skip:])
                for name, value in zip(NAMES, (*q, *k[:2]), strict=True):
                    key = f"layers.{index}.{name}"
                    sums[key] = sums[key] + value if key in sums else value
            x_BTC = layer(x_BTC)
    if count == 0:
        raise DataError(
            f"calibration: no tokens left after skipping {skip} per window; give longer text or"
            " lower calibrate.skip"
        )
    stats = {key: (total / count).cpu() for key, total in sums.items()}
    for index in _content_layers(model.config):
        stats[f"layers.{index}.inv_freq"] = model.layers[index].attention.inverse_frequency.cpu()
    return {"tokens": torch.tensor(count), **stats}


def merge(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the statistics of two disjoint texts taken together.

    Raises:
        BundleError: if they belong to different models.
    """
    if set(first) != set(second):
        raise BundleError("calibration statistics belong to different models; calibrate again")
    n, m = int(first["tokens"]), int(second["tokens"])
    merged = {"tokens": torch.tensor(n + m)}
    for key, value in first.items():
        if key.endswith(".inv_freq"):
            merged[key] = value
        elif key != "tokens":
            merged[key] = (n * value + m * second[key]) / (n + m)
    return merged


def layer_stats(
    stats: Mapping[str, Tensor] | None, config: ModelConfig
) -> list[dict[str, Tensor] | None]:
    """Check statistics against a model and split them by layer.

    Returns:
        One dict per layer with ``q_mean``, ``q_abs``, ``q_sq``, ``k_mean``, ``k_abs`` and
        ``inv_freq``; None for layers without content heads.

    Raises:
        BundleError: if statistics are missing, or shapes or RoPE frequencies disagree.
    """
    remedy = "run lipllm calibrate bundle=DIR"
    split: list[dict[str, Tensor] | None] = [None] * config.layers
    content = _content_layers(config)
    if stats is None:
        if content:
            raise BundleError(f"the model has no calibration statistics; {remedy}")
        return split
    for index in content:
        layer, prefix = config.layer(index), f"layers.{index}."
        own = {key[len(prefix) :]: v for key, v in stats.items() if key.startswith(prefix)}
        bands = layer.head_dim // 2
        shapes = {"q_mean": (layer.content_heads, bands, 2), "q_abs": (layer.content_heads, bands)}
        for name, shape in shapes.items():
            found = tuple(own[name].shape) if name in own else None
            if found != shape:
                raise BundleError(
                    f"calibration statistics {prefix}{name}: expected shape {shape}, found"
                    f" {found}; {remedy}"
                )
        frequency_F = inverse_frequencies(layer.head_dim, config.rope_theta, config.rope_dims)
        stored_F = own.get("inv_freq", torch.zeros(0))
        if stored_F.shape != frequency_F.shape or not torch.allclose(
            stored_F.double(), frequency_F, rtol=FREQUENCY_TOLERANCE, atol=0
        ):
            raise BundleError(
                f"calibration statistics {prefix}inv_freq differ from the model's RoPE"
                f" frequencies (theta {config.rope_theta:g}); {remedy}"
            )
        split[index] = own
    return split


def resultant_lengths(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Summarise how concentrated the queries are: |E q_f| / E|q_f|, 0 (dispersed) to 1.

    Returns:
        ``mean`` over layers, heads and bands, and ``dominant``: the mean over heads at the band
        with the largest E|q_f|; both 0 for a model without content heads.
    """
    every, dominant = [], []
    for key in (key for key in stats if key.endswith(".q_mean")):
        abs_HF = stats[key.replace("q_mean", "q_abs")]
        ratio_HF = stats[key].norm(dim=-1) / abs_HF.clamp(min=torch.finfo(abs_HF.dtype).tiny)
        every.append(ratio_HF.flatten())
        dominant.append(ratio_HF.gather(1, abs_HF.argmax(1, keepdim=True)).flatten())
    if not every:
        return {"mean": 0.0, "dominant": 0.0}
    return {"mean": float(torch.cat(every).mean()), "dominant": float(torch.cat(dominant).mean())}


def centre_cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the mean over heads of the cosine between two texts' mean queries.

    Close to 1 when the statistics are a property of the model; 1 without content heads.
    """
    pairs = [(v.flatten(1), second[k].flatten(1)) for k, v in first.items() if "q_mean" in k]
    if not pairs:
        return 1.0
    return float(torch.cat([torch.cosine_similarity(a, b, dim=1) for a, b in pairs]).mean())


def _content_layers(config: ModelConfig) -> list[int]:
    return [index for index in range(config.layers) if config.layer(index).content_heads]


def _band_sums(x_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum complex values, moduli and squared moduli over rows and tokens: (H, F, 2), (H, F) x 2."""
    bands_BHTF2 = torch.stack(x_BHTD.double().chunk(2, dim=-1), dim=-1)
    modulus_BHTF = bands_BHTF2.norm(dim=-1)
    total, absolute = bands_BHTF2.sum((0, 2)), modulus_BHTF.sum((0, 2))
    return total, absolute, modulus_BHTF.square().sum((0, 2))
