"""Pruning under the naive bound of the whole network: it does not grow, and it is used up.

Caps keep each block's product of norms. Two things remain. Biases also move the radii on which
later blocks are bounded, by parts in 100,000 in either direction: slightly smaller refits make up
for that. And removed heads free much of the bound: the caps then rise as far as it allows.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from compress.adapters import adapter_for
from compress.fit import Fit
from compress.targets import Target
from solvers.bounds import certify

log = logging.getLogger(__name__)

SHRINKS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Fractions by which refitted weights are made smaller, until one is enough."""
WORTH = 1.02
"""Least factor between the dense bound and the pruned one that is worth more fits."""
HIGHEST, HALVINGS = 4.0, 3
"""Bisection of the common cap, in its logarithm, where no cap at all is too much."""


def fit_within(dense: Any, prune_at: Callable[[float], Any]) -> Any:
    """Return the pruning with the highest caps under which the naive bound does not grow.

    Args:
        dense: Certifiable model before pruning.
        prune_at: From ``tau``, the allowed growth of each block's norms, to a ``Pruning``.

    Returns:
        The pruning at ``tau = 1``, held; or one with higher caps where the bound leaves room.

    Source:
        Own derivation: the certificate is a product over blocks, so blocks may share its slack.
    """
    limit = _naive(dense)
    best = prune_at(1.0)
    shrink = hold_bound(dense, best.model, [fit.target for fit in best.fits])
    if shrink:
        dtype = next(best.model.parameters()).dtype
        best = dataclasses.replace(best, fits=tuple(_shrunk(f, shrink, dtype) for f in best.fits))
    if _naive(best.model) * WORTH > limit:
        return best
    free = prune_at(math.inf)
    if _naive(free.model) <= limit:
        return free
    low, high = 1.0, HIGHEST
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        candidate = prune_at(middle)
        if _naive(candidate.model) <= limit:
            low, best = middle, candidate
        else:
            high = middle
    if low > 1:
        log.info("caps raised to %.3g times the blocks' norms: the whole bound allows it", low)
    return best


def hold_bound(dense: Any, pruned: Any, targets: Iterable[Target]) -> float:
    """Shrink refitted maps until the naive bound of the network is at most the dense one.

    Args:
        dense: Certifiable model before pruning.
        pruned: After pruning; its maps are changed in place.
        targets: The pruned places of the dense model.

    Returns:
        The fraction by which the weights were made smaller; 0 where nothing had to be done. With
        biases even the largest one may not be enough; the log then says so.
    """
    limit = _naive(dense)
    adapter = adapter_for(pruned)
    names = {target.name for target in targets}
    places = [target for target in adapter.targets() if target.name in names]
    weights = {place.name: adapter.weight(place) for place in places}
    for shrink in SHRINKS:
        for place in places if shrink else ():
            adapter.write(place, (1 - shrink) * weights[place.name])
        if _naive(pruned) <= limit:
            return shrink
    for place in places:
        adapter.write(place, weights[place.name])
    log.warning(
        "naive bound after pruning above the dense one, %.6g; biases outweigh the caps, lower "
        "compress.tau if it matters",
        limit,
    )
    return 0.0


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


def _naive(model: Any) -> float:
    return certify(model, tighten=False).naive
