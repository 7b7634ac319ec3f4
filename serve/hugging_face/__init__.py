"""Causal language models of ``transformers`` as decoders of the engine."""

from serve.hugging_face.decoder import HuggingFaceDecoder

__all__ = ["HuggingFaceDecoder"]
