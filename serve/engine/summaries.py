"""Mean tokens: what was evicted stays as a few pseudo tokens per layer and key/value head.

A pseudo token has the mean key and mean value of its cluster and the logit
``scale q.k + log n``; with relative-position biases, log of the sum of exp(bias) over the evicted
positions stands for ``log n``. Decode and prompt attention are corrected from their log-sum-exp, so
the kernels need not know. Source: project's notes on eviction, evicted-mean token.
"""

# Legend: L layers of a group, R rows, N queries, H query heads, K key/value heads, G = H / K,
# C pseudo tokens, D head width, S slots.

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.decoder import Decoder, LayerSpec
from serve.engine.attention import Part
from serve.engine.companions import Companion
from serve.engine.request import Sequence
from serve.kv.bias import BiasTable
from serve.kv.summary import SummaryStore, map_length
from serve.kv.view import CacheView


@dataclass(slots=True)
class _Group:
    """Layers of one shape: their sums in float64, and the pseudo tokens in working precision."""

    spec: LayerSpec
    store: SummaryStore
    bias: BiasTable | None
    tokens: tuple[Tensor, Tensor, Tensor]


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
        self._groups: dict[int, tuple[_Group, int]] = {}
        self._stores: list[_Group] = []
        for layers in decoder.groups:
            if decoder.layers[layers[0]].sliding_window is None:
                group = self._group(decoder, layers)
                self._stores.append(group)
                self._groups |= {layer: (group, i) for i, layer in enumerate(layers)}
        self._rows: dict[Sequence, int] = {}

    def attended(self, part: Part, sequences: Rows[Sequence]) -> Tensor | None:
        """Return the outputs with the pseudo tokens, None where no sequence has any."""
        if part.layer not in self._groups or part.lse_NH is None:
            return None
        rows = [self._rows.get(sequence, 0) for sequence in sequences]
        if not any(rows):
            return None
        group, index = self._groups[part.layer]
        rows_R = torch.tensor(rows, dtype=torch.int64, device=self.device)
        return self._merge(group, index, rows_R, part)

    def compacting(self, view: CacheView, sequences: Rows[Sequence], keep_RKS: Tensor) -> None:
        """Take the keys and values that are about to go into the means."""
        found = self._groups.get(view.layers[0])
        if found is None:
            return
        for sequence in sequences:
            if sequence not in self._rows:
                (self._rows[sequence],) = {group.store.open() for group in self._stores}
        rows = [self._rows[sequence] for sequence in sequences]
        found[0].store.evict(view, rows, keep_RKS)
        found[0].tokens = self._tokens(found[0].store)

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            for group in self._stores:
                group.store.close(row)

    def _merge(self, group: _Group, index: int, rows_R: Tensor, part: Part) -> Tensor:
        """Attend to the pseudo tokens as well; exact for rows that have none."""
        assert part.lse_NH is not None
        log_count, keys, values = (x[index, rows_R] for x in group.tokens)
        heads = (keys.shape[1], -1)
        q_NKGD = part.q_NHD.to(self.dtype).unflatten(1, heads)
        if group.bias is not None:
            layer_N = torch.full_like(part.positions_N, index)
            gone = group.store.whole().is_gone[index, rows_R]
            masses = group.bias.masses(layer_N, part.positions_N, gone, self.clusters)
            log_count = masses[0].to(self.dtype)
        else:
            log_count = log_count[:, :, None]
        z_NKGC = group.spec.scale * q_NKGD @ keys.mT + log_count
        lse_NKG1 = part.lse_NH.to(self.dtype).unflatten(1, heads)[..., None]
        weights = torch.cat((lse_NKG1, z_NKGC), dim=-1).softmax(-1)
        o_NKGD = part.o_NHD.to(self.dtype).unflatten(1, heads)
        o_NKGD = weights[..., :1] * o_NKGD + weights[..., 1:] @ values
        return o_NKGD.flatten(1, 2).to(part.o_NHD.dtype)

    def _group(self, decoder: Decoder, layers: Rows[int]) -> _Group:
        specs = [decoder.layers[layer] for layer in layers]
        biases = [spec.bias_HT for spec in specs if spec.bias_HT is not None]
        positions = map_length(decoder.context, self.clusters) if biases else None
        store = SummaryStore(len(layers), specs[0], self.clusters, self.device, positions)
        bias = None
        if positions is not None:
            bias = BiasTable.of(torch.stack(biases).to(self.device), positions)
        return _Group(specs[0], store, bias, self._tokens(store))

    def _tokens(self, store: SummaryStore) -> tuple[Tensor, Tensor, Tensor]:
        means = store.whole()
        fields = (means.count.log(), means.key_centre, means.value_centre)
        log_count, keys, values = (x.to(self.dtype) for x in fields)
        return log_count, keys, values
