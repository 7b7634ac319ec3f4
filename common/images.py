"""Images for classifiers: the handwritten digits that scikit-learn carries, without network."""

# Legend: N images, I pixels.

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.config import positive, within
from common.errors import BackendError

_BRIGHTEST = 16.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """A classification data set in two parts.

    Attributes:
        train_NI: Training pixels in [0, 1], float32.
        train_labels_N: Their classes, int64.
        val_NI: Validation pixels in [0, 1], float32.
        val_labels_N: Their classes, int64.
        classes: Number of classes.
    """

    train_NI: Tensor
    train_labels_N: Tensor
    val_NI: Tensor
    val_labels_N: Tensor
    classes: int


def load_digits(val_fraction: float = 0.2, seed: int = 0) -> Images:
    """Return the 1,797 digits of 8 x 8 pixels, shuffled and divided.

    Args:
        val_fraction: Share held out, above 0, at most 0.5.
        seed: Of the shuffle.

    Raises:
        ConfigError: for an impossible share.
        BackendError: when scikit-learn is not installed.
    """
    positive("val_fraction", val_fraction)
    within("val_fraction", val_fraction, 0.0, 0.5)
    try:
        from sklearn import datasets
    except ImportError:
        raise BackendError("the digits need scikit-learn: pip install scikit-learn") from None
    digits = datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    pixels = torch.from_numpy((digits.data[order] / _BRIGHTEST).astype(np.float32))
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    held = max(1, round(val_fraction * len(labels)))
    return Images(
        train_NI=pixels[held:],
        train_labels_N=labels[held:],
        val_NI=pixels[:held],
        val_labels_N=labels[:held],
        classes=len(digits.target_names),
    )
