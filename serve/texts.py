"""Windows of text for any served model: prepared corpora, or bytes encoded on the way."""

# Legend: N windows, T tokens.

import dataclasses
import itertools
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.bundle import Bundle
from common.corpus import Corpus, Split, prepare_corpus
from common.errors import DataError
from common.tokenizer import ByteTokenizer
from serve.hugging_face.tokenizer import HuggingFaceTokenizer
from serve.loading import Served

BYTES_PER_TOKEN = 8  # first guess at the text that a window needs; doubled while it is too short


class Text(Protocol):
    """Held-out and other text of a model."""

    def windows(self, split: Split, length: int, limit: int | None = None) -> Tensor:
        """Return windows (N, length + 1) of a split: inputs and their next tokens."""


def served_text(config: Any, served: Served) -> Text:
    """Return the text of a data configuration in the tokens of a model.

    Raises:
        LipError: as ``prepare_corpus`` does.
    """
    if isinstance(served, Bundle):
        return prepare_corpus(config, served.tokenizer)
    return EncodedText(prepare_corpus(config, ByteTokenizer()), served.tokenizer)


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedText:
    """A corpus of bytes whose windows are encoded when they are asked for.

    Attributes:
        corpus: Its tokens are bytes.
        tokenizer: Encodes windows; each begins with the tokenizer's own prefix, as prompts do.
    """

    corpus: Corpus
    tokenizer: HuggingFaceTokenizer

    def windows(self, split: Split, length: int, limit: int | None = None) -> Tensor:
        """Return disjoint windows of a split, in order.

        Args:
            split: ``train`` or ``val``.
            length: Inputs per window, the prefix included.
            limit: At most so many windows, spread evenly over the split.

        Returns:
            Ids (N, length + 1), int64: inputs and their next tokens.

        Raises:
            DataError: when the split holds no whole window.
        """
        data = self.corpus.tokens(split)
        prefix = self.tokenizer.prefix[:length]
        fresh = length + 1 - len(prefix)
        if limit is None or len(data) <= limit * fresh * BYTES_PER_TOKEN:
            rows = self._all(data, fresh, limit)
        else:
            starts = np.linspace(0, len(data), limit + 1).astype(np.int64)
            pieces = (data[a:b] for a, b in itertools.pairwise(starts))
            rows = [row for piece in pieces if (row := self._first(piece, fresh)) is not None]
        if not rows:
            raise DataError(
                f"corpus {self.corpus.meta['source']}: fewer than {length + 1} {split} tokens of "
                "this model's tokenizer; give more text, or shorter windows"
            )
        body_NT = torch.from_numpy(np.stack(rows))
        head_NT = torch.tensor(prefix, dtype=torch.int64).expand(len(rows), -1)
        return torch.cat((head_NT, body_NT), dim=1)

    def _all(self, data: np.ndarray, fresh: int, limit: int | None) -> list[np.ndarray]:
        """Cut a whole split into windows and keep ``limit`` of them, spread evenly."""
        ids = self._encode(data)
        count = len(ids) // fresh
        keep = np.arange(count)
        if limit is not None and limit < count:
            keep = np.linspace(0, count - 1, limit).round().astype(np.int64)
        return [ids[index * fresh : (index + 1) * fresh] for index in keep]

    def _first(self, data: np.ndarray, fresh: int) -> np.ndarray | None:
        """Return the first tokens of a piece, None where it is too short."""
        size = fresh * BYTES_PER_TOKEN
        while True:
            ids = self._encode(data[:size])
            # What follows a cut may join the last token: it does not count.
            whole = ids if size >= len(data) else ids[:-1]
            if len(whole) >= fresh:
                return whole[:fresh]
            if size >= len(data):
                return None
            size *= 2

    def _encode(self, data: np.ndarray) -> np.ndarray:
        # Pieces may begin or end inside a character.
        text = bytes(np.asarray(data, dtype=np.uint8)).decode("utf-8", errors="ignore")
        return self.tokenizer.encode_plain(text)
