"""Small models with prescribed norms for the tests of bounds and attacks."""

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from common.bundle import save_bundle
from common.bundle_format import fingerprint
from common.certificate import tensors_sha256
from common.classifier_certificate import load_certificate
from common.errors import LipError
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer
from solvers.bounds import TightenSettings, certify, verify

BuildModel = Callable[..., LipschitzTransformer]

# Every freedom of the configuration, in combinations that a certificate must cover.
FREEDOMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "one_head": {"heads": 1, "attn_residual": 1.0},
    "maxmin_bias": {"activation": "maxmin", "mlp_bias": True, "head_bias": True},
    "maxmin": {"activation": "maxmin", "mlp_residual": 1.0},
    "gelu_tanh_bias": {"activation": "gelu_tanh", "mlp_bias": True, "mlp_residual": 0.9},
    "silu_bias": {"activation": "silu", "mlp_bias": True, "mlp_residual": 0.9},
    "tanh": {"activation": "tanh", "mlp_residual": 1.0},
    "relu": {"activation": "relu", "attn_residual": 0.9, "mlp_residual": 0.6},
    "abs_bias": {"activation": "abs", "mlp_bias": True},
    "grouped": {"kv_heads": 2, "attn_residual": 0.8},
    "positional": {"content_heads": 0, "position_bias": True, "attn_residual": 1.0},
    "mixed": {"kv_heads": 2, "content_heads": 2, "position_bias": True, "attn_residual": 1.0},
    "scaled": {"softmax_scale": 6.0, "attn_factor": 1.0, "final_scale": 2.5},
    "no_residual": {"attn_residual": 0.0, "mlp_residual": 0.0},
    "layers_differ": {
        "heads": (4, 2),
        "kv_heads": (2, 2),
        "content_heads": (2, 1),
        "head_dim": (4, 6),
        "mlp_width": (20, 30),
        "activation": ("maxmin", "gelu"),
        "mlp_bias": (True, False),
        "attn_residual": (0.7, 0.3),
        "softmax_scale": (2.0, 0.5),
    },
}


def build(
    seed: int = 0, *, kind: str = "gaussian", norm: float = 1.0, **fields: Any
) -> LipschitzTransformer:
    """Return a float64 model whose matrices all have the RMS->RMS norm ``norm``."""
    torch.manual_seed(seed)
    defaults = {"vocab_size": 11, "width": 16, "layers": 2, "heads": 4, "context": 16}
    config = ModelConfig(**(defaults | fields))
    model = LipschitzTransformer(config).double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "position_bias" in name:
            parameter.normal_()
        elif name == "embedding.weight":
            parameter.normal_()
            parameter.mul_(math.sqrt(config.width) / parameter.norm(dim=1).max())
        else:
            parameter.normal_()
            if kind == "orthogonal":
                torch.nn.init.orthogonal_(parameter)
            size = torch.linalg.matrix_norm(parameter, 2)
            parameter.mul_(norm * math.sqrt(parameter.shape[0] / parameter.shape[1]) / size)
    return model


@pytest.fixture(scope="session")
def build_model() -> BuildModel:
    """Return the model builder."""
    return build


@pytest.fixture(params=FREEDOMS, ids=str)
def any_model(request: pytest.FixtureRequest) -> LipschitzTransformer:
    """Return one model per freedom of the configuration, at norm 1.5."""
    return build(norm=1.5, **FREEDOMS[request.param])


@pytest.fixture
def counterexample() -> LipschitzTransformer:
    """Return the four-head model of bound_tightening 4.2: orthogonal matrices, no residual."""
    return build(kind="orthogonal", width=64, layers=1, heads=4, context=24, attn_residual=1.0)


@pytest.fixture(scope="session")
def flip_bit() -> Callable[[Path, str], None]:
    """Return a function that flips one bit in the middle of a tensor of a safetensors file."""

    def flip(path: Path, tensor: str) -> None:
        data = bytearray(path.read_bytes())
        size = struct.unpack("<Q", data[:8])[0]
        start, stop = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
        data[8 + size + (start + stop) // 2] ^= 1
        path.write_bytes(data)

    return flip


FORGIVEN = 1 - 1e-8  # certificates may differ by their own margins, no more
BRIEF = TightenSettings(max_evals=3)
TINY = {"vocab_size": 256, "width": 4, "layers": 1, "heads": 2, "mlp_width": 6, "context": 4}
TOTALS = ("radius", "naive", "tightened", "log10_naive", "log10_tightened", "head_norm")
TOTALS += ("pair_norm", "naive_l2", "tightened_l2", "pair_l2")
OF_BLOCKS = ("naive", "tightened", "radius_in", "radius_out", "naive_radius_in")


class Forgery:
    """A copy of an honest bundle that a test spoils and makes consistent again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.honest = _claims(load_certificate(path))

    def read(self, name: str = "certificate.json") -> Any:
        """Return the content of a JSON file."""
        return json.loads((self.path / name).read_text())

    def write(self, content: Any, name: str = "certificate.json") -> None:
        """Replace a JSON file, NaN and infinity in Python's spelling."""
        (self.path / name).write_text(json.dumps(content))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file."""
        return dict(safetensors.torch.load((self.path / name).read_bytes()))

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Replace the tensors of a file."""
        whole = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        (self.path / name).write_bytes(safetensors.torch.save(whole))

    def seal(self, *, proof: bool = True) -> None:
        """Make every hash of the directory again, with ``proof`` those of the certificate too."""
        if proof:
            content = self.read()
            names = {"weights": "model.safetensors", "multipliers": "certificate.safetensors"}
            for key, name in names.items():
                content[f"{key}_sha256"] = tensors_sha256(self.tensors(name))
            config = self.read("config.json")
            text = json.dumps(config[config["kind"]], sort_keys=True)
            content["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
            self.write(content)
        manifest = self.read("manifest.json")
        files = {name: (self.path / name).read_bytes() for name in manifest["files"]}
        manifest["files"] = {n: hashlib.sha256(data).hexdigest() for n, data in files.items()}
        manifest["fingerprint"] = fingerprint(manifest["files"])
        self.write(manifest, "manifest.json")

    def accepted(self) -> Any:
        """Return the certificate if the checker accepts it; a refusal must be one line."""
        lines = 1
        try:
            verify(self.path)
        except LipError as error:
            lines = len(str(error).splitlines())
        else:
            return load_certificate(self.path)
        assert lines == 1
        return None

    def assert_no_weaker(self, what: object) -> None:
        """Fail if the checker accepts a claim below the honest one."""
        certificate = self.accepted()
        if certificate is None:
            return
        found = _claims(certificate)
        for name, value in self.honest.items():
            lowest = value - (1 - FORGIVEN) * abs(value)
            assert found.get(name, -math.inf) >= lowest, f"{what}: accepted {name}={found[name]}"


def _claims(certificate: Any) -> dict[str, float]:
    claims = {n: getattr(certificate, n) for n in TOTALS if hasattr(certificate, n)}
    claims = {name: value for name, value in claims.items() if not callable(value)}
    for block in certificate.blocks:
        for name in OF_BLOCKS:
            if hasattr(block, name):
                claims[f"{block.index}.{name}"] = getattr(block, name)
    return claims


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, build_model: BuildModel) -> dict[str, Path]:
    """Return certified bundles, made once: a transformer of each sort and a classifier."""
    root, paths = tmp_path_factory.mktemp("honest"), {}
    sorts: dict[str, dict[str, Any]] = {
        "gelu": {},
        "maxmin": {"activation": "maxmin", "mlp_bias": True, "position_bias": True},
        "deep": {"layers": 2},
    }
    for name, fields in sorts.items():
        model = build_model(norm=1.2, **TINY | fields).float()
        proof = certify(model, settings=BRIEF)
        paths[name] = save_bundle(root / name, model, ByteTokenizer(), certificate=proof).path
    torch.manual_seed(0)
    classifier = LipschitzMLP((6, 8, 4, 3), "maxmin")
    proof = certify(classifier, settings=BRIEF)
    paths["classifier"] = save_bundle(root / "classifier", classifier, certificate=proof).path
    return paths


@pytest.fixture
def forge(tmp_path: Path, honest: dict[str, Path]) -> Callable[[str], Forgery]:
    """Return a function that copies one of the honest bundles."""

    def copy(name: str) -> Forgery:
        path = tmp_path / f"forged_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(honest[name], path)
        return Forgery(path)

    return copy
