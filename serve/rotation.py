"""Rotation of queries and keys as a ``LayerSpec`` states it."""

# Legend: N tokens (flat), H heads, D head width.

from torch import Tensor

from serve.decoder import LayerSpec
from serve.kv.trigonometry import phasors, turned


def rotate(x_NHD: Tensor, positions_N: Tensor, spec: LayerSpec) -> Tensor:
    """Rotate heads to their positions, without ``rope_scale``.

    Args:
        x_NHD: Queries or keys.
        positions_N: Position of each token.
        spec: Its frequencies and pairing.

    Returns:
        Same shape and dtype; angles and products are float64.
    """
    turn_N1F = phasors(spec.inverse_frequency.to(x_NHD.device), positions_N)[:, None]
    return turned(x_NHD.double(), turn_N1F, interleaved=spec.interleaved).to(x_NHD.dtype)
