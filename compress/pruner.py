"""Pruning a model: survey the dense layers, share the budget, refit layer by layer, cut."""

# Legend: B sequences, T tokens, C width, K kept inputs.

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.certificate import Certificate
from compress.allocate import Curve, allocate
from compress.fidelity import Ranking, rank
from compress.fit import LayerFit, fit_layer, make_problem
from compress.grams import Calibration, Moments, collect
from compress.settings import CompressConfig
from compress.surgery import shrink
from compress.targets import Target, mlp_targets

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Survey:
    """Statistics of every layer of the dense model.

    Attributes:
        targets: Prunable places.
        moments: Fitted and held-out statistics per layer; empty unless asked for.
        rankings: Order of removal per layer.
    """

    targets: tuple[Target, ...]
    moments: tuple[tuple[Moments, Moments], ...]
    rankings: tuple[Ranking, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pruning:
    """A pruned model and how it came about.

    Attributes:
        model: New transformer.
        fits: One per layer.
    """

    model: Any
    fits: tuple[LayerFit, ...]

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Kept neurons per layer."""
        return tuple(fit.kept_K for fit in self.fits)

    @property
    def removed_fraction(self) -> float:
        """Removed share of the MLP parameters."""
        total = sum(fit.target.cost * fit.target.components for fit in self.fits)
        stay = sum(fit.target.cost * (len(fit.kept_K) // fit.target.unit) for fit in self.fits)
        return 1 - stay / total


def survey(
    model: Any,
    tokens_BT: Tensor,
    settings: CompressConfig,
    *,
    keeps: Sequence[float] = (),
    hold: bool = True,
) -> Survey:
    """Rank the components of every layer on the dense model's own activations.

    Args:
        model: Dense transformer.
        tokens_BT: Calibration tokens (sequences, length).
        settings: Score, ridge, least kept fraction.
        keeps: Budgets that the ranking has to reach, besides ``settings.keep``.
        hold: Keep the statistics, as one-shot pruning needs them.
    """
    targets = mlp_targets(model.config)
    calibration = Calibration(model, tokens_BT, holdout=settings.holdout)
    moments, rankings = [], []
    for index, fitted, held in collect(model, calibration):
        target = targets[index]
        problem = make_problem(model, target, fitted, settings)
        fewest = min(
            settings.least_kept(target.components, keep) for keep in (settings.keep, *keeps)
        )
        rankings.append(rank(problem, settings.score, keep=fewest, seed=settings.seed))
        if hold:
            moments.append((fitted, held))
    return Survey(targets=targets, moments=tuple(moments), rankings=tuple(rankings))


def share_budget(
    model: Any,
    found: Survey | None,
    certificate: Certificate,
    settings: CompressConfig,
) -> list[int]:
    """Return the number of components that each layer keeps.

    Args:
        model: Dense transformer.
        found: Its survey; needed for ``allocation=certified``.
        certificate: Its proof, for the downstream constants.
        settings: ``keep``, ``allocation``, ``align``, ``min_keep``.
    """
    targets = mlp_targets(model.config)
    curves = []
    for index, target in enumerate(targets):
        least = settings.least_kept(target.components, settings.keep)
        errors = [0.0] * (target.components - least + 1)
        if found is not None:
            errors = found.rankings[index].curve[: len(errors)].clamp(min=0).sqrt().tolist()
        residual = model.config.layer(index).mlp_residual
        curves.append(
            Curve(
                components=target.components,
                cost=target.cost,
                errors=errors,
                amplification=residual * certificate.amplification(2 * index + 1),
            )
        )
    return allocate(curves, settings.keep, settings.allocation, align=settings.align)


def prune_model(
    model: Any,
    certificate: Certificate,
    tokens_BT: Tensor,
    settings: CompressConfig,
    *,
    found: Survey | None = None,
) -> Pruning:
    """Remove MLP components of a transformer and refit what stays.

    Args:
        model: Dense transformer; not modified.
        certificate: Its proof.
        tokens_BT: Calibration tokens (sequences, length).
        settings: Everything else.
        found: A survey of the same model and tokens that reaches ``settings.keep``.

    Returns:
        The smaller model and the per-layer decisions.
    """
    if found is None and (settings.allocation != "uniform" or settings.order == "one_shot"):
        found = survey(model, tokens_BT, settings, hold=settings.order == "one_shot")
    counts = share_budget(model, found, certificate, settings)
    if settings.order == "one_shot":
        assert found is not None
        fits = [
            fit_layer(model, target, *moments, count, settings, ranking=ranking)
            for target, moments, count, ranking in zip(
                found.targets, found.moments, counts, found.rankings, strict=True
            )
        ]
    else:
        fits = _fit_in_order(model, tokens_BT, counts, settings)
    pruned = shrink(
        model, [f.kept_K for f in fits], [f.down_OK for f in fits], [f.bias_O for f in fits]
    )
    return Pruning(model=pruned, fits=tuple(fits))


def _fit_in_order(
    model: Any, tokens_BT: Tensor, counts: Sequence[int], settings: CompressConfig
) -> list[LayerFit]:
    """Fit each layer on activations that the already pruned layers before it produce."""
    calibration = Calibration(model, tokens_BT, holdout=settings.holdout)
    fits = []
    for target, count in zip(mlp_targets(model.config), counts, strict=True):
        layer = model.layers[target.layer]
        calibration.apply(layer.attend_block)
        fitted, held = calibration.moments(layer.mlp.hidden, target.inputs)
        fit = fit_layer(model, target, fitted, held, count, settings)
        log.info(
            "layer %d: kept %d of %d components, relative error %.2e (held out %.2e)",
            target.layer,
            count,
            target.components,
            fit.error,
            fit.held_error,
        )
        calibration.apply(_pruned_block(layer, fit))
        fits.append(fit)
    return fits


def _pruned_block(layer: Any, fit: LayerFit) -> Any:
    def block(x_BTC: Tensor) -> Tensor:
        hidden_BTK = layer.mlp.hidden(x_BTC)[..., fit.kept_K]
        bias_O = layer.mlp.down.bias if fit.bias_O is None else fit.bias_O
        branch_BTC = torch.nn.functional.linear(hidden_BTK, fit.down_OK, bias_O)
        a = layer.layer.mlp_residual
        return (1 - a) * x_BTC + a * branch_BTC

    return block
