"""The proof record of one token sequence: what is claimed, and what re-proves it.

A record speaks about the real-arithmetic function of the stored weights on sequences whose
embedded tokens are each within a distance (l2) of those of ``tokens``, all at once.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from common.config import check_types
from common.errors import CertificateError, ConfigError
from common.files import to_json, write_bytes

FORMAT_VERSION = 1
JSON_FILE = "local.json"
TENSOR_FILE = "local.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LocalBlock:
    """Movement of the tokens behind one block, per unit of the embeddings, within ``epsilon``.

    Attributes:
        index: Position in the network; ``2 * layer`` attention, ``2 * layer + 1`` MLP.
        movement: Local bound, largest over tokens.
        certified: The same from certified constants alone.
    """

    index: int
    movement: float
    certified: float

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalCertificate:
    """Claims about one sequence of T tokens, one number per position unless said otherwise.

    Attributes:
        format_version: Version of the file format.
        tokens: Token ids.
        top: First class.
        radii: Distance within which the first class provably stays first; 0 where nothing is
            proved.
        radius_level: Which of ``levels`` proves it.
        levels: Distances at which bounds were computed, ascending (not one per position).
        global_radii: As ``radii``, from certified constants of the blocks alone.
        global_level: Which of ``levels`` proves it.
        epsilon: Distance for the Lipschitz bounds.
        lipschitz: Bound on how fast any difference from the first logit moves per unit of the
            embeddings, between any two sequences within ``epsilon``.
        global_lipschitz: As ``lipschitz``, from certified constants alone.
        blocks: Movement behind each block, within ``epsilon``.
        ball: The global figures hold on this l2 ball of embeddings, or a larger one where the
            perturbed embeddings need it.
        weights_sha256: Hash per weight tensor.
        config_sha256: Hash of the model configuration.
        multipliers_sha256: Hash per multiplier tensor.
        multipliers: Float64 tensors: a certificate's, and "local.I.lambda" of local MLP bounds.
        settings: Settings of the run that made the record.
        versions: Versions of the libraries that made it.
    """

    format_version: int = FORMAT_VERSION
    tokens: tuple[int, ...]
    top: tuple[int, ...]
    radii: tuple[float, ...]
    radius_level: tuple[int, ...]
    levels: tuple[float, ...]
    global_radii: tuple[float, ...]
    global_level: tuple[int, ...]
    epsilon: float
    lipschitz: tuple[float, ...]
    global_lipschitz: tuple[float, ...]
    blocks: tuple[LocalBlock, ...]
    ball: float
    weights_sha256: Mapping[str, str]
    config_sha256: str
    multipliers_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    multipliers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)

    def save(self, directory: str | Path) -> None:
        """Write ``local.json`` and ``local.safetensors`` into a folder, made if it is missing.

        Raises:
            OSError: if the folder cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.multipliers.items()}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["multipliers"]
        fields["blocks"] = [dataclasses.asdict(block) for block in self.blocks]
        content = {k: dict(v) if isinstance(v, Mapping) else v for k, v in fields.items()}
        write_bytes(directory / TENSOR_FILE, safetensors.torch.save(tensors))
        write_bytes(directory / JSON_FILE, to_json(content).encode())

    @classmethod
    def load(cls, directory: str | Path) -> "LocalCertificate":
        """Read a record; nothing is proved here, see ``verify_local``.

        Raises:
            CertificateError: if a file is missing or damaged, or of a foreign version.
        """
        path = Path(directory) / JSON_FILE
        try:
            content = json.loads(path.read_text())
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise CertificateError(
                    f"{path}: format version {version}, expected {FORMAT_VERSION}; certify again"
                )
            blocks = tuple(LocalBlock(**block) for block in content.pop("blocks"))
            tensors = safetensors.torch.load((path.parent / TENSOR_FILE).read_bytes())
            return cls(**content, blocks=blocks, multipliers=tensors)
        except FileNotFoundError as error:
            raise CertificateError(
                f"{error.filename}: no such file; run: lipllm certify bundle=... around.text=..."
            ) from error
        except (
            ConfigError,
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
            SafetensorError,
        ) as error:
            raise CertificateError(
                f"{path}: not a record of a local certificate ({error}); certify again"
            ) from error


def find_records(directory: str | Path) -> list[Path]:
    """Return the folders of the records in a folder: itself, or those directly below it.

    Raises:
        CertificateError: if there is none.
    """
    directory = Path(directory)
    folders = [directory, *sorted(path for path in directory.glob("*") if path.is_dir())]
    found = [path for path in folders if (path / JSON_FILE).is_file()]
    if not found:
        raise CertificateError(
            f"record={directory}: no {JSON_FILE} in it or below it; give the run directory of "
            "lipllm certify around.text=..."
        )
    return found
