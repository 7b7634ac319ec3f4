"""The eviction ledger: what each sequence has lost, and what that can have done to its logits.

One row per sequence. ``evict`` before a compaction, ``observe`` after the attention of the layers
of a group, ``deviation`` after each step; the mathematics is in ``deviation.py``.
"""

# Legend: L layers of a group, Q sequences or tokens of a call, R = L * Q rows (layer-major),
# K key/value heads, H query heads, D head width, V vocabulary, N layers of the model.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.certificate import Certificate
from common.config import positive
from common.errors import CertificateError
from common.models import LipschitzTransformer
from common.norms import spectral_norm_bound
from serve.decoder import LayerSpec, LipschitzDecoder
from serve.kv.bias import BiasTable
from serve.kv.deviation import ROUNDINGS, Attended, cluster_masses, head_deviation
from serve.kv.margin import FARTHEST, HeadMargins
from serve.kv.summary import map_length, outward
from serve.kv.summary_store import LARGEST, SummaryStore
from serve.kv.view import CacheView

OUTWARD = outward(torch.float64)


@dataclass(frozen=True, slots=True)
class Deviation:
    """Bounds for sequences against full attention on the same tokens, float64.

    Attributes:
        stream_R: l2 movement of the final residual stream, largest over the tokens so far.
        logits_R: RMS movement of the logits over the vocabulary.
        pair_R: Movement of any difference of two logits.
        margins: Distances of the stream from another most probable token.
        stream_constant: Bound on the movement of the full model's final stream per l2 movement of
            the embedded tokens, largest over tokens.
    """

    stream_R: Tensor
    logits_R: Tensor
    pair_R: Tensor
    margins: HeadMargins
    stream_constant: float

    def top1(self, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        """Judge the largest logit of the compressed run at the newest token.

        Args:
            logits_RV: Its logits.

        Returns:
            Where full attention provably has the same largest logit (R,), bool; and how far inputs
            may move before that can change (R,): l2 of an embedded token, largest over tokens,
            within the certificate's ball; 0 where it is not proved.
        """
        distance_R = self.margins.distance(logits_RV)
        is_kept_R = (self.stream_R == 0) | (distance_R > self.stream_R)
        left_R = (distance_R - self.stream_R).clamp(min=0) / self.stream_constant
        return is_kept_R, (left_R * (1 - OUTWARD)).clamp(max=FARTHEST)

    def keeps_top1(self, logits_RV: Tensor) -> Tensor:
        """Return the first result of ``top1``."""
        return self.top1(logits_RV)[0]


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers of one shape: what they lost, and their constants.

    ``gain_L`` is residual weight times attention factor; ``norm_L`` bounds the spectral norm of
    the output matrix, ``head_norm_LH`` that of each head's columns, in float64; ``key_L`` and
    ``value_L`` bound the norms of all cached keys and values, in working precision.
    """

    layers: tuple[int, ...]
    spec: LayerSpec
    store: SummaryStore
    bias: BiasTable | None
    positions: int
    gain_L: Tensor
    norm_L: Tensor
    head_norm_LH: Tensor
    key_L: Tensor
    value_L: Tensor

    def block_deviation(self, layer_R: Tensor, head_RH: Tensor) -> Tensor:
        """Bound the l2 movement (R,) of the stream from that of each head's output (R, H)."""
        # What overflowed is unknown, hence unbounded.
        head_RH = head_RH.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
        joint_R = self.norm_L[layer_R] * head_RH.norm(dim=1)
        apart_R = (head_RH * self.head_norm_LH[layer_R]).sum(1)
        return self.gain_L[layer_R] * (1 + OUTWARD) * torch.minimum(joint_R, apart_R)


class EvictionLedger:
    """Certified eviction error of every running sequence.

    A block's deviation at a token is bounded from the summary of its evicted keys; because the
    certificate's norm is the largest over tokens, each sequence carries the running maximum per
    layer. The statement is about real arithmetic on the stored weights and cached values.
    Rounding inside the attention kernel is allowed for, that of the other blocks is left out.

    Args:
        model: The served model.
        certificate: A valid certificate of exactly this model.
        clusters: Summaries per key/value head; more are tighter and cost one dot product each.

    Raises:
        ConfigError: if ``clusters`` is not positive.
        CertificateError: if the certificate has another number of blocks.

    Source:
        Error recursion and head identity of the project's notes on eviction bounds; arXiv
        2604.04921 has no counterpart.
    """

    def __init__(
        self, model: LipschitzTransformer, certificate: Certificate, *, clusters: int = 8
    ) -> None:
        positive("clusters", clusters)
        config = model.config
        if len(certificate.blocks) != 2 * config.layers:
            raise CertificateError(
                f"certificate of {len(certificate.blocks)} blocks: expected {2 * config.layers};"
                " run lipllm certify"
            )
        self.model, self.certificate, self.clusters = model, certificate, clusters
        self.device = model.embedding.weight.device
        self.dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)
        decoder = LipschitzDecoder(model)
        self.group_layers = decoder.groups
        self._groups = {layers[0]: self._group(decoder, layers) for layers in decoder.groups}
        self.margins = HeadMargins(model, certificate)
        amplification = [certificate.amplification(2 * i) for i in range(config.layers)]
        self.amplification_N = self._tensor(amplification)
        self.delta_RN = torch.zeros_like(self.amplification_N)[None]

    @torch.inference_mode()
    def open(self) -> int:
        """Start a sequence with nothing evicted and return its row; row 0 is never given."""
        (row,) = {group.store.open() for group in self._groups.values()}
        missing = row + 1 - len(self.delta_RN)
        if missing > 0:
            more = self.delta_RN.new_zeros(missing, self.delta_RN.shape[1])
            self.delta_RN = torch.cat((self.delta_RN, more))
        self.delta_RN[row] = 0
        return row

    def close(self, row: int) -> None:
        """End a sequence; its row may be given to another."""
        for group in self._groups.values():
            group.store.close(row)

    def evict(self, view: CacheView, rows: Sequence[int], keep_RKS: Tensor) -> None:
        """Note what a compaction is about to drop; call it before ``compact_kv``.

        Args:
            view: The cache of one group of layers before the compaction.
            rows: Ledger row of each sequence of the view, distinct.
            keep_RKS: Slots that survive, from ``choose``.
        """
        self._groups[view.layers[0]].store.evict(view, rows, keep_RKS)

    @torch.inference_mode()
    def observe(
        self,
        layers: Sequence[int],
        rows_Q: Tensor,
        q_LQHD: Tensor,
        kept_LQHD: Tensor,
        used_LQHD: Tensor,
        lse_LQH: Tensor,
        positions_Q: Tensor,
    ) -> None:
        """Bound the deviation of a group's layers at one token per row; keep the largest so far.

        Args:
            layers: A group of layers, one of ``group_layers``.
            rows_Q: Ledger row of each token, int64; a sequence may occur several times.
            q_LQHD: Queries after RoPE.
            kept_LQHD: Attention outputs over the kept keys.
            used_LQHD: The outputs that went on through the model.
            lse_LQH: Log-sum-exp of the kept logits.
            positions_Q: Original positions of the queries.
        """
        group = self._groups[layers[0]]
        # A chunk of many tokens goes in parts: each needs so many numbers per head.
        wide = max(self.clusters * q_LQHD.shape[3], group.positions)
        step = max(1, LARGEST // (len(layers) * q_LQHD.shape[2] * wide))
        layer_L = torch.tensor(layers, device=self.device)
        for first in range(0, len(rows_Q), step):
            part = slice(first, first + step)
            given = (x[:, part].flatten(0, 1) for x in (q_LQHD, kept_LQHD, used_LQHD, lse_LQH))
            delta_R = self._block_deviation(group, rows_Q[part], positions_Q[part], *given)
            delta_QL = delta_R.view(len(layers), -1).T
            into_QL = rows_Q[part, None].expand_as(delta_QL)
            worst = self.delta_RN[:, layer_L].scatter_reduce(0, into_QL, delta_QL, "amax")
            self.delta_RN[:, layer_L] = worst

    def _block_deviation(
        self,
        group: _Group,
        rows_Q: Tensor,
        positions_Q: Tensor,
        q_RHD: Tensor,
        kept_RHD: Tensor,
        used_RHD: Tensor,
        lse_RH: Tensor,
    ) -> Tensor:
        clusters, layers = group.store.take(rows_Q), len(group.layers)
        layer_R = torch.arange(layers, device=self.device).repeat_interleave(len(rows_Q))
        heads = (group.spec.kv_heads, -1)
        q_RKGD = q_RHD.to(self.dtype).unflatten(1, heads)
        sums = None
        if group.bias is not None:
            positions_R = positions_Q.repeat(layers)
            sums = group.bias.masses(layer_R, positions_R, clusters.is_gone, self.clusters)
        masses = cluster_masses(clusters, group.spec.scale, q_RKGD, sums)
        # A dot product rounds relative to |q||k|, which may be far above the logit itself.
        unit = (q_RHD.shape[2] + ROUNDINGS) * torch.finfo(lse_RH.dtype).eps
        key_R11 = group.key_L[layer_R, None, None]
        attended = Attended(
            kept_RKGD=kept_RHD.unflatten(1, heads),
            used_RKGD=used_RHD.unflatten(1, heads),
            lse_RKG=lse_RH.unflatten(1, heads),
            error_RKG=unit * group.spec.scale * key_R11 * q_RKGD.norm(dim=-1),
            value_bound=group.value_L[layer_R, None, None],
        )
        return group.block_deviation(layer_R, head_deviation(clusters, masses, attended))

    @torch.inference_mode()
    def deviation(self, rows: Sequence[int]) -> Deviation:
        """Bound how far the sequences are from full attention on the same tokens."""
        rows_R = torch.tensor(rows, dtype=torch.int64, device=self.device)
        delta_RN = self.delta_RN[rows_R]
        # A bound may be infinite where nothing moved; zero times infinity is zero here.
        moved_RN = torch.where(delta_RN == 0, 0, delta_RN * self.amplification_N)
        stream_R = moved_RN.sum(1) * (1 + OUTWARD)
        certificate = self.certificate
        to_logits = certificate.head_norm / math.sqrt(certificate.vocab_size) * (1 + OUTWARD)
        pair_R = stream_R * certificate.pair_norm
        bounds = (stream_R, stream_R * to_logits, pair_R)
        return Deviation(*bounds, self.margins, certificate.stream)

    def _group(self, decoder: LipschitzDecoder, layers: tuple[int, ...]) -> _Group:
        specs = [decoder.layers[layer] for layer in layers]
        biases = [spec.bias_HT for spec in specs if spec.bias_HT is not None]
        positions = map_length(decoder.context, self.clusters) if biases else None
        bias = None
        if positions is not None:
            bias = BiasTable.of(torch.stack(biases), positions)
        blocks = [self.model.layers[layer] for layer in layers]
        outputs = [block.attention.output.weight for block in blocks]
        heads = [w_OI.split(specs[0].head_dim, dim=1) for w_OI in outputs]
        head_norms = [[spectral_norm_bound(w_OI) for w_OI in split] for split in heads]
        keys, values = zip(*(self._cached_bounds(layer) for layer in layers), strict=True)
        shape = (len(layers), specs[0], self.clusters)
        return _Group(
            layers,
            specs[0],
            SummaryStore(*shape, self.device, self.dtype, positions),
            bias,
            positions or 0,
            self._tensor([b.layer.attn_residual * b.layer.attn_factor for b in blocks]),
            self._tensor([spectral_norm_bound(w_OI) for w_OI in outputs]),
            torch.tensor(head_norms, dtype=torch.float64, device=self.device),
            *((self._tensor(x) * (1 + outward(self.dtype))).to(self.dtype) for x in (keys, values)),
        )

    def _cached_bounds(self, index: int) -> tuple[float, float]:
        """Bound the norms of all cached keys and values of a layer, with room for rounding."""
        attention, radius = self.model.layers[index].attention, 1.01
        radius *= self.certificate.blocks[2 * index].radius_in
        key = 0.0 if attention.key is None else spectral_norm_bound(attention.key.weight)
        return key * radius, spectral_norm_bound(attention.value.weight) * radius

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)
