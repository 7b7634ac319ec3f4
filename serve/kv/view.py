"""What a policy may see of the cache: layers of one shape, many requests, one row per pair."""

# Legend: R rows (layer-major: layer * requests + request), N table width (blocks), K key/value
# heads, H query heads, S slots, D head width, T relative distances, L layers of the view.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serve.decoder import LayerSpec
from serve.kernels import gather_pages


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheView:
    """Layers that share one pool, and the requests to compact.

    Attributes:
        layers: Indices of the layers.
        spec: Their shapes and constants; the bias is that of the first.
        bias_LHT: Relative-position biases (L, H, context), or None.
        context: The model's context, in tokens.
        k_pool: Keys after RoPE (blocks of all layers, K, block_size, D).
        v_pool: Values, same shape.
        pos_pool: Original positions (blocks of all layers, K, block_size), int32.
        tables_RN: Block indices of each row in these pools.
        lengths_R: Filled slots of each row.
        positions_R: Position of each row's next query, int64.
        prompts_R: Prompt length of each row's request, int64.
        seeds_R: Seed of each row's request, int64.
        stats: Calibration statistics (``serve.kv.calibrate``), stacked over the layers, or None.
        observed: What the policy's observer collected, each with one entry per row.
        backend: Kernel backend.
    """

    layers: tuple[int, ...]
    spec: LayerSpec
    bias_LHT: Tensor | None
    context: int
    k_pool: Tensor
    v_pool: Tensor
    pos_pool: Tensor
    tables_RN: Tensor
    lengths_R: Tensor
    positions_R: Tensor
    prompts_R: Tensor
    seeds_R: Tensor
    stats: Mapping[str, Tensor] | None = None
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    backend: str = "auto"

    @property
    def requests(self) -> int:
        """Requests of the view."""
        return len(self.tables_RN) // len(self.layers)

    def rows_of(self, x_L: Tensor) -> Tensor:
        """Repeat a tensor with one entry per layer (L, ...) for every request: (R, ...)."""
        return x_L.repeat_interleave(self.requests, dim=0)

    def slot_positions(self) -> Tensor:
        """Return the original position of every slot (R, K, S), int64; -1 in unfilled slots."""
        pos_RKS = gather_pages(self.pos_pool, self.tables_RN).long()
        return pos_RKS.masked_fill(~self._is_filled(pos_RKS.shape[2])[:, None], -1)

    def keys(self) -> Tensor:
        """Return the cached keys (R, K, S, D); zero in unfilled slots."""
        return self._dense(self.k_pool)

    def values(self) -> Tensor:
        """Return the cached values (R, K, S, D); zero in unfilled slots."""
        return self._dense(self.v_pool)

    def _dense(self, pool: Tensor) -> Tensor:
        x_RKSD = gather_pages(pool, self.tables_RN)
        slots = x_RKSD.shape[2]
        # On the CPU the slots that all rows have filled are spared; elsewhere that would wait.
        first = 0 if x_RKSD.is_cuda else int(self.lengths_R.min())
        # Stale slots may hold anything; zero times NaN would not be zero.
        is_stale_RS = ~self._is_filled(slots)[:, first:]
        x_RKSD[:, :, first:].masked_fill_(is_stale_RS[:, None, :, None], 0)
        return x_RKSD

    def _is_filled(self, slots: int) -> Tensor:
        return torch.arange(slots, device=self.k_pool.device) < self.lengths_R[:, None]


def stack_stats(
    stats: Sequence[Mapping[str, Tensor] | None] | None, layers: Sequence[int]
) -> dict[str, Tensor] | None:
    """Stack the statistics of some layers; None if one of them has none."""
    found = [None if stats is None else stats[layer] for layer in layers]
    known = [entry for entry in found if entry is not None]
    if len(known) < len(found):
        return None
    return {name: torch.stack([entry[name] for entry in known]) for name in known[0]}
