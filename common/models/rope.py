"""Rotary position embedding in the "half" pairing of Hugging Face models.

Band f pairs components f and f + D/2; at position p it is rotated by the angle p * w_f with
w_f = theta^(-2f/D). Rotations are orthogonal, so token norms and certificates do not change.
With R < D rotated components w_f = theta^(-2f/R), and the bands after them have frequency 0.
"""

# Legend: B batch, H heads, T position, D head width, N tokens (flat), A heads of any kind.

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float, rope_dims: int | None = None) -> Tensor:
    """Return the angular frequencies w_f (head_dim / 2,) in radians per token, float64.

    Args:
        head_dim: Head width, even.
        theta: Base.
        rope_dims: Rotated components, even; None for all. Bands beyond have frequency 0.
    """
    rotated = head_dim if rope_dims is None else rope_dims
    frequency_F = torch.zeros(head_dim // 2, dtype=torch.float64)
    exponent = torch.arange(0, rotated, 2, dtype=torch.float64) / max(rotated, 1)
    frequency_F[: rotated // 2] = theta**-exponent
    return frequency_F


def rotation(positions_BT: Tensor, inverse_frequency: Tensor, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines of all angles, reduced in float64.

    Args:
        positions_BT: Token positions (B, T), integer.
        inverse_frequency: Frequencies (D/2,), float64.
        dtype: Result dtype.

    Returns:
        Tensor (2, B, 1, T, D/2): cosines first, sines second.
    """
    angles = positions_BT.to(torch.float64)[:, None, :, None] * inverse_frequency
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def rotate(x_BHTD: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate queries or keys (B, H, T, D) by the angles of ``rotation``; same shape and dtype."""
    cos, sin = cos_sin
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def turn_table(context: int, inverse_frequency: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rotations of all positions, for ``turn``.

    Args:
        context: Number of positions.
        inverse_frequency: Frequencies (D/2,), float64.
        dtype: Result dtype.

    Returns:
        Tensor (context, 2, D): cosines twice, then minus sines and sines.
    """
    positions_1T = torch.arange(context, device=inverse_frequency.device)[None]
    cos_TF, sin_TF = rotation(positions_1T, inverse_frequency, dtype)[:, 0, 0]
    both = torch.cat((cos_TF, cos_TF), dim=-1), torch.cat((-sin_TF, sin_TF), dim=-1)
    return torch.stack(both, dim=1)


def turn(x_NAD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Rotate heads (N, A, D) by entries of ``turn_table``; ``rotate`` up to rounding."""
    swapped_NAD = torch.roll(x_NAD, x_NAD.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_NAD * cos_N1D, swapped_NAD, sin_N1D)
