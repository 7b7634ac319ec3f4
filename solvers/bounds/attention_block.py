"""The matrices of an attention block, split by head, for the untrusted multiplier search.

The trusted counterpart with its certified norms is ``attention_proof.split_heads``; the two share
no code, so that a mistake here cannot enter a proof.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError, ShapeError
from common.models.config import LayerConfig

# Shape letters: H query heads, K key/value heads, D head width, C model width.


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMatrices:
    """The matrices of one block, float64, one entry per head in the leading axis.

    Attributes:
        query_HDC: (content heads, D, C).
        key_KDC: (content KV heads, D, C).
        value_KDC: (K, D, C).
        output_HCD: (H, C, D).
        factor_HDC: (H, D, C) with ``factor^T factor = M_h M_h^T``, ``M_h = Wo_h Wv_h``.
        group: Query heads per KV head.
    """

    query_HDC: Tensor
    key_KDC: Tensor
    value_KDC: Tensor
    output_HCD: Tensor
    factor_HDC: Tensor
    group: int


def head_matrices(
    Wq: Tensor | None, Wk: Tensor | None, Wv: Tensor, Wo: Tensor, layer: LayerConfig
) -> HeadMatrices:
    """Split the weights of one block by head and convert them to float64 on the CPU.

    Raises:
        ShapeError: for weights that do not fit the layer.
        ConfigError: for entries that are not finite.
    """
    width, dim = Wo.shape[0], layer.head_dim
    wanted = {
        "Wq": (Wq, (layer.content_heads * dim, width)),
        "Wk": (Wk, (layer.content_kv_heads * dim, width)),
        "Wv": (Wv, (layer.kv_heads * dim, width)),
        "Wo": (Wo, (width, layer.heads * dim)),
    }
    ready = {}
    for name, (weight, shape) in wanted.items():
        if weight is None and shape[0] == 0:
            weight = Wo.new_zeros(shape)
        if weight is None or tuple(weight.shape) != shape:
            got = None if weight is None else tuple(weight.shape)
            raise ShapeError(f"{name}: expected {shape}, got {got}; the layer has other heads")
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(f"{name}: expected finite entries; the weights hold NaN or infinity")
        ready[name] = weight.detach().double().cpu()
    value_KDC = ready["Wv"].view(-1, dim, width)
    output_HCD = ready["Wo"].view(width, -1, dim).transpose(0, 1).contiguous()
    # Wv^T = q r, so M M^T = (Wo r^T)(Wo r^T)^T with a factor of D columns.
    r_KDD = torch.linalg.qr(value_KDC.mT, mode="r").R
    factor_HDC = r_KDD.repeat_interleave(layer.group, 0) @ output_HCD.mT
    return HeadMatrices(
        query_HDC=ready["Wq"].view(-1, dim, width),
        key_KDC=ready["Wk"].view(-1, dim, width),
        value_KDC=value_KDC,
        output_HCD=output_HCD,
        factor_HDC=factor_HDC,
        group=layer.group,
    )
