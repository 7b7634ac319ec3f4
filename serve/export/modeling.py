"""``LipschitzForCausalLM``: our model as a model of ``transformers``, with ``generate``.

Nothing here repeats a layer: the class holds a ``LipschitzTransformer`` and calls it with an
``attend`` hook. The library is imported when the class is first asked for.
"""

# Legend: B batch, T token, S key (cache) slot, C model width, V vocabulary.

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.errors import ConfigError, ShapeError
from common.models import LipschitzTransformer
from common.models.rope import inverse_frequencies
from serve.export.attention import CachedAttention, prepare_attention, slot_distance
from serve.export.config import MODEL_TYPE, config_class
from serve.export.library import require_transformers


class Wrapped:
    """What the model class adds to ``PreTrainedModel`` and ``GenerationMixin``."""

    config: Any
    model: LipschitzTransformer
    loss_function: Any
    is_biased: bool
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules: Any = ("Layer",)
    _skip_keys_device_placement: Any = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.head.weight": "model.embedding.weight"}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Return ``CausalLMOutputWithPast`` for token ids (B, T).

        Args:
            input_ids: Token ids (B, T), or None with ``inputs_embeds``.
            attention_mask: 1 for text, 0 for padding (B, S); or a finished mask (B, 1, T, S).
            position_ids: Positions (B or 1, T); by default they follow the cache.
            past_key_values: Cache of ``transformers``, updated in place.
            inputs_embeds: Embedded tokens (B, T, C) in place of ids.
            labels: Token ids (B, T) to predict, -100 where there is none; gives ``loss`` (nats).
            use_cache: Whether to return a cache; ``config.use_cache`` when left out.
            logits_to_keep: Last so many logits only, or those at these indices; 0 for all.
            **kwargs: Passed on to the attention function and the loss.

        Raises:
            ValueError: without exactly one of ``input_ids`` and ``inputs_embeds``.
            ShapeError: when cache and tokens together exceed the context.
            ConfigError: for position biases under attention that cannot add them.
        """
        from transformers import DynamicCache
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x_BTC = inputs_embeds if input_ids is None else self.model.embed(input_ids)
        assert x_BTC is not None
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        keeps_hidden = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        attend = self._attention(x_BTC, attention_mask, position_ids, past_key_values, kwargs)
        streams = [x_BTC]
        for layer in self.model.layers:
            x_BTC = layer(x_BTC, attend=attend)
            streams += [x_BTC] if keeps_hidden else []
        kept = kwargs.pop("num_logits_to_keep", logits_to_keep)
        kept_BTC = x_BTC[:, slice(-kept, None) if isinstance(kept, int) else kept]
        logits_BTV, loss = self.model.logits(kept_BTC), None
        if labels is not None:
            vocab = self.config.vocab_size
            loss = self.loss_function(logits_BTV, labels, vocab_size=vocab, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=past_key_values,
            hidden_states=tuple(streams) if keeps_hidden else None,
            attentions=tuple(attend.weights) if kwargs.get("output_attentions") else None,
        )

    def _attention(
        self,
        x_BTC: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        options: dict[str, Any],
    ) -> CachedAttention:
        """Return the attention hook of this pass."""
        from transformers.masking_utils import create_causal_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import eager_attention_forward

        length, device = x_BTC.shape[1], x_BTC.device
        past, slots = 0, length
        if cache is not None:
            past, (slots, _) = cache.get_seq_length(), cache.get_mask_sizes(length, 0)
        self._require_context(slots)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTC,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        distance_TS = None
        if self.is_biased:
            distance_TS = slot_distance(length, slots, past, device)
        if position_ids is None:
            position_ids = (torch.arange(length, device=device) + past)[None]
        chosen = self.config._attn_implementation
        self._require_bias(chosen, options)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)
        options = {"position_ids": position_ids, **options}
        return CachedAttention(
            self.model, function, cache, mask, position_ids, distance_TS, options
        )

    def _require_context(self, slots: int) -> None:
        context = self.model.config.context
        if slots > context:
            raise ShapeError(
                f"sequence of {slots} tokens: expected at most the model's context of {context}; "
                "shorten the prompt or lower max_new_tokens"
            )

    def _require_bias(self, chosen: str, options: dict[str, Any]) -> None:
        # Others make their own masks, and a paged cache tells no distances.
        if self.is_biased and (chosen not in ("sdpa", "eager") or "cache" in options):
            raise ConfigError(
                f"attention {chosen!r}{' over pages' * ('cache' in options)}: the model has "
                "position biases, expected sdpa or eager attention without pages; use generate"
            )

    def get_input_embeddings(self) -> Any:
        """Return the embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> Any:
        """Return the head."""
        return self.model.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Return the embedding; its size cannot change.

        Raises:
            ConfigError: for another number of tokens.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ConfigError(
                f"resize_token_embeddings({new_num_tokens}): the model has exactly "
                f"{self.config.vocab_size} token ids; train it with another tokenizer"
            )
        return self.get_input_embeddings()


@functools.cache
def model_class() -> type[Any]:
    """Return ``LipschitzForCausalLM``, a ``PreTrainedModel`` that can generate."""
    from transformers import GenerationMixin, PreTrainedModel, initialization
    from transformers.utils.generic import can_return_tuple

    class LipschitzForCausalLM(Wrapped, PreTrainedModel, GenerationMixin):
        """A ``LipschitzTransformer`` as a causal language model of ``transformers``."""

        __qualname__ = "LipschitzForCausalLM"
        config_class = config_class()
        forward = can_return_tuple(Wrapped.forward)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            definition = config.definition()
            self.is_biased = any(definition.position_bias)
            self.model = LipschitzTransformer(definition)
            _complete(self.model)
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            super()._init_weights(module)
            if getattr(module, "position_bias", None) is not None:
                initialization.zeros_(module.position_bias)

    return LipschitzForCausalLM


def wrap(model: LipschitzTransformer) -> Any:
    """Return the model of ``transformers`` that shares the weights of ``model``."""
    config = config_class()(transformer=model.config.to_dict(), dtype=model.embedding.weight.dtype)
    with torch.device("meta"):
        wrapped = model_class()(config)
    prepare_attention(model)
    wrapped.model = model
    return wrapped.eval()


def register() -> None:
    """Make the Auto classes of ``transformers`` know exported folders.

    Raises:
        BackendError: when ``transformers`` is not installed, or too old.
    """
    library = require_transformers()
    library.AutoConfig.register(MODEL_TYPE, config_class(), exist_ok=True)
    library.AutoModelForCausalLM.register(config_class(), model_class(), exist_ok=True)


def _complete(model: LipschitzTransformer) -> None:
    """Set what no file holds; the library builds models without memory, frequencies included."""
    prepare_attention(model)
    config = model.config
    with torch.device("cpu"):
        for index, layer in enumerate(model.layers):
            dim = config.layer(index).head_dim
            frequency_F = inverse_frequencies(dim, config.rope_theta, config.rope_dims)
            attention: Any = layer.attention
            attention.inverse_frequency = frequency_F


def __getattr__(name: str) -> Any:
    """Make a class when it is first asked for."""
    makers = {"LipschitzConfig": config_class, "LipschitzForCausalLM": model_class}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return makers[name]()
