"""GPT-2: transposed weights, queries, keys and values in one map, every head on its own."""

from typing import Any

from compress.adapters.decoder import DecoderAdapter, base_model
from compress.adapters.places import LayerShape, Place, Producer


class GPT2Adapter(DecoderAdapter):
    """``GPT2LMHeadModel``.

    Its configuration derives the head width from the number of heads: with fewer heads it is no
    ordinary checkpoint, with fewer neurons it is.
    """

    maps = ("c_attn", "c_proj", "c_fc")

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Return whether every layer has a fused attention map and a plain MLP."""
        layers = getattr(base_model(model), "h", ())
        return len(layers) > 0 and all(
            hasattr(getattr(layer, "attn", None), "c_attn")
            and hasattr(getattr(layer, "mlp", None), "c_fc")
            and not hasattr(layer, "crossattention")
            for layer in layers
        )

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return self.decoder.h

    def attention(self, index: int) -> Any:
        """Return the attention module of a layer."""
        return self.layers[index].attn

    def heads_place(self, index: int) -> Place:
        """Return the output projection and the fused map."""
        attention = self.attention(index)
        head_dim = attention.head_dim
        producers = (Producer(attention.c_attn, head_dim, 3),)
        return Place(consumer=attention.c_proj, unit=head_dim, producers=producers)

    def mlp_place(self, index: int) -> Place:
        """Return the two maps of the MLP."""
        mlp = self.layers[index].mlp
        return Place(consumer=mlp.c_proj, unit=1, producers=(Producer(mlp.c_fc, 1),))

    def config_values(self, shape: LayerShape) -> dict[str, int] | None:
        """Return the MLP width; None where heads are missing."""
        if shape.heads * self.attention(0).head_dim != self.model.config.n_embd:
            return None
        return {"n_inner": shape.mlp_width}

    def recount(self, index: int) -> None:
        """Update the number of heads and where the fused map is split."""
        attention, shape = self.attention(index), self.shape(index)
        attention.num_heads = shape.heads
        attention.split_size = shape.heads * attention.head_dim
