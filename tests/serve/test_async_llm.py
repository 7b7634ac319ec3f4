"""Streams against the offline engine; cancellation, shutdown, death; no clocks, no sleeps."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from common.bundle import Bundle, save_bundle
from common.errors import BackendError, ConfigError, DataError
from common.models import LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer
from serve import LLM, AsyncLLM, EngineConfig, RequestOutput, SamplingParams
from serve.kv import WindowPolicy

WINDOW = WindowPolicy(budget=16, interval=4, sinks=2, window=4)
ENGINE = EngineConfig(block_size=8, debug=True, max_num_seqs=4)
PROMPTS = ["def f(x):", "import os", "x = " * 12, "a"]
PARAMS = SamplingParams(temperature=1.5, seed=3, max_tokens=24)
ENDLESS = SamplingParams(temperature=1.5, seed=4, max_tokens=None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny byte model."""
    config = ModelConfig(vocab_size=256, width=24, layers=2, heads=2, context=120)
    model = LipschitzTransformer(config).eval().requires_grad_(False)
    return save_bundle(tmp_path_factory.mktemp("async") / "bundle", model, ByteTokenizer())


@pytest.fixture
def served(bundle: Bundle) -> Iterator[SimpleNamespace]:
    """An engine that can be stopped between steps: ``gate`` open lets it run."""
    llm = LLM(bundle, kv=WINDOW, engine=ENGINE)
    gate, stepping = threading.Event(), threading.Event()
    gate.set()
    step = llm.core.step

    def gated() -> list:
        stepping.set()
        gate.wait()
        return step()

    llm.core.step = gated
    engine = AsyncLLM(llm)
    yield SimpleNamespace(engine=engine, llm=llm, gate=gate, stepping=stepping)
    gate.set()
    asyncio.run(engine.shutdown())
    blocks = llm.core.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    assert not engine._thread.is_alive()


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """Run a coroutine function with a limit that only a hanging test reaches."""
    return asyncio.run(asyncio.wait_for(main(), 60))


def test_streams_join_to_what_the_offline_engine_gives(bundle: Bundle, served) -> None:
    """Oracle: LLM.generate; the shared rules of text make every piece a prefix of it."""
    expected = LLM(bundle, kv=WINDOW, engine=ENGINE).generate(PROMPTS, PARAMS)

    async def stream(prompt: str) -> list[RequestOutput]:
        return [piece async for piece in served.engine.generate(prompt, PARAMS)]

    async def main() -> list[list[RequestOutput]]:
        return await asyncio.gather(*map(stream, PROMPTS))

    for pieces, whole in zip(run(main), expected, strict=True):
        joined = RequestOutput.joined(pieces)
        assert joined.outputs == whole.outputs
        assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert all(len(piece.outputs) == 1 for piece in pieces)
    assert served.engine.num_live == 0


def test_choices_stream_beside_each_other(bundle: Bundle, served) -> None:
    """Oracle: LLM.generate with the same n; a stop string ends one choice alone."""
    whole = LLM(bundle, engine=ENGINE).generate("abc " * 6, SamplingParams(n=3, seed=7))[0]
    stop = whole.outputs[1].text[4:6]
    params = SamplingParams(n=3, seed=7, stop=(stop,))
    expected = LLM(bundle, kv=WINDOW, engine=ENGINE).generate("abc " * 6, params)[0]

    async def main() -> RequestOutput:
        return await served.engine.complete("abc " * 6, params, kv_compression=True)

    got = run(main)
    assert [(o.index, o.text, o.finish_reason) for o in got.outputs] == [
        (o.index, o.text, o.finish_reason) for o in expected.outputs
    ]


def test_a_cancelled_consumer_frees_its_blocks(served) -> None:
    """Oracle: an empty pool in the engine after the step that was running."""

    async def consume(begun: asyncio.Event) -> None:
        async for _ in served.engine.generate("abcdefgh" * 4, ENDLESS, "mine"):
            begun.set()

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(consume(begun))
        await begun.wait()
        served.gate.clear()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert served.engine.num_live == 0
        served.gate.set()
        other = await served.engine.complete("x", PARAMS, "mine")
        assert other.finish_reason == "length"
        assert not served.llm.core.has_work

    run(main)


@pytest.mark.parametrize("when", ["queued", "running"])
def test_abort_gives_the_consumer_a_last_piece(served, when: str) -> None:
    """Oracle: the documented finish reason, and the text so far."""

    async def main() -> RequestOutput:
        if when == "queued":
            served.gate.clear()
        stream = served.engine.generate("abcd", ENDLESS, "mine")
        pieces = []
        if when == "running":
            pieces.append(await anext(stream))
        waiting = asyncio.create_task(anext(stream))
        await asyncio.to_thread(served.stepping.wait)
        while served.engine.num_live == 0:
            await asyncio.sleep(0)
        served.engine.abort("mine")
        served.engine.abort("never seen")
        served.gate.set()
        pieces.append(await waiting)
        return RequestOutput.joined(pieces + [piece async for piece in stream])

    output = run(main)
    assert (output.finish_reason, output.finished) == ("abort", True)
    assert len(output.token_ids) < 100


def test_bad_requests_raise_at_once_and_others_go_on(served) -> None:
    """Oracle: the errors of the offline engine; one line each; the next request works."""

    async def main() -> None:
        running = served.engine.generate("abcd", ENDLESS, "busy")
        await anext(running)
        for prompt, params, name, error, words in (
            ("", PARAMS, None, DataError, "empty"),
            ("x" * 500, PARAMS, None, DataError, "500 tokens"),
            ([1, 256], PARAMS, None, DataError, "256"),
            ("x", PARAMS, "busy", DataError, "in use"),
            ("x", SamplingParams(logit_bias={999: 1.0}), None, ConfigError, "999"),
        ):
            with pytest.raises(error, match=words) as caught:
                await served.engine.complete(prompt, params, name)
            assert "\n" not in str(caught.value)
        await running.aclose()
        assert (await served.engine.complete("x", PARAMS)).finish_reason == "length"

    run(main)


def test_shutdown_ends_streams_and_refuses_new_ones(served) -> None:
    """Oracle: "abort" for the running, one documented line for the later; twice is harmless."""

    async def main() -> None:
        stream = served.engine.generate("abcd", ENDLESS)
        pieces = [await anext(stream)]
        await served.engine.shutdown()
        pieces += [piece async for piece in stream]
        assert RequestOutput.joined(pieces).finish_reason == "abort"
        assert not served.engine.is_alive
        with pytest.raises(BackendError, match="shut down"):
            await served.engine.complete("x", PARAMS)
        await served.engine.shutdown()

    run(main)


def test_death_of_the_engine_reaches_everybody(bundle: Bundle, caplog) -> None:
    """Oracle: running, queued and later requests all get the documented error."""
    llm = LLM(bundle, engine=ENGINE)
    entered, go_on = threading.Event(), threading.Event()

    def broken() -> list:
        entered.set()
        go_on.wait()
        raise AssertionError("books are wrong")

    llm.core.step = broken

    async def main() -> None:
        engine = AsyncLLM(llm)
        running = asyncio.create_task(engine.complete("abcd", ENDLESS))
        await asyncio.to_thread(entered.wait)
        queued = asyncio.create_task(engine.complete("efgh", ENDLESS))
        while engine.num_live < 2:
            await asyncio.sleep(0)
        assert engine.stalled_s > 0
        go_on.set()
        for task in (running, queued):
            with pytest.raises(BackendError, match="books are wrong"):
                await task
        with pytest.raises(BackendError, match="books are wrong"):
            await engine.complete("later", PARAMS)
        assert not engine.is_alive
        await engine.shutdown()

    run(main)
    assert "the engine died" in caplog.text


def test_a_fault_of_the_tokenizer_ends_one_request(served, monkeypatch) -> None:
    """Oracle: its consumer sees the fault, the neighbour its text."""

    class Broken(ByteTokenizer):
        def decode_bytes(self, ids: Any) -> bytes:
            raise RuntimeError("cannot decode")

    async def main() -> None:
        good = asyncio.create_task(served.engine.complete("abcd", PARAMS))
        while served.engine.num_live == 0:
            await asyncio.sleep(0)
        monkeypatch.setattr(served.llm, "tokenizer", Broken())
        with pytest.raises(RuntimeError, match="cannot decode"):
            await served.engine.complete("efgh", ENDLESS)
        assert (await good).finish_reason == "length"

    run(main)


def test_one_engine_serves_loops_one_after_another(served) -> None:
    """Oracle: the same answer from two event loops; a loop that closed early leaves nothing."""

    async def main() -> str:
        return (await served.engine.complete("abcd", PARAMS)).text

    async def leave() -> None:
        stream = served.engine.generate("abcd", ENDLESS)
        await anext(stream)

    first = run(main)
    run(leave)
    assert run(main) == first


def test_a_name_asked_for_by_two_loops_at_once_is_given_once(served, monkeypatch) -> None:
    """Oracle: one answer and one documented error; the engine serves the next request."""
    prepare, both = served.llm.core.prepare, threading.Barrier(2)

    def meeting(*arguments: Any, **options: Any) -> Any:
        both.wait(60)
        return prepare(*arguments, **options)

    async def main() -> RequestOutput | Exception:
        try:
            return await served.engine.complete("abcd", PARAMS, "mine")
        except (DataError, BackendError) as error:
            return error

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(served.llm.core, "prepare", meeting)
        found = [job.result() for job in [pool.submit(run, main) for _ in range(2)]]
    assert sorted(type(x).__name__ for x in found) == ["DataError", "RequestOutput"]
    again = run(main)
    assert isinstance(again, RequestOutput)
    assert again.finish_reason == "length"


def test_a_loop_that_was_closed_under_its_request_is_no_fault(served) -> None:
    """Oracle: the pool is empty afterwards, and another loop is served."""

    async def leave() -> asyncio.Task:
        served.gate.clear()
        task = asyncio.create_task(anext(served.engine.generate("abcd", ENDLESS)))
        while served.engine.num_live == 0:
            await asyncio.sleep(0)
        return task

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())._log_destroy_pending = False
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    served.gate.set()

    async def main() -> str | None:
        return (await served.engine.complete("abcd", PARAMS)).finish_reason

    assert run(main) == "length"


def test_an_idle_engine_sleeps_in_its_queue(served, monkeypatch) -> None:
    """Oracle: not one step without work, however long nothing is asked."""
    calls = []
    step = served.llm.core.step
    monkeypatch.setattr(served.llm.core, "step", lambda: calls.append(1) or step())

    async def main() -> None:
        await served.engine.complete("abcd", SamplingParams(seed=1, max_tokens=4))

    for _ in range(2):
        run(main)
    # One step for the prompt and first token, one for each further token.
    assert len(calls) == 8
