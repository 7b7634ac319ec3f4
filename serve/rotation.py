"""Rotation of queries and keys as a ``LayerSpec`` states it, in float64 angles."""

# Legend: N tokens (flat), H heads, D head width, F rotated bands.

import torch
from torch import Tensor

from serve.decoder import LayerSpec


def to_bands(x_NHD: Tensor, spec: LayerSpec) -> Tensor:
    """Return the rotated components as pairs (N, H, F, 2): real and imaginary part per band."""
    rotated = x_NHD[..., : 2 * spec.bands]
    if spec.interleaved:
        return rotated.unflatten(-1, (spec.bands, 2))
    return rotated.unflatten(-1, (2, spec.bands)).transpose(-1, -2)


def from_bands(x_NHF2: Tensor, rest_NHE: Tensor, spec: LayerSpec) -> Tensor:
    """Return heads (N, H, D) made of bands and the components that are not rotated."""
    pairs = x_NHF2 if spec.interleaved else x_NHF2.transpose(-1, -2)
    return torch.cat((pairs.flatten(-2), rest_NHE), dim=-1)


def rotate(x_NHD: Tensor, positions_N: Tensor, spec: LayerSpec) -> Tensor:
    """Rotate heads to their positions, without ``rope_scale``.

    Args:
        x_NHD: Queries or keys.
        positions_N: Position of each token.
        spec: Its frequencies and pairing.

    Returns:
        Same shape and dtype; angles and products are float64.
    """
    frequency_F = spec.inverse_frequency.to(x_NHD.device)
    angle_NF = positions_N.double()[:, None] * frequency_F
    turn_N1F = torch.polar(torch.ones_like(angle_NF), angle_NF)[:, None]
    bands_NHF = torch.complex(*to_bands(x_NHD, spec).double().unbind(-1))
    turned_NHF2 = torch.view_as_real(bands_NHF * turn_N1F).to(x_NHD.dtype)
    return from_bands(turned_NHF2, x_NHD[..., 2 * spec.bands :], spec)
