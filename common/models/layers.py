"""Attention and MLP blocks whose Lipschitz constants the certificate bounds.

No normalisation layers: a residual block is x -> (1 - a) x + a f(x), and everything that makes f
sensitive is a weight matrix, a constant of ``LayerConfig`` or the slope of the activation.
"""

# Legend: B batch, T token, C width, H query heads, K key/value heads, D head width, F MLP width.

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.config import DIVIDED, LayerConfig
from common.models.rope import inverse_frequencies, rotate, rotation

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Hook ``attend(layer, q_BHTD, k_BKTD, v_BKTD) -> o_BHTD``; queries and keys are rotated."""


class TurningAttend(ABC):
    """A hook that rotates by itself, at the positions that it was made for."""

    @abstractmethod
    def turning(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the hook returns for the rotated queries and keys.

        Args:
            layer: Index of the layer.
            q: Queries before RoPE, (B, H, T, D) or, packed, (N, H, D).
            k: Keys before RoPE, the same with K heads.
            v: Values, shaped like the keys.
        """


def activate(z_BTF: Tensor, layer: LayerConfig) -> Tensor:
    """Apply the layer's activation to pre-activations (..., F); MaxMin sorts neighbouring pairs."""
    y_BTF = undivided(z_BTF, layer.activation)
    return y_BTF / layer.gelu_divisor if layer.activation in DIVIDED else y_BTF


def undivided(z_BTF: Tensor, activation: str) -> Tensor:
    """Apply an activation (..., F) without the divisor of those that have one."""
    match activation:
        case "gelu":
            return F.gelu(z_BTF)
        case "gelu_tanh":
            return F.gelu(z_BTF, approximate="tanh")
        case "silu":
            return F.silu(z_BTF)
        case "tanh":
            return z_BTF.tanh()
        case "relu":
            return F.relu(z_BTF)
        case "abs":
            return z_BTF.abs()
        case _:
            pairs = z_BTF.unflatten(-1, (-1, 2))
            return torch.stack((pairs.amax(-1), pairs.amin(-1)), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal multi-head attention with content heads first and positional heads after them.

    The forward result is ``attn_factor * W_o concat_h(softmax(logits_h) v_h)`` with logits
    ``softmax_scale / head_dim * rope(q_i).rope(k_j) + bias[h, i - j]``.

    Source:
        arXiv 2507.13338 section 4; positional heads and biases: project's addition.
    """

    def __init__(
        self,
        index: int,
        width: int,
        context: int,
        theta: float,
        layer: LayerConfig,
        rope_dims: int | None = None,
    ):
        super().__init__()
        self.index, self.layer, self.context = index, layer, context
        dim = layer.head_dim
        self.query = self.key = None
        if layer.content_heads:
            self.query = nn.Linear(width, layer.content_heads * dim, bias=False)
            self.key = nn.Linear(width, layer.content_kv_heads * dim, bias=False)
        self.value = nn.Linear(width, layer.kv_heads * dim, bias=False)
        self.output = nn.Linear(layer.heads * dim, width, bias=False)
        self.position_bias: nn.Parameter | None = None
        if layer.position_bias:
            self.position_bias = nn.Parameter(torch.zeros(layer.heads, context))
        # Kept outside the state so that half-precision casts never round the frequencies.
        self.inverse_frequency = inverse_frequencies(dim, theta, rope_dims)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, D), keys and values (B, K, T, D) before rotation.

        Positional heads have zero queries and keys.
        """
        layer = self.layer
        v_BKTD = self._split(self.value(x_BTC), layer.kv_heads)
        if self.query is None or self.key is None:
            q_BHTD = v_BKTD.new_zeros(()).expand(x_BTC.shape[0], layer.heads, *v_BKTD.shape[2:])
            return q_BHTD, torch.zeros_like(v_BKTD), v_BKTD
        q_BHTD = self._split(self.query(x_BTC), layer.content_heads)
        k_BKTD = self._split(self.key(x_BTC), layer.content_kv_heads)
        if layer.content_heads < layer.heads:
            q_BHTD = F.pad(q_BHTD, (0, 0, 0, 0, 0, layer.heads - layer.content_heads))
            k_BKTD = F.pad(k_BKTD, (0, 0, 0, 0, 0, layer.kv_heads - layer.content_kv_heads))
        return q_BHTD, k_BKTD, v_BKTD

    def mix(
        self, x_BTC: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Return the concatenated head outputs (B, T, H * D) before the output matrix."""
        q_BHTD, k_BKTD, v_BKTD = self.project(x_BTC)
        if isinstance(attend, TurningAttend):
            return attend.turning(self.index, q_BHTD, k_BKTD, v_BKTD).transpose(1, 2).flatten(2)
        positions = positions_BT
        if positions is None:
            positions = torch.arange(x_BTC.shape[1], device=x_BTC.device)[None]
        if self.query is not None:
            frequency = self.inverse_frequency.to(x_BTC.device)
            cos_sin = rotation(positions, frequency, q_BHTD.dtype)
            q_BHTD, k_BKTD = rotate(q_BHTD, cos_sin), rotate(k_BKTD, cos_sin)
        if attend is None:
            o_BHTD = self._attend(q_BHTD, k_BKTD, v_BKTD, positions_BT)
        else:
            o_BHTD = attend(self.index, q_BHTD, k_BKTD, v_BKTD)
        return o_BHTD.transpose(1, 2).flatten(2)

    def forward(
        self, x_BTC: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Return ``attn_factor * W_o mix(x)`` (B, T, C)."""
        return self.layer.attn_factor * self.output(self.mix(x_BTC, positions_BT, attend))

    def _split(self, y: Tensor, heads: int) -> Tensor:
        return y.unflatten(-1, (heads, self.layer.head_dim)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions_BT: Tensor | None) -> Tensor:
        mask, scale = self._mask(q.shape[2], q, positions_BT), self.layer.logit_scale
        if scale == 0:
            # Torch scales its own causal mask as well: minus infinity times 0.
            q, scale = torch.zeros_like(q), 1.0
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=self.layer.group > 1,
        )

    def _mask(self, length: int, q: Tensor, positions_BT: Tensor | None) -> Tensor | None:
        """Return the additive causal mask (B or 1, H or 1, T, T), or None for plain causality."""
        if positions_BT is None:
            if self.position_bias is None:
                return None
            # Row i of the Toeplitz matrix b(i - j) is a window of the reversed table.
            reversed_HT = self.position_bias[:, :length].flip(-1).to(q.dtype)
            padded = F.pad(reversed_HT, (0, length - 1), value=float("-inf"))
            return padded.unfold(-1, length, 1).flip(-2)[None]
        distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
        if self.position_bias is None:
            mask = torch.zeros_like(distance_BTT, dtype=q.dtype)[:, None]
        else:
            mask = self.position_bias.to(q.dtype)[:, distance_BTT.clamp(min=0)].transpose(0, 1)
        return mask.masked_fill((distance_BTT < 0)[:, None], float("-inf"))


class MLP(nn.Module):
    """Two matrices around an activation: ``W_2 phi(W_1 x + b_1) + b_2``."""

    def __init__(self, width: int, layer: LayerConfig):
        super().__init__()
        self.layer = layer
        self.up = nn.Linear(width, layer.mlp_width, bias=layer.mlp_bias)
        self.down = nn.Linear(layer.mlp_width, width, bias=layer.mlp_bias)

    def hidden(self, x_BTC: Tensor) -> Tensor:
        """Return the activations (B, T, F) that enter the down projection."""
        return activate(self.up(x_BTC), self.layer)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the MLP output (B, T, C)."""
        return self.down(self.hidden(x_BTC))


class Layer(nn.Module):
    """An attention block and an MLP block, each a convex residual combination."""

    def __init__(
        self,
        index: int,
        width: int,
        context: int,
        theta: float,
        layer: LayerConfig,
        rope_dims: int | None = None,
    ):
        super().__init__()
        self.layer = layer
        self.attention = Attention(index, width, context, theta, layer, rope_dims)
        self.mlp = MLP(width, layer)

    def attend_block(
        self, x_BTC: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Return ``(1 - a) x + a attention(x)`` (B, T, C)."""
        a = self.layer.attn_residual
        if a == 0 and attend is None:
            return x_BTC
        return (1 - a) * x_BTC + a * self.attention(x_BTC, positions_BT, attend)

    def mlp_block(self, x_BTC: Tensor) -> Tensor:
        """Return ``(1 - a) x + a mlp(x)`` (B, T, C)."""
        a = self.layer.mlp_residual
        if a == 0:
            return x_BTC
        return (1 - a) * x_BTC + a * self.mlp(x_BTC)

    def forward(
        self, x_BTC: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Return the stream (B, T, C) after both blocks."""
        return self.mlp_block(self.attend_block(x_BTC, positions_BT, attend))
