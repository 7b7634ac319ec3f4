"""How far the last features may move before a right answer can change: for certified radii.

The *margin* of an input is the smallest ``(z_top - z_j) / |U_top - U_j|`` over the other classes
j, with rows U of the last matrix. Divided by a proved bound on everything before that matrix it is
a certified radius of the input, so that every later certificate of the weights reuses the file.
"""

# Legend: N windows or images, T token position, I pixels, V classes or vocabulary, M margins.

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.certificate import Certificate, product_up
from common.models import LipschitzMLP, LipschitzTransformer
from solvers.robustness.domain import median_row_distance
from solvers.robustness.images import feature_bound, forward_error
from solvers.robustness.radii import PairNorms, certified_radii

MARGINS_FILE = "margins.json"
# Positions of the validation text that are read: 0.4 % standard error of a share.
MOST_POSITIONS = 16384
# Points of the stored curve; logits held at once, elements.
CURVE_POINTS = 200
_BATCH_ELEMENTS = 2**23
# Stands for "any distance": JSON has no infinity.
_FARTHEST = 1e300


def text_margins(
    model: LipschitzTransformer, windows_NT: Tensor, certificate: Certificate
) -> dict[str, Any]:
    """Measure the margins of text positions, in float64.

    Args:
        model: On any device; not modified.
        windows_NT: Ids (N, T + 1): inputs and their next tokens.
        certificate: Of these weights; its naive bound on the blocks is stored beside.

    Returns:
        See ``summary``; lengths are l2 per token, their unit the median embedding distance.
    """
    margins_M = stream_margins(model, windows_NT)
    bound = product_up([block.naive for block in certificate.blocks])
    return summary(margins_M, bound, "embedding", median_row_distance(model))


def image_margins(model: LipschitzMLP, images_NI: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """Measure the margins of images, in float64.

    Returns:
        See ``summary``; lengths are l2 over all pixels, their unit 1.
    """
    exact = copy.deepcopy(model).double().eval()
    head_VC = exact.linears[-1].weight
    margins_N = _margins(exact, head_VC, 1.0, images_NI.double(), labels_N)
    return summary(margins_N, feature_bound(model), "pixels", 1.0)


def summary(margins_M: Tensor, bound: float, unit: str, length: float) -> dict[str, Any]:
    """Return the content of ``margins.json``.

    Args:
        margins_M: Margins, -1 where the answer is wrong.
        bound: Proved l2 to l2 constant of everything before the last matrix.
        unit: ``embedding`` or ``pixels``.
        length: Unit of the radii that a report shows, l2.

    Returns:
        JSON types: ``inputs`` read and the share answered right (``accuracy``); ``naive_bound``,
        None if it overflows; ``unit`` and ``unit_length``; and the curve ``radii`` (l2 of the
        features, increasing) and ``shares``: at least ``shares[k]`` of all inputs are right and
        have a margin of ``radii[k]`` or more.
    """
    radii, shares = margin_curve(margins_M.numpy())
    return {
        "inputs": margins_M.numel(),
        "accuracy": float((margins_M >= 0).double().mean()),
        "naive_bound": bound if math.isfinite(bound) else None,
        "unit": unit,
        "unit_length": length,
        "radii": radii,
        "shares": shares,
    }


@torch.no_grad()
def stream_margins(model: LipschitzTransformer, windows_NT: Tensor) -> Tensor:
    """Return the margin of every position (M,), float64 on the CPU; -1 where the answer is wrong.

    Args:
        model: Not modified; a float64 copy of it is evaluated.
        windows_NT: Ids (N, T + 1): inputs and their next tokens.
    """
    exact = copy.deepcopy(model).double().eval()
    head_VC = exact.head.weight[: exact.config.vocab_size]
    inputs_NT, next_NT = windows_NT[:, :-1], windows_NT[:, 1:]
    return _margins(exact, head_VC, exact.config.final_scale, inputs_NT, next_NT)


@torch.no_grad()
def _margins(
    exact: nn.Module, head_VC: Tensor, scale: float, inputs: Tensor, answers: Tensor
) -> Tensor:
    classify: Callable[[Tensor], Tensor] = exact
    pairs = PairNorms(head_VC, scale)
    rows = max(1, _BATCH_ELEMENTS // (answers[0].numel() * len(head_VC)))
    found = []
    for batch, answers_B in zip(inputs.split(rows), answers.split(rows), strict=True):
        logits_MV = classify(batch.to(head_VC.device)).flatten(0, -2)
        error = forward_error(exact, batch) if isinstance(exact, LipschitzMLP) else 0.0
        movement_MV = pairs.of(logits_MV.argmax(dim=1))
        top_M, margins_M = certified_radii(logits_MV, movement_MV, error)
        is_right_M = top_M == answers_B.flatten().to(top_M.device)
        found.append(torch.where(is_right_M, margins_M.clamp(max=_FARTHEST), -1.0).cpu())
    return torch.cat(found)


def margin_curve(margins_M: np.ndarray) -> tuple[list[float], list[float]]:
    """Return radii and shares of a falling curve that never lies above the observed one.

    Args:
        margins_M: Margins, negative where the answer is wrong; at least one.
    """
    right_M = np.sort(margins_M[margins_M >= 0])
    if not len(right_M):
        return [0.0], [0.0]
    index = np.unique(np.linspace(0, len(right_M) - 1, CURVE_POINTS).astype(np.int64))
    shares = (len(right_M) - index) / len(margins_M)
    return right_M[index].tolist(), shares.tolist()
