"""Decoder models of ``transformers``: separate projections and a gated MLP, or GPT-2."""

from typing import Any

from common.errors import ConfigError
from compress.adapters.decoder import DecoderAdapter, base_model
from compress.adapters.gpt2 import GPT2Adapter
from compress.adapters.linear import outputs_of
from compress.adapters.places import LayerShape, Place, Producer

ATTENTION_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MAPS = ("gate_proj", "up_proj", "down_proj")


class GatedAdapter(DecoderAdapter):
    """Llama, Mistral, Qwen2, Qwen3 and what is built like them.

    Components of attention are groups of query heads with the key-value head they share.
    """

    maps = ATTENTION_MAPS + MLP_MAPS

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Return whether every layer has the maps of a gated MLP and of separate projections."""
        layers = getattr(base_model(model), "layers", ())
        return len(layers) > 0 and all(
            all(hasattr(getattr(layer, "self_attn", None), name) for name in ATTENTION_MAPS)
            and all(hasattr(getattr(layer, "mlp", None), name) for name in MLP_MAPS)
            for layer in layers
        )

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return self.decoder.layers

    def attention(self, index: int) -> Any:
        """Return the attention module of a layer."""
        return self.layers[index].self_attn

    def heads_place(self, index: int) -> Place:
        """Return the output projection and the maps to queries, keys and values."""
        attention = self.attention(index)
        kv_heads = max(1, outputs_of(attention.k_proj) // attention.head_dim)
        group = outputs_of(attention.q_proj) // kv_heads
        return Place(
            consumer=attention.o_proj,
            unit=group,
            producers=(
                Producer(attention.q_proj, group),
                Producer(attention.k_proj, attention.head_dim),
                Producer(attention.v_proj, attention.head_dim),
            ),
        )

    def mlp_place(self, index: int) -> Place:
        """Return the down projection and the two maps that are multiplied."""
        mlp = self.layers[index].mlp
        producers = (Producer(mlp.gate_proj, 1), Producer(mlp.up_proj, 1))
        return Place(consumer=mlp.down_proj, unit=1, producers=producers)

    def config_values(self, shape: LayerShape) -> dict[str, int]:
        """Return widths and head counts, with the head width, which no longer follows from them."""
        return {
            "intermediate_size": shape.mlp_width,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": self.attention(0).head_dim,
        }

    def recount(self, index: int) -> None:
        """Update the counters that the installed version keeps."""
        shape = self.shape(index)
        counters = {
            self.attention(index): {
                "num_heads": shape.heads,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "num_key_value_groups": shape.heads // shape.kv_heads,
            },
            self.layers[index].mlp: {"intermediate_size": shape.mlp_width},
        }
        for module, values in counters.items():
            for name, value in values.items():
                if hasattr(module, name):
                    setattr(module, name, value)


def is_transformers_model(model: Any) -> bool:
    """Return whether a model comes from ``transformers``, without importing it."""
    config = getattr(model, "config", None)
    return hasattr(config, "model_type") and hasattr(model, "base_model_prefix")


def decoder_adapter(model: Any) -> DecoderAdapter:
    """Return the adapter of a model of ``transformers``.

    Raises:
        ConfigError: for an architecture that no adapter knows.
    """
    for family in (GatedAdapter, GPT2Adapter):
        if family.matches(model):
            return family(model)
    raise ConfigError(
        f"{type(model).__name__}: unknown architecture, expected the layers of Llama, Mistral, "
        "Qwen2 or Qwen3 (q/k/v/o and gate/up/down projections) or of GPT-2; choose such a model"
    )
