"""Tiny random models of ``transformers``, one per way of attending."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve.decoder import Decoder
from serve.engine.engine import EngineCore
from serve.engine.request import SamplingParams, Sequence
from serve.engine.scheduler import EngineConfig
from serve.kv import Policy

VOCAB, CONTEXT = 97, 192
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 48,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "glm": ("Glm", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "cohere": ("Cohere", {}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2_mixed": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
}


def build(kind: str, changes: dict[str, Any]) -> Any:
    """Return a model of a class of ``transformers``, with its own initialization."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = getattr(transformers, f"{kind}Config")(**(SHAPE | changes))
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model in evaluation mode with norms and biases away from one and zero."""
    model = build(*MODELS[name])
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise if key.endswith("bias") else 1 + noise)
    return model.to(dtype).eval().requires_grad_(False)


def make_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Return random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def run(
    model: Decoder,
    prompts: list[list[int]],
    policy: Policy | None = None,
    stats: Any = None,
    params: SamplingParams = GREEDY,
    **settings: Any,
) -> list[Sequence]:
    """Run prompts together in an engine of their own."""
    core = EngineCore(model, EngineConfig(debug=True, **settings), policy, stats)
    sequences = [core.add(prompt, params) for prompt in prompts]
    while core.has_work:
        core.step()
    return sequences


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the library's greedy continuation."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def save_folder(path: Path, name: str = "qwen3") -> Path:
    """Write a model with a byte-level tokenizer as a folder of ``transformers``."""
    import tokenizers
    import transformers

    make_model(name).save_pretrained(path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    letters = [c for c in alphabet if c.isascii() or c == "\u0120"][: VOCAB - 1]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    fast.save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a tiny checkpoint, for this test alone."""
    return save_folder(tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def hf() -> SimpleNamespace:
    """Return the helpers of this file by name."""
    make_model("llama")  # importing the library takes seconds, which no single test should pay
    return SimpleNamespace(
        build=build,
        generated=generated,
        make_model=make_model,
        make_prompts=make_prompts,
        run=run,
        models=tuple(MODELS),
        save_folder=save_folder,
        context=CONTEXT,
        vocab=VOCAB,
        greedy=GREEDY,
    )
