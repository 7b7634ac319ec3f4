"""Operations of a whole transformer per token, counted from its shapes (2 per multiply-add).

Only matrix products count, as in ``Target.flops``: what pruning saves adds up to the difference.
"""

from common.models import LayerConfig, ModelConfig


def token_flops(config: ModelConfig, *, keys: float | None = None) -> float:
    """Return the operations per token of a forward pass or of a decode step.

    Args:
        config: Shapes of the model.
        keys: Tokens that a query meets; half the context by default, the average of a causal
            forward pass over the whole of it. For a decode step: the cached tokens.
    """
    keys = config.context / 2 if keys is None else keys
    blocks = sum(_layer_flops(config, config.layer(i), keys) for i in range(config.layers))
    return blocks + 2.0 * config.width * config.head_rows


def _layer_flops(config: ModelConfig, layer: LayerConfig, keys: float) -> float:
    """Blocks with residual weight 0 are not run."""
    total = 0.0
    if layer.attn_residual:
        content = layer.content_heads + layer.content_kv_heads
        rows = layer.head_dim * (layer.heads + layer.kv_heads + content)
        total += 2.0 * config.width * rows
        total += 2.0 * keys * layer.head_dim * (layer.heads + layer.content_heads)
    if layer.mlp_residual:
        total += 4.0 * config.width * layer.mlp_width
    return total
