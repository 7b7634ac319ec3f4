"""Decoding speed and cache memory against context and batch: full and compressed, interleaved.

Random weights: what a step costs does not depend on what the model has learned.
"""

# Legend: B requests, T tokens.

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from common.models import LipschitzTransformer, ModelConfig
from serve.bench.policies import budget_tokens
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig, SpeedModel
from serve.decoder import as_decoder
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.pools import block_bytes
from serve.engine.sampling_params import SamplingParams
from serve.evaluate import with_budget
from serve.kv import POLICIES
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


def measure_speed(rows: Rows, settings: BenchConfig, device: str | torch.device) -> None:
    """Add one row per context, batch and policy; the policies of one shape run interleaved."""
    for context in settings.contexts:
        room = max(_overlap(context, batch) for batch in settings.batches)
        model = random_model(settings.model, context + room, device)
        for batch in settings.batches:
            keys = {"context": context, "batch": batch}
            names = ["full", *settings.compressing]
            done = {row["policy"] for row in rows if keys.items() <= row.items()}
            if done >= set(names):
                continue
            measured = _race(model, settings, context, batch, names)
            for name in names:
                rows.make("speed", keys | {"policy": name}, partial(measured.__getitem__, name))


def _race(
    model: LipschitzTransformer, settings: BenchConfig, context: int, batch: int, names: list[str]
) -> dict[str, dict[str, float]]:
    """Prefill every engine, then time their decode steps in turn."""
    generator = torch.Generator().manual_seed(1)
    vocab, length = model.config.vocab_size, context - settings.decoded
    prompts = torch.randint(vocab, (batch, length), generator=generator).tolist()
    new = settings.decoded + _overlap(context, batch)
    engines = {name: _engine(model, settings, context, name, prompts, new) for name in names}
    prefill = {name: _seconds(lambda core=core: _prefill(core)) for name, core in engines.items()}
    steps = {name: lambda core=core: _steps(core, settings.steps) for name, core in engines.items()}
    times = interleaved(steps, settings.rounds)
    per_slot = block_bytes(as_decoder(model).layers, 1, torch.float32)
    figures = {}
    for name, core in engines.items():
        ratios = [full / own for full, own in zip(times["full"], times[name], strict=True)]
        cached = sum(sequence.kv_len for sequence in core.scheduler.sequences)
        figures[name] = {
            "tokens_per_s": batch * settings.steps / statistics.median(times[name]),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "prefill_seconds": prefill[name],
            "kv_bytes": float(cached * per_slot),
            "cached": cached / batch,
        }
    return figures


def interleaved(
    jobs: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Run the jobs in turn, once to warm up and ``rounds`` times by the clock, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            began = clock()
            job()
            if turn:
                times[name].append(clock() - began)
    return times


def _engine(
    model: LipschitzTransformer,
    settings: BenchConfig,
    context: int,
    name: str,
    prompts: list[list[int]],
    new: int,
) -> EngineCore:
    policy, stats = None, None
    if name != "full":
        budget = budget_tokens(settings.share, context)
        policy = with_budget(POLICIES[name](), budget)
        if policy.needs_stats:
            shape = (CALIBRATION[0], min(CALIBRATION[1], context))
            text_BT = torch.randint(model.config.vocab_size, shape)
            stats = layer_stats(calibrate(model, [text_BT]), model)
    batch, default = len(prompts), EngineConfig()
    blocks = -(-(len(prompts[0]) + new) // default.block_size) + 1
    config = EngineConfig(
        max_num_seqs=batch,
        num_blocks=batch * blocks,
        max_num_batched_tokens=default.max_num_batched_tokens + batch,
    )
    core = EngineCore(model, config, policy, stats)
    for prompt in prompts:
        core.add(prompt, SamplingParams(temperature=0.0, max_tokens=new))
    return core


def _overlap(context: int, batch: int) -> int:
    """Return the steps in which the first request may decode while others' prompts are read."""
    return -(-context * batch // EngineConfig().max_num_batched_tokens) + 1


@torch.inference_mode()
def _prefill(core: EngineCore) -> None:
    while any(sequence.is_prefilling for sequence in core.scheduler.sequences):
        core.step()


@torch.inference_mode()
def _steps(core: EngineCore, count: int) -> None:
    batch = core.config.max_num_seqs
    for _ in range(count):
        assert len(core.step()) == batch


def _seconds(job: Callable[[], None]) -> float:
    began = time.process_time()
    job()
    return time.process_time() - began
