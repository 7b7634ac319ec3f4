"""The eviction ledger: what each sequence has lost, and what that can have done to its logits.

One row per sequence. ``evict`` before a compaction, ``observe`` after each attention over a
compressed cache, ``deviation`` after each step; the mathematics is in ``deviation.py``.
"""

# Legend: R rows of a call, K key/value heads, H query heads, G = H / K, S slots, D head width,
# L layers, V vocabulary.

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
from serve.kv.deviation import (
    OUTWARD,
    ROUNDINGS,
    AttentionConstants,
    Summary,
    head_deviation,
    log_mass_bound,
)
from serve.kv.view import CacheView

LARGEST = 1 << 22  # float64 numbers of a temporary


@dataclass(frozen=True, slots=True)
class Deviation:
    """Bounds for R sequences against full attention on the same tokens, float64.

    Attributes:
        stream_R: l2 movement of the final residual stream, largest over the tokens so far.
        logits_R: RMS movement of the logits over the vocabulary.
        pair_R: Movement of any difference of two logits.
    """

    stream_R: Tensor
    logits_R: Tensor
    pair_R: Tensor

    def keeps_top1(self, logits_RV: Tensor) -> Tensor:
        """Return where full attention provably has the same largest logit (R,), bool.

        Args:
            logits_RV: Logits of the compressed run at the newest token.
        """
        if logits_RV.shape[1] < 2:
            return torch.ones_like(self.pair_R, dtype=torch.bool)
        top_R2 = logits_RV.topk(2, dim=1).values.double()
        rounding_R = ROUNDINGS * torch.finfo(logits_RV.dtype).eps * top_R2.abs().sum(1)
        is_exact_R = self.pair_R == 0
        return is_exact_R | (top_R2[:, 0] - top_R2[:, 1] - rounding_R > self.pair_R)


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
        self.constants = [AttentionConstants.of(model, i) for i in range(config.layers)]
        self.cached_bounds = [self._cached_bounds(index) for index in range(config.layers)]
        amplification = [certificate.amplification(2 * i) for i in range(config.layers)]
        self.amplification_L = self._tensor(amplification)
        self.delta_RL = self._tensor([]).view(0, config.layers)
        self.summaries = [self._empty(index, 0) for index in range(config.layers)]
        self._free: list[int] = []
        self._compressed: set[int] = set()

    @torch.inference_mode()
    def open(self) -> int:
        """Start a sequence with nothing evicted and return its row."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self.delta_RL[row] = 0
        for index, summary in enumerate(self.summaries):
            summary.put(self._rows([row]), self._empty(index, 1))
        return row

    def close(self, row: int) -> None:
        """End a sequence; its row may be given to another."""
        self._compressed.discard(row)
        self._free.append(row)

    @torch.inference_mode()
    def evict(self, view: CacheView, rows: Sequence[int], keep_RKS: Tensor) -> None:
        """Note what a compaction of some layers is about to drop; call it before ``compact_kv``.

        Args:
            view: The cache before the compaction.
            rows: Ledger row of each sequence of the view, distinct.
            keep_RKS: Slots that survive, from ``choose``.
        """
        positions_RKS = view.slot_positions()
        is_gone_RKS = (positions_RKS >= 0).scatter(2, keep_RKS, False)
        given = (view.keys(), view.values(), positions_RKS, is_gone_RKS)
        index = self._rows(rows)
        for layer, *own in zip(view.layers, *(x.split(len(rows)) for x in given), strict=True):
            summary = self.summaries[layer].take(index)
            summary.add(*own)
            self.summaries[layer].put(index, summary)
        self._compressed.update(rows)

    @torch.inference_mode()
    def observe(
        self,
        layer: int,
        rows: Sequence[int],
        q_RHD: Tensor,
        o_RHD: Tensor,
        lse_RH: Tensor,
        positions_R: Tensor,
    ) -> None:
        """Bound one layer's deviation at one token per row and keep the largest so far.

        Args:
            layer: Layer index.
            rows: Ledger row of each query; a sequence may occur several times.
            q_RHD: Queries after RoPE.
            o_RHD: Attention outputs over the kept keys.
            lse_RH: Log-sum-exp of the kept logits.
            positions_R: Original positions of the queries.
        """
        chosen = [i for i, row in enumerate(rows) if row in self._compressed]
        if not chosen:
            return
        pick, index = self._rows(chosen), self._rows([rows[i] for i in chosen])
        # A chunk of many tokens goes in parts: the bias needs (R, H, context) numbers.
        part = max(1, LARGEST // (q_RHD.shape[1] * self.model.config.context))
        for picked, row_index in zip(pick.split(part), index.split(part), strict=True):
            given = (q_RHD[picked], o_RHD[picked], lse_RH[picked], positions_R[picked])
            delta_R = self._block_deviation(layer, row_index, *given)
            self.delta_RL[:, layer].scatter_reduce_(0, row_index, delta_R, "amax")

    def _block_deviation(
        self,
        layer: int,
        index: Tensor,
        q_RHD: Tensor,
        o_RHD: Tensor,
        lse_RH: Tensor,
        positions_R: Tensor,
    ) -> Tensor:
        summary, constants = self.summaries[layer].take(index), self.constants[layer]
        groups = (summary.count.shape[1], -1)
        q_RKGD = q_RHD.double().unflatten(1, groups)
        log_mass = log_mass_bound(summary, constants, q_RKGD, positions_R)
        o_RKGD, lse_RKG = o_RHD.unflatten(1, groups), lse_RH.unflatten(1, groups)
        # A dot product rounds relative to |q||k|, which may be far above the logit itself.
        key_bound, value_bound = self.cached_bounds[layer]
        unit = (q_RHD.shape[2] + ROUNDINGS) * torch.finfo(lse_RH.dtype).eps
        error_RKG = unit * constants.scale * key_bound * q_RKGD.norm(dim=-1)
        heads = head_deviation(summary, log_mass, o_RKGD, lse_RKG, error_RKG, value_bound)
        return constants.block_deviation(heads)

    @torch.inference_mode()
    def deviation(self, rows: Sequence[int]) -> Deviation:
        """Bound how far the sequences are from full attention on the same tokens."""
        delta_RL = self.delta_RL[self._rows(rows)]
        # A bound may be infinite where nothing moved; zero times infinity is zero here.
        moved_RL = torch.where(delta_RL > 0, delta_RL * self.amplification_L, 0)
        stream_R = moved_RL.sum(1) * (1 + OUTWARD)
        certificate = self.certificate
        to_logits = certificate.head_norm / math.sqrt(certificate.vocab_size) * (1 + OUTWARD)
        return Deviation(stream_R, stream_R * to_logits, stream_R * certificate.pair_norm)

    def _cached_bounds(self, index: int) -> tuple[float, float]:
        """Bound the norms of all cached keys and values of a layer, with room for rounding."""
        attention, radius = self.model.layers[index].attention, 1.01
        radius *= self.certificate.blocks[2 * index].radius_in
        key = 0.0 if attention.key is None else spectral_norm_bound(attention.key.weight)
        return key * radius, spectral_norm_bound(attention.value.weight) * radius

    def _grow(self) -> None:
        old, extra = len(self.delta_RL), max(len(self.delta_RL), 8)
        self.delta_RL = torch.cat((self.delta_RL, self.delta_RL.new_zeros(extra, self._layers)))
        for index, summary in enumerate(self.summaries):
            pairs = zip(summary.fields(), self._empty(index, extra).fields(), strict=True)
            self.summaries[index] = Summary(*(torch.cat(pair) for pair in pairs))
        self._free += range(old + extra - 1, old - 1, -1)

    @property
    def _layers(self) -> int:
        return self.delta_RL.shape[1]

    def _empty(self, index: int, rows: int) -> Summary:
        layer = self.model.config.layer(index)
        shape = (rows, layer.kv_heads, self.clusters)
        return Summary.empty(shape, layer.head_dim, self.model.config.context, self.device)

    def _rows(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)
