"""Attention of a step whose rotation and cache write are one kernel per layer."""

# Legend: N tokens of the step (flat), H query heads, K key/value heads, D head width, F bands.

from torch import Tensor

from common.models.layers import TurningAttend
from common.models.rope import rotation
from serve.decoder import Decoder
from serve.engine.attention import Listener, PagedAttention
from serve.engine.batch import Batch
from serve.engine.pools import Pools
from serve.kernels import rope_write
from serve.kernels.reference import accumulator


class Rotations:
    """Angles of every layer; frequencies stay on the device.

    Args:
        decoder: Its layers of one group share their frequencies.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.group_of = {layer: i for i, group in enumerate(decoder.groups) for layer in group}
        specs = [decoder.layers[group[0]] for group in decoder.groups]
        self._frequencies = [spec.inverse_frequency.to(decoder.device) for spec in specs]
        self._scales = [spec.rope_scale for spec in specs]

    def at(self, group: int, positions_N: Tensor, like: Tensor) -> Tensor:
        """Return cosines and sines (2, N, F) of a group, for heads such as ``like``."""
        turns = rotation(positions_N[None], self._frequencies[group], accumulator(like))
        return turns[:, 0, 0] * self._scales[group]


class KernelAttention(PagedAttention, TurningAttend):
    """Attention through ``rope_write`` and ``paged_decode``; padding (slot -1) is not written.

    Args:
        decoder: Supplies the layers.
        pools: The cache; written in place.
        batch: What runs.
        rotations: Those of the decoder.
        backend: Kernel backend.
        listener: Sees, and may correct, the attention of every layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        pools: Pools,
        batch: Batch,
        rotations: Rotations,
        backend: str = "auto",
        listener: Listener | None = None,
    ) -> None:
        super().__init__(decoder.layers, pools, batch, backend, listener)
        self.rotations = rotations
        self._turns: dict[int, Tensor] = {}

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Write rotated keys and values (N, K, D), return outputs (N, H, D)."""
        return self._write(layer, q_NHD, k_NKD, v_NKD, None, None)

    def turning(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Rotate, write keys and values (N, K, D), return outputs (N, H, D)."""
        group = self.rotations.group_of[layer]
        if group not in self._turns:
            self._turns[group] = self.rotations.at(group, self.batch.positions_N, k_NKD)
        return self._write(layer, q_NHD, k_NKD, v_NKD, *self._turns[group])

    def _write(
        self,
        layer: int,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        cos_NF: Tensor | None,
        sin_NF: Tensor | None,
    ) -> Tensor:
        q_NHD = rope_write(
            q_NHD,
            k_NKD,
            v_NKD,
            cos_NF,
            sin_NF,
            *self.pools[layer].tensors,
            self.batch.positions_N,
            self.batch.slots_N,
            interleaved=self.specs[layer].interleaved,
            backend=self.backend,
        )
        return self.attend(layer, q_NHD, None)
