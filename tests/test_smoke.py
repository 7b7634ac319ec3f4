"""The whole house in seconds: import, one training step, one proof, one token. Runs first."""

import importlib
from pathlib import Path

import pytest
import torch

from common.bundle import load_bundle, save_bundle
from common.cli import PACKAGES
from common.models import LipschitzTransformer, ModelConfig
from common.norms import rms_norm_factor, spectral_norm
from common.tokenizer import ByteTokenizer

CAP = 1.0
CAP_TOLERANCE = 1e-5  # float32 arithmetic of the projection


def _model() -> LipschitzTransformer:
    config = ModelConfig(vocab_size=256, width=16, layers=2, heads=2, context=16)
    model = LipschitzTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", PACKAGES)
def test_package_imports(name: str) -> None:
    """Oracle: Python."""
    assert importlib.import_module(name).__doc__


def test_one_step_lowers_the_loss_and_keeps_the_caps() -> None:
    """Oracle: the loss on the same batch, and the SVD of every matrix."""
    from train.groups import Constraint, OptimConfig, parameter_groups
    from train.optim import Muon

    model = _model()
    constraint = Constraint(kind="exact_cap", w_max=CAP)
    optimizer = Muon(parameter_groups(model, OptimConfig(), constraint))
    tokens_BT = torch.arange(4 * 17).remainder(7).view(4, 17)

    def loss() -> torch.Tensor:
        logits_BTV = model(tokens_BT[:, :-1])
        return torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()
        )

    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before
    for block in model.layers:
        for weight_OI in (block.mlp.up.weight, block.mlp.down.weight, block.attention.value.weight):
            assert spectral_norm(weight_OI) * rms_norm_factor(weight_OI) <= CAP + CAP_TOLERANCE


def test_certificate_holds_and_is_re_proved() -> None:
    """Oracle: the order of the three numbers, and the independent checker."""
    from solvers.bounds import certify, verify

    model = _model().double()
    certificate = certify(model, tighten=False)
    assert 0 < certificate.tightened <= certificate.naive
    verify(model, certificate)


def test_bundle_generates_one_token(tmp_path: Path) -> None:
    """Oracle: the largest logit of the model itself."""
    from serve import LLM, SamplingParams

    model = _model().eval()
    save_bundle(tmp_path / "bundle", model, ByteTokenizer())
    prompt = load_bundle(tmp_path / "bundle").tokenizer.encode("def ")
    with torch.no_grad():
        expected = int(model(torch.tensor(prompt.tolist())[None])[0, -1].argmax())
    [output] = LLM(tmp_path / "bundle").generate(
        ["def "], SamplingParams(max_tokens=1, temperature=0.0)
    )
    assert output.token_ids == [expected]
