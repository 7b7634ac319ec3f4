"""Bundles as folders of ``transformers``.

Importing this package makes ``AutoModelForCausalLM.from_pretrained`` know exported folders.
"""

import logging

from common.errors import BackendError
from serve.export.modeling import register

try:
    register()
except BackendError as error:
    # Commands that export say so; whoever loads a folder finds why it is unknown.
    logging.getLogger(__name__).info("exported folders cannot be loaded: %s", error)
