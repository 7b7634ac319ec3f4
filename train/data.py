"""Windows of a token memory map, by number: random ones to train on, spread ones to validate."""

# Legend: N windows or tokens, B batch, T token position.

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.corpus import Corpus
from train.batch_stream import StreamDataModule


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


class TokenDataModule(StreamDataModule):
    """Random training windows and disjoint validation windows of a corpus.

    Args:
        corpus: The prepared corpus.
        context: Inputs per window.
        batch_size: Training windows per rank and batch.
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
        self._train_ids = corpus.tokens("train")

    @property
    def tokens_per_batch(self) -> int:
        """Trained positions in one batch of one rank."""
        return self.batch_size * self.context

    def batch(self, index: int) -> Tensor:
        """Return ids (B, T + 1), int64, of training batch ``index``."""
        return window_batch(
            self._train_ids, self.context, self.batch_size, seed=self.seed, index=index
        )

    def val_dataloader(self) -> DataLoader:
        """Return batches (B, T + 1) of validation windows in order, this rank's share of them."""
        windows_NT = self.corpus.windows("val", self.context, self.val_windows)
        return DataLoader(self.shared_out(windows_NT), batch_size=self.val_batch_size)
