"""From a bundle to a folder that ``transformers`` loads, written beside its place and swapped in.

The folder holds no code: ``import serve.export`` supplies the class, the tokenizer needs none.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from common import files
from common.bundle import Bundle
from common.bundle_format import CERTIFICATE
from common.checkpoints import transformers_library
from common.errors import BundleError
from common.models import LipschitzTransformer
from serve.export.config import MODEL_TYPE
from serve.export.library import require_transformers
from serve.export.tokenizer import fast_tokenizer
from serve.llm import cast_model, require_tokenizer

log = logging.getLogger(__name__)

CONFIG = "config.json"
README = "README.md"
CHECKED_TOKENS = 16

USAGE = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A Lipschitz transformer: {parameters:,} parameters, context of {context} tokens.

```python
import serve.export  # of the package lipllm: makes transformers know the model
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (c.from_pretrained("{name}") for c in (AutoModelForCausalLM, AutoTokenizer))
ids = model.generate(**tokenizer(["def "], return_tensors="pt"), max_new_tokens=64)
```

{proof}
"""
PROOF = (
    "`certificate.json` is the proof; it calls tensors by their names in `model.safetensors` "
    "without the leading `model.`."
)
NO_PROOF = "This folder holds no proof about these weights."


def export_bundle(
    bundle: Bundle, path: str | Path, *, dtype: str | None = None, replace: bool = False
) -> str | None:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    Args:
        bundle: Of a transformer.
        path: New or empty folder.
        dtype: Type of the stored weights, such as ``bfloat16``; None keeps the model's.
        replace: Whether an earlier export at ``path`` may be replaced.

    Returns:
        Why the certificate was left out; None where it lies in the folder.

    Raises:
        BundleError: for a classifier, or a place that holds something or cannot be written; what
            was there is unchanged.
        BackendError: when ``transformers`` is not installed.
    """
    require_transformers()
    transformers_library()  # silent from here on
    require_tokenizer(bundle)
    path = Path(path).expanduser().resolve()
    _require_free(path, replace=replace)
    model = cast_model(bundle.model, dtype)
    missing = _missing_proof(bundle, model)
    try:
        with files.staged_directory(path) as stage:
            _write(stage, bundle, model, with_proof=missing is None, name=path.name)
            _check(stage, model)
            files.swap_directory(stage, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise BundleError(
            f"{path}: cannot write the folder ({reason}); what was there is unchanged; free space "
            "or choose another folder"
        ) from error
    if missing is not None:
        log.warning("%s: exported without certificate: %s", path, missing)
    return missing


def _require_free(path: Path, *, replace: bool) -> None:
    files.recover_directory(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not _is_export(path):
        raise BundleError(
            f"{path}: holds something else than an exported model; choose a new or empty folder"
        )
    if not replace:
        raise BundleError(
            f"{path}: holds an exported model already; choose another folder, or replace it with "
            "force=true"
        )


def _is_export(path: Path) -> bool:
    try:
        config = files.from_json((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def _missing_proof(bundle: Bundle, model: LipschitzTransformer) -> str | None:
    if bundle.void is not None:
        return bundle.void
    if bundle.certificate is None:
        return "the bundle has none; lipllm certify adds one"
    if not _are_equal(bundle.model.state_dict(), model.state_dict()):
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        return f"it is not about weights rounded to {dtype}"
    return None


def _are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    # Half and single precision are exact in float64.
    return all(torch.equal(one[name].cpu().double(), other[name].cpu().double()) for name in one)


def _write(
    stage: Path, bundle: Bundle, model: LipschitzTransformer, *, with_proof: bool, name: str
) -> None:
    from transformers import GenerationConfig

    from serve.export.modeling import wrap

    tokenizer = fast_tokenizer(require_tokenizer(bundle), model.config.context)
    wrapped = wrap(model)
    wrapped.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        # Without an end no sequence of a batch is filled up: any id will do.
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    # A model that has served has matrices that are parts of others, or lie column by column.
    clone = torch.contiguous_format
    state = {name: t.clone(memory_format=clone) for name, t in wrapped.state_dict().items()}
    wrapped.save_pretrained(stage, state_dict=state)
    tokenizer.save_pretrained(stage)
    for file in CERTIFICATE if with_proof else ():
        files.write_bytes(stage / file, (bundle.path / file).read_bytes())
    text = USAGE.format(
        name=name,
        parameters=model.num_parameters,
        context=model.config.context,
        proof=PROOF if with_proof else NO_PROOF,
    )
    files.write_bytes(stage / README, text.encode())
    for written in stage.iterdir():
        written.chmod(0o644)  # weights come out readable by their owner only


@torch.no_grad()
def _check(stage: Path, model: LipschitzTransformer) -> None:
    """Load the folder as a user would; other versions of the library may read it otherwise."""
    import transformers

    options: dict[str, Any] = {"local_files_only": True, "dtype": "auto"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(stage, **options)
    tokens_1T = torch.arange(min(CHECKED_TOKENS, model.config.context))[None]
    tokens_1T = tokens_1T % model.config.vocab_size
    expected = model(tokens_1T.to(model.embedding.weight.device)).cpu()
    found = loaded(tokens_1T).logits
    limit = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    if not _are_equal(model.state_dict(), loaded.model.state_dict()) or not (
        float((found - expected).abs().max()) <= limit
    ):
        raise BundleError(
            f"transformers {transformers.__version__} does not read back what was written; "
            "install the version that pip install 'lipllm[hf]' chooses"
        )
