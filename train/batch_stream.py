"""A stream of training batches as a stateful Lightning DataModule.

Batch k of rank r out of W is number ``k W + r`` of one sequence, each a pure function of its
number. Resuming needs the counter alone, neither worker processes nor prefetching can change what
is trained on, and W ranks see what one process sees that accumulates W batches.
"""

# Legend: N examples.

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


class NumberedBatches(IterableDataset):
    """The endless stream of training batches of one rank, starting at any batch number.

    Args:
        batch: Function of a number in the sequence of all ranks, from 0.
        first: Number k of this rank's first batch.
        rank: Data-parallel rank r.
        world: Number of ranks W.
    """

    def __init__(
        self, batch: Callable[[int], Any], *, first: int = 0, rank: int = 0, world: int = 1
    ):
        self.batch, self.first, self.rank, self.world = batch, first, rank, world

    def __iter__(self) -> Iterator[Any]:
        for index in count(self.first):
            yield self.batch(index * self.world + self.rank)


class StreamDataModule(L.LightningDataModule, ABC):
    """Training batches by number; a subclass says what they hold.

    ``consumed`` counts training batches of one rank and is saved with checkpoints; the training
    step advances it, so that batches which were only prefetched are not lost on resume.
    """

    def __init__(self) -> None:
        super().__init__()
        self.consumed = 0

    @abstractmethod
    def batch(self, index: int) -> Any:
        """Return training batch ``index`` of the sequence of all ranks, a pure function of it."""

    def train_dataloader(self) -> DataLoader:
        """Return the stream of this rank's batches that continues after the consumed ones."""
        stream = NumberedBatches(
            self.batch, first=self.consumed, rank=self._rank, world=self._world
        )
        return DataLoader(stream, batch_size=None)

    def shared_out(self, examples_N: Tensor) -> Tensor:
        """Return this rank's share of validation examples (N, ...); all of them where N < W."""
        # A rank without any example would log nothing, and the others would wait for it.
        is_enough = len(examples_N) >= self._world
        return examples_N[self._rank :: self._world] if is_enough else examples_N

    def state_dict(self) -> dict[str, Any]:
        """Return the number of consumed training batches per rank, and of ranks."""
        return {"consumed": self.consumed, "world": self._world}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that many batches, also with another number of ranks."""
        self.consumed = int(state_dict["consumed"]) * state_dict.get("world", 1) // self._world

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1
