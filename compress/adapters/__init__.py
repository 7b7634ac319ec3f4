"""Families of models that can be pruned, behind one interface."""

from typing import Any

from common.errors import ConfigError
from common.models import LipschitzTransformer
from compress.adapters.base import Adapter as Adapter
from compress.adapters.base import Stage as Stage
from compress.adapters.base import captured as captured
from compress.adapters.base import rows_of as rows_of
from compress.adapters.lipschitz import LipschitzAdapter as LipschitzAdapter


def adapter_for(model: Any) -> Adapter:
    """Return the adapter of a model.

    Args:
        model: A ``LipschitzTransformer``.

    Raises:
        ConfigError: for a model that no adapter knows.
    """
    if isinstance(model, LipschitzTransformer):
        return LipschitzAdapter(model)
    raise ConfigError(f"{type(model).__name__}: no adapter prunes this kind of model")
