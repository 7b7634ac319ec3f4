"""Decoding against ``generate`` of transformers on the same weights, interleaved."""

# Legend: B requests, T tokens.

import statistics
import warnings
from functools import partial
from typing import Any

import torch

from common.errors import ConfigError
from common.models import LipschitzTransformer
from serve.bench.clock import Clock
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig
from serve.bench.speed import interleaved, paired, succeeded
from serve.decoder import Decoder, as_decoder
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.sampling_params import SamplingParams

CONTEXT, PROMPT, NEW = 1024, 32, 96


def require_context(context: int) -> None:
    """Raise ``ConfigError`` for a model that cannot hold a prompt and what is generated."""
    if context < PROMPT + NEW:
        raise ConfigError(
            f"bench.parts=baseline needs a context of {PROMPT + NEW} tokens, the model has "
            f"{context}; leave the part out, or bundle=null"
        )


def measure_baseline(
    rows: Rows, settings: BenchConfig, model: LipschitzTransformer | Decoder
) -> None:
    """Add one row per batch: greedy tokens per second, prompt included, and their ratio.

    Raises:
        ConfigError: for a model whose context is too short.
        BackendError: without ``transformers``.
    """
    decoder = as_decoder(model)
    require_context(decoder.context)
    clock = Clock.of(decoder.device)
    for batch in settings.batches:
        keys = {"batch": batch, **clock.keys}
        rows.make("baseline", keys, partial(_race, decoder, settings.rounds, batch, clock))


def _race(decoder: Decoder, rounds: int, batch: int, clock: Clock) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    prompts_BT = torch.randint(decoder.vocab_size, (batch, PROMPT), generator=generator)
    # The other library reads the prompts anew in every round.
    core = EngineCore(decoder, EngineConfig(max_num_seqs=batch, prefix_caching=False))
    other, given_BT = _counterpart(decoder), prompts_BT.to(decoder.device)
    mask = torch.ones_like(given_BT)
    options: Any = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}

    @torch.inference_mode()
    def ours() -> None:
        for prompt in prompts_BT.tolist():
            core.add(prompt, SamplingParams(temperature=0.0, max_tokens=NEW))
        while core.has_work:
            succeeded(core.step())

    @torch.inference_mode()
    def theirs() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.generate(given_BT, attention_mask=mask, pad_token_id=0, **options)

    times = interleaved({"lipllm": ours, "transformers": theirs}, rounds, clock)
    return {
        "tokens_per_s": batch * NEW / statistics.median(times["lipllm"]),
        "tokens_per_s_transformers": batch * NEW / statistics.median(times["transformers"]),
        **paired(times["lipllm"], times["transformers"]),
    }


def _counterpart(decoder: Decoder) -> Any:
    """Return the model of ``transformers`` with the same weights, free of settings of its own."""
    model: Any = decoder.model
    if isinstance(model, LipschitzTransformer):
        from serve.export.modeling import wrap

        return wrap(model)
    from transformers import GenerationConfig

    # Outside of the engine its attention is the library's SDPA. Its own settings may sample,
    # search beams or penalise, which is other work.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return model
