"""The text of a growing token sequence: whole characters, and nothing of a stop string."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from common.tokenizer import KINDS, Tokenizer
from serve.engine.sampling_params import SamplingParams

# What decoders write for bytes that are no character, or not yet one.
REPLACEMENT = "\ufffd"


class _Characters(ABC):
    """Whole characters from single tokens."""

    @abstractmethod
    def push(self, token: int) -> str:
        """Take a token and return the characters that it completes."""

    @abstractmethod
    def flush(self) -> str:
        """Return what is left at the end."""


class _ExactCharacters(_Characters):
    """For tokenizers whose tokens are byte strings: exact, and linear in the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowCharacters(_Characters):
    """For any tokenizer: a token's text is what it adds to that of a few tokens before it.

    Some decoders change the first token of a text (a leading space), hence the window. A window
    that ends in U+FFFD may be in the middle of a character.
    """

    LONGEST = 16  # tokens of an unfinished character; more of them are bytes that are none

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._new: list[int] = []

    def push(self, token: int) -> str:
        self._new.append(token)
        known, whole = self._texts()
        if whole.endswith(REPLACEMENT) and len(self._new) < self.LONGEST:
            return ""
        self._before, self._new = self._new, []
        return whole[len(known) :]

    def flush(self) -> str:
        known, whole = self._texts()
        return whole[len(known) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._before), decode(self._before + self._new)


class Detokenizer:
    """Turns tokens into text as they come.

    Characters appear when their last byte is there, and text that may be the beginning of a stop
    string when that is decided. Bytes that are no UTF-8 come out as U+FFFD.

    Args:
        tokenizer: Decodes.
        params: Stop strings and ``min_tokens``.
        stop_ids: Tokens that have no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, stop_ids: Collection[int] = ()
    ) -> None:
        kind = _ExactCharacters if tokenizer.kind in KINDS else _WindowCharacters
        self._characters: _Characters = kind(tokenizer)
        self._stop_ids = stop_ids
        self._stops, self._min_tokens = params.stop, params.min_tokens
        self._longest = max(map(len, self._stops), default=0)
        self._text = ""
        self._shown = 0
        self._searched = 0
        self._num_tokens = 0
        self.stop: str | None = None

    def push(self, tokens: Sequence[int], *, is_last: bool = False) -> tuple[str, int]:
        """Take new tokens.

        Args:
            tokens: The next ones.
            is_last: Nothing follows: show what was held back.

        Returns:
            The text that can be shown now, and how many of the tokens belong to it: all of them, or
            those up to the one that completes a stop string (``stop`` then names it).
        """
        used = 0
        for token in tokens:
            if self.stop is not None:
                break
            if token not in self._stop_ids:
                self._text += self._characters.push(token)
            used += 1
            self._num_tokens += 1
            self._find_stop()
        if is_last and self.stop is None:
            self._text += self._characters.flush()
            self._find_stop()
        is_whole = is_last or self.stop is not None
        end = len(self._text) - (0 if is_whole else self._held())
        start, self._shown = self._shown, end
        return self._text[start:end], used

    def _find_stop(self) -> None:
        """Cut the text before the first stop string in it."""
        if self._num_tokens < self._min_tokens:
            self._searched = len(self._text)
            return
        # Only what ends in the new characters counts.
        starts = [max(0, self._searched - len(stop) + 1) for stop in self._stops]
        places = [
            (place, stop)
            for stop, start in zip(self._stops, starts, strict=True)
            if (place := self._text.find(stop, start)) >= 0
        ]
        self._searched = len(self._text)
        if places:
            place, self.stop = min(places)
            self._text = self._text[:place]

    def _held(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._text)), 0, -1):
            end = self._text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
