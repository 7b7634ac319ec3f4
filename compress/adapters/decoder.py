"""Decoder models of ``transformers``: what all families share.

Families only name their maps (see ``places``). Nothing here imports ``transformers``.
"""

# Legend: B batch, T tokens, C width, I inputs, O outputs, K kept inputs, N kept components.

import contextlib
import copy
import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import ShapeError
from compress.adapters.base import Adapter, Stage, evaluating
from compress.adapters.linear import inputs_of, narrowed, weight_view
from compress.adapters.places import LayerShape, Place, check_maps, check_place
from compress.targets import Target

ATTENDED = 2048
"""Tokens of context for which the operations of attention are counted; fewer where the model or
its window is shorter."""


class Stream(NamedTuple):
    """Where a batch is between two decoder layers.

    Attributes:
        hidden_BTC: Hidden states.
        calls: Positional and keyword arguments that each layer gets besides the hidden states:
            position embeddings, causal mask.
    """

    hidden_BTC: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class DecoderAdapter(Adapter):
    """A causal language model of ``transformers``.

    Args:
        model: The model, with or without its head.

    Raises:
        ConfigError: when a map is not an ordinary one or the layer holds parts that head or
            neuron pruning would break.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._is_tuple: bool | None = None
        for index, layer in enumerate(self.layers):
            where = f"{type(model).__name__}: layer {index}"
            for part in (self.attention(index), layer.mlp):
                check_maps(where, part, self.maps)
            for part, place in (
                (self.attention(index), self.heads_place(index)),
                (layer.mlp, self.mlp_place(index)),
            ):
                check_place(where, part, place)
        self._targets = tuple(self._describe())

    maps: tuple[str, ...] = ()
    """Names of the linear maps inside attention and MLP."""

    @classmethod
    @abstractmethod
    def matches(cls, model: Any) -> bool:
        """Return whether a model has the layers of this family."""

    @property
    @abstractmethod
    def layers(self) -> Any:
        """The decoder layers."""

    @abstractmethod
    def attention(self, index: int) -> Any:
        """Return the attention module of a layer."""

    @abstractmethod
    def heads_place(self, index: int) -> Place:
        """Return the maps around the heads of a layer."""

    @abstractmethod
    def mlp_place(self, index: int) -> Place:
        """Return the maps around the neurons of a layer."""

    @abstractmethod
    def config_values(self, shape: LayerShape) -> dict[str, int] | None:
        """Return the configuration of a model whose layers all have this shape, or None."""

    @abstractmethod
    def recount(self, index: int) -> None:
        """Bring the counters that a layer keeps of its own in line with its maps."""

    @property
    def decoder(self) -> Any:
        """The model without its head."""
        return base_model(self.model)

    def targets(self) -> tuple[Target, ...]:
        """Return heads and MLP of every layer."""
        return self._targets

    def place(self, target: Target) -> Place:
        """Return the maps of a target."""
        is_heads = target.kind == "heads"
        return self.heads_place(target.layer) if is_heads else self.mlp_place(target.layer)

    def module(self, target: Target) -> Any:
        """Return the output projection of the heads or the down projection."""
        return self.place(target).consumer

    def weight(self, target: Target) -> Tensor:
        """Return a float64 copy (I, O) of the map, one row per input."""
        return weight_view(self.module(target)).detach().double().clone()

    @torch.no_grad()
    def write(self, target: Target, weight_IO: Tensor, bias_O: Tensor | None = None) -> None:
        """Replace the map at full size; see ``Adapter.write``."""
        module = self.module(target)
        weight_view(module).copy_(weight_IO)
        if bias_O is not None:
            module.bias.copy_(bias_O)

    def flops(self, batch: Tensor) -> float:
        """Return the operations per token; those of attention for ``ATTENDED`` tokens of context.

        Args:
            batch: Not looked at.
        """
        head = self.model.get_output_embeddings()
        outputs = 0.0 if head is None else 2.0 * head.weight.numel()
        return outputs + sum(target.flops * target.components for target in self._targets)

    @torch.no_grad()
    def start(self, batch: Tensor) -> Stream:
        """Return the embedded tokens and the arguments that the model passes to its layers.

        Args:
            batch: Token ids (B, T).

        Raises:
            ShapeError: for sequences beyond the positions that the model knows.
        """
        known = self.model.config.max_position_embeddings
        if batch.shape[-1] > known:
            raise ShapeError(
                f"tokens {tuple(batch.shape)}: expected at most {known} per sequence, the model's "
                "positions; lower compress.length"
            )
        found: list[Any] = []
        tokens_BT = batch.to(self.decoder.get_input_embeddings().weight.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.decoder))
            for layer in self.layers:
                stack.enter_context(_replaced(layer, self._recorder(layer.forward, found)))
            self.decoder(input_ids=tokens_BT, use_cache=False)
        return Stream(found[0][0], tuple(call for _, call in found))

    def stages(self) -> tuple[Stage, ...]:
        """Return one stage per decoder layer; final norm and head are not among them."""
        return tuple(
            Stage(
                tuple(target.name for target in self._targets if target.layer == index),
                functools.partial(self._run, index),
            )
            for index in range(len(self.layers))
        )

    def allowed(self, target: Target) -> frozenset[int] | None:
        """Return the counts with which an ordinary checkpoint can be built, or None for any.

        Some configurations reject head counts that do not divide the width. None also where no
        smaller count is ordinary (heads of GPT-2): such models are saved with a manifest anyway.
        """
        if target.kind != "heads":
            return None
        shape = self.shape(target.layer)
        group = shape.heads // shape.kv_heads
        counts = {target.components}
        for count in range(1, target.components):
            values = self.config_values(LayerShape(shape.mlp_width, count * group, count))
            if values is None:
                return None
            if _is_admitted(self.model.config, values):
                counts.add(count)
        return frozenset(counts)

    @torch.no_grad()
    def cut(self, kept: Mapping[str, Tensor]) -> Any:
        """Return the model with only the kept neurons and heads; see ``Adapter.cut``.

        Its configuration describes it where all layers have one shape that can be configured,
        else stays the dense one.
        """
        # What the copy meets in its memo it takes as copied: the dense maps are never duplicated.
        memo: dict[int, Any] = {}
        for target in self._targets:
            if target.name not in kept:
                continue
            place = self.place(target)
            kept_K = kept[target.name]
            kept_N = kept_K[:: target.unit] // target.unit
            memo[id(place.consumer)] = narrowed(place.consumer, inputs_K=kept_K)
            for producer in place.producers:
                rows = producer.outputs(kept_N)
                memo[id(producer.module)] = narrowed(producer.module, outputs_K=rows)
        smaller = type(self)(copy.deepcopy(self.model, memo))
        for index in range(len(smaller.layers)):
            smaller.recount(index)
        smaller._configure()
        return smaller.model

    def shape(self, index: int) -> LayerShape:
        """Return the sizes of a layer, taken from its weights."""
        place = self.heads_place(index)
        head_dim = self.attention(index).head_dim
        heads = inputs_of(place.consumer) // head_dim
        return LayerShape(inputs_of(self.mlp_place(index).consumer), heads, place.components)

    def _configure(self) -> None:
        shapes = {self.shape(index) for index in range(len(self.layers))}
        values = self.config_values(shapes.pop()) if len(shapes) == 1 else None
        if values is not None and _is_admitted(self.model.config, values):
            for name, value in values.items():
                setattr(self.model.config, name, value)

    def _describe(self) -> Iterator[Target]:
        config = self.model.config
        window = getattr(config, "sliding_window", None) or ATTENDED
        attended = min(ATTENDED, window, config.max_position_embeddings)
        for index in range(len(self.layers)):
            for kind, place in (
                ("heads", self.heads_place(index)),
                ("mlp", self.mlp_place(index)),
            ):
                # Each query meets half the context on average, for its score and for the mixture.
                mixing = 2.0 * attended * place.unit if kind == "heads" else 0.0
                yield Target(
                    name=f"model.layers.{index}.{kind}",
                    layer=index,
                    kind=kind,
                    inputs=inputs_of(place.consumer),
                    unit=place.unit,
                    params=place.params,
                    flops=2.0 * place.weights + mixing,
                )

    def _recorder(self, forward: Any, found: list[Any]) -> Any:
        """Return a layer that does nothing but note what it is called with."""

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append((hidden_states, (args, kwargs)))
            # Older versions return tuples from some layers: one real call tells.
            if self._is_tuple is None:
                self._is_tuple = isinstance(forward(hidden_states, *args, **kwargs), tuple)
            return (hidden_states,) if self._is_tuple else hidden_states

        return record

    def _run(self, index: int, stream: Stream) -> Stream:
        args, kwargs = stream.calls[index]
        layer = self.layers[index]
        with evaluating(layer):
            output = layer(stream.hidden_BTC, *args, **kwargs)
        return stream._replace(hidden_BTC=output[0] if isinstance(output, tuple) else output)


def base_model(model: Any) -> Any:
    """Return a model of ``transformers`` without its head."""
    return getattr(model, model.base_model_prefix, model)


def _is_admitted(config: Any, values: Mapping[str, int]) -> bool:
    """Return whether a configuration accepts values, which only its class knows."""
    try:
        type(config).from_dict({**config.to_dict(), **values})
    except Exception:  # every version of transformers has its own
        return False
    return True


@contextlib.contextmanager
def _replaced(module: Any, forward: Any) -> Iterator[None]:
    """Let a module compute something else while the block runs."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
