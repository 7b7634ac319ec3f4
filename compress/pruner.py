"""Pruning a model: survey the dense model, share the budget, refit place by place, cut."""

# Legend: N calibration inputs (sequences or images), K kept inputs.

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from common.errors import ConfigError
from compress.adapters import Adapter, adapter_for
from compress.budgets.budget import Candidate, share
from compress.budgets.clock import StageClock
from compress.fit import Fit, fit_target, make_problem
from compress.hold import Limit, fit_within, naive_limit
from compress.scoring.fidelity import Ranking, rank
from compress.settings import CompressConfig
from compress.statistics.collect import Statistics, collect, warn_if_few
from compress.statistics.streams import Streams
from compress.targets import Target

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Survey:
    """What is known about the dense model.

    Attributes:
        statistics: Second moments of what enters each place, by target name.
        rankings: Order of removal, by target name.
    """

    statistics: Statistics
    rankings: Mapping[str, Ranking]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pruning:
    """A pruned model and how it came about.

    Attributes:
        model: New model.
        fits: One per pruned place.
        tau: Growth of each block's norms that the refit was allowed, as set or as ``hold`` found
            it; ``inf`` without a cap, None for a refit that knows none.
        proof: Certificate of the model where one was needed on the way, else None.
    """

    model: Any
    fits: tuple[Fit, ...]
    tau: float | None = None
    proof: Any = None

    @property
    def kept(self) -> dict[str, Tensor]:
        """Kept inputs per target name."""
        return {fit.target.name: fit.kept_K for fit in self.fits}

    def removed(self, kind: str | None = None) -> int:
        """Return the number of removed components, of one kind or of all."""
        fits = [fit for fit in self.fits if kind in (None, fit.target.kind)]
        return sum(fit.target.components - len(fit.kept_K) // fit.target.unit for fit in fits)

    @property
    def removed_fraction(self) -> float:
        """Removed share of the parameters of the pruned places."""
        total = sum(fit.target.params * fit.target.components for fit in self.fits)
        stay = sum(fit.target.params * (len(fit.kept_K) // fit.target.unit) for fit in self.fits)
        return 1 - stay / total if total else 0.0

    @property
    def fidelity(self) -> float:
        """Mean over the pruned places of ``1 - held_error`` (estimate)."""
        return 1 - sum(fit.held_error for fit in self.fits) / len(self.fits)


def survey(
    adapter: Adapter,
    inputs: Tensor,
    settings: CompressConfig,
    *,
    keeps: Sequence[float] = (),
    statistics: Statistics | None = None,
) -> Survey:
    """Rank the components of every place on the dense model's own activations.

    Args:
        adapter: Dense model.
        inputs: Calibration tokens (N, T) or images (N, ...).
        settings: Score, ridge, least kept fraction.
        keeps: Values of ``keep`` that the rankings have to reach, besides that of the settings.
        statistics: Of the same inputs, for all places, if they are known.
    """
    lowest = dataclasses.replace(settings, keep=min((settings.keep, *keeps)))
    targets = chosen_targets(adapter, lowest)
    if statistics is None:
        statistics = collect(adapter, inputs, targets, holdout=settings.holdout)
    rankings = {}
    for target in targets:
        problem = make_problem(adapter, target, statistics.fitted[target.name], settings)
        fewest = lowest.least_kept(target)
        rankings[target.name] = rank(problem, settings.score, keep=fewest, seed=settings.seed)
    return Survey(statistics=statistics, rankings=rankings)


def chosen_targets(adapter: Adapter, settings: CompressConfig) -> tuple[Target, ...]:
    """Return the places whose budget is below 1.

    Raises:
        ConfigError: when the model has none at all, or none with the bias that the settings use.
    """
    found = adapter.targets()
    name = type(adapter.model).__name__
    if not found:
        raise ConfigError(f"{name}: nothing in it can be pruned; choose a model with hidden units")
    chosen = tuple(target for target in found if settings.keep_for(target.kind) < 1)
    # Keeping everything is a no-op on the first kind of place, not an empty job.
    chosen = chosen or tuple(target for target in found if target.kind != "heads") or found
    if settings.bias and all(adapter.bias(target) is None for target in chosen):
        raise ConfigError(
            f"compress.bias=true: no pruned map of this {name} has a bias to absorb the mean; "
            "set compress.bias=false or choose a model with biases (model.mlp_bias=true)"
        )
    return chosen


def share_budget(
    adapter: Adapter,
    targets: Sequence[Target],
    inputs: Tensor,
    settings: CompressConfig,
    *,
    found: Survey | None = None,
    gains: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Return the number of components that each place keeps.

    Args:
        adapter: Dense model.
        targets: Its places in scope.
        inputs: Calibration inputs, of which the first few are timed under a latency budget.
        settings: ``keep``, ``keep_heads``, ``budget``, ``allocation``, ``align``, ``min_keep``.
        found: Survey of the places; needed unless ``allocation=uniform``.
        gains: Certified amplification of each place's error, if there is a certificate.
    """
    candidates = []
    for target in targets:
        errors = None
        if found is not None:
            errors = found.rankings[target.name].curve.clamp(min=0).sqrt().tolist()
        candidates.append(
            Candidate(
                target=target,
                errors=errors,
                amplification=gains[target.name] if gains else 1.0,
                least=settings.least_kept(target),
                align=settings.align_for(target.kind),
                allowed=adapter.allowed(target),
            )
        )
    # Without heads in scope their default budget is moot; any other one is a mistake to report.
    keep_heads = settings.keep_heads
    if keep_heads == 1 and all(target.kind != "heads" for target in targets):
        keep_heads = None
    clock = StageClock(adapter, inputs)
    return share(
        candidates,
        settings.keep,
        settings.allocation,
        budget=settings.budget,
        keep_heads=keep_heads,
        model_total=clock.total(settings.budget.kind) if settings.budget.of == "model" else None,
        seconds=clock.seconds if settings.budget.kind == "latency" else None,
    )


def prune_model(
    model: Any,
    inputs: Tensor,
    settings: CompressConfig,
    *,
    gains: Mapping[str, float] | None = None,
    found: Survey | None = None,
    limit: Limit | None = None,
) -> Pruning:
    """Remove components of a model and refit what stays.

    Args:
        model: Dense model of a family that ``adapter_for`` knows; not modified.
        inputs: Calibration tokens (N, T) or images (N, ...).
        settings: Everything else.
        gains: Certified amplification of each place's error; needed by ``allocation=certified``.
        found: A survey of the same model and inputs that reaches the budgets.
        limit: Bound that must not grow at ``tau=1``; of a certifiable model by default the one
            from norms.

    Returns:
        The smaller model and the decisions.
    """
    adapter = adapter_for(model, inputs)
    if settings.allocation == "certified" and gains is None:
        raise ConfigError(
            "compress.allocation=certified: expected a model with a certificate; "
            "choose uniform, global or rms"
        )
    if found is None and (settings.allocation != "uniform" or settings.order == "one_shot"):
        found = survey(adapter, inputs, settings)
    targets = chosen_targets(adapter, settings)
    counts = share_budget(adapter, targets, inputs, settings, found=found, gains=gains)

    comp = settings.comp_for(certifiable=adapter.certifiable)
    is_held = adapter.certifiable and comp == "lsq_capped" and settings.tau == 1

    def prune_at(tau: float) -> Pruning:
        capped = dataclasses.replace(settings, tau=tau)
        return _prune(adapter, targets, inputs, counts, capped, found, is_shown=not is_held)

    if not is_held:
        return prune_at(settings.tau)
    pruning: Pruning = fit_within(prune_at, limit or naive_limit(model))
    if settings.order == "sequential":
        for fit in pruning.fits:
            _show(fit)
    return pruning


def _prune(
    adapter: Adapter,
    targets: Sequence[Target],
    inputs: Tensor,
    counts: Mapping[str, int],
    settings: CompressConfig,
    found: Survey | None,
    *,
    is_shown: bool,
) -> Pruning:
    """Refit and cut for counts that are decided."""
    copy = adapter.working_copy()
    if settings.order == "one_shot":
        assert found is not None
        fits = _fit_at_once(copy, targets, found, counts, settings)
        _recalibrate(copy, inputs, settings)
    else:
        fits = _fit_in_order(copy, targets, inputs, counts, settings, is_shown=is_shown)
    pruned = copy.cut({fit.target.name: fit.kept_K for fit in fits})
    is_capped = settings.comp_for(certifiable=adapter.certifiable) == "lsq_capped"
    return Pruning(model=pruned, fits=tuple(fits), tau=settings.tau if is_capped else None)


def _fit_at_once(
    copy: Adapter,
    targets: Sequence[Target],
    found: Survey,
    counts: Mapping[str, int],
    settings: CompressConfig,
) -> list[Fit]:
    """Fit every place on what the dense model feeds it."""
    fits = []
    for target in targets:
        fit = fit_target(
            copy,
            target,
            found.statistics.fitted[target.name],
            found.statistics.held[target.name],
            counts[target.name],
            settings,
            ranking=found.rankings[target.name],
        )
        copy.write(target, fit.weight_IO, fit.bias_O)
        fits.append(fit)
    return fits


def _recalibrate(copy: Adapter, inputs: Tensor, settings: CompressConfig) -> None:
    """Walk through a model whose normalisation statistics belong to its old weights."""
    if not copy.normalises:
        return
    streams = Streams(copy, inputs, settings.holdout)
    for stage in copy.stages():
        copy.recalibrate(stage, streams.fitted)
        streams.advance(stage)


def _fit_in_order(
    copy: Adapter,
    targets: Sequence[Target],
    inputs: Tensor,
    counts: Mapping[str, int],
    settings: CompressConfig,
    *,
    is_shown: bool,
) -> list[Fit]:
    """Fit each place on activations that the already pruned places before it produce."""
    streams = Streams(copy, inputs, settings.holdout)
    named = {target.name: target for target in targets}
    fits = []
    for stage in copy.stages():
        for name in stage.targets:
            if name not in named:
                continue
            target = named[name]
            moments = streams.moments(stage, target)
            fit = fit_target(copy, target, *moments, counts[name], settings)
            copy.write(target, fit.weight_IO, fit.bias_O)
            fits.append(fit)
            if is_shown:
                _show(fit)
        copy.recalibrate(stage, streams.fitted)
        if len(fits) == len(targets):
            break
        streams.advance(stage)
    return fits


def _show(fit: Fit) -> None:
    warn_if_few(fit.rows, fit.target)
    log.info(
        "%s: kept %d of %d components, relative error %.2e (held out %.2e)",
        fit.target.name,
        len(fit.kept_K) // fit.target.unit,
        fit.target.components,
        fit.error,
        fit.held_error,
    )
