"""The proof of a changed model, started from the multipliers of the model it was made from.

Any multipliers are sound, so those of the neurons and heads that stay are a proof as they are; a
short search improves on them. Source: spec modhifi 5.5.
"""

# Legend: K kept inputs.

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.certificate import Certificate, config_sha256, tensors_sha256
from compress.adapters import LipschitzAdapter
from solvers.bounds import TightenSettings, certify
from solvers.bounds.warm import warm_multipliers

EVALS = 60
"""Eigen-decompositions per search that come within a few per cent of a search from scratch."""
EVALS_PER_STEP = 4
"""Eigen-decompositions per step of the joint search, which costs about as much."""


def recertify(
    dense: Any,
    changed: Any,
    kept: Mapping[str, Tensor],
    certificate: Certificate,
    *,
    max_evals: int = EVALS,
    tighten: bool = True,
    known: Certificate | None = None,
) -> Certificate:
    """Certify a changed transformer.

    Args:
        dense: Transformer before the change.
        changed: After it.
        kept: Kept input indices per target name; all of them where none is named.
        certificate: Proof of the dense transformer.
        max_evals: Effort: eigen-decompositions per search. 0 takes the old multipliers, or closed
            forms where there are none.
        tighten: False for the bound from norms alone, the fastest.
        known: A certificate that may already be one of the changed weights, perhaps tightened.

    Returns:
        A certificate of exactly the changed weights; the given one where nothing has changed.
    """
    if _is_of(certificate, changed):
        return certificate
    if known is not None and (known.multipliers or not tighten) and _is_of(known, changed):
        return known
    steps = min(max_evals // EVALS_PER_STEP, TightenSettings().steps(dense.config.width))
    settings = TightenSettings(max_evals=max_evals, stream_steps=steps)
    warm = warm_multipliers(certificate.multipliers, _survivors(dense, kept)) if tighten else None
    return certify(changed, tighten, settings=settings, warm=warm)


def _is_of(certificate: Certificate, model: Any) -> bool:
    """Return whether a certificate speaks about exactly these weights and this configuration."""
    is_same = certificate.config_sha256 == config_sha256(model.config)
    return is_same and certificate.weights_sha256 == tensors_sha256(model.state_dict())


def _survivors(dense: Any, kept: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return the old positions of kept query heads and neurons (or pairs), per block."""
    found = {}
    for target in LipschitzAdapter(dense).targets():
        if target.name in kept:
            is_heads = target.kind == "heads"
            size = dense.config.layer(target.layer).head_dim if is_heads else target.unit
            index = 2 * target.layer + (not is_heads)
            found[index] = kept[target.name].cpu()[::size] // size
    return found
