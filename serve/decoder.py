"""What the engine needs of a language model: layers as the cache sees them, and one forward call.

The engine, the policies and the evaluation know models only through this. A model keeps its own
layers; its attention calls ``attend`` with rotated queries and keys of a flat token axis.
"""

# Legend: N tokens of a step (flat), M tokens whose logits are wanted, H query heads, K key/value
# heads, D head width, F rotated bands, T relative distances, V vocabulary, C model width.

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from common.models import LipschitzTransformer
from common.models.layers import Attention
from common.models.packed import PackedTransformer

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, q_NHD, k_NKD, v_NKD) -> o_NHD``; queries and keys are rotated."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerSpec:
    """Attention of one layer, as the cache and the policies see it.

    Attributes:
        heads: Query heads (H).
        kv_heads: Key/value heads (K), a divisor of ``heads``.
        head_dim: Head width (D).
        content_heads: The first this many query heads have queries and keys; those of the others
            are zero, their attention is the position bias alone.
        scale: Factor on the query-key product.
        inverse_frequency: Angular frequencies (F,) in radians per token, float64, CPU; bands fill
            the first 2F components of a head.
        interleaved: Band f is (2f, 2f + 1); otherwise (f, f + F).
        rope_scale: Factor on cosines and sines (attention scaling of YaRN); 1 for plain RoPE.
        bias_HT: Relative-position bias (H, context), or None.
        sliding_window: The layer attends to this many most recent tokens only; None for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    content_heads: int
    scale: float
    inverse_frequency: Tensor
    interleaved: bool = False
    rope_scale: float = 1.0
    bias_HT: Tensor | None = None
    sliding_window: int | None = None

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def bands(self) -> int:
        """Rotated bands (F)."""
        return len(self.inverse_frequency)

    def is_like(self, other: "LayerSpec") -> bool:
        """Return True if one kernel launch can serve both layers: all but the bias values agree."""
        names = ("heads", "kv_heads", "head_dim", "content_heads", "scale")
        names += ("interleaved", "rope_scale", "sliding_window")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        same = same and (self.bias_HT is None) == (other.bias_HT is None)
        return same and torch.equal(self.inverse_frequency, other.inverse_frequency)


class Decoder(ABC):
    """A causal language model in evaluation mode on its device.

    Attributes:
        layers: Attention of each layer.
        vocab_size: Number of logits (V).
        context: Longest sequence, in tokens.
        num_parameters: Stored scalars, for the choice of threads.
        device: Where the weights are.
        dtype: Dtype of the cache.
    """

    layers: tuple[LayerSpec, ...]
    vocab_size: int
    context: int
    num_parameters: int
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def forward(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, last_M: Tensor | None = None
    ) -> Tensor:
        """Run the tokens of a step.

        Args:
            tokens_N: Token ids, int64; tokens of many sequences one after another.
            positions_N: Original position of each token.
            attend: Called once per layer; writes the cache and mixes the values.
            last_M: Indices of the tokens whose logits are wanted; None for all.

        Returns:
            Logits (M, V).
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides keys and values of a text; keys of the prefix cache."""

    @property
    @abstractmethod
    def model(self) -> torch.nn.Module:
        """The wrapped module."""

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Layers that share one pool and one kernel launch, in order of their first layer."""
        groups: list[list[int]] = []
        for index, spec in enumerate(self.layers):
            for group in groups:
                if self.layers[group[0]].is_like(spec):
                    group.append(index)
                    break
            else:
                groups.append([index])
        return tuple(map(tuple, groups))


class LipschitzDecoder(Decoder):
    """Our transformer; its ``attend`` hook is the engine's."""

    def __init__(self, model: LipschitzTransformer) -> None:
        weight = model.embedding.weight
        self._model, self._packed = model, PackedTransformer(model)
        self.layers = tuple(layer_spec(layer.attention) for layer in model.layers)
        self.vocab_size, self.context = model.config.vocab_size, model.config.context
        self.num_parameters = model.num_parameters
        self.device, self.dtype = weight.device, weight.dtype

    @property
    def model(self) -> LipschitzTransformer:
        """The transformer."""
        return self._model

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights."""
        digest = hashlib.sha256(repr(self._model.config).encode())
        for name, tensor in self._model.state_dict().items():
            flat = tensor.detach().cpu().contiguous().view(-1)
            digest.update(name.encode() + str(tensor.dtype).encode())
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
        return digest.hexdigest()

    def forward(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, last_M: Tensor | None = None
    ) -> Tensor:
        """Return logits (M, V); see ``Decoder.forward``."""
        return self._packed(tokens_N, positions_N, attend, last_M)


def layer_spec(attention: Attention) -> LayerSpec:
    """Return what the cache sees of one of our attention blocks."""
    layer, bias = attention.layer, attention.position_bias
    return LayerSpec(
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        content_heads=layer.content_heads,
        scale=layer.logit_scale,
        inverse_frequency=attention.inverse_frequency.cpu(),
        bias_HT=None if bias is None else bias.detach(),
    )


def as_decoder(model: LipschitzTransformer | Decoder) -> Decoder:
    """Return the model itself if it is a decoder, else our transformer as one."""
    return model if isinstance(model, Decoder) else LipschitzDecoder(model)
