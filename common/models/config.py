"""Shapes and freedoms of a Lipschitz transformer, one value per layer.

A scalar given for a per-layer field applies to all layers; after construction every such field
is a tuple, so that a pruned model with different layers is an ordinary model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.config import check_types, one_of, positive, within
from common.errors import ConfigError

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "tanh", "relu", "abs", "maxmin")

DIVIDED = ("gelu", "gelu_tanh", "silu")
"""Those whose largest slope exceeds 1 (1.1289, 1.1290, 1.0998); ``gelu_divisor`` divides them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """One transformer layer: an attention block followed by an MLP block.

    Attributes:
        heads: Query heads (H).
        kv_heads: Key/value heads (K), a divisor of ``heads``.
        content_heads: The first this many query heads have content logits; the others are
            purely positional and own no query and key weights. A multiple of ``group``.
        head_dim: Head width (D), even.
        mlp_width: Hidden width of the MLP (F); even for ``maxmin``.
        activation: One of ``ACTIVATIONS``.
        gelu_divisor: The activations in ``DIVIDED`` are divided by this number.
        mlp_bias: Whether both MLP matrices have biases.
        position_bias: Whether each head adds a learned bias b(i - j) to its logits.
        attn_residual: Residual weight a of the attention block, in [0, 1].
        mlp_residual: Residual weight a of the MLP block, in [0, 1].
        attn_factor: Constant factor on the attention output (1/3 in the paper).
        softmax_scale: Constant c of the logits ``c / head_dim * q.k``.
    """

    heads: int
    kv_heads: int
    content_heads: int
    head_dim: int
    mlp_width: int
    activation: str
    gelu_divisor: float
    mlp_bias: bool
    position_bias: bool
    attn_residual: float
    mlp_residual: float
    attn_factor: float
    softmax_scale: float

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("heads", "kv_heads", "head_dim", "mlp_width", "gelu_divisor"):
            positive(name, getattr(self, name))
        for name in ("content_heads", "attn_factor", "softmax_scale"):
            positive(name, getattr(self, name), zero=True)
        within("attn_residual", self.attn_residual, 0.0, 1.0)
        within("mlp_residual", self.mlp_residual, 0.0, 1.0)
        one_of("activation", self.activation, ACTIVATIONS)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"heads={self.heads}: expected a multiple of kv_heads={self.kv_heads}"
            )
        if self.content_heads > self.heads or self.content_heads % self.group:
            raise ConfigError(
                f"content_heads={self.content_heads}: expected a multiple of the query group "
                f"({self.group}) between 0 and heads={self.heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: expected an even number (RoPE pairs)")
        if self.mlp_width % self.unit:
            raise ConfigError(f"mlp_width={self.mlp_width}: expected an even number for maxmin")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def content_kv_heads(self) -> int:
        """Key/value heads that own key weights."""
        return self.content_heads // self.group

    @property
    def unit(self) -> int:
        """MLP neurons per prunable component: 2 for MaxMin pairs, else 1."""
        return 2 if self.activation == "maxmin" else 1

    @property
    def logit_scale(self) -> float:
        """Factor on the query-key product: ``softmax_scale / head_dim``."""
        return self.softmax_scale / self.head_dim


_LATER = {"rope_dims": None, "vocab_multiple": 1}
_PER_LAYER = tuple(field.name for field in dataclasses.fields(LayerConfig))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything needed to build a ``LipschitzTransformer``.

    ``vocab_size``, ``width`` (C), ``layers`` (L), ``heads`` and ``context`` (longest sequence, in
    tokens) are enough. Fields of ``LayerConfig`` take one value or one per layer.

    Defaults that depend on others: ``kv_heads = content_heads = heads``, ``head_dim = width /
    heads``, ``mlp_width = mlp_ratio * width``, residual weights ``1 / (2 * layers)``.

    ``rope_dims`` components of every head are rotated (even, at most ``head_dim``; None for all),
    the others do not see positions. The head's rows are padded to a multiple of ``vocab_multiple``
    for speed; the surplus rows take no part in the logits, whose number stays ``vocab_size``.

    Raises:
        ConfigError: naming the field, its value and what was expected.

    Source:
        arXiv 2507.13338, section 4 for the default architecture; biases, positional heads and
        the other activations are this project's additions that cost nothing in the certificate.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int | tuple[int, ...]
    context: int
    kv_heads: int | tuple[int, ...] | None = None
    content_heads: int | tuple[int, ...] | None = None
    head_dim: int | tuple[int, ...] | None = None
    mlp_ratio: int | float = 4
    mlp_width: int | tuple[int, ...] | None = None
    activation: str | tuple[str, ...] = "gelu"
    gelu_divisor: float | tuple[float, ...] = 1.1289
    mlp_bias: bool | tuple[bool, ...] = False
    position_bias: bool | tuple[bool, ...] = False
    attn_residual: float | tuple[float, ...] | None = None
    mlp_residual: float | tuple[float, ...] | None = None
    attn_factor: float | tuple[float, ...] = 1 / 3
    softmax_scale: float | tuple[float, ...] = 1.0
    head_bias: bool = False
    final_scale: float = 1.0
    rope_theta: float = 10000.0
    rope_dims: int | None = None
    vocab_multiple: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "width", "layers", "context", "mlp_ratio", "rope_theta"):
            positive(name, getattr(self, name))
        positive("vocab_multiple", self.vocab_multiple)
        positive("final_scale", self.final_scale)
        self._set("heads", self.heads)
        heads = self.heads
        assert isinstance(heads, tuple)
        if any(count < 1 for count in heads):
            raise ConfigError(f"heads={heads}: expected at least one head in each layer")
        if self.head_dim is None and any(self.width % count for count in heads):
            raise ConfigError(f"width={self.width}: expected a multiple of heads={heads}")
        self._set("head_dim", self.head_dim, tuple(self.width // count for count in heads))
        self._set("kv_heads", self.kv_heads, heads)
        self._set("content_heads", self.content_heads, heads)
        self._set("mlp_width", self.mlp_width, round(self.mlp_ratio * self.width))
        self._set("attn_residual", self.attn_residual, 1 / (2 * self.layers))
        self._set("mlp_residual", self.mlp_residual, 1 / (2 * self.layers))
        for name in _PER_LAYER:
            self._set(name, getattr(self, name))
        for index in range(self.layers):
            self._check_rope(self.layer(index).head_dim)

    @property
    def head_rows(self) -> int:
        """Stored rows of the head: ``vocab_size`` rounded up to ``vocab_multiple``."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layer(self, index: int) -> LayerConfig:
        """Return the settings of one layer."""
        return LayerConfig(**{name: getattr(self, name)[index] for name in _PER_LAYER})

    def replace(self, **changes: Any) -> "ModelConfig":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_layer(self, index: int, **changes: Any) -> "ModelConfig":
        """Return a copy in which some fields of one layer are changed."""
        updated = {}
        for name, value in changes.items():
            values = list(getattr(self, name))
            values[index] = value
            updated[name] = tuple(values)
        return self.replace(**updated)

    def to_dict(self) -> dict[str, Any]:
        """Return every constructor field as plain JSON types.

        Fields that came later are left out at their defaults, so that hashes of older models hold.
        """
        fields = dataclasses.asdict(self)
        for name, default in _LATER.items():
            if fields[name] == default:
                del fields[name]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Build a configuration from ``to_dict`` output.

        Raises:
            ConfigError: for unknown or missing fields and for impossible values.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"model configuration: unknown field {unknown[0]!r}; remove it")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(f"model configuration: {error}") from error

    def _check_rope(self, head_dim: int) -> None:
        dims = head_dim if self.rope_dims is None else self.rope_dims
        if dims % 2 or not 0 <= dims <= head_dim:
            raise ConfigError(
                f"rope_dims={dims}: expected an even number from 0 to head_dim={head_dim}"
            )

    def _set(self, name: str, value: Any, default: Any = None) -> None:
        value = default if value is None else value
        values = value if isinstance(value, tuple) else (value,) * self.layers
        if len(values) != self.layers:
            raise ConfigError(
                f"{name}={list(values)}: expected one value or {self.layers} (one per layer)"
            )
        object.__setattr__(self, name, values)
