"""Recovery on retained data after an edit, and the guard against the class coming back with it.

The features of a class can often be computed from the remaining weights: refitting them on retained
data alone may restore it completely (arXiv 2511.19566's predecessor reports the same of BatchNorm
statistics). So the class is measured again after every recovery.
"""

# Legend: I inputs of a map, O its outputs, P patterns of chosen inputs.

import dataclasses

import torch
from torch import Tensor

from common.errors import ConfigError
from compress.compensate import compensate
from compress.targets import Problem
from compress.unlearning.edits import Edit, clip_by_scale

RECOVERIES = ("none", "lsq")


def recover(problem: Problem, edit: Edit, cap: float) -> Tensor:
    """Refit the weights that an edit left alone, so that retained outputs come back.

    Args:
        problem: Gram of retained data only, and the map before the edit.
        edit: What was done; its chosen weights stay as they are.
        cap: Largest spectral norm of the result.

    Returns:
        New weights (I, O): per output, least squares over the weights that are free.
    """
    gap_IO = problem.weight_IO - edit.weight_IO
    missing_IO = torch.where(edit.chosen_IO, gap_IO, problem.weight_IO)
    refit = dataclasses.replace(problem, weight_IO=missing_IO)
    new_IO = edit.weight_IO.clone()
    # Outputs that lost the same inputs share one factorisation.
    patterns_IP, pattern_O = torch.unique(edit.chosen_IO, dim=1, return_inverse=True)
    for index, chosen_I in enumerate(patterns_IP.unbind(1)):
        free_K = (~chosen_I).nonzero().flatten()
        if not len(free_K):
            continue
        outputs = (pattern_O == index).nonzero().flatten()
        part = dataclasses.replace(refit, weight_IO=missing_IO[:, outputs])
        new_IO[free_K[:, None], outputs] = compensate(part, free_K, "lsq_capped", cap=cap)
    return clip_by_scale(new_IO, cap)


def rebound(before: float, edited: float, recovered: float) -> float:
    """Return the share of the forgetting that a recovery undid.

    Args:
        before: What the model knew of the class, larger is more.
        edited: The same after the edit.
        recovered: The same after the recovery.
    """
    forgotten = before - edited
    return (recovered - edited) / forgotten if forgotten > 0 else 0.0


def guard(before: float, edited: float, recovered: float, limit: float) -> float:
    """Return the rebound if it is within its limit.

    Raises:
        ConfigError: when the recovery brought the class back.
    """
    share = rebound(before, edited, recovered)
    if share > limit:
        raise ConfigError(
            f"unlearn.recovery: refitting on retained data brought {share:.0%} of the class back "
            f"({before:.4g} before, {edited:.4g} edited, {recovered:.4g} recovered), expected at "
            f"most unlearn.rebound={limit:g}; nothing was written; set unlearn.recovery=none"
        )
    return share
