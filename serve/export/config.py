"""``LipschitzConfig``: the configuration of an exported model, as ``transformers`` wants it.

The library is imported when the class is first asked for.
"""

import functools
from collections.abc import Mapping
from typing import Any

from common.checkpoints import EXPORTED_TYPE
from common.errors import ConfigError
from common.models import ModelConfig

MODEL_TYPE = EXPORTED_TYPE


def usual_names(config: ModelConfig) -> dict[str, int]:
    """Return sizes under the names that ``transformers`` gives them.

    Where the layers of a pruned model differ, the largest value is told.
    """
    layers = [config.layer(index) for index in range(config.layers)]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "max_position_embeddings": config.context,
        "num_attention_heads": max(layer.heads for layer in layers),
        "num_key_value_heads": max(layer.kv_heads for layer in layers),
        "head_dim": max(layer.head_dim for layer in layers),
        "intermediate_size": max(layer.mlp_width for layer in layers),
    }


@functools.cache
def config_class() -> type[Any]:
    """Return ``LipschitzConfig``, a ``PretrainedConfig``."""
    from transformers import PretrainedConfig

    class LipschitzConfig(PretrainedConfig):
        """Configuration of a ``LipschitzForCausalLM``.

        Args:
            transformer: ``ModelConfig.to_dict()``, which the usual names follow from.
            tie_word_embeddings: Whether head and embedding are one matrix.
            use_cache: Whether a plain call returns its keys and values.
            **kwargs: Those of ``PretrainedConfig``.

        Raises:
            ConfigError: for impossible settings.
        """

        __qualname__ = "LipschitzConfig"
        model_type = MODEL_TYPE

        def __init__(
            self,
            transformer: Mapping[str, Any] | None = None,
            tie_word_embeddings: bool = False,
            use_cache: bool = True,
            **kwargs: Any,
        ) -> None:
            # Without arguments it is only compared with: the library asks for defaults that way.
            self.transformer = dict(transformer or {})
            self.tie_word_embeddings, self.use_cache = tie_word_embeddings, use_cache
            if transformer is not None:
                _set_sizes(self, kwargs)
            super().__init__(**kwargs)

        def definition(self) -> ModelConfig:
            """Return the settings that our model is built from."""
            return ModelConfig.from_dict(self.transformer)

    return LipschitzConfig


def _set_sizes(target: Any, given: dict[str, Any]) -> None:
    """Set the usual names, which a stored configuration repeats."""
    config = target.definition()
    for name, value in usual_names(config).items():
        if (found := given.pop(name, value)) != value:
            raise ConfigError(
                f"{name}={found}: expected {value}, which follows from transformer; change it there"
            )
        setattr(target, name, value)
    if target.tie_word_embeddings and config.head_rows != config.vocab_size:
        raise ConfigError(
            f"tie_word_embeddings=True: the head has {config.head_rows} rows, expected "
            f"{config.vocab_size}; use vocab_multiple=1"
        )


def __getattr__(name: str) -> Any:
    """Make the class when it is first asked for."""
    if name != "LipschitzConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class()
