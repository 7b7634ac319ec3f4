"""Unlearning a model: edit the last maps, then perhaps refit what is left on retained data.

Generic over the families of models of ``compress.adapters``. What comes out gives other answers
about the class; that is forgetting at the output, not erasure: fine-tuning or a probe of the hidden
layers may still find it.
"""

# Legend: N inputs (sequences or images), I inputs of a map, O its outputs.

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from common.norms import spectral_norm
from compress.adapters import Adapter, adapter_for
from compress.statistics.collect import collect, warn_if_few
from compress.statistics.grams import Moments
from compress.statistics.streams import Streams
from compress.targets import Problem, Target
from compress.unlearning.edits import Classes, Edit, Strength, edit
from compress.unlearning.recovery import recover
from compress.unlearning.settings import UnlearnConfig

log = logging.getLogger(__name__)

Change = Callable[[Target, tuple[Moments, ...]], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Edited:
    """What was done to one map.

    Attributes:
        target: The map.
        edit: Its weights as the edit left them.
        weight_IO: Its weights in the end: recovered, and rounded to the stored type (as float64).
        change: Frobenius norm of the whole change over that of the old weights.
        growth: Spectral norm after over before.
    """

    target: Target
    edit: Edit
    weight_IO: Tensor
    change: float
    growth: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Unlearning:
    """An unlearned model and how it came about.

    Attributes:
        model: New model, of the old shape.
        edited: The model after the edit and before recovery; ``model`` itself without recovery.
        maps: One record per edited map.
    """

    model: Any
    edited: Any
    maps: tuple[Edited, ...]


def unlearn_model(
    model: Any, forget: Tensor, retain: Tensor, settings: UnlearnConfig
) -> Unlearning:
    """Make a model forget a class of inputs.

    Recovery sees ``retain`` only. Whether the class came back with it is for the caller to measure:
    compare ``edited`` with ``model`` by ``recovery.guard``.

    Args:
        model: A model that ``adapter_for`` knows, or its adapter; not modified.
        forget: Inputs of the class: tokens (N, T) or images (N, ...).
        retain: Inputs of everything else; nothing of the class.
        settings: Method, strength, layers.

    Returns:
        The new model, also as it was before recovery, and the edits.

    Raises:
        ConfigError: for a model without a map that can be edited.
        DataError: for inputs that are none, or activations that are not finite.
    """
    dense = model if isinstance(model, Adapter) else adapter_for(model)
    targets = chosen_targets(dense, settings)
    copy = dense.working_copy()
    edits: dict[str, Edit] = {}

    def change(target: Target, moments: tuple[Moments, ...]) -> Tensor:
        # Pushed hidden outputs would come back on the other side in the maps that follow.
        push = settings.push if target is targets[-1] else 0.0
        edits[target.name] = _edit(dense, target, moments, settings, push)
        return _bounded(dense, target, edits[target.name].weight_IO, settings)

    _apply(copy, targets, (forget, retain), change, settings.order)
    edited = copy
    if settings.recovery != "none":
        copy = edited.working_copy()

        def refit(target: Target, moments: tuple[Moments, ...]) -> Tensor:
            problem = Problem(
                gram_II=moments[0].gram_II(),
                weight_IO=dense.weight(target),
                unit=target.unit,
                ridge=settings.ridge,
            )
            weight_IO = recover(problem, edits[target.name], _cap(dense, target, settings))
            return _bounded(dense, target, weight_IO, settings)

        _apply(copy, targets, (retain,), refit, settings.order)
    maps = tuple(_record(dense, copy, target, edits[target.name]) for target in targets)
    return Unlearning(model=copy.model, edited=edited.model, maps=maps)


def chosen_targets(adapter: Adapter, settings: UnlearnConfig) -> tuple[Target, ...]:
    """Return the maps to edit, in execution order: those of the last layers.

    Raises:
        ConfigError: when the model has none.
    """
    found = [t for t in adapter.targets() if settings.heads or t.kind != "heads"]
    if not found:
        raise ConfigError(
            f"{type(adapter.model).__name__}: no map in it can be edited; expected a model with "
            "hidden layers (attention counts with unlearn.heads=true)"
        )
    layers = sorted({target.layer for target in found})
    count = math.ceil(settings.layers * len(layers) - 1e-9)
    return tuple(target for target in found if target.layer in layers[-count:])


def _apply(
    copy: Adapter,
    targets: Sequence[Target],
    parts: Sequence[Tensor],
    change: Change,
    order: str,
) -> None:
    """Change every target in place, on the statistics of each part of the data."""
    if order == "one_shot":
        found = [collect(copy, part, targets, holdout=0.0).fitted for part in parts]
        for target in targets:
            copy.write(target, change(target, tuple(part[target.name] for part in found)))
        return
    streams = [Streams(copy, part, 0.0) for part in parts]
    named: Mapping[str, Target] = {target.name: target for target in targets}
    left = set(named)
    for stage in copy.stages():
        for name in stage.targets:
            if name in named:
                moments = tuple(stream.moments(stage, named[name])[0] for stream in streams)
                warn_if_few(min(part.count for part in moments), named[name])
                copy.write(named[name], change(named[name], moments))
                log.info("%s: edited", name)
                left.discard(name)
        if not left:
            break
        for stream in streams:
            stream.advance(stage)


def _edit(
    dense: Adapter,
    target: Target,
    moments: tuple[Moments, ...],
    settings: UnlearnConfig,
    push: float,
) -> Edit:
    forget, retain = moments
    classes = Classes(
        forget_II=forget.gram_II(),
        forget_mean_I=forget.mean_I,
        retain_II=retain.gram_II(),
        retain_mean_I=retain.mean_I,
        weight_IO=dense.weight(target),
        unit=target.unit,
    )
    strength = Strength(
        share=settings.share,
        mu=settings.mu,
        push=push,
        ridge=settings.ridge,
        cap=_cap(dense, target, settings),
    )
    return edit(classes, settings.method, strength)


def _cap(dense: Adapter, target: Target, settings: UnlearnConfig) -> float:
    """Return the norm that keeps the naive constant; no limit where there is nothing to keep."""
    if not dense.certifiable or math.isinf(settings.tau):
        return math.inf
    weight_IO = dense.weight(target)
    every = torch.arange(target.inputs, device=weight_IO.device)
    return dense.cap(target, every, settings.tau)


def _bounded(dense: Adapter, target: Target, weight_IO: Tensor, settings: UnlearnConfig) -> Tensor:
    if not dense.certifiable or math.isinf(settings.tau):
        return weight_IO
    every = torch.arange(target.inputs, device=weight_IO.device)
    return dense.bounded(target, every, weight_IO, settings.tau)


def _record(dense: Adapter, copy: Adapter, target: Target, found: Edit) -> Edited:
    old_IO, new_IO = dense.weight(target), copy.weight(target)
    norm, size = spectral_norm(old_IO), float(old_IO.norm())
    return Edited(
        target=target,
        edit=found,
        weight_IO=new_IO,
        change=float((new_IO - old_IO).norm()) / size if size else 0.0,
        growth=spectral_norm(new_IO) / norm if norm else 1.0,
    )
