"""Saving and loading the model of transformers; sizes that follow from one definition."""

import copy
import pickle
from typing import Any

import pytest
import torch

from common.errors import ConfigError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def wrap() -> Any:
    """Return the function that makes a model of transformers of ours."""
    from serve.export.modeling import wrap

    return wrap


def random_tokens(tiny: Any, *shape: int) -> torch.Tensor:
    """Return random token ids."""
    return torch.randint(tiny.vocab, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_save_and_load_are_exact(tiny: Any, wrap: Any, tmp_path: Any, dtype: torch.dtype) -> None:
    """Oracle: every tensor and every logit before saving."""
    import serve.export  # noqa: F401

    model = tiny.make_model(dtype)
    wrapped, tokens_BT = wrap(model), random_tokens(tiny, 2, 20)
    wrapped.save_pretrained(tmp_path / "one")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto")
    assert type(loaded) is type(wrapped)
    assert not loaded.training
    assert loaded.config.definition() == model.config
    expected, found = wrapped.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(loaded(tokens_BT).logits, wrapped(tokens_BT).logits)
    # Our own forward works inside as well: frequencies are in no file.
    assert torch.equal(loaded.model(tokens_BT), model(tokens_BT))
    loaded.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_tied_head(tiny: Any, tmp_path: Any) -> None:
    """Oracle: one stored matrix, the same logits, and gradients that add up."""
    from serve.export.modeling import LipschitzConfig, LipschitzForCausalLM

    fields = tiny.model.config.to_dict()
    tied = LipschitzForCausalLM(LipschitzConfig(transformer=fields, tie_word_embeddings=True))
    assert tied.model.head.weight is tied.model.embedding.weight
    tied.save_pretrained(tmp_path)
    loaded = LipschitzForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.head.weight is loaded.model.embedding.weight
    tokens_BT = random_tokens(tiny, 1, 9)
    assert torch.equal(loaded(tokens_BT).logits, tied(tokens_BT).logits)
    with pytest.raises(ConfigError, match="vocab_multiple=1"):
        LipschitzConfig(transformer={**fields, "vocab_multiple": 16}, tie_word_embeddings=True)


def test_sizes_follow_from_the_definition(tiny: Any, wrap: Any) -> None:
    """Oracle: the model's configuration; a contradiction is refused."""
    from serve.export.modeling import LipschitzConfig

    config = wrap(tiny.model).config
    assert (config.vocab_size, config.hidden_size) == (tiny.vocab, 32)
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (4, 16, 128)
    assert config.max_position_embeddings == tiny.context
    assert LipschitzConfig(**config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ConfigError, match="hidden_size=64: expected 32"):
        LipschitzConfig(**{**config.to_dict(), "hidden_size": 64})


def test_the_vocabulary_keeps_its_size(tiny: Any, wrap: Any) -> None:
    """Oracle: the number of embedding rows."""
    wrapped = wrap(tiny.model)
    assert wrapped.resize_token_embeddings(tiny.vocab) is tiny.model.embedding
    with pytest.raises(ConfigError, match=f"exactly {tiny.vocab} token ids"):
        wrapped.resize_token_embeddings(tiny.vocab + 1)


def test_copies_are_models_too(tiny: Any, wrap: Any) -> None:
    """Oracle: the logits before copying; other processes get models by pickle."""
    wrapped, tokens_BT = wrap(tiny.make_model()), random_tokens(tiny, 1, 9)
    expected = wrapped(tokens_BT).logits
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert type(other) is type(wrapped)
        assert torch.equal(other(tokens_BT).logits, expected)
