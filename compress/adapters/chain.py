"""What a chain of layers is made of: maps, what may stand between them, how they are linked."""

# Legend: N images.

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from common.errors import ConfigError

MAPS = (nn.Linear, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CHANNELWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid),
    *(nn.Hardswish, nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
"""Layers without parameters that keep the channels apart."""


class Link(NamedTuple):
    """Two consecutive maps, by position in the chain.

    Attributes:
        producer: Map whose outputs go.
        consumer: Map whose inputs go.
        norms: BatchNorm layers between them, and whether each counts inputs of the consumer
            (after ``nn.Flatten``) instead of channels.
        unit: Inputs of the consumer per output of the producer.
    """

    producer: int
    consumer: int
    norms: tuple[tuple[int, bool], ...]
    unit: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Neighbouring layers ``start <= i < stop`` of a chain, run in evaluation mode."""

    chain: tuple[Any, ...]
    start: int
    stop: int

    def __call__(self, stream: Tensor) -> Tensor:
        """Return what the layers make of a stream (N, ...)."""
        for layer in self.chain[self.start : self.stop]:
            stream = evaluated(layer, stream)
        return stream


def flattened(container: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the layers of nested Sequentials with their dotted names.

    Raises:
        ConfigError: for a layer with layers of its own that is no plain ``nn.Sequential``.
    """
    if type(container).forward is not nn.Sequential.forward:
        raise ConfigError(
            f"layer {prefix.rstrip('.') or 'model'} ({type(container).__name__}): its own forward "
            "is not seen through; write the model as nested nn.Sequential"
        )
    found: list[tuple[str, Any]] = []
    for name, layer in container._modules.items():
        if any(True for _ in layer.children()):
            found += flattened(layer, f"{prefix}{name}.")
        else:
            found.append((prefix + name, layer))
    return found


def links(names: Sequence[str], chain: Sequence[Any]) -> tuple[Link, ...]:
    """Pair each map with the next one and check everything between them."""
    found = []
    producer, is_flat, norms = None, False, []
    for index, (name, layer) in enumerate(zip(names, chain, strict=True)):
        if isinstance(layer, MAPS):
            _require_plain(name, layer)
            if producer is not None:
                unit = _unit(name, chain[producer], layer, is_flat)
                found.append(Link(producer, index, tuple(norms), unit))
            producer, is_flat, norms = index, isinstance(layer, nn.Linear), []
        elif producer is None or not any(isinstance(later, MAPS) for later in chain[index:]):
            continue
        elif isinstance(layer, NORMS) and layer.track_running_stats:
            norms.append((index, is_flat and isinstance(chain[producer], nn.Conv2d)))
        elif isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            is_flat = True
        elif not isinstance(layer, CHANNELWISE):
            raise ConfigError(
                f"layer {name} ({type(layer).__name__}): expected BatchNorm with running "
                "statistics, pooling, nn.Flatten() or an elementwise layer between two maps; "
                "replace it"
            )
    return tuple(found)


def _unit(name: str, producer: Any, consumer: Any, is_flat: bool) -> int:
    """Return the inputs of a map per output of the one before."""
    if isinstance(consumer, nn.Conv2d):
        fits = isinstance(producer, nn.Conv2d) and not is_flat
    else:
        fits = is_flat
    outputs = producer.weight.shape[0]
    per_row = consumer.weight[0].numel()
    if not fits or per_row % outputs:
        raise ConfigError(
            f"layer {name} ({type(consumer).__name__}): {per_row} inputs do not belong to the "
            f"{outputs} outputs of the map before; put nn.Flatten() between a convolution and a "
            "linear layer"
        )
    return per_row // outputs


def _require_plain(name: str, layer: Any) -> None:
    if isinstance(layer, nn.Conv2d) and (
        layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        raise ConfigError(
            f"layer {name} (Conv2d): groups={layer.groups}, padding={layer.padding!r}, "
            f"padding_mode={layer.padding_mode!r}: expected groups=1 and zero padding given as "
            "numbers; rebuild the layer"
        )


def require_own_parameters(model: nn.Module) -> None:
    """Refuse shared tensors: a write for one layer would change another one."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name:
            raise ConfigError(
                f"{name} is the same tensor as {first}: expected layers with parameters of their "
                "own; copy one of them"
            )


def evaluated(layer: Any, stream: Tensor) -> Tensor:
    """Run one layer in evaluation mode."""
    was_training, layer.training = layer.training, False
    try:
        return layer(stream)
    finally:
        layer.training = was_training
