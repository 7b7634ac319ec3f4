"""One request in an event loop: pieces of its output that wait for their consumer."""

import asyncio
from collections.abc import Sequence as Rows

from serve.engine.request import FinishReason, Sequence
from serve.outputs import RequestOutput, Update, Writer


class Stream:
    """Made and used in one event loop alone.

    Args:
        sequences: All choices of the request.
        writer: Makes text of their updates.
    """

    def __init__(self, sequences: Rows[Sequence], writer: Writer) -> None:
        self.sequences, self.writer = sequences, writer
        self.loop = asyncio.get_running_loop()
        self._pieces: list[RequestOutput] = []
        self._news = asyncio.Event()
        self._error: Exception | None = None

    def put(self, update: Update) -> FinishReason | None:
        """Take an update; return the reason if it ended its choice."""
        piece = self.writer.write(update)
        if piece is None:
            return None
        self._pieces.append(piece)
        self._news.set()
        return piece.finish_reason

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self._error = error
        self._news.set()

    @property
    def has_news(self) -> bool:
        """True if the next call of ``next`` will not wait."""
        return self._news.is_set()

    async def next(self) -> RequestOutput:
        """Wait for news and return all of them as one piece."""
        await self._news.wait()
        self._news.clear()
        if not self._pieces and self._error is not None:
            raise self._error
        pieces, self._pieces = self._pieces, []
        if self._error is not None:
            self._news.set()
        return RequestOutput.joined(pieces) if len(pieces) > 1 else pieces[0]
