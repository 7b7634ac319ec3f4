"""A causal language model of ``transformers`` as a decoder: its layers stay its own.

The model runs one flat row of tokens; its attention reaches the engine through the library's own
registry (``dispatch.py``). What the cache has to know is read off the model (``probe.py``).
"""

# Legend: N tokens (flat), M tokens with logits, H query heads, K key/value heads, D head width,
# V vocabulary.

import hashlib
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from serve.decoder import Attend, Decoder
from serve.hugging_face.dispatch import NAME, hooked, register
from serve.hugging_face.probe import probe

HASHES_AT_ONCE = 8


class HuggingFaceDecoder(Decoder):
    """A ``PreTrainedModel`` with a language-model head.

    Its attention implementation is set to ours; outside the engine it goes on with SDPA.

    Args:
        model: In evaluation mode on its device; any class that dispatches attention through
            ``ALL_ATTENTION_FUNCTIONS`` and rotates queries and keys, or some layers' ones.

    Raises:
        ConfigError: for a model that the cache cannot hold, with the reason.
    """

    def __init__(self, model: Any) -> None:
        register()
        config = model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if not isinstance(context, int):
            raise ConfigError(
                f"{config.model_type}: its configuration names no max_position_embeddings; choose "
                "a model with a stated context"
            )
        self._model, self.context = model.eval(), context
        self.device, self.dtype = model.device, model.dtype
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        # A mask of four dimensions is passed on as it is: the library builds none of its own.
        self._mask_1111 = torch.zeros(1, 1, 1, 1, device=self.device)
        model.set_attn_implementation(NAME)
        self.layers, self.vocab_size = probe(model, context)

    @property
    def model(self) -> nn.Module:
        """The model of ``transformers``."""
        return self._model

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of configuration, dtype and weights."""
        config = {**self._model.config.to_dict(), "dtype": str(self.dtype)}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        state = self._model.state_dict()
        with ThreadPoolExecutor(HASHES_AT_ONCE) as pool:
            for name, sha256 in zip(state, pool.map(_sha256, state.values()), strict=True):
                digest.update(name.encode() + sha256)
        return digest.hexdigest()

    def forward(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, last_M: Tensor | None = None
    ) -> Tensor:
        """Return logits (M, V); see ``Decoder.forward``."""

        def hook(
            module: Any, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, _: Any, __: Any
        ) -> Tensor:
            return attend(module.layer_idx, q_NHD, k_NKD, v_NKD)

        wanted = {"logits_to_keep": last_M} if self._keeps_logits and last_M is not None else {}
        with hooked(hook):
            output = self._model(
                input_ids=tokens_N[None],
                position_ids=positions_N[None],
                attention_mask=self._mask_1111,
                use_cache=False,
                **wanted,
            )
        logits_NV = output.logits[0]
        return logits_NV if wanted or last_M is None else logits_NV[last_M]


def _sha256(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
