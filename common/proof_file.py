"""The two files of a certificate: ``certificate.json`` and the multipliers beside it.

Certificates of transformers and of classifiers are stored alike; infinite totals are null.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from common.errors import CertificateError
from common.files import from_json, to_json, write_bytes

FORMAT_VERSION = 2
JSON_FILE = "certificate.json"
TENSOR_FILE = "certificate.safetensors"


class ProofFile:
    """What both certificates share: dataclasses with ``blocks``, ``multipliers`` and totals.

    Attributes:
        totals: Names of the fields that may be infinite.
        block: Type of one entry of ``blocks``.
    """

    totals: ClassVar[tuple[str, ...]]
    block: ClassVar[type]
    multipliers: Mapping[str, Tensor]

    def save(self, directory: str | Path) -> None:
        """Write the two files into an existing folder.

        Raises:
            OSError: if the folder cannot be written.
        """
        directory = Path(directory)
        tensors = {name: tensor.contiguous() for name, tensor in self.multipliers.items()}
        write_bytes(directory / TENSOR_FILE, safetensors.torch.save(tensors))
        write_bytes(directory / JSON_FILE, to_json(self.to_dict()).encode())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the multipliers as JSON types; an infinite total is null."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        fields = {name: getattr(self, name) for name in names if name != "multipliers"}
        fields["blocks"] = [dataclasses.asdict(block) for block in fields["blocks"]]
        for name in self.totals:
            fields[name] = fields[name] if math.isfinite(fields[name]) else None
        return {key: _plain(value) for key, value in fields.items()}

    @classmethod
    def from_content(
        cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
    ) -> Self:
        """Build a certificate from what ``read_proof`` returned; ``path`` is for messages.

        Raises:
            CertificateError: if the content is not that of a certificate.
        """
        try:
            fields = dict(content)
            for name in cls.totals:
                fields[name] = math.inf if fields[name] is None else fields[name]
            fields["blocks"] = tuple(cls.block(**block) for block in fields["blocks"])
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return cls(**fields, multipliers=tensors)  # type: ignore[call-arg]
        except (TypeError, KeyError, AttributeError) as error:
            raise CertificateError(f"{path}: {error}: not a certificate; certify again") from error


def read_proof(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of the two files of a certificate; ``CertificateError`` naming a bad one.

    Bundles of both kinds of models keep their proofs in these files.
    """
    path = directory / JSON_FILE
    try:
        content = from_json(path.read_text())
        path = directory / TENSOR_FILE
        tensors = safetensors.torch.load(path.read_bytes())
    except FileNotFoundError as error:
        raise CertificateError(f"{path}: no such file; run: lipllm certify bundle=...") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CertificateError(f"{path}: damaged ({error}); certify again") from error
    if not isinstance(content, dict):
        raise CertificateError(f"{directory / JSON_FILE}: not a certificate; certify again")
    _check_mappings(directory / JSON_FILE, content)
    if (version := content.get("format_version")) != FORMAT_VERSION:
        raise CertificateError(
            f"{directory / JSON_FILE}: format version {version}, expected {FORMAT_VERSION}; "
            "certify again"
        )
    return content, tensors


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _check_mappings(path: Path, content: Mapping[str, Any]) -> None:
    """Check the fields that every reader takes for mappings, in both kinds of certificates."""
    fields = [(name, content.get(name, {})) for name in ("weights_sha256", "multipliers_sha256")]
    blocks = content.get("blocks")
    for block in blocks if isinstance(blocks, list) else []:
        # What else is wrong with a block is found when it is built.
        components = block.get("components", {}) if isinstance(block, dict) else {}
        fields.append(("components", components))
    for name, value in fields:
        if not isinstance(value, dict):
            raise CertificateError(f"{path}: {name}={value!r}: expected a mapping; certify again")
