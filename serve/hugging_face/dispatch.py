"""Our entry in the attention registry of ``transformers``.

A model whose attention implementation is ``NAME`` calls the hook of the running forward pass.
Outside of one it attends through the library's SDPA, so it can still be used as before.
"""

# Legend: N tokens (flat), H query heads, K key/value heads, D head width.

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from common.checkpoints import transformers_library

NAME = "lipllm"

Hook = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], Tensor]
"""``hook(module, q_NHD, k_NKD, v_NKD, mask, options) -> o_NHD``"""
MaskHook = Callable[[dict[str, Any]], Tensor | None]
"""``hook(options) -> mask``, whatever the attention hook wants to see as its mask."""

_HOOKS: ContextVar[tuple[Hook, MaskHook] | None] = ContextVar("lipllm_attention", default=None)


def register() -> None:
    """Enter our attention and mask functions under ``NAME``; again is harmless."""
    transformers_library()
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def hooked(hook: Hook, mask_hook: MaskHook = lambda options: None) -> Iterator[None]:
    """Send the attention of all models of this context to a hook."""
    token = _HOOKS.set((hook, mask_hook))
    try:
        yield
    finally:
        _HOOKS.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    hooks = _HOOKS.get()
    if hooks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    q_NHD, k_NKD, v_NKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return hooks[0](module, q_NHD, k_NKD, v_NKD, attention_mask, options)[None], None


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    hooks = _HOOKS.get()
    if hooks is None:
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(*arguments, **options)
    return hooks[1](options)
