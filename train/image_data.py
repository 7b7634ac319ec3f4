"""Shuffled images, by number: every epoch is one permutation of the training split."""

# Legend: N images, B batch, I pixels.

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from common.errors import ConfigError
from common.images import Images
from train.batch_stream import StreamDataModule


def image_indices(num_images: int, batch_size: int, *, seed: int, index: int) -> Tensor:
    """Return which images training batch ``index`` holds: every epoch is one permutation.

    Args:
        num_images: Training images (N), at least ``batch_size``.
        batch_size: Images (B).
        seed: Seed of the run.
        index: Number in the sequence of all ranks, from 0.

    Returns:
        Indices (B,), int64; the incomplete batch at the end of an epoch is dropped.
    """
    epoch, position = divmod(index, num_images // batch_size)
    order_N = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_images)
    return torch.from_numpy(order_N[position * batch_size : (position + 1) * batch_size])


class ImageDataModule(StreamDataModule):
    """Shuffled training batches, and the whole validation split in order.

    Args:
        images: The data.
        batch_size: Training images per rank and batch.
        seed: Seed of the run.
        val_batch_size: Images per validation batch.

    Raises:
        ConfigError: for a batch larger than the training split.
    """

    def __init__(self, images: Images, batch_size: int, *, seed: int, val_batch_size: int):
        super().__init__()
        if batch_size > len(images.train_NI):
            raise ConfigError(
                f"trainer.batch_size={batch_size}: expected at most the {len(images.train_NI)} "
                "training images; lower it"
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.val_batch_size = val_batch_size

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return pixels (B, I) and labels (B,) of training batch ``index``."""
        chosen_B = image_indices(
            len(self.images.train_NI), self.batch_size, seed=self.seed, index=index
        )
        return self.images.train_NI[chosen_B], self.images.train_labels_N[chosen_B]

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches in order, this rank's share of them."""
        columns = (self.images.val_NI, self.images.val_labels_N)
        dataset = TensorDataset(*map(self.shared_out, columns))
        return DataLoader(dataset, batch_size=self.val_batch_size)
