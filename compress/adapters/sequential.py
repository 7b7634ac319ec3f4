"""Chains of layers in ``nn.Sequential``: hidden neurons and the channels of convolutions.

The inputs of every linear map but the first can go, and with them the outputs of the map before:
what stands between two maps acts on each channel alone. BatchNorm always uses its stored
statistics here, whatever mode the model is in.
"""

# Legend: N images, C channels, I inputs of a map (im2col columns), O its outputs, M positions.

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import DataError
from compress.adapters.base import Adapter, Stage
from compress.adapters.chain import (
    MAPS,
    NORMS,
    Span,
    evaluated,
    flattened,
    links,
    require_own_parameters,
)
from compress.targets import Target


class SequentialAdapter(Adapter):
    """An ``nn.Sequential`` of linear maps, convolutions and channelwise layers, nested or not.

    Args:
        model: The chain; only ``write`` and ``recalibrate`` change it.
        example: Images (N, ...) as the model takes them, at least one, of which only the shape
            is used: the operations of a convolution depend on it. Without it the ``flops`` of
            targets next to a convolution are NaN.

    Raises:
        ConfigError: for a layer that pruning would not see through.
    """

    reach = 2

    def __init__(self, model: nn.Module, example: Tensor | None = None):
        super().__init__(model)
        self.example = None if example is None else example[:1]
        named = flattened(model)
        self.names = tuple(name for name, _ in named)
        self.chain: tuple[Any, ...] = tuple(layer for _, layer in named)
        self.links = links(self.names, self.chain)
        require_own_parameters(model)
        self._first_written = len(self.chain)

    def targets(self) -> tuple[Target, ...]:
        """Return the inputs of every map but the first."""
        positions = self._positions if self.links else {}
        found = []
        for index, link in enumerate(self.links):
            producer, consumer = self.chain[link.producer], self.chain[link.consumer]
            per_output = producer.weight[0].numel()
            per_input = consumer.weight.numel() * link.unit // consumer.weight[0].numel()
            norms = sum(
                (link.unit if is_flat else 1) * 2
                for norm, is_flat in link.norms
                if self.chain[norm].affine
            )
            multiplies = (
                positions[link.producer] * per_output + positions[link.consumer] * per_input
            )
            found.append(
                Target(
                    name=self.names[link.consumer],
                    layer=index + 1,
                    kind="mlp" if isinstance(producer, nn.Linear) else "channels",
                    inputs=consumer.weight[0].numel(),
                    unit=link.unit,
                    params=per_output + int(producer.bias is not None) + norms + per_input,
                    flops=2.0 * multiplies,
                )
            )
        return tuple(found)

    def start(self, batch: Tensor) -> Tensor:
        """Return the images in the device and type of the model."""
        return self.inputs(batch)

    def stages(self) -> tuple[Stage, ...]:
        """Return each map with the channelwise layers behind it."""
        maps = [index for index, layer in enumerate(self.chain) if isinstance(layer, MAPS)]
        edges = [0, *maps[1:], len(self.chain)]
        spans = [Span(self.chain, *edge) for edge in itertools.pairwise(edges)]
        first, *others = spans
        return (Stage((), first), *(Stage((self.names[span.start],), span) for span in others))

    def module(self, target: Target) -> Any:
        """Return the map that reads the channels."""
        return self.chain[self.names.index(target.name)]

    def rows(self, target: Target, inputs: Tensor) -> Tensor:
        """Return one row per image, or per image and position of a convolution (im2col)."""
        module = self.module(target)
        if isinstance(module, nn.Linear):
            return inputs
        columns_NIM = F.unfold(
            inputs, module.kernel_size, module.dilation, module.padding, module.stride
        )
        return columns_NIM.transpose(1, 2)

    def weight(self, target: Target) -> Tensor:
        """Return a float64 copy (I, O); the inputs of a convolution are channels times taps."""
        return self.module(target).weight.detach().double().flatten(1).T.clone()

    @torch.no_grad()
    def write(self, target: Target, weight_IO: Tensor, bias_O: Tensor | None = None) -> None:
        """Replace the map at full size, see ``Adapter.write``."""
        module = self.module(target)
        if bias_O is not None or not torch.equal(weight_IO, self.weight(target)):
            self._first_written = min(self._first_written, self.names.index(target.name))
        module.weight.copy_(weight_IO.T.reshape(module.weight.shape))
        if bias_O is not None:
            module.bias.copy_(bias_O)

    @property
    def normalises(self) -> bool:
        """Whether the chain holds BatchNorm layers with running statistics."""
        return any(isinstance(layer, NORMS) and layer.track_running_stats for layer in self.chain)

    def absorbs_mean(self, target: Target) -> bool:
        """Return whether a re-estimated BatchNorm is the next layer.

        Source: arXiv 2511.19566 (centred similarity matrix of networks with BatchNorm).
        """
        behind = self.chain[self.names.index(target.name) + 1 :][:1]
        return any(isinstance(layer, NORMS) and layer.track_running_stats for layer in behind)

    @torch.no_grad()
    def recalibrate(self, stage: Stage, streams: Sequence[Tensor]) -> None:
        """Re-estimate BatchNorm's statistics behind the first map that a write has changed.

        Mean and unbiased variance per channel over all images and positions, layer after layer.
        Source: arXiv 2511.19566 (re-estimation after pruning), "BNFix" of its predecessor.
        """
        span: Any = stage.run
        norms = [
            index
            for index in range(max(span.start, self._first_written), span.stop)
            if isinstance(self.chain[index], NORMS) and self.chain[index].track_running_stats
        ]
        reached, inside = span.start, list(streams)
        for index in norms:
            inside = [Span(self.chain, reached, index)(stream) for stream in inside]
            _estimate(self.chain[index], inside)
            reached = index

    @torch.no_grad()
    def cut(self, kept: Mapping[str, Tensor]) -> Any:
        """Return the chain with only the kept channels and neurons; see ``Adapter.cut``."""
        model = copy.deepcopy(self.model)
        chain: list[Any] = [layer for _, layer in flattened(model)]
        for link in self.links:
            name = self.names[link.consumer]
            if name not in kept:
                continue
            kept_K = kept[name]
            channels = kept_K[:: link.unit] // link.unit
            _narrow(chain[link.producer], 0, channels)
            for norm, is_flat in link.norms:
                _narrow_norm(chain[norm], kept_K if is_flat else channels)
            is_linear = isinstance(chain[link.consumer], nn.Linear)
            _narrow(chain[link.consumer], 1, kept_K if is_linear else channels)
        return model

    def working_copy(self) -> Self:
        """Return an adapter around a deep copy of the model."""
        return type(self)(copy.deepcopy(self.model), self.example)

    @cached_property
    @torch.no_grad()
    def _positions(self) -> dict[int, float]:
        """Return at how many positions of one image each map is applied."""
        positions = {}
        stream = None if self.example is None else self.start(self.example)
        for index, layer in enumerate(self.chain):
            if stream is not None:
                stream = evaluated(layer, stream)
            if isinstance(layer, nn.Conv2d):
                positions[index] = math.nan if stream is None else float(stream[0, 0].numel())
            elif isinstance(layer, nn.Linear):
                positions[index] = 1.0
        return positions


def _estimate(norm: Any, streams: Sequence[Tensor]) -> None:
    """Set running mean and variance from what enters the layer; float64 sums."""
    # Sums around the old mean lose no digits where the mean is large.
    shift_C = norm.running_mean.double()
    count, first_C, second_C = 0, torch.zeros_like(shift_C), torch.zeros_like(shift_C)
    for stream in streams:
        values_CM = stream.double().transpose(0, 1).flatten(1) - shift_C[:, None]
        count += values_CM.shape[1]
        first_C += values_CM.sum(1)
        second_C += values_CM.square().sum(1)
    if count < 2:
        raise DataError("one image of one pixel has no variance; calibrate with more images")
    norm.running_mean.copy_(shift_C + first_C / count)
    norm.running_var.copy_((second_C - first_C.square() / count).clamp(min=0) / (count - 1))


def _narrow(module: Any, axis: int, index: Tensor) -> None:
    """Keep some outputs (axis 0) or inputs (axis 1) of a map."""
    module.weight = _selected(module.weight, axis, index)
    if axis == 0 and module.bias is not None:
        module.bias = _selected(module.bias, 0, index)
    kind = "features" if isinstance(module, nn.Linear) else "channels"
    setattr(module, f"{('out', 'in')[axis]}_{kind}", len(index))


def _narrow_norm(norm: Any, index: Tensor) -> None:
    if norm.affine:
        norm.weight, norm.bias = (_selected(old, 0, index) for old in (norm.weight, norm.bias))
    index = index.to(norm.running_mean.device)
    norm.running_mean, norm.running_var = norm.running_mean[index], norm.running_var[index]
    norm.num_features = len(index)


def _selected(parameter: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    kept = parameter.detach().index_select(axis, index.to(parameter.device)).contiguous()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)
