"""Mean tokens: what was evicted stays as a few pseudo tokens per layer and key/value head.

A pseudo token has the mean key and mean value of its cluster and the logit
``scale q.k + log n``; with relative-position biases, log of the sum of exp(bias) over the evicted
positions stands for ``log n``. Decode and prompt attention are corrected from their log-sum-exp, so
the kernels need not know. Source: project's notes on eviction, evicted-mean token.
"""

# Legend: L layers of a group, R rows, N queries, T queries of a row, H query heads, K key/value
# heads, G = H / K, X = G * T, C pseudo tokens, D head width, S slots.

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.decoder import Decoder, LayerSpec
from serve.engine.attention import Part
from serve.engine.companions import Companion
from serve.engine.request import Sequence
from serve.kv.bias import BiasTable
from serve.kv.summary import Clusters
from serve.kv.summary_store import SummaryStore
from serve.kv.view import CacheView


@dataclass(slots=True)
class _Group:
    """Layers of one shape, and the pseudo tokens of the parts that they attend to in this step."""

    layers: tuple[int, ...]
    spec: LayerSpec
    store: SummaryStore
    bias: BiasTable | None
    taken: dict[int | None, tuple[Clusters, Tensor]]


class Summaries(Companion):
    """The pseudo tokens of all running sequences.

    Layers with a sliding window get none: what they lost is about to leave the window anyway.

    Args:
        decoder: Supplies shapes, dtype and device; any decoder.
        clusters: Pseudo tokens per layer and key/value head; each stands for a segment of
            positions. Segments double as a sequence grows; with biases they are fixed.
    """

    def __init__(self, decoder: Decoder, clusters: int) -> None:
        self.device, self.clusters = decoder.device, clusters
        self.dtype = torch.promote_types(decoder.dtype, torch.float32)
        groups = [
            self._group(decoder, layers)
            for layers in decoder.groups
            if decoder.layers[layers[0]].sliding_window is None
        ]
        self._groups = {layer: group for group in groups for layer in group.layers}
        self._stores = [group.store for group in groups]
        self._rows: dict[Sequence, int] = {}

    def attended(self, part: Part, sequences: Rows[Sequence]) -> Tensor | None:
        """Return the outputs with the pseudo tokens, None where no sequence has any."""
        group = self._groups.get(part.layer)
        if group is None or part.lse_NH is None:
            return None
        rows = [self._rows.get(sequence, 0) for sequence in sequences]
        if not any(rows):
            return None
        if part.layer == group.layers[0]:
            rows_R = torch.tensor(rows, dtype=torch.int64, device=self.device)
            group.taken[part.chunk] = self._take(group, rows_R, part.positions_N)
        clusters, log_LNKGC = group.taken[part.chunk]
        if part.layer == group.layers[-1]:
            del group.taken[part.chunk]
        index = group.layers.index(part.layer)
        own = clusters.rows(index * len(rows), len(rows))
        return self._merge(group.spec, own, log_LNKGC[index], part)

    def compacting(self, view: CacheView, sequences: Rows[Sequence], keep_RKS: Tensor) -> None:
        """Take the keys and values that are about to go into the means."""
        group = self._groups.get(view.layers[0])
        if group is None:
            return
        for sequence in sequences:
            if sequence not in self._rows:
                (self._rows[sequence],) = {store.open() for store in self._stores}
        group.store.evict(view, [self._rows[sequence] for sequence in sequences], keep_RKS)

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            for store in self._stores:
                store.close(row)

    def _take(self, group: _Group, rows_R: Tensor, positions_N: Tensor) -> tuple[Clusters, Tensor]:
        """Return the pseudo tokens of all layers and the logarithms of what they stand for."""
        clusters, layers, rows = group.store.take(rows_R), len(group.layers), len(rows_R)
        if group.bias is None:
            return clusters, clusters.log_count.unflatten(0, (layers, rows))[..., None, :]
        # A chunk is one row of many queries.
        positions_RT = positions_N.view(rows, -1).repeat(layers, 1)
        layer_R = torch.arange(layers, device=self.device).repeat_interleave(rows)
        log_RKXC = group.bias.masses(layer_R, positions_RT, clusters).log_total.to(self.dtype)
        log_LRKGTC = log_RKXC.unflatten(2, (group.spec.group, -1)).unflatten(0, (layers, rows))
        return clusters, log_LRKGTC.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)

    def _merge(self, spec: LayerSpec, clusters: Clusters, log_NKGC: Tensor, part: Part) -> Tensor:
        """Attend to the pseudo tokens as well; exact for rows that have none."""
        assert part.lse_NH is not None
        heads = (spec.kv_heads, -1)
        q_NKGD = part.q_NHD.to(self.dtype).unflatten(1, heads)
        z_NKGC = (spec.scale * q_NKGD) @ clusters.keys.mT + log_NKGC
        lse_NKG1 = part.lse_NH.to(self.dtype).unflatten(1, heads)[..., None]
        weights = torch.cat((lse_NKG1, z_NKGC), dim=-1).softmax(-1)
        o_NKGD = part.o_NHD.to(self.dtype).unflatten(1, heads)
        o_NKGD = weights[..., :1] * o_NKGD + weights[..., 1:] @ clusters.values
        return o_NKGD.flatten(1, 2).to(part.o_NHD.dtype)

    def _group(self, decoder: Decoder, layers: tuple[int, ...]) -> _Group:
        specs = [decoder.layers[layer] for layer in layers]
        biases = [spec.bias_HT for spec in specs if spec.bias_HT is not None]
        shape, context = (len(layers), specs[0], self.clusters), decoder.context if biases else None
        store = SummaryStore(*shape, self.device, self.dtype, context)
        bias = BiasTable(torch.stack(biases).to(self.device), store.segment) if biases else None
        return _Group(layers, specs[0], store, bias, {})
