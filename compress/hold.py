"""Pruning under the certificate of the whole network: it does not grow, and it is used up.

Caps keep each block's product of norms. Two things remain. Biases also move the radii on which
later blocks are bounded, by parts in 100,000 in either direction: slightly smaller refits make up
for that. And what is removed frees much of the bound: the caps then rise as far as it allows.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from common.certificate import Certificate
from compress.adapters import adapter_for
from compress.deviation.recertify import recertify
from compress.fit import Fit
from solvers.bounds import certify

log = logging.getLogger(__name__)

SHRINKS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Fractions by which refitted weights are made smaller, until one is enough."""
WORTH = 1.02
"""Least factor between the dense bound and the pruned one that is worth more fits."""
NEAR = 1.001
"""Factor above the dense bound up to which slightly smaller weights are the remedy."""
HIGHEST, HALVINGS = 4.0, 4
"""Bisection of the common cap, in its logarithm: above 1, or below it where 1 is too much."""


class Limit(NamedTuple):
    """A bound that must not grow.

    Attributes:
        most: Its value for the dense model.
        prove: From a ``Pruning`` to a certificate of the pruned model.
        number: Which number of the certificate it is.
    """

    most: float
    prove: Callable[[Any], Any]
    number: str = "naive"

    def proved(self, pruning: Any) -> Any:
        """Return the pruning together with the proof of its model."""
        return dataclasses.replace(pruning, proof=self.prove(pruning))

    def of(self, pruning: Any) -> float:
        """Return the value for a pruned model, from its proof if there is one."""
        proof = pruning.proof or self.prove(pruning)
        return float(getattr(proof, self.number))

    def allows(self, pruning: Any) -> bool:
        """Return whether a pruned model stays within."""
        return self.of(pruning) <= self.most


def naive_limit(dense: Any) -> Limit:
    """Return the limit by the bound from norms of a certifiable model."""
    most = certify(dense, tighten=False).naive
    return Limit(most, lambda pruning: certify(pruning.model, tighten=False))


def certified_limit(dense: Any, certificate: Certificate, hold: str = "tightened") -> Limit:
    """Return the limit by a transformer's certificate.

    Args:
        dense: The model before pruning.
        certificate: Its proof.
        hold: ``tightened``: the proved constant where solvers tightened it, else the bound from
            norms; ``naive``: always the latter.
    """
    if hold == "naive" or not certificate.multipliers:
        return naive_limit(dense)

    def prove(pruning: Any) -> Certificate:
        return recertify(dense, pruning.model, pruning.kept, certificate)

    return Limit(certificate.tightened, prove, "tightened")


def fit_within(prune_at: Callable[[float], Any], limit: Limit) -> Any:
    """Return the pruning with the highest caps under which a bound of the network does not grow.

    Args:
        prune_at: From ``tau``, the allowed growth of each block's norms, to a ``Pruning``.
        limit: The bound.

    Returns:
        The pruning without caps where the bound allows it, or nothing was removed; else with the
        highest caps that it allows; at ``tau = 1``, held, where none of a few does. With its proof,
        unless nothing was removed.

    Source:
        Own derivation: the certificate is a product over blocks, so blocks may share its slack.
    """
    free = prune_at(math.inf)
    is_smaller = any(len(fit.kept_K) < fit.target.inputs for fit in free.fits)
    if not is_smaller:
        return free
    free = _tried(free, limit)
    if limit.allows(free):
        return free
    best = _tried(prune_at(1.0), limit)
    found = limit.of(best)
    if limit.most < found <= NEAR * limit.most:
        return hold_bound(best, limit)
    if limit.most / WORTH <= found <= limit.most:
        return best
    low, high = (1.0, HIGHEST) if found <= limit.most else (1 / HIGHEST, 1.0)
    chosen = None
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        candidate = _tried(prune_at(middle), limit)
        if limit.allows(candidate):
            low, chosen = middle, candidate
        else:
            high = middle
    return hold_bound(best, limit) if chosen is None else chosen


def _tried(pruning: Any, limit: Limit) -> Any:
    """Prove a candidate of the search, and say so in a line."""
    proved = limit.proved(pruning)
    log.info(
        "caps at %.3g times the blocks' norms: %s bound %.6g, at most %.6g",
        pruning.tau,
        limit.number,
        limit.of(proved),
        limit.most,
    )
    return proved


def hold_bound(pruning: Any, limit: Limit) -> Any:
    """Shrink refitted maps until a bound of the network does not exceed its limit.

    Args:
        pruning: The pruned model is changed in place.
        limit: The bound.

    Returns:
        The pruning with its account of the fits brought in step. With biases even the largest
        fraction may not be enough; the log then says so, and nothing is changed.
    """
    if limit.allows(pruning):
        return pruning
    adapter = adapter_for(pruning.model)
    names = {fit.target.name for fit in pruning.fits}
    places = [target for target in adapter.targets() if target.name in names]
    weights = {place.name: adapter.weight(place) for place in places}
    for shrink in SHRINKS:
        for place in places:
            adapter.write(place, (1 - shrink) * weights[place.name])
        held = limit.proved(pruning)
        if limit.allows(held):
            dtype = next(pruning.model.parameters()).dtype
            fits = tuple(_shrunk(fit, shrink, dtype) for fit in pruning.fits)
            return dataclasses.replace(held, fits=fits)
    for place in places:
        adapter.write(place, weights[place.name])
    log.warning(
        "the bound after pruning is above the dense one, %.6g; biases outweigh the caps, lower "
        "compress.tau if it matters",
        limit.most,
    )
    return pruning


def _shrunk(fit: Fit, shrink: float, dtype: torch.dtype) -> Fit:
    """Return the account of a fit whose weights were made smaller.

    What the place loses is then ``1 - shrink`` times what the fit lost and ``shrink`` times all of
    its output: the triangle inequality bounds the new error by the old one.
    """

    def error(old: float) -> float:
        return ((1 - shrink) * math.sqrt(old) + shrink) ** 2

    return dataclasses.replace(
        fit,
        weight_IO=((1 - shrink) * fit.weight_IO).to(dtype).double(),
        error=error(fit.error),
        held_error=error(fit.held_error),
    )
