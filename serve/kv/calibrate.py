"""Calibration: the mean queries and keys before RoPE, per layer, head and rotary band.

They are a property of the weights, not of a prompt. Statistics are plain tensors keyed
``layers.{l}.{name}``; those of disjoint texts merge by token count.
"""

# Legend: B windows, T tokens of a window, N tokens (flat), H query heads with content, K key heads
# with content, D head width, F rotary bands, P = D - 2F components that are not rotated.

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from common.config import check_types, positive
from common.errors import BundleError, DataError
from common.models import LipschitzTransformer
from serve.causal import CausalAttention
from serve.decoder import Decoder, LayerSpec, as_decoder, layer_spec
from serve.kernels.reference import rotary_parts
from serve.rotation import rotate

FREQUENCY_TOLERANCE = 1e-6  # relative; a wrong frequency scores wrongly without any other sign
SUM_TOKENS = 4096  # tokens whose float64 copy is held at a time
REMEDY = "run lipllm calibrate bundle=DIR"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """How much of which text calibrates the cache policies.

    Attributes:
        tokens: Number of tokens, at most; the published results are flat from 50,000 on.
        batch: Windows per forward pass.
        length: Tokens per window, at most; the context where that is shorter.
        split: Part of the corpus.
        skip: First positions of each window that are left out (they are outliers).
        reference: Statistics file of the published code to import in the place of reading text.
    """

    tokens: int = 100_000
    batch: int = 16
    length: int = 2048
    split: Literal["train", "val"] = "train"
    skip: int = 4
    reference: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        positive("calibrate.tokens", self.tokens)
        positive("calibrate.batch", self.batch)
        positive("calibrate.length", self.length)
        positive("calibrate.skip", self.skip, zero=True)


@torch.no_grad()
def calibrate(
    model: LipschitzTransformer | Decoder, token_batches: Iterable[Tensor], *, skip: int = 0
) -> dict[str, Tensor]:
    """Average queries and keys before RoPE over a text.

    Every token runs at position 0, where RoPE turns nothing, and the attention rotates to the
    true positions itself: queries and keys are seen exactly as they enter RoPE, after norms and
    biases, whatever the model. Sums are float64; memory does not grow with the text.

    Args:
        model: Model in evaluation mode.
        token_batches: Integer tokens (B, T), T at most the context; any B and T.
        skip: First positions of each row that are left out.

    Returns:
        ``tokens`` (int64 scalar) and per layer with content heads, float64 on the CPU:
        ``q_mean`` (H, F, 2), ``q_abs`` and ``q_sq`` (H, F), ``k_mean`` (K, F, 2), ``k_abs``
        (K, F), ``inv_freq`` (F,); moduli and squares are those of the complex band values.
        Where some components are not rotated also ``rest_mean``, ``rest_abs``, ``rest_sq``
        (H, P) of queries and ``k_rest_mean``, ``k_rest_abs`` (K, P): means of values, moduli
        and squares.

    Raises:
        DataError: if no token is left to average over.

    Source:
        arXiv 2604.04921, calibration; deviation: queries are read before RoPE, sums are float64.
    """
    decoder = as_decoder(model)
    sums = _Sums()
    count = 0
    for tokens_BT in token_batches:
        count += tokens_BT[:, skip:].numel()
        tokens_N = tokens_BT.to(decoder.device).flatten()
        decoder.forward(
            tokens_N,
            torch.zeros_like(tokens_N),
            _Collector(decoder.layers, tokens_BT, skip, sums),
            torch.zeros_like(tokens_N[:1]),
        )
    if count == 0:
        raise DataError(
            f"calibration: no tokens left after skipping {skip} per window; give longer text or"
            " lower calibrate.skip"
        )
    stats = {key: (total / count).cpu() for key, total in sums.totals.items()}
    for index, spec in enumerate(decoder.layers):
        if spec.content_heads:
            stats[f"layers.{index}.inv_freq"] = spec.inverse_frequency.clone()
    return {"tokens": torch.tensor(count), **stats}


class _Sums:
    """Running totals by name."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, key: str, value: Tensor) -> None:
        self.totals[key] = self.totals[key] + value if key in self.totals else value


class _Collector(CausalAttention):
    """Attention of windows whose queries and keys arrive as they enter RoPE."""

    def __init__(
        self, specs: Sequence[LayerSpec], tokens_BT: Tensor, skip: int, sums: _Sums
    ) -> None:
        super().__init__(specs, len(tokens_BT))
        self.skip, self.sums = skip, sums
        self.positions_T = torch.arange(tokens_BT.shape[1])

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Add to the sums, rotate, attend."""
        spec = self.specs[layer]
        positions_N = self.positions_T.to(q_NHD.device).repeat(self.windows)
        if spec.content_heads:
            kept_M = torch.nonzero(positions_N >= self.skip)[:, 0]
            for part_M in kept_M.split(SUM_TOKENS):
                self._add(layer, "", q_NHD[part_M, : spec.content_heads])
                content_keys = spec.content_heads // spec.group
                self._add(layer, "k_", k_NKD[part_M, :content_keys])
        q_NHD, k_NKD = rotate(q_NHD, positions_N, spec), rotate(k_NKD, positions_N, spec)
        return super().__call__(layer, q_NHD, k_NKD, v_NKD)

    def _add(self, layer: int, prefix: str, x_MHD: Tensor) -> None:
        spec, x_MHD = self.specs[layer], x_MHD.double()
        bands_MHF2 = torch.stack(rotary_parts(x_MHD, spec.bands, spec.interleaved), dim=-1)
        # At position 0 cosines are the factor of the rotation, sines zero.
        bands_MHF2 = bands_MHF2 / spec.rope_scale
        rest_MHP = x_MHD[..., 2 * spec.bands :]
        square_MHF = bands_MHF2.square().sum(-1)
        band_prefix = prefix or "q_"
        found = {
            f"{band_prefix}mean": bands_MHF2,
            f"{band_prefix}abs": square_MHF.sqrt(),
            f"{band_prefix}sq": square_MHF,
        }
        if rest_MHP.shape[-1]:
            found[f"{prefix}rest_mean"] = rest_MHP
            found[f"{prefix}rest_abs"] = rest_MHP.abs()
            found[f"{prefix}rest_sq"] = rest_MHP.square()
        for name, value in found.items():
            if name not in ("k_sq", "k_rest_sq"):
                self.sums.add(f"layers.{layer}.{name}", value.sum(0))


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
    stats: Mapping[str, Tensor] | None, model: LipschitzTransformer | Decoder
) -> list[dict[str, Tensor] | None]:
    """Check statistics against a model and split them by layer.

    Returns:
        One dict per layer with the names of ``calibrate``; None for layers without content heads,
        and for layers with a sliding window that have no statistics: they need none.

    Raises:
        BundleError: if statistics are missing, or shapes or RoPE frequencies disagree.
    """
    layers = specs_of(model)
    split: list[dict[str, Tensor] | None] = [None] * len(layers)
    for index, spec in enumerate(layers):
        prefix = f"layers.{index}."
        own = {k.removeprefix(prefix): v for k, v in (stats or {}).items() if k.startswith(prefix)}
        if not spec.content_heads or (not own and spec.sliding_window is not None):
            continue
        if stats is None:
            raise BundleError(f"the model has no calibration statistics; {REMEDY}")
        _check_layer(prefix, own, spec)
        split[index] = own
    return split


def specs_of(model: LipschitzTransformer | Decoder) -> tuple[LayerSpec, ...]:
    """Return the attention of each layer."""
    if isinstance(model, Decoder):
        return model.layers
    blocks: Any = model.layers
    return tuple(layer_spec(layer.attention) for layer in blocks)


def _check_layer(prefix: str, own: Mapping[str, Tensor], spec: LayerSpec) -> None:
    heads, rest = spec.content_heads, spec.head_dim - 2 * spec.bands
    shapes = {"q_mean": (heads, spec.bands, 2), "q_abs": (heads, spec.bands)}
    shapes |= {name: (heads, rest) for name in ("rest_mean", "rest_abs") if rest}
    for name, shape in shapes.items():
        found = tuple(own[name].shape) if name in own else None
        if found != shape:
            raise BundleError(
                f"calibration statistics {prefix}{name}: expected shape {shape}, found"
                f" {found}; {REMEDY}"
            )
    stored_F = own.get("inv_freq", torch.zeros(0))
    if stored_F.shape != spec.inverse_frequency.shape or not torch.allclose(
        stored_F.double(), spec.inverse_frequency, rtol=FREQUENCY_TOLERANCE, atol=0
    ):
        raise BundleError(
            f"calibration statistics {prefix}inv_freq differ from the model's RoPE frequencies;"
            f" {REMEDY}"
        )


def centre_cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the mean over heads of the cosine between two texts' mean queries.

    Close to 1 when the statistics are a property of the model; 1 without content heads.
    """
    means = {k: v.flatten(1) for k, v in first.items() if k.endswith(".q_mean") and v.numel()}
    pairs = [(v, second[k].flatten(1)) for k, v in means.items()]
    if not pairs:
        return 1.0
    return float(torch.cat([torch.cosine_similarity(a, b, dim=1) for a, b in pairs]).mean())
