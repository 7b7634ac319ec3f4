"""Frozen features with labels and groups, for heads that must serve every group."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import ConfigError
from solvers.library.known import normal, uniform

# Shape letters: N examples, D features, G groups.

_MINORITY = 0.5  # each group has half the examples of the group before it
_CORRUPTED = 0.1  # share of wrong labels


class Examples(NamedTuple):
    """Features (N, D) float64, labels -1 or +1 (N,), group numbers (N,) with none empty."""

    features_ND: Tensor
    label_N: Tensor
    group_N: Tensor


def read_examples(
    data: str, dim: int, count: int, groups: int, generator: torch.Generator
) -> Examples:
    """Return the examples that a name stands for.

    Args:
        data: ``synthetic``, ``digits`` or the directory of an image classifier.
        dim: Synthetic features per example.
        count: Synthetic examples.
        groups: Synthetic groups, at most ``count``.
        generator: Of the synthetic examples.

    Raises:
        ConfigError: for more groups than examples, or a bundle that is no digits classifier.
        BackendError: when the digits need scikit-learn and it is not installed.
    """
    if data == "synthetic":
        return synthetic(dim, count, groups, generator)
    return digits() if data == "digits" else digits(Path(data))


def synthetic(dim: int, count: int, groups: int, generator: torch.Generator) -> Examples:
    """Return groups of halving size whose separating directions disagree in part."""
    if groups > count:
        raise ConfigError(f"groups={groups}: expected at most components={count}")
    shares_G = _MINORITY ** torch.arange(groups, dtype=torch.float64)
    group_N = torch.multinomial(shares_G, count, replacement=True, generator=generator)
    group_N[:groups] = torch.arange(groups)
    features_ND = normal(generator, count, dim) / dim**0.5
    shared, own_GD = normal(generator, dim), normal(generator, groups, dim)
    score_N = (features_ND * (shared + own_GD[group_N])).sum(1)
    flip_N = uniform(generator, count) < _CORRUPTED
    label_N = torch.where(flip_N, -score_N.sign(), score_N.sign())
    return Examples(features_ND, label_N, group_N)


@torch.no_grad()
def digits(classifier: Path | None = None) -> Examples:
    """Return the digits, odd against even, a group per digit.

    Args:
        classifier: Directory of an image classifier on them; None takes the pixels.

    Raises:
        ConfigError: for a bundle that is no classifier of 64 pixels.
        BackendError: without scikit-learn, which carries the digits.
    """
    from common.images import load_digits

    images = load_digits()
    pixels_NI, digit_N = images.train_NI, images.train_labels_N
    features_ND = pixels_NI if classifier is None else hidden_features(classifier, pixels_NI)
    features_ND = features_ND.double()
    features_ND = features_ND - features_ND.mean(0)
    features_ND = features_ND / features_ND.norm(dim=1).max()
    bias_N1 = torch.ones(len(features_ND), 1, dtype=torch.float64)
    return Examples(torch.cat((features_ND, bias_N1), 1), 2.0 * (digit_N % 2) - 1, digit_N)


@torch.no_grad()
def hidden_features(path: Path, pixels_NI: Tensor) -> Tensor:
    """Return the activations (N, D) before the last layer of a classifier.

    Args:
        path: Directory of its bundle.
        pixels_NI: Flattened images (N, I), float32.

    Raises:
        ConfigError: for a bundle that is no classifier of I pixels.
        BundleError: for a directory without a bundle.
    """
    from common.bundle import load_bundle
    from common.models.classifier import LipschitzMLP

    model = load_bundle(path).model
    if not isinstance(model, LipschitzMLP) or model.sizes[0] != pixels_NI.shape[1]:
        raise ConfigError(
            f"data={path}: expected synthetic, digits or the bundle of a classifier of "
            f"{pixels_NI.shape[1]} pixels"
        )
    for linear in model.linears[:-1]:
        pixels_NI = model.activate(linear(pixels_NI))
    return pixels_NI
