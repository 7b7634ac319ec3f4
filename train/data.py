"""Windows of a token memory map as a stateful Lightning DataModule.

Batch k of rank r out of W is number ``k W + r`` of one sequence, each a pure function of the seed
and its number. Resuming needs the counter alone, neither worker processes nor prefetching can
change what is trained on, and W ranks see what one process sees that accumulates W batches.
"""

# Legend: B batch, T token position.

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from common.corpus import Corpus


def window_batch(
    ids: np.ndarray, context: int, batch_size: int, *, seed: int, index: int
) -> Tensor:
    """Return training batch ``index``: random windows, with replacement.

    Args:
        ids: Token ids (N,), at least ``context + 1``.
        context: Inputs per window (T).
        batch_size: Windows (B).
        seed: Seed of the run.
        index: Number in the sequence of all ranks, from 0.

    Returns:
        Ids (B, T + 1), int64: inputs and their next tokens.
    """
    generator = np.random.Generator(np.random.PCG64([seed, index, 0]))
    starts_B1 = generator.integers(0, len(ids) - context, size=(batch_size, 1))
    return torch.from_numpy(ids[starts_B1 + np.arange(context + 1)].astype(np.int64))


class Windows(IterableDataset):
    """The endless stream of training batches of one rank, starting at any batch number."""

    def __init__(
        self,
        ids: np.ndarray,
        context: int,
        batch_size: int,
        *,
        seed: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.ids, self.context, self.batch_size = ids, context, batch_size
        self.seed, self.first, self.rank, self.world = seed, first, rank, world

    def __iter__(self) -> Iterator[Tensor]:
        index = self.first
        while True:
            yield window_batch(
                self.ids,
                self.context,
                self.batch_size,
                seed=self.seed,
                index=index * self.world + self.rank,
            )
            index += 1


class TokenDataModule(L.LightningDataModule):
    """Random training windows and disjoint validation windows of a corpus.

    ``consumed`` counts training batches of one rank and is saved with checkpoints; the training
    step advances it, so that batches which were only prefetched are not lost on resume.

    Args:
        corpus: The prepared corpus.
        context: Inputs per window.
        batch_size: Training windows per batch.
        seed: Seed of the run.
        val_windows: Validation windows during training, spread evenly over the split.
        val_batch_size: Windows per validation batch.

    Raises:
        DataError: if a split is shorter than one window.
    """

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        batch_size: int,
        *,
        seed: int,
        val_windows: int,
        val_batch_size: int,
    ):
        super().__init__()
        corpus.require(context)
        self.corpus, self.context, self.batch_size, self.seed = corpus, context, batch_size, seed
        self.val_windows, self.val_batch_size = val_windows, val_batch_size
        self.consumed = 0

    @property
    def tokens_per_batch(self) -> int:
        """Trained positions in one batch of one rank."""
        return self.batch_size * self.context

    def train_dataloader(self) -> DataLoader:
        """Return the stream of batches (B, T + 1) that continues after the consumed ones."""
        stream = Windows(
            self.corpus.tokens("train"),
            self.context,
            self.batch_size,
            seed=self.seed,
            first=self.consumed,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world=self._world,
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Return the batches of validation windows, sharded by rank where there are enough."""
        windows_NT = self.corpus.windows("val", self.context, self.val_windows)
        # A rank without any window would log nothing, and the others would wait for it.
        if self.trainer is not None and len(windows_NT) >= self.trainer.world_size:
            windows_NT = windows_NT[self.trainer.global_rank :: self.trainer.world_size]
        return window_loader(windows_NT, self.val_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of consumed training batches per rank, and of ranks."""
        return {"consumed": self.consumed, "world": self._world}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that many batches, also with another number of ranks."""
        self.consumed = int(state_dict["consumed"]) * state_dict.get("world", 1) // self._world

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1


def window_loader(windows_NT: Tensor, batch_size: int) -> DataLoader:
    """Return a loader of batches (B, T + 1) over windows (N, T + 1), in order."""
    dataset = TensorDataset(windows_NT)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=_first_column)


def _first_column(items: list[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([item[0] for item in items])
