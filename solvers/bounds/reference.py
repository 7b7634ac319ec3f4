"""The published formula for the network constant: for comparison only, not a bound.

Unsound for more than one head, and its MLP term divides by the GELU constant once too often.
Source: arXiv 2507.13338 as implemented by its authors; spec lipschitz_training 5.1 and 5.2.
"""

from collections.abc import Mapping

from torch import Tensor

from common.models import LayerConfig, ModelConfig
from common.models.config import DIVIDED
from common.norms import rms_norm_factor, spectral_norm_bound


def reference_constants(
    config: ModelConfig, tensors: Mapping[str, Tensor]
) -> tuple[list[float], float]:
    """Return the constants of all blocks and of embedding and head together.

    Args:
        config: The model's configuration; its residual weights, attention factors and softmax
            scales stand where the formula has 1 / (2 layers), 1 / 3 and c.
        tensors: The model's state.

    Returns:
        One number per block, and the product of the embedding's (l1 -> RMS) and the head's norm.
    """
    radius, constants = 1.0, []
    for index in range(config.layers):
        layer, prefix = config.layer(index), f"layers.{index}."
        norms = {name: _rms_norm(tensors[f"{prefix}{name}.weight"]) for name in _matrices(layer)}
        query_key = norms.get("attention.query", 0.0) * norms.get("attention.key", 0.0)
        value, output = norms["attention.value"], norms["attention.output"]
        a, c, factor = layer.attn_residual, layer.softmax_scale, layer.attn_factor
        lipschitz = c * output * (value + 2 * value * radius * radius * query_key) * factor
        constants.append((1 - a) + a * lipschitz)
        radius *= (1 - a) + a * output * value * factor
        a = layer.mlp_residual
        divisor = layer.gelu_divisor if layer.activation in DIVIDED else 1.0
        mlp = norms["mlp.down"] * norms["mlp.up"] / divisor
        constants.append((1 - a) + a * mlp)
        radius *= constants[-1]
    embedding_VC = tensors["embedding.weight"].double()
    embedding = float(embedding_VC.norm(dim=1).max()) / config.width**0.5
    return constants, embedding * _rms_norm(tensors["head.weight"]) * config.final_scale


def _matrices(layer: LayerConfig) -> list[str]:
    content = ["attention.query", "attention.key"] if layer.content_heads else []
    return [*content, "attention.value", "attention.output", "mlp.up", "mlp.down"]


def _rms_norm(w_OI: Tensor) -> float:
    return rms_norm_factor(w_OI) * spectral_norm_bound(w_OI)
