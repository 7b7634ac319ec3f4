"""A tokenizer of ``transformers`` with the interface of ours."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints import first_line, transformers_library
from common.errors import BundleError, DataError


class HuggingFaceTokenizer:
    """Text to ids as the model expects them, and back.

    Args:
        tokenizer: A fast tokenizer of ``transformers``.
    """

    kind = "hugging_face"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.document_end: int | None = tokenizer.eos_token_id
        self.prefix = tuple(self.encode("").tolist())
        """Ids that the tokenizer puts before every text, such as a beginning of sequence."""

    @classmethod
    def load(cls, folder: Path) -> "HuggingFaceTokenizer":
        """Return the tokenizer of a checkpoint's folder.

        Raises:
            BundleError: when there is none that the library can load without code of its own.
        """
        library = transformers_library()
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # every version of the library has its own
            raise BundleError(
                f"{folder}: its tokenizer cannot be loaded ({first_line(error)}); put the model's "
                "tokenizer.json and tokenizer_config.json into the folder"
            ) from error
        return cls(tokenizer)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids (T,) of a text with the model's own prefix, int64.

        Raises:
            DataError: for bytes that are not UTF-8.
        """
        ids = self._tokenizer(self._as_text(text), verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Return ``encode`` of every text."""
        return [self.encode(text) for text in texts]

    def encode_plain(self, text: str) -> np.ndarray:
        """Return the ids (T,) of a text without any prefix, int64."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of ``decode``."""
        return self.decode(ids).encode()

    def _as_text(self, text: str | bytes) -> str:
        try:
            return text if isinstance(text, str) else text.decode()
        except UnicodeDecodeError:
            raise DataError("text is not UTF-8, which this model's tokenizer needs") from None
