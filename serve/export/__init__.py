"""Bundles as folders of ``transformers``.

Importing this package makes ``AutoModelForCausalLM.from_pretrained`` know exported folders.
"""

import contextlib

from serve.export.modeling import register

# Without the library there is nothing to register with.
with contextlib.suppress(ImportError):
    register()
