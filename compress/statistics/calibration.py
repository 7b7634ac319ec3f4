"""Where calibration inputs come from: text, the model itself, or noise.

Which one was used decides what a reconstruction error is an average over, so it is a setting that
reports name. Sampling from the model needs no data at all.
"""

# Legend: B sequences at a time, N all sequences, T tokens, V vocabulary.

from typing import Any

import torch
from torch import Tensor

from common.config import one_of, positive
from common.corpus import Corpus
from common.errors import ConfigError
from common.models import LipschitzTransformer
from compress.adapters import evaluating
from compress.decoding import KVCache
from compress.statistics.grams import sums_device

TOKEN_SOURCES = ("data", "model", "random")
CACHE_NUMBERS = 1 << 28
"""Keys and values held while sampling: 1 GiB in float32 decides how many sequences at a time."""


def calibration_tokens(
    source: str, model: Any, count: int, length: int, *, seed: int = 0, corpus: Corpus | None = None
) -> Tensor:
    """Return calibration sequences for a language model.

    Args:
        source: ``data`` (windows of the training split, in random order), ``model`` (see
            ``sampled_tokens``) or ``random`` (every token equally likely).
        model: A ``LipschitzTransformer`` or a causal model of ``transformers``.
        count: Sequences; ``data`` gives fewer where the corpus is shorter.
        length: Tokens per sequence.
        seed: Of the order, or of the sampling.
        corpus: The text; only ``data`` needs it.

    Returns:
        Token ids (N, T), int64, on the CPU; the same for the same arguments.

    Raises:
        ConfigError: for another source, ``data`` without a corpus, or sequences that the model
            cannot read.
    """
    one_of("source", source, TOKEN_SOURCES)
    positive("count", count)
    positive("length", length)
    require_room(model, length)
    if source == "model":
        return sampled_tokens(model, count, length, seed)
    generator = torch.Generator().manual_seed(seed)
    if source == "random":
        return torch.randint(model.config.vocab_size, (count, length), generator=generator)
    if corpus is None:
        raise ConfigError("source=data: expected a text; name a corpus, or choose model or random")
    windows_NT = corpus.windows("train", length, count)
    return windows_NT[torch.randperm(len(windows_NT), generator=generator), :-1]


@torch.no_grad()
def sampled_tokens(model: Any, count: int, length: int, seed: int = 0) -> Tensor:
    """Return sequences drawn from the model at temperature 1.

    The first token is the model's beginning-of-sequence token. A model without one continues a
    token that is drawn uniformly, once, and its answer comes first: sequences then begin with
    what the model expects on average after a single token, not with tokens it never saw.

    Args:
        model: As in ``calibration_tokens``.
        count: Sequences (N).
        length: Tokens per sequence (T), at most the model's context.
        seed: Of the sampling; all random numbers are drawn on the CPU, in advance.

    Returns:
        Token ids (N, T), int64, on the CPU.

    Source:
        Sampling from the dense model: arXiv 2511.19566 ("distributional access"); the first token
        of models that have none of their own is this project's choice.
    """
    require_room(model, length)
    generator = torch.Generator().manual_seed(seed)
    # One number for the discarded token, then one per token.
    noise_NT = torch.rand(count, length + 1, generator=generator, dtype=torch.float64)
    at_once = max(1, CACHE_NUMBERS // (length * _numbers_per_token(model)))
    with evaluating(model):
        return torch.cat([_sample(model, noise_BT) for noise_BT in noise_NT.split(at_once)])


def gaussian_images(
    count: int,
    shape: tuple[int, ...],
    *,
    mean: float | Tensor = 0.0,
    std: float | Tensor = 1.0,
    seed: int = 0,
) -> Tensor:
    """Return images of independent normal numbers, for classifiers without their data.

    Args:
        count: Images (N).
        shape: Of one image: (channels, height, width), or (features,).
        mean: One number, or what broadcasts to an image; see ``image_moments``.
        std: The same; not negative.
        seed: Of the sampling.

    Returns:
        Images (N, *shape), float32, on the CPU.
    """
    positive("count", count)
    noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))
    return noise * std + mean


def image_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of real images, per channel or per feature.

    Args:
        images: Images (N, channels, height, width) or vectors (N, features).

    Returns:
        Two float32 tensors that broadcast to an image: (channels, 1, 1) or (features,).
    """
    axes = (0, *range(2, images.dim()))
    std, mean = torch.std_mean(images.double(), dim=axes, correction=0, keepdim=True)
    return mean[0].float(), std[0].float()


def require_room(model: Any, length: int) -> None:
    """Check that a language model can read sequences of so many tokens.

    Raises:
        ConfigError: when its context is shorter.
    """
    config = model.config
    room = getattr(config, "context", None) or getattr(config, "max_position_embeddings", length)
    if length > room:
        raise ConfigError(
            f"compress.length={length}: expected at most the model's context of {room} tokens; "
            "lower it"
        )


def _sample(model: Any, noise_BT: Tensor) -> Tensor:
    """Turn uniform numbers (B, T + 1) into sequences (B, T)."""
    begin = getattr(model.config, "bos_token_id", None)
    if begin is None:
        before_B = (noise_BT[:, 0] * model.config.vocab_size).long()
        first_B = _choose(_decoder(model).step(before_B[:, None]), noise_BT[:, 1])
    else:
        first_B = torch.full((len(noise_BT),), begin)
    tokens = [first_B]
    decoder = _decoder(model)
    for noise_B in noise_BT[:, 2:].unbind(1):
        tokens.append(_choose(decoder.step(tokens[-1][:, None]), noise_B))
    return torch.stack(tokens, dim=1)


def _choose(logits_BV: Tensor, noise_B: Tensor) -> Tensor:
    """Return the tokens (B) at which the distribution function passes the uniform numbers."""
    logits_BV = logits_BV.to(sums_device(logits_BV.device)).double()
    below_BV = logits_BV.softmax(-1).cumsum(-1)
    level_B1 = noise_B.to(below_BV.device)[:, None] * below_BV[:, -1:]
    found_B1 = torch.searchsorted(below_BV, level_B1, right=True)
    return found_B1[:, 0].clamp(max=below_BV.shape[1] - 1).cpu()


class _HuggingFaceCache:
    """``KVCache.step`` for causal models of ``transformers``, which bring their own cache."""

    def __init__(self, model: Any):
        self.model = model
        self._past: Any = None

    def step(self, tokens_B1: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        output = self.model(
            input_ids=tokens_B1.to(device), past_key_values=self._past, use_cache=True
        )
        self._past = output.past_key_values
        return output.logits[:, -1]


def _decoder(model: Any) -> KVCache | _HuggingFaceCache:
    return KVCache(model) if isinstance(model, LipschitzTransformer) else _HuggingFaceCache(model)


def _numbers_per_token(model: Any) -> int:
    """Return how many numbers a decoder keeps per token, at most."""
    config = model.config
    if not isinstance(model, LipschitzTransformer):
        return 2 * config.num_hidden_layers * config.hidden_size
    layers = [config.layer(index) for index in range(config.layers)]
    return sum(2 * layer.kv_heads * layer.head_dim for layer in layers)
