"""Shuffled images as a stateful Lightning DataModule.

Batch k of rank r is a pure function of (seed, k, r), as for text: resuming needs the counter alone.
"""

# Legend: N images, B batch, I pixels.

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from common.errors import ConfigError
from common.images import Images


def image_indices(
    num_images: int, batch_size: int, *, seed: int, index: int, rank: int = 0, world: int = 1
) -> Tensor:
    """Return which images batch ``index`` of a rank holds: every epoch is one permutation.

    Args:
        num_images: Training images (N).
        batch_size: Images per rank and batch (B), cut to what one epoch can give each rank.
        seed: Seed of the run.
        index: Batch number k of this rank, from 0.
        rank: Data-parallel rank.
        world: Number of ranks; together they take ``world * B`` different images.

    Returns:
        Indices (B,), int64; the incomplete batch at the end of an epoch is dropped.
    """
    batch_size = max(1, min(batch_size, num_images // world))
    per_epoch = max(1, num_images // (batch_size * world))
    epoch, position = divmod(index, per_epoch)
    order_N = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_images)
    start = (position * world + rank) * batch_size
    return torch.from_numpy(order_N[start : start + batch_size])


class Batches(IterableDataset):
    """The endless stream of training batches of one rank, starting at any batch number."""

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.first, self.rank, self.world = first, rank, world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        index = self.first
        while True:
            chosen_B = image_indices(
                len(self.images.train_NI),
                self.batch_size,
                seed=self.seed,
                index=index,
                rank=self.rank,
                world=self.world,
            )
            yield self.images.train_NI[chosen_B], self.images.train_labels_N[chosen_B]
            index += 1


class ImageDataModule(L.LightningDataModule):
    """Shuffled training batches, and the whole validation split in order.

    ``consumed`` counts training batches and is saved with checkpoints; the training step advances
    it.

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
        self.consumed = 0

    @property
    def images_per_batch(self) -> int:
        """Images in one batch of one rank."""
        return max(1, min(self.batch_size, len(self.images.train_NI) // self._world))

    def train_dataloader(self) -> DataLoader:
        """Return the stream of batches (B, I), (B,) that continues after the consumed ones."""
        stream = Batches(
            self.images,
            self.batch_size,
            seed=self.seed,
            first=self.consumed,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world=self._world,
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches, sharded by rank where there are enough images."""
        x_NI, labels_N = self.images.val_NI, self.images.val_labels_N
        if self.trainer is not None and len(x_NI) >= self.trainer.world_size:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            x_NI, labels_N = x_NI[rank::world], labels_N[rank::world]
        return DataLoader(TensorDataset(x_NI, labels_N), batch_size=self.val_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of consumed training batches per rank, and of ranks."""
        return {"consumed": self.consumed, "world": self._world}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that many batches, also with another number of ranks."""
        self.consumed = int(state_dict["consumed"]) * state_dict.get("world", 1) // self._world

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1
