"""Removing directions of the residual stream: rotate it, keep the strongest ones, slice every map.

A measured opponent of structured pruning, without any compensation. Our blocks have no
normalisation, so one orthogonal change of basis commutes with the whole network. Neither step
raises the norm of a matrix, so naive constants cannot grow; they are recomputed all the same.
Source: SliceGPT (arXiv 2401.15024); one rotation for all blocks is our simplification.
"""

# Legend: B sequences, T tokens, C width, K kept directions.

from typing import Any

import torch
from torch import Tensor

from common.config import within
from compress.adapters import LipschitzAdapter
from compress.adapters.lipschitz import assemble
from compress.statistics.collect import batches
from compress.statistics.grams import Moments

_READERS = (
    *("embedding.weight", "head.weight", "mlp.up.weight"),
    *("attention.query.weight", "attention.key.weight", "attention.value.weight"),
)
_WRITERS = ("attention.output.weight", "mlp.down.weight", "mlp.down.bias")


@torch.no_grad()
def directions(model: Any, tokens_BT: Tensor) -> Tensor:
    """Return an orthogonal matrix (C, C) whose columns are directions of the stream, strong first.

    Each depth (embedding, then after each block) counts alike, whatever the size of its tokens.

    Args:
        model: Transformer.
        tokens_BT: Calibration tokens.
    """
    adapter = LipschitzAdapter(model)
    width, stages = model.config.width, adapter.stages()
    device = model.embedding.weight.device
    depths = [Moments(width, device) for _ in range(len(stages) + 1)]
    for batch_BT in batches(tokens_BT):
        stream_BTC = adapter.start(batch_BT)
        depths[0].update(stream_BTC)
        for moments, stage in zip(depths[1:], stages, strict=True):
            stream_BTC = stage.run(stream_BTC)
            moments.update(stream_BTC)
    total_CC = torch.zeros(width, width, dtype=torch.float64, device=device)
    for moments in depths:
        gram_CC = moments.gram_II()
        total_CC += gram_CC / gram_CC.trace().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.linalg.eigh(total_CC).eigenvectors.flip(1)


@torch.no_grad()
def slice_width(model: Any, q_CC: Tensor, width: int) -> Any:
    """Return the transformer in the basis ``q_CC``, cut to its first ``width`` directions.

    Args:
        model: Transformer; not modified.
        q_CC: Orthogonal, float64, see ``directions``.
        width: Directions that stay; all of them give the same function up to rounding.

    Raises:
        ConfigError: for a width outside 1 ... C.
    """
    within("width", width, 1, model.config.width)
    q_CK = q_CC[:, :width]
    state = {}
    for name, tensor in model.state_dict().items():
        turned = tensor.double()
        match _axis(name):
            case 0:
                turned = q_CK.T @ turned
            case 1:
                turned = turned @ q_CK
        state[name] = turned.to(tensor.dtype)
    return assemble(model.config.replace(width=width), state, model)


def width_for(model: Any, params: int) -> int:
    """Return the width at which a sliced model's parameters come nearest to ``params``."""
    width = model.config.width
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    sliced = sum(size for name, size in sizes.items() if _axis(name) is not None)
    fixed = sum(sizes.values()) - sliced
    return max(1, min(width, round((params - fixed) * width / sliced)))


def _axis(name: str) -> int | None:
    """Return along which axis of a tensor the stream's directions lie."""
    if name.endswith(_READERS):
        return 1
    return 0 if name.endswith(_WRITERS) else None
