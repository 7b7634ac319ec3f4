"""The maps around one prunable place: the one whose inputs go, and those that produce them."""

# Legend: K kept outputs, N kept components.

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import ConfigError
from compress.adapters.linear import biased, inputs_of, is_linear, outputs_of
from compress.targets import block_indices


class Producer(NamedTuple):
    """A map whose outputs go together with the components.

    Attributes:
        module: The map.
        unit: Outputs per component in each part.
        parts: Equal parts side by side: 3 for fused queries, keys and values.
    """

    module: Any
    unit: int
    parts: int = 1

    def outputs(self, kept_N: Tensor) -> Tensor:
        """Return the output indices that belong to components."""
        size = outputs_of(self.module) // self.parts
        within_K = block_indices(kept_N, self.unit)
        return torch.cat([part * size + within_K for part in range(self.parts)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The maps of one target.

    Attributes:
        consumer: The map whose inputs go.
        unit: Inputs per component.
        producers: The maps that produce those inputs.
    """

    consumer: Any
    unit: int
    producers: tuple[Producer, ...]

    @property
    def components(self) -> int:
        """Number of components."""
        return inputs_of(self.consumer) // self.unit

    @property
    def params(self) -> int:
        """Parameters of one component."""
        count = self.unit * outputs_of(self.consumer)
        for producer in self.producers:
            rows = producer.unit * producer.parts
            count += rows * (inputs_of(producer.module) + biased(producer.module))
        return count

    @property
    def weights(self) -> int:
        """Parameters of one component that multiply."""
        biases = sum(p.unit * p.parts * biased(p.module) for p in self.producers)
        return self.params - biases


class LayerShape(NamedTuple):
    """Sizes of one decoder layer."""

    mlp_width: int
    heads: int
    kv_heads: int


def check_maps(where: str, part: Any, names: Collection[str]) -> None:
    """Refuse maps that cannot be narrowed.

    Args:
        where: Model and layer, for the message.
        part: Attention or MLP.
        names: What the maps in it are called.

    Raises:
        ConfigError: for quantised weights, adapters around a map, and the like.
    """
    for name, module in part.named_children():
        if name in names and not is_linear(module):
            raise ConfigError(
                f"{where} {name} is a {type(module).__name__}: expected a plain linear map in "
                "floating point; merge its adapters or load the model without quantisation"
            )


def check_place(where: str, part: Any, place: Place) -> None:
    """Refuse parts that would no longer fit narrower maps.

    Args:
        where: Model and layer, for the message.
        part: Attention or MLP.
        place: Its maps.

    Raises:
        ConfigError: for further parameters, and for maps that hold more than the components.
    """
    owned = {id(place.consumer)} | {id(producer.module) for producer in place.producers}
    head_dim = getattr(part, "head_dim", 0)
    for name, module in part.named_modules():
        others = [] if id(module) in owned else module.parameters(recurse=False)
        if any(parameter.numel() != head_dim for parameter in others):
            raise ConfigError(
                f"{where} {name or type(part).__name__} holds parameters of its own: expected "
                "only linear maps and norms of single heads; choose a supported architecture"
            )
    for producer in place.producers:
        found, outputs = outputs_of(producer.module), place.components * producer.unit
        if found != outputs * producer.parts:
            raise ConfigError(
                f"{where} {type(part).__name__}: a map of {found} outputs, expected "
                f"{outputs * producer.parts}; choose a supported architecture"
            )
