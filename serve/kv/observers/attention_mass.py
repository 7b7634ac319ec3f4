"""The attention that each cached token has received."""

# Legend: R rows of a call, T tokens of a chunk, H query heads, K key/value heads, G = H / K,
# S slots, D head width, C context.

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.decoder import LayerSpec
from serve.kernels import gather_pages
from serve.kv.attention import received
from serve.kv.observer import Attended
from serve.kv.observers.rows import RowObserver, Tensors


class AttentionMass(RowObserver):
    """Sums the attention weights per slot over all queries and the query heads of a group.

    The sums, ``mass`` (rows, K, S), float32 at least, follow the slots through compactions.
    Computed from the cache at every step, so it costs one more attention.
    """

    def empty(self, spec: LayerSpec, rows: int) -> Tensors:
        """Return no slots."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return {"mass": torch.zeros(rows, spec.kv_heads, 0, dtype=dtype, device=self.device)}

    @torch.inference_mode()
    def attended(self, event: Attended) -> None:
        """Add the weights of these queries."""
        spec = self.specs.get(event.layer)
        if spec is None:
            return
        k_RKSD, pos_RKS = (
            gather_pages(pool, event.tables_RW) for pool in (event.k_pool, event.pos_pool)
        )
        slots = pos_RKS.shape[2]
        slot_S = torch.arange(slots, device=self.device)
        is_empty = (slot_S >= event.lengths_R[:, None])[:, None]
        bias_HC = spec.bias_HT
        weights_RKGS = received(
            event.q_RTHD,
            event.positions_RT,
            k_RKSD,
            pos_RKS.long().masked_fill(is_empty, -1),
            scale=spec.scale,
            bias_RHC=None if bias_HC is None else bias_HC.expand(len(k_RKSD), -1, -1),
        )
        mass = self._reserve(event.layer, slots)
        # Adds up where a sequence comes as many decode rows.
        mass[:, :, :slots].index_add_(0, self.index(event.rows), weights_RKGS.sum(2))

    @torch.inference_mode()
    def moved(self, layers: Sequence[int], rows: Sequence[int], source_RKS: Tensor) -> None:
        """Take the sums along with the kept slots; the others start at zero."""
        index, kept = self.index(rows), source_RKS.shape[2]
        for layer, part in self.watched(layers, len(rows)):
            old = self._reserve(layer, kept)[index]
            # Slots beyond the sums have never been filled.
            source = source_RKS[part]
            sums = old.gather(2, source.clamp(max=old.shape[2] - 1))
            fresh = torch.zeros_like(old)
            fresh[:, :, :kept] = sums.masked_fill(source >= old.shape[2], 0)
            self.state[layer]["mass"][index] = fresh

    def _reserve(self, layer: int, slots: int) -> Tensor:
        """Return the sums of a layer, widened to so many slots."""
        mass = self.state[layer]["mass"]
        if mass.shape[2] < slots:
            mass = self.state[layer]["mass"] = F.pad(mass, (0, slots - mass.shape[2]))
        return mass
