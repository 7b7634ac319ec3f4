"""The certificate's budget: the certificate itself is the oracle."""

from types import SimpleNamespace

import pytest
import torch

from common.bundle import load_bundle
from common.errors import CertificateError, ConfigError
from common.models import LipschitzTransformer, ModelConfig
from solvers.bounds import certify, verify
from train import budget as budget_module
from train.app import train
from train.budget import MARGIN, Budget, KeepBudget, enforce, head_cap
from train.groups import HEAD, Constraint
from train.init import initialise

SIZES = {"vocab_size": 11, "width": 8, "layers": 1, "heads": 2, "context": 6}


@pytest.fixture
def model():
    """A transformer whose constant is far from 2."""
    torch.manual_seed(0)
    model = LipschitzTransformer(ModelConfig(**SIZES, final_scale=1.5, head_bias=True))
    initialise(model, Constraint(), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("tighten", [True, False])
def test_a_head_at_its_cap_uses_the_whole_budget(model, tighten):
    """Oracle: the certificate of the model whose head has been scaled to the cap by SVD.

    A tightened proof sees which changes the head can see, so that some of the budget stays.
    """
    budget = Budget(target=0.7, tighten=tighten)
    cap = head_cap(certify(model, tighten), model, budget)
    with torch.no_grad():
        head_VC = model.head.weight
        norm = (8 / 11) ** 0.5 * torch.linalg.matrix_norm(head_VC.double(), 2)
        head_VC.mul_(cap / norm)
    share = certify(model, tighten).tightened / budget.target
    assert (0.3 if tighten else 1 - 2 * MARGIN) < share <= 1


def test_surplus_rows_of_the_head_cost_nothing():
    """Oracle: the certificate, whose RMS is over the logits alone, at the cap by SVD."""
    model = LipschitzTransformer(ModelConfig(**SIZES, vocab_multiple=8)).requires_grad_(False)
    budget = Budget(target=0.7, tighten=False)
    cap = head_cap(certify(model, False), model, budget)
    norm = (8 / 16) ** 0.5 * torch.linalg.matrix_norm(model.head.weight.double(), 2)
    model.head.weight.mul_(cap / norm)
    assert 1 - 2 * MARGIN < certify(model, False).tightened / budget.target <= 1


@pytest.mark.parametrize("size", [1e12, 1e30])
def test_a_budget_that_no_head_can_meet_is_refused(model, size):
    """Oracle: the head would underflow to 0 and predict nothing; it is left as it was."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name:
                parameter.mul_(size)
    before = model.head.weight.clone()
    with pytest.raises(CertificateError, match=r"trainer\.budget\.target=0\.7"):
        enforce(model, Budget(target=0.7))
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("margin", [1e-4, 1e-6])
def test_a_head_that_rounds_back_is_never_stored_over_budget(model, margin, monkeypatch):
    """Oracle: the certificate. Equal entries a hair above the budget round back to themselves."""
    monkeypatch.setattr(budget_module, "ROUNDING", margin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        model.head.weight.fill_(1.5)
    budget = Budget(target=certify(model).tightened * (1 - 1e-6))
    if margin > 1e-5:
        assert enforce(model, budget, torch.bfloat16).tightened <= budget.target
    else:
        with pytest.raises(CertificateError, match="expected at most"):
            enforce(model, budget, torch.bfloat16)


def test_a_block_that_nothing_passes_leaves_the_cap_alone(model):
    """Oracle: the constant is 0 under every head, so there is no cap to compute."""
    with torch.no_grad():
        for name in ("output", "value"):
            getattr(model.layers[0].attention, name).weight.zero_()
    blocked = LipschitzTransformer(model.config.with_layer(0, attn_residual=1.0))
    blocked.load_state_dict(model.state_dict())
    group = {"names": [HEAD], "w_max": 0.5}
    trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[group])], loggers=[])
    module = SimpleNamespace(whole=lambda: blocked)
    KeepBudget(Budget(target=1.0)).on_step(trainer, module)
    assert group["w_max"] == 0.5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("target", [0.1, 2.0])
def test_the_finished_model_is_within_its_budget(model, target, dtype):
    """Oracle: a fresh certificate; bfloat16 weights must still be bfloat16 values."""
    if dtype is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
    before = certify(model).tightened
    assert before > target
    enforce(model, Budget(target=target), dtype)
    assert 0.98 * target < certify(model).tightened <= target
    if dtype is not None:
        head_VC = model.head.weight
        assert torch.equal(head_VC, head_VC.to(dtype).to(head_VC.dtype))


def test_enforcing_a_budget_changes_no_prediction(model):
    """Oracle: the most probable token of every position before."""
    with torch.no_grad():
        tokens_BT = torch.randint(11, (8, 6))
        before_BTV = model(tokens_BT)
        enforce(model, Budget(target=0.1))
        after_BTV = model(tokens_BT)
    assert torch.equal(before_BTV.argmax(-1), after_BTV.argmax(-1))
    assert after_BTV.abs().max() < 0.5 * before_BTV.abs().max()


def test_a_model_within_its_budget_is_left_alone(model):
    """Oracle: the weights, bit for bit."""
    before = model.head.weight.clone()
    enforce(model, Budget(target=1e6))
    assert torch.equal(model.head.weight, before)


def test_the_proof_of_a_tightened_budget_is_stored(make_run):
    """Oracle: the checker, which proves the stored bound again."""
    outcome = train(*make_run("trainer.max_steps=2", "trainer.budget.target=0.02"))
    bundle = load_bundle(outcome.artifacts["bundle"])
    assert outcome.metrics["cert/tightened"] <= 0.02
    assert verify(bundle.model, bundle.certificate).tightened <= 0.02


@pytest.mark.parametrize(
    "settings", [{"target": 0.0}, {"target": -1.0}, {"target": 1e-300}, {"every": 0}]
)
def test_impossible_budgets_are_refused(settings):
    """A budget is positive and checked at least every step."""
    with pytest.raises(ConfigError, match=r"trainer\.budget"):
        Budget(**settings)
