"""The cache's memory: one allocation per group of layers of equal shape."""

# Legend: L layers of a group, K key/value heads, D head width.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.decoder import Decoder, LayerSpec


@dataclass(frozen=True, slots=True)
class LayerPool:
    """Keys and values (blocks, K, block_size, D) and int32 positions (blocks, K, block_size)."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    def part(self, first: int, count: int) -> "LayerPool":
        """Return a view of ``count`` blocks."""
        return LayerPool(*(x[first : first + count] for x in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, positions."""
        return self.keys, self.values, self.positions


def block_bytes(specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block over all layers: keys, values and positions."""
    return sum(
        spec.kv_heads * block_size * (2 * spec.head_dim * dtype.itemsize + 4) for spec in specs
    )


class Pools:
    """All pools of a decoder.

    Block ``b`` of layer number i of a group is block ``i * num_blocks + b`` of the group's pool,
    so that one kernel launch can serve all of its layers.

    Args:
        decoder: Supplies shapes, dtype and device.
        num_blocks: Blocks of each layer.
        block_size: Slots per block.
    """

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int) -> None:
        self.groups = decoder.groups
        self.num_blocks, self.block_size = num_blocks, block_size
        self.group_pools = [self._allocate(decoder, group) for group in self.groups]
        parts = {
            layer: pool.part(index * num_blocks, num_blocks)
            for group, pool in zip(self.groups, self.group_pools, strict=True)
            for index, layer in enumerate(group)
        }
        self.layers = [parts[layer] for layer in range(len(decoder.layers))]

    def group_tables(self, group: Sequence[int], tables_RW: Tensor) -> Tensor:
        """Return tables (layers * R, W) of all layers of a group, layer-major."""
        offset_L = torch.arange(len(group), device=tables_RW.device) * self.num_blocks
        return (tables_RW + offset_L[:, None, None]).flatten(0, 1)

    def _allocate(self, decoder: Decoder, group: Sequence[int]) -> LayerPool:
        spec = decoder.layers[group[0]]
        shape = (len(group) * self.num_blocks, spec.kv_heads, self.block_size)
        keys = torch.zeros(*shape, spec.head_dim, dtype=decoder.dtype, device=decoder.device)
        positions = torch.zeros(shape, dtype=torch.int32, device=decoder.device)
        return LayerPool(keys, torch.zeros_like(keys), positions)
