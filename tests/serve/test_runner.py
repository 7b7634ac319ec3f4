"""The runner's ways of running a step against one another: torch, kernels, recorded steps."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serve.decoder import as_decoder
from serve.engine.graphs import DecodeGraphs, Recorder, sizes_up_to
from serve.engine.kernel_attention import Rotations
from serve.engine.request import Item, Request, Sequence
from serve.engine.runner import Runner
from serve.engine.sampling_params import SamplingParams

EXACT = 1e-12  # float64, tiny model
SINGLE = 2e-4  # float32 with other orders of summation, logits of size one
SIZE, BLOCKS = 4, 40


class Again(Recorder):
    """Replays by calling anew: what a graph would do with the same fixed tensors."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return ``run`` itself."""
        return run


class Stub(Recorder):
    """A device that records nothing."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Fail."""
        raise RuntimeError("operation not permitted when stream is capturing")


class Steps:
    """Sequences over one runner, with blocks handed out in turns."""

    def __init__(self, runner: Runner, prompts: list[list[int]]) -> None:
        self.runner = runner
        self.sequences = [
            Sequence.start(
                Request(
                    request_id=str(index),
                    prompt=tuple(prompt),
                    params=SamplingParams(),
                    seed=0,
                    max_total=90,
                )
            )
            for index, prompt in enumerate(prompts)
        ]
        self.free = list(range(BLOCKS))

    def run(self, counts: dict[int, int]) -> Tensor:
        """Run so many tokens of some sequences; a decode continues with the likeliest token."""
        items = []
        for index, count in counts.items():
            sequence = self.sequences[index]
            while len(sequence.block_table) * SIZE < sequence.kv_len + count:
                sequence.block_table.append(self.free.pop(0))
            items.append(Item(sequence=sequence, count=count))
        logits_RV = self.runner.forward(items)
        for item, logits_V in zip(items, logits_RV, strict=True):
            item.sequence.advance(item.count)
            if item.sequence.remaining == 0:
                item.sequence.tokens.append(int(logits_V.argmax()))
        return logits_RV.clone()


# A chunk, decodes beside a chunk, growing and shrinking numbers of rows, a chunk on a cache.
SCRIPT = [{0: 7, 1: 5}, {0: 1, 1: 1, 2: 6}, {0: 1}, {1: 1, 2: 9, 0: 1}, *[{0: 1, 1: 1, 2: 1}] * 6]


def make_runner(tiny, *, kernels: bool, device: str = "cpu", dtype=torch.float64) -> Runner:
    """Return a runner on torch, or on the kernels' references where there is no device."""
    decoder = as_decoder(tiny.make_model(dtype).to(device))
    runner = Runner(decoder, BLOCKS, SIZE)
    if kernels and runner.rotations is None:
        runner.rotations, runner.builder.in_place = Rotations(decoder), False
    return runner


def run_script(runner: Runner, tiny) -> list[Tensor]:
    """Return the logits of every step."""
    steps = Steps(runner, tiny.make_prompts([7, 5, 15]))
    return [steps.run(counts) for counts in SCRIPT]


def test_kernels_equal_torch(tiny) -> None:
    """Oracle: the other way of writing, rotating and attending, over every freedom of a model."""
    pairs = zip(
        run_script(make_runner(tiny, kernels=True), tiny),
        run_script(make_runner(tiny, kernels=False), tiny),
        strict=True,
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
def test_replayed_steps_equal_eager_ones(tiny, rows: int) -> None:
    """Oracle: the same steps without recording; steps of more rows than recorded run eagerly."""
    runner = make_runner(tiny, kernels=True)
    runner.record(rows, Again())
    pairs = zip(
        run_script(runner, tiny), run_script(make_runner(tiny, kernels=True), tiny), strict=True
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_padding_leaves_the_cache_alone(tiny) -> None:
    """Oracle: the cache of eager steps; slots that hold nothing stay exactly as they were."""
    recorded, eager = (make_runner(tiny, kernels=True) for _ in range(2))
    recorded.record(8, Again())
    for runner in (recorded, eager):
        run_script(runner, tiny)
    for one, other in zip(recorded.pools.layers, eager.pools.layers, strict=True):
        for found, expected in zip(one.tensors, other.tensors, strict=True):
            torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
            assert torch.equal(found == 0, expected == 0)


def test_results_of_replays_are_kept_apart(tiny) -> None:
    """Oracle: a copy; the second replay writes where the first one did."""
    runner = make_runner(tiny, kernels=True)
    runner.record(2, Overwriting())
    steps = Steps(runner, tiny.make_prompts([3, 3]))
    steps.run({0: 3, 1: 3})
    steps.sequences[0].block_table.append(steps.free.pop(0))
    item = Item(sequence=steps.sequences[0], count=1)
    first_1V = runner.forward([item])
    copy_1V = first_1V.clone()
    steps.sequences[0].tokens[-1] += 1
    assert not torch.equal(runner.forward([item]), copy_1V)
    assert torch.equal(first_1V, copy_1V)


class Overwriting(Recorder):
    """Replays into the result of the first run, as a graph does."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run once for the place of the result."""
        place = run()
        return lambda: place.copy_(run())


def test_only_steps_of_few_decodes_fit(tiny) -> None:
    """Oracle: the definition."""
    runner = make_runner(tiny, kernels=True)
    runner.record(2, Again())
    assert isinstance(runner.graphs, DecodeGraphs)
    steps = Steps(runner, tiny.make_prompts([6, 6, 6]))
    steps.run({0: 6, 1: 6, 2: 5})
    items = [Item(sequence=sequence, count=1) for sequence in steps.sequences]
    for chosen, fits in [(items[:1], True), (items[:2], True), (items, False)]:
        assert runner.graphs.fits(runner.builder.build(chosen)) == fits
    chunk = Item(sequence=Steps(runner, [[1, 2]]).sequences[0], count=2)
    chunk.sequence.block_table.append(9)
    assert not runner.graphs.fits(runner.builder.build([items[0], chunk]))


def test_what_cannot_be_recorded_runs_eagerly_and_says_why(tiny, caplog) -> None:
    """Oracle: the error's own words, and logits as before."""
    runner = make_runner(tiny, kernels=True)
    with caplog.at_level(logging.WARNING):
        runner.record(2, Stub())
    assert "operation not permitted when stream is capturing" in caplog.text
    assert runner.graphs is None
    assert torch.isfinite(run_script(runner, tiny)[-1]).all()


def test_nothing_is_recorded_by_itself_without_a_cuda_device(tiny) -> None:
    """Oracle: the definition."""
    for kernels in (False, True):
        runner = make_runner(tiny, kernels=kernels)
        runner.record(2)
        assert runner.graphs is None


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 9, 16, 33])
def test_sizes_cover_all_numbers_of_rows(rows: int) -> None:
    """Oracle: the list in the documentation, cut at the largest."""
    documented = [1, 2, 4, 8, 16, 24, 32, 40]
    expected = [size for size in documented if size < rows] + [rows]
    assert sizes_up_to(rows) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_graphs_equal_torch_on_the_cpu(tiny) -> None:
    """Oracle: eager float64 on the CPU."""
    runner = make_runner(tiny, kernels=True, device="cuda", dtype=torch.float32)
    runner.record(4)
    assert runner.graphs is not None
    expected = run_script(make_runner(tiny, kernels=False), tiny)
    for found, wanted in zip(run_script(runner, tiny), expected, strict=True):
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=SINGLE, atol=SINGLE)
