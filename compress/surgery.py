"""Really smaller layers: a new model whose tensors have fewer rows and columns."""

# Legend: O/I out/in features, K kept neurons.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import ShapeError
from common.models import LipschitzTransformer


@torch.no_grad()
def shrink(
    model: Any,
    kept: Sequence[Tensor],
    down_OK: Sequence[Tensor],
    bias_O: Sequence[Tensor | None] | None = None,
) -> Any:
    """Return a new model in which every MLP has only its kept neurons.

    Args:
        model: Dense transformer; not modified.
        kept: Per layer, indices of the kept hidden neurons, ascending; pairs stay neighbours.
        down_OK: Per layer, the new down projection (width, kept); rounded to the stored type.
        bias_O: Per layer, a new bias of the down projection or None to keep the old one.

    Returns:
        Transformer on the same device and of the same type; all other tensors are equal.

    Raises:
        ShapeError: if a projection does not match its kept neurons.
    """
    config = model.config
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for index, (kept_K, weight_OK) in enumerate(zip(kept, down_OK, strict=True)):
        prefix = f"layers.{index}.mlp."
        dense_OI = state[f"{prefix}down.weight"]
        if weight_OK.shape != (dense_OI.shape[0], len(kept_K)):
            raise ShapeError(
                f"layer {index}: down projection {tuple(weight_OK.shape)}, expected "
                f"({dense_OI.shape[0]}, {len(kept_K)})"
            )
        rows = kept_K.to(dense_OI.device)
        for name in ("up.weight", "up.bias"):
            if prefix + name in state:
                state[prefix + name] = state[prefix + name][rows].contiguous()
        state[f"{prefix}down.weight"] = weight_OK.to(dense_OI).contiguous()
        if bias_O is not None and bias_O[index] is not None:
            state[f"{prefix}down.bias"] = bias_O[index].to(dense_OI)
        config = config.with_layer(index, mlp_width=len(kept_K))
    return assemble(config, state, model)


def assemble(config: Any, state: dict[str, Tensor], like: Any) -> Any:
    """Build a transformer from a state, with the type, device and mode of another one.

    Args:
        config: ``ModelConfig`` of the new model.
        state: Every tensor of it.
        like: Model whose device, parameter type, mode and gradient flags are taken over.
    """
    parameter = next(like.parameters())
    # Initial weights are overwritten; drawing them must not disturb the caller's random state.
    with torch.random.fork_rng(devices=[]):
        model = LipschitzTransformer(config)
    model = model.to(device=parameter.device, dtype=parameter.dtype)
    model.load_state_dict(state)
    model.train(like.training)
    for new, old in zip(model.parameters(), like.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return model
