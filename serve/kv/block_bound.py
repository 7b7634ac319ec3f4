"""Bounds on how far eviction moves the attention blocks of one shape, many tokens at a time."""

# Legend: L layers of a group, S sequences, T tokens of each, R = L * S rows (layer-major),
# K key/value heads, H query heads, G = H / K, X = G * T, D head width.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.certificate import Certificate
from common.models import LipschitzTransformer
from common.norms import spectral_norm_bound
from serve.decoder import Decoder
from serve.kv.bias import BiasTable
from serve.kv.deviation import ROUNDINGS, Attended, cluster_masses, head_deviation
from serve.kv.summary import outward
from serve.kv.summary_store import LARGEST, SummaryStore

OUTWARD = outward(torch.float64)


@dataclass(frozen=True, slots=True)
class Queries:
    """Tokens of some sequences in the layers of a group.

    Attributes:
        q: Queries after RoPE (S, T, L, H, D).
        kept: Attention outputs over the kept keys, same shape.
        used: The outputs that went on through the model; the same object where none was corrected.
        lse: Log-sum-exp of the kept logits (S, T, L, H).
        positions: Original positions (S, T).
    """

    q: Tensor
    kept: Tensor
    used: Tensor
    lse: Tensor
    positions: Tensor

    def as_one(self) -> "Queries":
        """Return sequences of one token each as the tokens of one sequence."""
        kept = self.kept.transpose(0, 1)
        used = kept if self.used is self.kept else self.used.transpose(0, 1)
        q, lse, positions = (x.transpose(0, 1) for x in (self.q, self.lse, self.positions))
        return Queries(q, kept, used, lse, positions)

    def some(self, part: slice | Tensor) -> "Queries":
        """Return some sequences."""
        kept = self.kept[part]
        used = kept if self.used is self.kept else self.used[part]
        return Queries(self.q[part], kept, used, self.lse[part], self.positions[part])


class BlockBound:
    """What layers of one shape lost, and what that can have moved.

    Args:
        decoder: The served model, as the cache sees it.
        model: The same; its weights.
        layers: Indices of the layers.
        certificate: Of this model; its radii bound the cached keys and values.
        clusters: Summaries per key/value head.
    """

    def __init__(
        self,
        decoder: Decoder,
        model: LipschitzTransformer,
        layers: Sequence[int],
        certificate: Certificate,
        clusters: int,
    ) -> None:
        specs = [decoder.layers[layer] for layer in layers]
        biases = [spec.bias_HT for spec in specs if spec.bias_HT is not None]
        self.layers, self.spec, self.clusters = tuple(layers), specs[0], clusters
        self.device, self.dtype = decoder.device, torch.promote_types(decoder.dtype, torch.float32)
        shape, context = (len(specs), specs[0], clusters), decoder.context if biases else None
        self.store = SummaryStore(*shape, self.device, self.dtype, context)
        self.bias = BiasTable(torch.stack(biases), self.store.segment) if biases else None
        blocks = [model.layers[layer] for layer in layers]
        outputs = [block.attention.output.weight for block in blocks]
        apart = [w_OI.split(specs[0].head_dim, dim=1) for w_OI in outputs]
        # Residual weight times attention factor, and norms of the output matrix and its columns.
        self.gain_L = self._tensor([b.layer.attn_residual * b.layer.attn_factor for b in blocks])
        self.norm_L = self._tensor([spectral_norm_bound(w_OI) for w_OI in outputs])
        self.head_norm_LH = self._tensor([[spectral_norm_bound(w) for w in row] for row in apart])
        # All cached keys and values are at most this long, with room for rounding.
        radii = [certificate.blocks[2 * layer].radius_in * 1.01 for layer in layers]
        keys, values = zip(*(_norms(block.attention) for block in blocks), strict=True)
        self.key_L, self.value_L = (
            (self._tensor(radii) * self._tensor(norms) * (1 + outward(self.dtype))).to(self.dtype)
            for norms in (keys, values)
        )

    def deltas(self, rows_S: Tensor, queries: Queries) -> Tensor:
        """Bound the l2 movement of the stream at every token, (S, T, L), float64.

        Args:
            rows_S: Row of each sequence in the store.
            queries: Their tokens.
        """
        _, tokens, layers, heads, width = queries.q.shape
        # Many tokens go in parts: each needs so many numbers per head.
        wide = self.clusters * width
        step = max(1, LARGEST // (tokens * layers * heads * wide))
        parts = [
            self._deltas(rows_S[first : first + step], queries.some(slice(first, first + step)))
            for first in range(0, len(rows_S), step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _deltas(self, rows_S: Tensor, queries: Queries) -> Tensor:
        sequences, tokens, layers = queries.lse.shape[:3]
        layer_R = torch.arange(layers, device=self.device).repeat_interleave(sequences)
        clusters = self.store.take(rows_S)
        bias = None
        if self.bias is not None:
            bias = self.bias.masses(layer_R, queries.positions.repeat(layers, 1), clusters)
        q_RKXD = self._by_row(queries.q).to(self.dtype)
        masses = cluster_masses(clusters, self.spec.scale, q_RKXD, bias)
        lse_RKX = self._by_row(queries.lse[..., None])[..., 0]
        kept_RKXD = self._by_row(queries.kept)
        is_used = queries.used is not queries.kept
        # A dot product rounds relative to |q||k|, which may be far above the logit itself.
        unit = (q_RKXD.shape[3] + ROUNDINGS) * torch.finfo(lse_RKX.dtype).eps
        key_R11 = self.key_L[layer_R, None, None]
        attended = Attended(
            kept_RKGD=kept_RKXD,
            used_RKGD=self._by_row(queries.used) if is_used else kept_RKXD,
            lse_RKG=lse_RKX,
            error_RKG=unit * self.spec.scale * key_R11 * q_RKXD.norm(dim=-1),
            value_bound=self.value_L[layer_R, None, None],
        )
        moved_RKX = head_deviation(clusters, masses, attended)
        moved_LSHT = moved_RKX.view(layers, sequences, -1, tokens)
        return self._block_deviation(moved_LSHT).permute(1, 2, 0)

    def _by_row(self, x_STLHD: Tensor) -> Tensor:
        """Return (R, K, G * T, D): the tokens of a row are further queries of each group."""
        x_LSHTD = x_STLHD.permute(2, 0, 3, 1, 4)
        layers, sequences, _, _, width = x_LSHTD.shape
        return x_LSHTD.reshape(layers * sequences, self.spec.kv_heads, -1, width)

    def _block_deviation(self, head_LSHT: Tensor) -> Tensor:
        """Bound the l2 movement (L, S, T) of the stream from that of each head's output."""
        # What overflowed is unknown, hence unbounded.
        head_LSHT = head_LSHT.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
        joint_LST = self.norm_L[:, None, None] * head_LSHT.norm(dim=2)
        apart_LST = (head_LSHT * self.head_norm_LH[:, None, :, None]).sum(2)
        return self.gain_L[:, None, None] * (1 + OUTWARD) * torch.minimum(joint_LST, apart_LST)

    def _tensor(self, values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)


def _norms(attention: torch.nn.Module) -> tuple[float, float]:
    """Bound the spectral norms of the key and the value matrix."""
    key = 0.0 if attention.key is None else spectral_norm_bound(attention.key.weight)
    return key, spectral_norm_bound(attention.value.weight)
