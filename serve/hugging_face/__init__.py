"""Causal language models of ``transformers`` as decoders of the engine."""

from serve.hugging_face.checkpoint import Checkpoint, load_checkpoint
from serve.hugging_face.decoder import HuggingFaceDecoder

__all__ = ["Checkpoint", "HuggingFaceDecoder", "load_checkpoint"]
