"""Families of models that can be pruned, behind one interface."""

from typing import Any

from torch import Tensor, nn

from common.errors import ConfigError
from common.models import LipschitzMLP, LipschitzTransformer
from compress.adapters.base import Adapter as Adapter
from compress.adapters.base import Stage as Stage
from compress.adapters.base import captured as captured
from compress.adapters.base import evaluating as evaluating
from compress.adapters.base import rows_of as rows_of
from compress.adapters.classifier import ClassifierAdapter as ClassifierAdapter
from compress.adapters.hugging_face import decoder_adapter, is_transformers_model
from compress.adapters.lipschitz import LipschitzAdapter as LipschitzAdapter
from compress.adapters.sequential import SequentialAdapter as SequentialAdapter


def adapter_for(model: Any, example: Tensor | None = None) -> Adapter:
    """Return the adapter of a model.

    Args:
        model: A ``LipschitzTransformer``, a ``LipschitzMLP``, an ``nn.Sequential`` or a decoder
            model of ``transformers``.
        example: Model inputs (N, ...) whose shape counts the operations of convolutions.

    Raises:
        ConfigError: for a model that no adapter knows.
    """
    if isinstance(model, LipschitzTransformer):
        return LipschitzAdapter(model)
    if isinstance(model, LipschitzMLP):
        return ClassifierAdapter(model)
    if isinstance(model, nn.Sequential):
        return SequentialAdapter(model, example)
    if is_transformers_model(model):
        return decoder_adapter(model)
    raise ConfigError(f"{type(model).__name__}: no adapter prunes this kind of model")
