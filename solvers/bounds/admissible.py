"""Trusted: which weights and multipliers a proof may start from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import CertificateError
from common.models import LayerConfig
from common.norms import exact64

_CONTENT = ("query", "key", "mixed")

MULTIPLIER_RANGE = (1e-100, 1e100)

WEIGHT_RANGE = (1e-75, 1e75)
"""Sizes of nonzero weights for which no product in a proof underflows; holds all of float32."""

_MATTERS = (".weight", "up.bias", "down.bias")  # other biases are in no bound


def multiplier_shapes(layer: LayerConfig, index: int) -> dict[str, int]:
    """Return the names and lengths of a block's multiplier vectors.

    Without prefix: of its l2 constant; ``domain.``: of where tokens lie after it; ``stream.``: of
    where changes of the whole stream lie after it.
    """
    if index % 2:
        shapes = {"lambda": layer.mlp_width // layer.unit}
        image = {**shapes, "excess": 1}
        domain = image
    else:
        domain = {"value": layer.heads, "skip": 1}
        shapes = {"value": layer.heads}
        shapes |= dict.fromkeys(_CONTENT, layer.content_heads) if layer.content_heads else {}
        image = {**shapes, "skip": 1}
    return {
        **shapes,
        **{f"domain.{name}": length for name, length in domain.items()},
        **{f"stream.{name}": length for name, length in image.items()},
    }


def check_multipliers(multipliers: Mapping[str, Tensor], layer: LayerConfig, index: int) -> None:
    """Refuse multipliers that prove nothing; none at all stand for the bound from operator norms.

    Raises:
        CertificateError: naming the multiplier.
    """
    shapes = multiplier_shapes(layer, index)
    if not multipliers:
        return
    for name in sorted(set(shapes) ^ set(multipliers)):
        state = "missing" if name in shapes else "not expected"
        raise CertificateError(f"multiplier blocks.{index}.{name}: {state}; certify again")
    for name, tensor in multipliers.items():
        if tensor.dtype != torch.float64 or tuple(tensor.shape) != (shapes[name],):
            raise CertificateError(
                f"multiplier blocks.{index}.{name}: {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected float64 ({shapes[name]},); certify again"
            )
        low, high = MULTIPLIER_RANGE
        if not bool(((tensor >= low) & (tensor <= high)).all()):
            raise CertificateError(
                f"multiplier blocks.{index}.{name}: expected positive finite numbers "
                f"({low:g} to {high:g}); certify again"
            )


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights for which the proofs would not hold: NaN, infinity, or products underflow.

    Raises:
        CertificateError: naming the tensor.
    """
    low, high = WEIGHT_RANGE
    for name, tensor in tensors.items():
        size = exact64(tensor).abs()
        if name.endswith(_MATTERS) and bool(((size > high) | ((size > 0) & (size < low))).any()):
            raise CertificateError(
                f"weight tensor {name}: expected entries that are 0 or of size {low:g} to "
                f"{high:g}; rescale it, or set smaller entries to 0"
            )
