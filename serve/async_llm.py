"""The engine behind asyncio: one thread steps it, any number of tasks stream from it.

Commands go to the thread through one queue, on which it sleeps when idle; news come back in one
call per step and event loop. Text is made in the loop, so that the thread only steps.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from common.errors import BackendError, DataError
from serve.engine.config import EngineConfig
from serve.engine.request import Sequence
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy
from serve.llm import LLM, Prompt
from serve.loading import Served
from serve.outputs import Reader, RequestOutput, Update
from serve.stream import Stream

log = logging.getLogger(__name__)


class AsyncLLM:
    """A model that serves many callers at once; create it anywhere, use it in an event loop.

    Args:
        path: Bundle or checkpoint, its directory, the name of a shipped model, or an ``LLM`` that
            nobody else uses.
        kv: Cache policy, or the name of one with its default options; None keeps every token.
        engine: Engine settings.
        device: Where the model runs; ignored for a loaded bundle.

    Raises:
        LipError: whatever ``LLM`` raises.
    """

    def __init__(
        self,
        path: str | Path | Served | LLM,
        *,
        kv: Policy | str | None = None,
        engine: EngineConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not isinstance(path, LLM):
            path = LLM(path, kv=kv, engine=engine, device=device)
        self.llm = path
        self._commands: queue.SimpleQueue[tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        self._readers: dict[Sequence, tuple[Reader, Stream]] = {}
        self._streams: dict[str, Stream] = {}
        self._names = itertools.count()
        self._error: Exception | None = None
        self._is_closing = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._serve, name="lipllm-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while requests are accepted."""
        return self._error is None

    @property
    def stalled_s(self) -> float:
        """Seconds since the step that is running began; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def num_live(self) -> int:
        """Requests that somebody waits for."""
        return len(self._streams)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        kv_compression: bool = True,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the continuations of one prompt.

        A consumer that is cancelled, or closes the iterator, aborts the request; blocks are free
        after the step that is running then.

        Args:
            prompt: Text or token ids.
            params: Sampling parameters; the defaults when absent.
            request_id: Unique name; drawn when absent.
            kv_compression: False keeps its cache whole.
            cache_salt: Only requests with the same salt share cached prefixes.

        Yields:
            What is new since the last time: pieces that ``RequestOutput.joined`` puts together.
            Text never ends within a character or within what may become a stop string. The last
            piece is ``finished``.

        Raises:
            DataError: for a prompt that cannot be served, or a name in use.
            ConfigError: for parameters that name tokens outside the vocabulary.
            BackendError: if the engine has stopped, or stops.
        """
        tokens = await asyncio.to_thread(self.llm.encode, prompt)
        name = request_id if request_id is not None else f"stream-{next(self._names)}"
        stream = self._open(name, tokens, params, kv_compression, cache_salt)
        try:
            while not stream.writer.is_finished or stream.has_news:
                yield await stream.next()
        finally:
            # In this order: whoever takes the name next comes after the abort.
            if not stream.writer.is_finished:
                self._command(self._abort, stream.sequences)
            del self._streams[name]

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        kv_compression: bool = True,
        cache_salt: str = "",
    ) -> RequestOutput:
        """Return the whole output of one prompt; see ``generate``."""
        stream = self.generate(
            prompt, params, request_id, kv_compression=kv_compression, cache_salt=cache_salt
        )
        return RequestOutput.joined([piece async for piece in stream])

    def abort(self, request_id: str) -> None:
        """End a request; its consumer gets a last piece with finish reason "abort"."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._command(self._abort, stream.sequences)

    async def shutdown(self) -> None:
        """Abort what is running and end the thread; then nothing is accepted any more."""
        self._command(self._close)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> "AsyncLLM":
        """Return itself; leaving the block shuts it down."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Shut down."""
        await self.shutdown()

    def _open(
        self,
        name: str,
        tokens: list[int],
        params: SamplingParams | None,
        kv_compression: bool,
        cache_salt: str,
    ) -> Stream:
        sequences = self.llm.core.prepare(
            tokens,
            params or SamplingParams(),
            request_id=name,
            compress=kv_compression,
            cache_salt=cache_salt,
        )
        stream = Stream(sequences, self.llm.writer(sequences))
        # One operation: loops of other threads may ask for the same name now.
        if self._streams.setdefault(name, stream) is not stream:
            raise DataError(f"request id {name!r} is in use; choose another")
        self._command(self._submit, stream)
        # Looked at after the command: a thread that ends now either sees it or is seen here.
        if self._error is not None:
            del self._streams[name]
            raise self._error
        return stream

    def _command(self, action: Callable[[Any], None], argument: Any = None) -> None:
        self._commands.put((action, argument))

    def _deliver(self, rows: list[tuple[Stream, Sequence, Update]]) -> None:
        """Make text of updates, in the loop; only the text shows a stop string."""
        for stream, sequence, update in rows:
            try:
                reason = stream.put(update)
            except Exception as error:
                # Whoever waits ends with it, and that aborts the request.
                stream.fail(error)
                continue
            if reason is not None and update.finish_reason is None:
                self._command(self._stop, sequence)

    # What follows runs in the engine's thread alone.

    def _serve(self) -> None:
        error: Exception = BackendError("the engine was shut down; start a new one")
        try:
            with torch.inference_mode():
                while self._obey():
                    self._step_began = time.monotonic()
                    self._publish(self.llm.core.step())
                    self._step_began = None
        except BaseException as fault:
            log.critical("the engine died", exc_info=fault)
            error = BackendError(f"the engine died: {fault!r}; start a new one")
        self._bury(error)

    def _obey(self) -> bool:
        """Carry out the commands, waiting for one when there is nothing to step."""
        while not self._is_closing:
            try:
                action, argument = self._commands.get(block=not self.llm.core.has_work)
            except queue.Empty:
                return True
            action(argument)
        return False

    def _submit(self, stream: Stream) -> None:
        self.llm.core.submit(stream.sequences)
        self._readers |= {s: (self.llm.reader(s), stream) for s in stream.sequences}

    def _stop(self, sequence: Sequence) -> None:
        self._readers.pop(sequence, None)
        self.llm.core.finish(sequence, "stop")

    def _abort(self, sequences: Iterable[Sequence]) -> None:
        live = [sequence for sequence in sequences if sequence in self._readers]
        for sequence in live:
            self.llm.core.finish(sequence, "abort")
        self._publish(live)

    def _close(self, _: None) -> None:
        self._abort(self._readers)
        self._is_closing = True

    def _publish(self, changed: Iterable[Sequence]) -> None:
        """Send what is new to the loops of those who wait for it, one call to each."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Sequence, Update]]] = {}
        for sequence in changed:
            if sequence in self._readers:
                reader, stream = self._readers[sequence]
                news.setdefault(stream.loop, []).append((stream, sequence, reader.read()))
                if sequence.finish_reason is not None:
                    del self._readers[sequence]
        for loop, rows in news.items():
            if not _call(loop, self._deliver, rows):
                for _, sequence, _ in rows:
                    self._readers.pop(sequence, None)
                    self.llm.core.finish(sequence, "abort")

    def _bury(self, error: Exception) -> None:
        """Tell all that nothing more will come, those included whose command is still queued."""
        self._error = error
        waiting = [stream for _, stream in self._readers.values()]
        while not self._commands.empty():
            action, argument = self._commands.get()
            if action == self._submit:
                waiting.append(argument)
        for stream in dict.fromkeys(waiting):
            _call(stream.loop, stream.fail, error)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], argument: Any) -> bool:
    """Call a function in a loop; False if the loop was closed: then nobody waits there."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        return False
    return True
