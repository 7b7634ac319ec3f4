"""Serving with a compressed KV cache: ``LLM(path).generate(prompts, params)``.

Names are resolved on first use, so that importing a torch-free module stays free of torch.
"""

from typing import Any

_EXPORTS = {
    "LLM": "serve.llm",
    "AsyncLLM": "serve.async_llm",
    "RequestOutput": "serve.outputs",
    "Completion": "serve.outputs",
    "SamplingParams": "serve.engine.sampling_params",
    "EngineConfig": "serve.engine.config",
}

__all__ = ["LLM", "AsyncLLM", "Completion", "EngineConfig", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import an exported name on first access."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
