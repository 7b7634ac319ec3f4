"""Decoding speed and cache memory against context and batch: full and compressed, interleaved."""

# Legend: B requests, T tokens.

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from functools import cached_property, partial

import torch

from common.errors import DataError
from common.models import LipschitzTransformer, ModelConfig
from serve.bench.clock import Clock
from serve.bench.policies import budget_tokens, compared
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig, SpeedModel
from serve.decoder import Decoder, as_decoder
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.pools import block_bytes
from serve.engine.request import Sequence
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy
from serve.kv.calibrate import calibrate, layer_stats

CALIBRATION = (4, 512)  # windows and tokens; any statistics cost the same


def random_model(
    shape: SpeedModel, context: int, device: str | torch.device = "cpu"
) -> LipschitzTransformer:
    """Return a model of random weights, in evaluation mode, seed 0."""
    config = ModelConfig(
        vocab_size=shape.vocab_size,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        mlp_width=shape.mlp_width,
        context=context,
    )
    generator = torch.Generator().manual_seed(0)
    model = LipschitzTransformer(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            std = parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval().to(device)


def measure_speed(rows: Rows, settings: BenchConfig, model: LipschitzTransformer | Decoder) -> None:
    """Add one row per context, batch, policy and budget, each in turns with the full cache.

    What a step costs does not depend on what the model has learned: prompts are random tokens.

    Raises:
        ConfigError: for contexts that the model does not have.
    """
    decoder = as_decoder(model)
    clock = Clock.of(decoder.device)
    for context, batch in settings.shapes(decoder.context):
        race = _Race(decoder, settings, context, batch, clock)
        keys = {"context": context, "batch": batch, **clock.keys}
        rows.make("speed", keys | {"policy": "full"}, partial(race.run, None))
        for share in settings.budgets:
            budget = budget_tokens(share, context)
            for own, policy in compared(settings, budget):
                where = own | {"budget": share, "tokens": budget}
                rows.make("speed", keys | where, partial(race.run, policy))


class _Race:
    """Engines that decode random prompts of one length; that of the full cache is kept."""

    def __init__(
        self, decoder: Decoder, settings: BenchConfig, context: int, batch: int, clock: Clock
    ) -> None:
        self.decoder, self.settings, self.batch, self.clock = decoder, settings, batch, clock
        self.new = settings.decoded(context, batch)
        generator = torch.Generator().manual_seed(1)
        shape = (batch, context - self.new)
        prompts_BT = torch.randint(decoder.vocab_size, shape, generator=generator)
        self.prompts: list[list[int]] = prompts_BT.tolist()

    def run(self, policy: Policy | None) -> dict[str, float]:
        """Return the figures of a policy, None for the full cache, in turns with the full cache."""
        settings, cores = self.settings, {"full": self.full}
        if policy is not None:
            # Each timing has a compaction: they are at least as frequent as in the other parts.
            interval = min(policy.interval, settings.steps)
            cores["own"] = self._engine(dataclasses.replace(policy, interval=interval))
        prefill = {each: self._seconds(partial(self._prefill, c)) for each, c in cores.items()}
        steps = {each: partial(self._steps, core) for each, core in cores.items()}
        times = interleaved(steps, settings.rounds, self.clock)
        name, core = list(cores.items())[-1]
        cached = sum(sequence.kv_len for sequence in core.scheduler.sequences)
        per_slot = block_bytes(self.decoder.layers, 1, self.decoder.dtype)
        for each in cores.values():
            _clear(each)
        rates = {key: self.batch * settings.steps / statistics.median(times[key]) for key in times}
        return {
            "tokens_per_s": rates[name],
            "tokens_per_s_full": rates["full"],
            **paired(times[name], times["full"]),
            "prefill_seconds": prefill[name],
            "kv_bytes": float(cached * per_slot),
            "cached": cached / self.batch,
        }

    @cached_property
    def full(self) -> EngineCore:
        """The engine that keeps every token; it finds the prompts in its prefix cache again."""
        return self._engine(None)

    def _engine(self, policy: Policy | None) -> EngineCore:
        stats, default = None, EngineConfig()
        if policy is not None and policy.needs_stats:
            shape = (CALIBRATION[0], min(CALIBRATION[1], self.decoder.context))
            generator = torch.Generator().manual_seed(2)
            text_BT = torch.randint(self.decoder.vocab_size, shape, generator=generator)
            stats = layer_stats(calibrate(self.decoder, [text_BT]), self.decoder)
        blocks = -(-(len(self.prompts[0]) + self.new) // default.block_size) + 1
        config = EngineConfig(
            max_num_seqs=self.batch,
            num_blocks=self.batch * blocks,
            max_num_batched_tokens=default.max_num_batched_tokens + self.batch,
        )
        return EngineCore(self.decoder, config, policy, stats)

    @torch.inference_mode()
    def _prefill(self, core: EngineCore) -> None:
        for prompt in self.prompts:
            core.add(prompt, SamplingParams(temperature=0.0, max_tokens=self.new))
        while any(sequence.is_prefilling for sequence in core.scheduler.sequences):
            succeeded(core.step())

    @torch.inference_mode()
    def _steps(self, core: EngineCore) -> None:
        for _ in range(self.settings.steps):
            assert len(succeeded(core.step())) == self.batch

    def _seconds(self, job: Callable[[], None]) -> float:
        began = self.clock()
        job()
        return self.clock() - began


def paired(own: list[float], other: list[float]) -> dict[str, float]:
    """Return how many times faster ``own`` is: median, lowest and highest of paired ratios."""
    ratios = [theirs / ours for ours, theirs in zip(own, other, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def interleaved(
    jobs: Mapping[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Run the jobs in turn, once to warm up and ``rounds`` times by the clock, in seconds.

    Every other round runs in reverse order.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name in reversed(list(jobs)) if turn % 2 else jobs:
            began = clock()
            jobs[name]()
            if turn:
                times[name].append(clock() - began)
    return times


def succeeded(sequences: list[Sequence]) -> list[Sequence]:
    """Return the sequences of a step, none of which may have failed.

    Raises:
        DataError: with the engine's reason.
    """
    for sequence in sequences:
        if sequence.error is not None:
            raise DataError(
                f"bench: the engine failed ({sequence.error}); lower contexts or batches"
            )
    return sequences


def _clear(core: EngineCore) -> None:
    for sequence in list(core.scheduler.sequences):
        core.finish(sequence, "abort")
