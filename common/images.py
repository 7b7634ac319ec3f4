"""Images for classifiers: digits without network, CIFAR-10, and arrays of one's own.

Nothing is unpickled: the published ``data_batch_*`` files of CIFAR-10's Python version are refused,
its binary version, parquet tables and ``npz`` arrays are read.
"""

# Legend: N images, I pixels.

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.config import check_types, one_of, positive, within
from common.errors import BackendError, DataError
from common.image_files import read_hub, read_path

SOURCES = ("digits", "cifar10", "local")
_BRIGHTEST_DIGIT = 16.0
CIFAR10_HUB = "uoft-cs/cifar10"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """A classification data set in two parts.

    Attributes:
        train_NI: Training pixels in [0, 1], float32.
        train_labels_N: Their classes, int64; some are wrong when label noise was asked for.
        val_NI: Validation pixels in [0, 1], float32.
        val_labels_N: Their classes, int64; never noisy.
        classes: Number of classes.
    """

    train_NI: Tensor
    train_labels_N: Tensor
    val_NI: Tensor
    val_labels_N: Tensor
    classes: int

    @property
    def inputs(self) -> int:
        """Pixels per image (I), colours included."""
        return int(self.train_NI.shape[1])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """Which images.

    Attributes:
        source: ``digits`` (1,797 images of 8 x 8, carried by scikit-learn), ``cifar10`` (from
            ``path``, or the hub), ``local`` (from ``path``).
        path: Folder with CIFAR-10's binary version (``data_batch_1.bin`` ... ``test_batch.bin``)
            or with ``train*.parquet`` and ``test*.parquet``, or an ``npz`` file with ``x_train``,
            ``y_train``, ``x_test`` and ``y_test``. The test part is the validation split.
        val_fraction: Share of the digits that is held out, above 0, at most 0.5.
        label_noise: Share of the training labels that is made wrong, 0 to 1.
        seed: Of the digits' division and of the label noise, whatever the training seed.
    """

    source: str = "digits"
    path: str | None = None
    val_fraction: float = 0.2
    label_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        one_of("data.source", self.source, SOURCES)
        positive("data.val_fraction", self.val_fraction)
        within("data.val_fraction", self.val_fraction, 0.0, 0.5)
        within("data.label_noise", self.label_noise, 0.0, 1.0)
        positive("data.seed", self.seed, zero=True)
        if self.source == "local" and self.path is None:
            raise DataError("data.path=null: expected a folder or npz file with images; set it")


def load_images(config: ImageConfig) -> Images:
    """Return the images that a configuration asks for.

    Raises:
        DataError: for missing, damaged or pickled files, or an unreachable hub.
        BackendError: when scikit-learn, datasets, pyarrow or Pillow is needed and missing.
    """
    if config.source == "digits":
        images = load_digits(config.val_fraction, config.seed)
    else:
        train, val = (
            read_hub(CIFAR10_HUB)
            if config.path is None
            else read_path(Path(config.path).expanduser())
        )
        images = _images(train, val)
    labels_N = with_label_noise(
        images.train_labels_N, images.classes, config.label_noise, config.seed
    )
    return dataclasses.replace(images, train_labels_N=labels_N)


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
    pixels = torch.from_numpy((digits.data[order] / _BRIGHTEST_DIGIT).astype(np.float32))
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    held = max(1, round(val_fraction * len(labels)))
    return Images(
        train_NI=pixels[held:],
        train_labels_N=labels[held:],
        val_NI=pixels[:held],
        val_labels_N=labels[:held],
        classes=len(digits.target_names),
    )


def with_label_noise(labels_N: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """Return labels of which exactly ``round(share * N)`` are wrong, chosen by ``seed``.

    Each chosen label becomes one of the other classes, all equally likely.
    """
    count = round(share * len(labels_N))
    if not count or classes < 2:
        return labels_N
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    chosen = torch.from_numpy(generator.permutation(len(labels_N))[:count])
    shift = torch.from_numpy(generator.integers(1, classes, size=count))
    noisy_N = labels_N.clone()
    noisy_N[chosen] = (labels_N[chosen] + shift) % classes
    return noisy_N


def _images(train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]) -> Images:
    """Flatten pixels (uint8 of 0 to 255, or floats of 0 to 1) of two parts."""
    classes = int(max(train[1].max(), val[1].max())) + 1
    parts = [torch.from_numpy(_pixels(part[0])) for part in (train, val)]
    labels = [torch.from_numpy(part[1].astype(np.int64)) for part in (train, val)]
    return Images(
        train_NI=parts[0],
        train_labels_N=labels[0],
        val_NI=parts[1],
        val_labels_N=labels[1],
        classes=classes,
    )


def _pixels(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(len(values), -1)
    if flat.dtype == np.uint8:
        return flat.astype(np.float32) / np.float32(255)
    flat = flat.astype(np.float32)
    if not (np.isfinite(flat).all() and flat.min() >= 0 and flat.max() <= 1):
        raise DataError(
            f"pixels from {flat.min():g} to {flat.max():g}: expected bytes, or numbers from 0 to "
            "1; scale them"
        )
    return flat
