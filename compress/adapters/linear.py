"""Linear maps in both storage orders: ``nn.Linear`` and the transposed ``Conv1D`` of GPT-2."""

# Legend: I inputs, O outputs, K kept ones.

from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: Any) -> bool:
    """Return whether a module is a plain linear map with floating-point weights."""
    is_known = type(module) is nn.Linear or is_transposed(module)
    return is_known and bool(module.weight.is_floating_point())


def is_transposed(module: Any) -> bool:
    """Return whether a map stores its weight (I, O), as the ``Conv1D`` of transformers does."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_view(module: Any) -> Tensor:
    """Return the weight (I, O) as a view of the parameter."""
    return module.weight if is_transposed(module) else module.weight.T


def inputs_of(module: Any) -> int:
    """Return the number of inputs."""
    return int(weight_view(module).shape[0])


def outputs_of(module: Any) -> int:
    """Return the number of outputs."""
    return int(weight_view(module).shape[1])


def biased(module: Any) -> bool:
    """Return whether a map has a bias."""
    return module.bias is not None


def narrowed(
    module: Any, *, inputs_K: Tensor | None = None, outputs_K: Tensor | None = None
) -> Any:
    """Return a new map with only some inputs or outputs.

    Type, device, gradient flags, mode and the presence of a bias stay.

    Args:
        module: A map for which ``is_linear`` holds; not modified.
        inputs_K: Inputs to keep, or None for all.
        outputs_K: Outputs to keep, or None for all.
    """
    weight_IO, bias_O = weight_view(module).detach(), module.bias
    if inputs_K is not None:
        weight_IO = weight_IO[inputs_K.to(weight_IO.device)]
    if outputs_K is not None:
        outputs_K = outputs_K.to(weight_IO.device)
        weight_IO = weight_IO[:, outputs_K]
        bias_O = None if bias_O is None else bias_O[outputs_K]
    new = _empty(module, *weight_IO.shape)
    stored = weight_IO if is_transposed(module) else weight_IO.T
    new.weight = _parameter(stored, module.weight)
    if bias_O is not None:
        new.bias = _parameter(bias_O, module.bias)
    return new.train(module.training)


def _empty(module: Any, inputs: int, outputs: int) -> Any:
    with torch.device("meta"):
        if is_transposed(module):
            return type(module)(outputs, inputs)
        return nn.Linear(inputs, outputs, bias=biased(module))


def _parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    # A copy even where nothing was selected: the new map shares no memory with the old one.
    whole = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(whole, requires_grad=like.requires_grad)
