"""Tiny decoder models of ``transformers`` with random weights, one per family."""

from typing import Any

import pytest
import torch

WIDTH, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 32, 8, 4, 8, 64
GATED: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
}
# Windows of six tokens: layers then get different masks.
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
GPT2: dict[str, Any] = {
    "vocab_size": 40,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 24,
    "n_positions": POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GATED, "mlp_bias": True, "attention_bias": True}),
    "qwen2": ("Qwen2Config", {**GATED, **WINDOW, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", GATED),
    "mistral": ("MistralConfig", {**GATED, "sliding_window": 6}),
    "gpt2": ("GPT2Config", GPT2),
}


@pytest.fixture(scope="session")
def transformers() -> Any:
    """Return the package; its import takes seconds, so only these tests pay for it."""
    library = pytest.importorskip("transformers")
    # The package imports its parts on first use: that time belongs to no single test.
    assert library.AutoModelForCausalLM
    assert library.LlamaForCausalLM
    return library


@pytest.fixture
def make_decoder(transformers: Any):
    """Return ``(family, ...) -> model`` in evaluation mode with every bias nonzero."""

    def make(
        family: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any
    ) -> Any:
        name, settings = FAMILIES[family]
        config = getattr(transformers, name)(**{**settings, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    """Return random token sequences (16, 20)."""
    return torch.randint(40, (16, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits():
    """Return ``(model, tokens) -> logits`` without gradients."""

    def compute(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens_BT).logits

    return compute
