"""Decoding against ``generate`` of transformers on the same weights, interleaved."""

# Legend: B requests, T tokens.

import statistics
import warnings
from typing import Any

import torch

from common.models import LipschitzTransformer
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig
from serve.bench.speed import interleaved, random_model
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.sampling_params import SamplingParams

CONTEXT, PROMPT, NEW = 1024, 32, 96


def measure_baseline(rows: Rows, settings: BenchConfig, device: str | torch.device) -> None:
    """Add one row per batch: greedy tokens per second, prompt included, and their ratio."""
    model = random_model(settings.model, CONTEXT, device)
    for batch in settings.batches:
        rows.make("baseline", {"batch": batch}, lambda batch=batch: _race(model, settings, batch))


def _race(model: LipschitzTransformer, settings: BenchConfig, batch: int) -> dict[str, float]:
    from serve.export.modeling import wrap

    generator = torch.Generator().manual_seed(1)
    prompts_BT = torch.randint(model.config.vocab_size, (batch, PROMPT), generator=generator)
    other = wrap(model)
    # The other library reads the prompts anew in every round.
    core = EngineCore(model, EngineConfig(max_num_seqs=batch, prefix_caching=False))
    mask = torch.ones_like(prompts_BT)
    options: Any = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}

    @torch.inference_mode()
    def ours() -> None:
        for prompt in prompts_BT.tolist():
            core.add(prompt, SamplingParams(temperature=0.0, max_tokens=NEW))
        while core.has_work:
            core.step()

    @torch.inference_mode()
    def theirs() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.generate(prompts_BT, attention_mask=mask, pad_token_id=0, **options)

    times = interleaved({"lipllm": ours, "transformers": theirs}, settings.rounds)
    pairs = zip(times["lipllm"], times["transformers"], strict=True)
    ratios = [theirs / ours for ours, theirs in pairs]
    return {
        "tokens_per_s": batch * NEW / statistics.median(times["lipllm"]),
        "tokens_per_s_transformers": batch * NEW / statistics.median(times["transformers"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }
