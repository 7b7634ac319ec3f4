"""The eviction ledger: what each sequence has lost, and what that can have done to its logits.

One row per sequence. ``evict`` before a compaction, ``note`` or ``observe`` after the attention of
a group of layers, ``settle`` before the next compaction; the mathematics is in ``deviation.py``.
"""

# Legend: S, Q, R sequences, T tokens of each, L layers of a group, N layers of the model,
# K key/value heads, V vocabulary.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.certificate import Certificate
from common.config import positive
from common.errors import CertificateError
from common.models import LipschitzTransformer
from serve.decoder import LipschitzDecoder
from serve.kv.block_bound import OUTWARD, BlockBound, Queries
from serve.kv.margin import FARTHEST, HeadMargins
from serve.kv.pending import Pending
from serve.kv.view import CacheView


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


class EvictionLedger:
    """Certified eviction error of every running sequence.

    A block's deviation at a token is bounded from the summary of its evicted keys; because the
    certificate's norm is the largest over tokens, each sequence carries the running maximum per
    layer. The statement is about real arithmetic on the stored weights and cached values.
    Rounding inside the attention kernel is allowed for, that of the other blocks is left out.

    Args:
        model: The served model; as a decoder where there is one already.
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
        self,
        model: LipschitzTransformer | LipschitzDecoder,
        certificate: Certificate,
        *,
        clusters: int = 8,
    ) -> None:
        positive("clusters", clusters)
        decoder = model if isinstance(model, LipschitzDecoder) else LipschitzDecoder(model)
        model = decoder.model
        layers = model.config.layers
        if len(certificate.blocks) != 2 * layers:
            raise CertificateError(
                f"certificate of {len(certificate.blocks)} blocks: expected {2 * layers};"
                " run lipllm certify"
            )
        self.model, self.certificate = model, certificate
        self.device = decoder.device
        self.groups = {
            group[0]: BlockBound(decoder, model, group, certificate, clusters)
            for group in decoder.groups
        }
        self.margins = HeadMargins(model, certificate)
        amplification = [certificate.amplification(2 * i) for i in range(layers)]
        self.amplification_N = torch.tensor(amplification, dtype=torch.float64, device=self.device)
        self.delta_RN = torch.zeros_like(self.amplification_N)[None]
        self._pending = {first: Pending() for first in self.groups}
        self._waiting: dict[int, range] = {}  # positions

    @torch.inference_mode()
    def open(self) -> int:
        """Start a sequence with nothing evicted and return its row; row 0 is never given."""
        (row,) = {group.store.open() for group in self.groups.values()}
        missing = row + 1 - len(self.delta_RN)
        if missing > 0:
            more = self.delta_RN.new_zeros(missing, self.delta_RN.shape[1])
            self.delta_RN = torch.cat((self.delta_RN, more))
        self.delta_RN[row] = 0
        self._waiting[row] = range(0)
        return row

    def close(self, row: int) -> None:
        """End a sequence; its row may be given to another."""
        for group in self.groups.values():
            group.store.close(row)
        self._waiting.pop(row, None)

    def evict(self, view: CacheView, rows: Sequence[int], keep_RKS: Tensor) -> None:
        """Note what a compaction is about to drop; call it before ``compact_kv``.

        Args:
            view: The cache of one group of layers before the compaction.
            rows: Ledger row of each sequence of the view, distinct; none has waiting tokens.
            keep_RKS: Slots that survive, from ``choose``.
        """
        self.groups[view.layers[0]].store.evict(view, rows, keep_RKS)

    def waiting(self, row: int) -> int:
        """Return how many tokens of a sequence have no bound yet; ``pending.MOST`` at most."""
        return len(self._waiting[row])

    @torch.inference_mode()
    def note(
        self,
        layers: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        queries: Queries,
    ) -> None:
        """Keep one token of each sequence until ``settle``; after its last group it waits.

        Args:
            layers: A group of layers.
            rows: Ledger row of each sequence, distinct.
            positions: Of the tokens, which follow those that wait; one of these again replaces it.
            queries: The tokens (S sequences, T = 1).
        """
        group, waiting = self.groups[layers[0]], self._waiting
        starts = [
            waiting[row].start if waiting[row] else position
            for row, position in zip(rows, positions, strict=True)
        ]
        slots = [position - start for position, start in zip(positions, starts, strict=True)]
        self._pending[layers[0]].put(self._rows(rows), self._rows(slots), group.store.rows, queries)
        if layers[-1] == len(self.amplification_N) - 1:
            for row, start, position in zip(rows, starts, positions, strict=True):
                waiting[row] = range(start, position + 1)

    @torch.inference_mode()
    def observe(self, layers: Sequence[int], rows: Sequence[int], queries: Queries) -> None:
        """Bound the deviation of many tokens at once; keep the largest so far.

        Args:
            layers: A group of layers.
            rows: Ledger row of each sequence, without waiting tokens; it may occur several times.
            queries: The tokens.
        """
        group, rows_S = self.groups[layers[0]], self._rows(rows)
        delta_SL = group.deltas(rows_S, queries).amax(1)
        layer_L = self._rows(group.layers)
        worst = self.delta_RN[:, layer_L].scatter_reduce(
            0, rows_S[:, None].expand_as(delta_SL), delta_SL, "amax"
        )
        self.delta_RN[:, layer_L] = worst

    @torch.inference_mode()
    def settle(self, rows: Sequence[int]) -> list[list[float]]:
        """Bound what waits.

        Returns:
            Of each sequence, the bound on the movement of its final stream before the waiting
            tokens and at each of them.
        """
        counts = [len(self._waiting.get(row, ())) for row in rows]
        rows_S = self._rows(rows)
        before_S1N = self.delta_RN[rows_S][:, None]
        tokens = max(counts, default=0)
        if tokens == 0:
            return self._stream(before_S1N).tolist()
        delta_STN = before_S1N.repeat(1, tokens, 1)
        for first, group in self.groups.items():
            found = group.deltas(rows_S, self._pending[first].take(rows_S, tokens))
            delta_STN[..., self._rows(group.layers)] = found
        is_pad_ST = torch.arange(tokens, device=self.device) >= self._rows(counts)[:, None]
        delta_STN.masked_fill_(is_pad_ST[..., None], 0.0)
        running = torch.cat((before_S1N, delta_STN), dim=1).cummax(1).values
        self.delta_RN[rows_S] = running[:, -1]
        self._waiting.update((row, range(0)) for row in rows if row in self._waiting)
        bounds = self._stream(running).tolist()
        return [row[: count + 1] for row, count in zip(bounds, counts, strict=True)]

    @torch.inference_mode()
    def deviation(self, rows: Sequence[int]) -> Deviation:
        """Bound how far the sequences are from full attention on the same tokens."""
        self.settle(rows)
        stream_R = self._stream(self.delta_RN[self._rows(rows)])
        pair_R = stream_R * self.certificate.pair_norm
        bounds = (stream_R, stream_R * self.to_logits, pair_R)
        return Deviation(*bounds, self.margins, self.certificate.stream)

    @property
    def to_logits(self) -> float:
        """Bound on the RMS movement of the logits per movement of the final stream."""
        certificate = self.certificate
        return certificate.head_norm / math.sqrt(certificate.vocab_size) * (1 + OUTWARD)

    def _stream(self, delta_XN: Tensor) -> Tensor:
        """Bound the movement (...) of the final stream from that of each attention block."""
        # A bound may be infinite where nothing moved; zero times infinity is zero here.
        moved = torch.where(delta_XN == 0, 0, delta_XN * self.amplification_N)
        return moved.sum(-1) * (1 + OUTWARD)

    def _rows(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)
