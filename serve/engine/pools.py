"""The cache's memory: one allocation per group of layers of equal shape."""

# Legend: L layers of a group, K key/value heads, D head width, N tokens of a step, M = N * K.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from serve.decoder import Decoder, LayerSpec
from serve.engine.config import EngineConfig


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


def pool_blocks(decoder: Decoder, config: EngineConfig) -> int:
    """Return the number of blocks: as configured, or for ``max_num_seqs`` contexts within bytes.

    Raises:
        ConfigError: if not even one block fits the bytes.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    size = block_bytes(decoder.layers, config.block_size, decoder.dtype)
    if size > config.cache_bytes:
        raise ConfigError(
            f"engine.cache_bytes={config.cache_bytes}: one block of {config.block_size} tokens "
            f"takes {size} bytes in this model; raise it, or lower engine.block_size"
        )
    per_context = -(-decoder.context // config.block_size)
    return min(config.max_num_seqs * per_context, config.cache_bytes // size)


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
        # Keys and values with one line per (block, head, offset).
        self.lines = [(pool.keys.flatten(0, 2), pool.values.flatten(0, 2)) for pool in self.layers]

    def group_tables(self, group: Sequence[int], tables_RW: Tensor) -> Tensor:
        """Return tables (layers * R, W) of all layers of a group, layer-major."""
        offset_L = torch.arange(len(group), device=tables_RW.device) * self.num_blocks
        return (tables_RW + offset_L[:, None, None]).flatten(0, 1)

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zero the values of some blocks in all layers.

        A weight of zero does not silence a NaN. Blocks are wiped when they get a new owner that
        does not fill them at once, so that their unfilled slots hold finite values.
        """
        for pool in self.group_pools if blocks else ():
            index = torch.tensor(blocks, dtype=torch.int64, device=pool.values.device)
            pool.values.unflatten(0, (-1, self.num_blocks)).index_fill_(1, index, 0)

    def _allocate(self, decoder: Decoder, group: Sequence[int]) -> LayerPool:
        spec = decoder.layers[group[0]]
        shape = (len(group) * self.num_blocks, spec.kv_heads, self.block_size)
        keys = torch.zeros(*shape, spec.head_dim, dtype=decoder.dtype, device=decoder.device)
        positions = torch.zeros(shape, dtype=torch.int32, device=decoder.device)
        return LayerPool(keys, torch.zeros_like(keys), positions)


class SlotWriter:
    """Writes the tokens of one step; their positions at once, in all layers.

    Args:
        pools: All pools.
        positions_N: Original position of each token.
        slots_N: Slot of each token, ``block * block_size + offset``.
    """

    def __init__(self, pools: Pools, positions_N: Tensor, slots_N: Tensor) -> None:
        self.lines = pools.lines
        self._index: dict[int, Tensor] = {}
        block_N = slots_N // pools.block_size
        for group in pools.group_pools:
            kv_heads, size = group.keys.shape[1:3]
            if kv_heads not in self._index:
                first_N = torch.add(slots_N, block_N, alpha=size * (kv_heads - 1))
                head_K = torch.arange(0, size * kv_heads, size, device=slots_N.device)
                self._index[kv_heads] = (first_N[:, None] + head_K).flatten()
            position_M = positions_N.int().repeat_interleave(kv_heads)
            flat_LS = group.positions.view(len(group.keys) // pools.num_blocks, -1)
            flat_LS.index_copy_(1, self._index[kv_heads], position_M.expand(len(flat_LS), -1))

    def write(self, layer: int, k_NKD: Tensor, v_NKD: Tensor) -> None:
        """Write keys and values (N, K, D) of a layer."""
        keys, values = self.lines[layer]
        index_M, shape = self._index[k_NKD.shape[1]], (-1, k_NKD.shape[2])
        keys.index_copy_(0, index_M, k_NKD.reshape(shape))
        values.index_copy_(0, index_M, v_NKD.reshape(shape))
