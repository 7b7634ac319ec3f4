"""Decoding with a 10M model: against transformers' generate, and full against compressed cache."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.models import LipschitzTransformer
from serve import EngineConfig, SamplingParams
from serve.engine.engine import EngineCore
from serve.kv import policy_by_name
from serve.kv.calibrate import calibrate, layer_stats

SHAPE = {"width": 384, "layers": 6, "heads": 6}
PROMPT, NEW = 16, 96
# At batch 1 and at batch 16; full cache over budget context / 8.
FASTER = {1: 1.3, 16: 1.2}
COMPRESSED = 2.5
SHARE = 8
# Continuous batching against static batches that wait for their longest member.
MIXED = 1.3
REQUESTS, SLOTS, LENGTHS = 64, 16, (8, 128)
STEPS = 64  # per round and between compactions (published: 128), so that each round has one


def _prompts(vocab: int, batch: int, length: int) -> list[list[int]]:
    return torch.randint(vocab, (batch, length)).tolist()


def _engine(model: LipschitzTransformer, prompts: list[list[int]], new: int, **options: Any) -> Any:
    core = EngineCore(model, EngineConfig(max_num_seqs=len(prompts)), **options)
    _add(core, prompts, new)
    return core


def _add(core: EngineCore, prompts: list[list[int]], new: int) -> None:
    for prompt in prompts:
        core.add(prompt, SamplingParams(temperature=0.0, max_tokens=new))


def _llama(parameters: int, vocab: int) -> Any:
    """Return a Llama of the same width and depth with about as many parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=SHAPE["width"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=SHAPE["width"] * 8 // 3,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    assert abs(model.num_parameters() / parameters - 1) < 0.05
    return model


@pytest.mark.parametrize("batch", FASTER)
def test_decode(bench: Any, timed: Callable, make_model: Callable, batch: int) -> None:
    """Tokens per second of short greedy generations, prompt included.

    Against ``generate`` of the same model, exported, and of a Llama of as many parameters.
    """
    pytest.importorskip("transformers")
    from serve.export.modeling import wrap

    model = make_model(**SHAPE, context=1024).eval()
    others = {
        "exported": wrap(copy.deepcopy(model)),
        "llama": _llama(model.num_parameters, model.config.vocab_size),
    }
    prompts = _prompts(model.config.vocab_size, batch, PROMPT)

    # Like the other models, the pool is allocated once and every prompt is read anew.
    core = EngineCore(model, EngineConfig(max_num_seqs=batch, prefix_caching=False))

    @torch.inference_mode()
    def ours() -> None:
        _add(core, prompts, NEW)
        while core.has_work:
            core.step()

    times = timed(
        {"lipllm": ours}
        | {name: _generator(other, prompts, NEW) for name, other in others.items()},
        bench.rounds,
    )
    sizes = {"batch": batch, "prompt": PROMPT, "new": NEW, "parameters": model.num_parameters}
    for name, measured in times.items():
        rates = [batch * NEW / seconds for seconds in measured.cpu]
        bench.add(f"serve: {name}, batch {batch}", rates, "token/s", **sizes)
    for name in others:
        pairs = zip(times["lipllm"].cpu, times[name].cpu, strict=True)
        ratios = [theirs / own for own, theirs in pairs]
        label = f"serve: speed over transformers ({name}), batch {batch}"
        bench.add(label, ratios, "ratio", least=FASTER[batch], **sizes)


def test_mixed_lengths(bench: Any, timed: Callable, make_model: Callable) -> None:
    """Useful tokens per second of requests whose lengths differ."""
    pytest.importorskip("transformers")
    from serve.export.modeling import wrap

    model = make_model(**SHAPE, context=1024).eval()
    other = wrap(copy.deepcopy(model))
    prompts = _prompts(model.config.vocab_size, REQUESTS, PROMPT)
    news = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (REQUESTS,)).tolist()
    core = EngineCore(model, EngineConfig(max_num_seqs=SLOTS, prefix_caching=False))

    @torch.inference_mode()
    def ours() -> None:
        for prompt, new in zip(prompts, news, strict=True):
            _add(core, [prompt], new)
        while core.has_work:
            core.step()

    def theirs() -> None:
        for start in range(0, REQUESTS, SLOTS):
            batch = slice(start, start + SLOTS)
            _generator(other, prompts[batch], max(news[batch]))()

    times = timed({"lipllm": ours, "exported": theirs}, bench.rounds)
    sizes = {"requests": REQUESTS, "slots": SLOTS, "prompt": PROMPT, "new": sum(news)}
    for name, measured in times.items():
        rates = [sum(news) / seconds for seconds in measured.cpu]
        bench.add(f"serve: {name}, mixed lengths", rates, "token/s", **sizes)
    pairs = zip(times["lipllm"].cpu, times["exported"].cpu, strict=True)
    ratios = [theirs / own for own, theirs in pairs]
    name = "serve: speed over static batches (exported), mixed lengths"
    bench.add(name, ratios, "ratio", least=MIXED, **sizes)


@pytest.mark.parametrize("batch", FASTER)
def test_half_precision(bench: Any, timed: Callable, make_model: Callable, batch: int) -> None:
    """What bfloat16 brings: half the memory traffic, which a processor without it pays for."""
    model = make_model(**SHAPE, context=1024).eval()
    prompts = _prompts(model.config.vocab_size, batch, PROMPT)
    settings = EngineConfig(max_num_seqs=batch, prefix_caching=False)
    cores = {
        "float32": EngineCore(model, settings),
        "bfloat16": EngineCore(copy.deepcopy(model).bfloat16(), settings),
    }

    def runner(core: EngineCore) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            _add(core, prompts, NEW)
            while core.has_work:
                core.step()

        return run

    times = timed({name: runner(core) for name, core in cores.items()}, bench.rounds)
    pairs = zip(times["float32"].cpu, times["bfloat16"].cpu, strict=True)
    ratios = [single / half for single, half in pairs]
    sizes = {"batch": batch, "prompt": PROMPT, "new": NEW, "parameters": model.num_parameters}
    bench.add(f"serve: speed of bfloat16 over float32, batch {batch}", ratios, "ratio", **sizes)


def _generator(model: Any, prompts: list[list[int]], new: int) -> Callable[[], None]:
    def run() -> None:
        ids = torch.tensor(prompts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
            )
        assert out.shape == (len(prompts), PROMPT + new)

    return run


def test_compressed_cache(bench: Any, timed: Callable, make_model: Callable) -> None:
    """Decode steps near the end of a long context, scoring and compaction included."""
    model = make_model(**SHAPE, context=bench.long).eval()
    new = STEPS * (bench.rounds + 2) + 1
    prompts = _prompts(model.config.vocab_size, 1, bench.long - new)
    text_BT = torch.randint(model.config.vocab_size, (4, min(bench.long, 512)))
    stats = layer_stats(calibrate(model, [text_BT]), model)
    engines = {"full": _engine(model, prompts, new)}
    for name in ("window", "keydiff", "triattention"):
        policy = policy_by_name(name, budget=bench.long // SHARE, interval=STEPS)
        engines[name] = _engine(model, prompts, new, policy=policy, stats=stats)
    for core in engines.values():
        while not core.step():
            pass
    times = timed({name: _stepper(core) for name, core in engines.items()}, bench.rounds)
    sizes = {"context": bench.long, "budget": bench.long // SHARE, "batch": 1, "steps": STEPS}
    for name, measured in times.items():
        rates = [STEPS / seconds for seconds in measured.cpu]
        bench.add(f"serve: {name} cache at {bench.long}", rates, "token/s", **sizes)
        if name != "full":
            ratios = [a / b for a, b in zip(times["full"].cpu, measured.cpu, strict=True)]
            label = f"serve: {name} over full cache at {bench.long}"
            bench.add(label, ratios, "ratio", least=COMPRESSED, **sizes)


def _stepper(core: EngineCore) -> Callable[[], None]:
    @torch.inference_mode()
    def steps() -> None:
        for _ in range(STEPS):
            assert core.step()

    return steps
