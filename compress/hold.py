"""The last step of pruning under a certificate: the whole network's naive bound does not grow.

Caps keep each block's product of norms, but biases also move the radii on which later blocks are
bounded: by parts in 100,000, in either direction. A slightly smaller refit makes up for that.
"""

import logging
from collections.abc import Iterable
from typing import Any

from compress.adapters import adapter_for
from compress.targets import Target
from solvers.bounds import certify

log = logging.getLogger(__name__)

SHRINKS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Fractions by which refitted weights are made smaller, until one is enough."""


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
    limit = certify(dense, tighten=False).naive
    adapter = adapter_for(pruned)
    names = {target.name for target in targets}
    places = [target for target in adapter.targets() if target.name in names]
    weights = {place.name: adapter.weight(place) for place in places}
    for shrink in SHRINKS:
        for place in places if shrink else ():
            adapter.write(place, (1 - shrink) * weights[place.name])
        if certify(pruned, tighten=False).naive <= limit:
            return shrink
    for place in places:
        adapter.write(place, weights[place.name])
    log.warning(
        "naive bound after pruning above the dense one, %.6g; biases outweigh the caps, lower "
        "compress.tau if it matters",
        limit,
    )
    return 0.0
