"""What a family of models has to say so that pruning is generic: places, stages, weights, cuts.

Statistics are taken by pre-hooks on the pruned maps while a batch runs through the stages; new
weights are written at full size into a working copy, and ``cut`` makes that really smaller.
"""

# Legend: I inputs of a pruned map, O its outputs, K kept inputs, M rows.

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.norms import spectral_norm
from compress.targets import Target


class Stage(NamedTuple):
    """One step of the forward pass, from stream to stream.

    Attributes:
        targets: Names of the targets inside it, in execution order; often one or none.
        run: The step.
    """

    targets: tuple[str, ...]
    run: Callable[[Any], Any]


class Adapter(ABC):
    """One model and where it can be pruned.

    Args:
        model: The model; only ``write`` and ``recalibrate`` change it.
    """

    certifiable = False
    """Whether ``cap`` and ``bounded`` protect a Lipschitz certificate of the model."""

    reach = 1
    """Consecutive stages, a target's own the last one, whose maps narrow with its components."""

    def __init__(self, model: nn.Module):
        self.model: Any = model

    @abstractmethod
    def targets(self) -> tuple[Target, ...]:
        """Return every prunable place, in execution order."""

    @abstractmethod
    def start(self, batch: Tensor) -> Any:
        """Return the first stream of a batch of inputs (tokens or images)."""

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """Return the steps that, one after the other, turn the first stream into the output."""

    @abstractmethod
    def module(self, target: Target) -> nn.Module:
        """Return the linear map whose inputs are pruned."""

    @abstractmethod
    def cut(self, kept: Mapping[str, Tensor]) -> Any:
        """Return a new, physically smaller model.

        Args:
            kept: Input indices (K) that stay, ascending, whole components, per target name; a
                target that is not named stays as it is.
        """

    def rows(self, target: Target, inputs: Tensor) -> Tensor:
        """Return the rows (..., I) that the pruned map multiplies, from its module's input."""
        return inputs

    def weight(self, target: Target) -> Tensor:
        """Return a float64 copy (I, O) of the map, one row per input."""
        return self.module(target).weight.detach().double().T.clone()

    def bias(self, target: Target) -> Tensor | None:
        """Return a float64 copy (O) of the map's bias, or None."""
        bias = getattr(self.module(target), "bias", None)
        return None if bias is None else bias.detach().double().clone()

    @torch.no_grad()
    def write(self, target: Target, weight_IO: Tensor, bias_O: Tensor | None = None) -> None:
        """Replace the map at full size; rows of removed inputs are zero.

        Args:
            target: The place.
            weight_IO: New weights, rounded to the stored type.
            bias_O: New bias, or None to keep the old one.
        """
        module: Any = self.module(target)
        module.weight.copy_(weight_IO.T)
        if bias_O is not None:
            module.bias.copy_(bias_O)

    @torch.no_grad()
    def flops(self, batch: Tensor) -> float:
        """Return the operations of the whole model per token or image, as ``Target`` counts them.

        Args:
            batch: Model inputs (N, ...), at least one, of which only the shape is used.
        """
        one = self.inputs(batch[:1])
        with evaluating(self.model), FlopCounterMode(display=False) as counter:
            self.model(one)
        return float(counter.get_total_flops())

    def inputs(self, batch: Tensor) -> Tensor:
        """Return a batch on the model's device; images in its type."""
        like = next(self.model.parameters())
        return batch.to(like) if batch.is_floating_point() else batch.to(like.device)

    @property
    def normalises(self) -> bool:
        """Whether the model holds normalisation statistics that ``recalibrate`` estimates."""
        return False

    def absorbs_mean(self, target: Target) -> bool:
        """Return whether normalisation right behind the map takes out any constant."""
        return False

    def recalibrate(self, stage: Stage, streams: Sequence[Any]) -> None:
        """Re-estimate normalisation statistics inside a stage from the streams that enter it."""
        return

    def allowed(self, target: Target) -> frozenset[int] | None:
        """Return the component counts that the model can be built with, or None for any."""
        return None

    def cap(self, target: Target, kept_K: Tensor, tau: float) -> float:
        """Return the largest admissible spectral norm of the new weights (K, O)."""
        return tau * spectral_norm(self.weight(target))

    def bounded(self, target: Target, kept_K: Tensor, weight_KO: Tensor, tau: float) -> Tensor:
        """Return weights pulled back until the block's naive bound is ``tau`` times the dense."""
        return weight_KO

    def working_copy(self) -> Self:
        """Return an adapter around a deep copy of the model."""
        return type(self)(copy.deepcopy(self.model))

    def find(self, name: str) -> Target:
        """Return a target by its name."""
        return next(target for target in self.targets() if target.name == name)


class CertifiableAdapter(Adapter):
    """One model with a Lipschitz certificate, which ``cap`` and ``bounded`` protect."""

    certifiable = True

    @abstractmethod
    def amplifications(self, certificate: Any) -> dict[str, float]:
        """Return by how much an error of each pruned map can move the final stream (l2).

        Args:
            certificate: Proof of this model.
        """


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the estimation of statistics off while the block runs."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


class _Reached(Exception):
    """Ends a forward pass as soon as the wanted activations are there."""


@contextlib.contextmanager
def captured(
    adapter: Adapter, targets: Sequence[Target], receive: Callable[[Target, Tensor], None]
) -> Iterator[None]:
    """Hand the input of every target's module to ``receive`` while the block runs.

    Args:
        adapter: The model.
        targets: Where to listen.
        receive: Called with the target and its rows (..., I).
    """

    def listen(target: Target) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            receive(target, adapter.rows(target, args[0]))

        return adapter.module(target).register_forward_pre_hook(hook)

    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.callback(listen(target).remove)
        yield


@torch.no_grad()
def rows_of(adapter: Adapter, stage: Stage, target: Target, stream: Any) -> Tensor:
    """Return the rows (..., I) that enter a target when a stage runs on a stream.

    The rest of the stage is not run.
    """
    found: list[Tensor] = []

    def receive(_: Target, rows: Tensor) -> None:
        found.append(rows)
        raise _Reached

    with captured(adapter, [target], receive), contextlib.suppress(_Reached):
        stage.run(stream)
    return found[0]
