"""The certificate of the whole network does not grow under caps, biases or not."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from common.certificate import tensors_sha256
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from compress import pruner
from compress.deviation import recertify as recertifying
from compress.hold import SHRINKS, certified_limit, fit_within, hold_bound, naive_limit
from compress.pruner import Pruning, prune_model
from compress.record import make_report
from compress.settings import CompressConfig
from solvers.bounds import certify

TOKENS = torch.randint(11, (48, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "keeps", [(0.8, 1.0), (0.5, 0.5), (1.0, 0.5)], ids=["mlp", "both", "heads"]
)
@pytest.mark.parametrize("activation", ["maxmin", "gelu", "relu"])
def test_the_certificate_does_not_grow(make_model, activation, keeps):
    """Oracle: certificates before and after, with large biases, several seeds."""
    for seed in range(3):
        model = make_model(activation, heads=4, seed=seed).float()
        settings = CompressConfig(keep=keeps[0], keep_heads=keeps[1], ridge=1e-4)
        pruned = prune_model(model, TOKENS, settings).model
        before, after = (certify(each, tighten=False).naive for each in (model, pruned))
        assert after <= before


def test_classifiers_are_held_too():
    """Oracle: as above, whole input space."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LipschitzMLP((6, 16, 12, 3), "relu")
    images = torch.rand(256, 6, generator=torch.Generator().manual_seed(0))
    pruned = prune_model(model, images, CompressConfig(keep=0.5)).model
    assert certify(pruned, tighten=False).naive <= certify(model, tighten=False).naive


def test_the_smallest_shrink_that_is_enough_is_taken(make_model):
    """A map made larger by a thousandth comes back; a fitting one stays bit for bit."""
    model = make_model("relu", bias=False)
    settings = CompressConfig(keep=0.99, ridge=1e-4, comp="none")
    pruning = prune_model(model, TOKENS, settings)
    before = {name: tensor.clone() for name, tensor in pruning.model.state_dict().items()}
    assert hold_bound(pruning, naive_limit(model)) is pruning
    for name, tensor in pruning.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    grown = make_model("relu", bias=False)
    with torch.no_grad():
        for layer in grown.layers:
            layer.mlp.down.weight *= 1.0005
    old = grown.layers[0].mlp.down.weight.detach().clone()
    held = hold_bound(dataclasses.replace(pruning, model=grown), naive_limit(model))
    new = held.model.layers[0].mlp.down.weight.detach()
    torch.testing.assert_close(new, (1 - SHRINKS[2]) * old, rtol=1e-12, atol=0)
    assert certify(grown, tighten=False).naive <= certify(model, tighten=False).naive


def test_what_cannot_be_held_is_said(make_model, caplog):
    """Another matrix has grown: the log names the bound, and the weights stay."""
    model, grown = make_model("relu"), make_model("relu")
    with torch.no_grad():
        grown.head.weight *= 2
    before = grown.layers[0].mlp.down.weight.clone()
    pruning = prune_model(model, TOKENS, CompressConfig(keep=0.9, comp="none", ridge=1e-4))
    pruning = dataclasses.replace(pruning, model=grown)
    assert hold_bound(pruning, naive_limit(model)) is pruning
    assert "biases outweigh" in caplog.text
    assert torch.equal(grown.layers[0].mlp.down.weight, before)


@pytest.mark.parametrize("keeps", [(0.5, 1.0), (0.5, 0.5)], ids=["mlp", "both"])
def test_a_tightened_certificate_is_held_and_used_up(make_model, keeps):
    """Oracle: a new certificate; caps above the blocks' own norms are allowed by it alone."""
    model = make_model("maxmin", heads=4, bias=False).float()
    certificate = certify(model)
    limit = certified_limit(model, certificate)
    assert limit.most == certificate.tightened < certificate.naive
    settings = CompressConfig(keep=keeps[0], keep_heads=keeps[1], ridge=1e-4)
    by_norms = prune_model(model, TOKENS, settings)
    used = prune_model(model, TOKENS, settings, limit=limit)
    assert limit.of(used) <= certificate.tightened
    assert certify(used.model).tightened <= certificate.tightened * (1 + 1e-6)
    errors = [sum(fit.error for fit in each.fits) for each in (used, by_norms)]
    assert errors[0] <= errors[1] * 1.01


def test_keeping_everything_touches_nothing(make_model):
    """Bit for bit, under a tightened certificate too, whatever a new search would find."""
    model = make_model("maxmin", heads=4).float()
    limit = certified_limit(model, certify(model))
    same = prune_model(model, TOKENS, CompressConfig(keep=1.0), limit=limit._replace(most=0.0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(same.model.state_dict()[name], tensor)


def test_a_certificate_from_norms_is_held_as_such(make_model):
    """Without multipliers there is nothing tightened that could be used up."""
    model = make_model("relu")
    certificate = certify(model, tighten=False)
    assert certified_limit(model, certificate).most == certificate.naive
    proved = certify(model)
    assert certified_limit(model, proved, "naive").most == proved.naive


def test_slack_of_the_whole_bound_goes_to_the_caps(make_model):
    """Oracle: without heads the bound has room; the fit is then closer, the bound still held."""
    closer = 0
    for seed in range(4):
        model = make_model("relu", heads=4, width=16, seed=seed).float()
        settings = CompressConfig(keep=0.5, keep_heads=0.5, ridge=1e-4)
        used = prune_model(model, TOKENS, settings)
        narrow = prune_model(model, TOKENS, dataclasses.replace(settings, tau=1 - 1e-9))
        before, after = (certify(each, tighten=False).naive for each in (model, used.model))
        assert after <= before
        errors = [sum(fit.error for fit in each.fits) for each in (used, narrow)]
        assert errors[0] <= errors[1] * 1.01
        closer += errors[0] < 0.99 * errors[1]
    assert closer


def test_the_search_stops_below_the_limit(make_model):
    """Oracle: a family of models whose bound grows with tau, the limit at a known one."""
    dense, asked = make_model("relu"), []

    def prune_at(tau):
        asked.append(tau)
        model = make_model("relu")
        with torch.no_grad():
            model.head.weight *= min(tau, 10.0) / 2.5
        fit = SimpleNamespace(kept_K=range(1), target=SimpleNamespace(inputs=2))
        return Pruning(model=model, fits=(fit,), tau=tau)

    best = fit_within(prune_at, naive_limit(dense))
    assert asked[:2] == [math.inf, 1.0]
    scale = float((best.model.head.weight / dense.head.weight).detach().mean())
    assert 0.7 < scale <= 1.0
    assert best.tau == max(tau for tau in asked if tau <= 2.5)
    assert best.proof.weights_sha256 == tensors_sha256(best.model.state_dict())


def test_a_search_tells_one_line_per_candidate_and_proves_it_once(make_model, caplog, monkeypatch):
    """Oracle: counting candidates, proofs and lines; the places are told once, of the result."""
    model = make_model("relu", heads=4, width=16).float()
    tried, proved = [], []

    def count(calls, work):
        return lambda *args, **named: (calls.append(args), work(*args, **named))[1]

    monkeypatch.setattr(pruner, "_prune", count(tried, pruner._prune))
    limit = naive_limit(model)
    limit = limit._replace(most=0.7 * limit.most, prove=count(proved, limit.prove))
    settings = CompressConfig(keep=0.5, keep_heads=0.5, ridge=1e-4)
    with caplog.at_level("INFO"):
        pruning = prune_model(model, TOKENS, settings, limit=limit)
    lines = [record.getMessage() for record in caplog.records]
    assert len(tried) == len(proved) == sum(line.startswith("caps at") for line in lines) > 2
    for fit in pruning.fits:
        assert sum(line.startswith(f"{fit.target.name}: kept") for line in lines) == 1
    assert limit.of(pruning) <= limit.most
    assert len(proved) == len(tried)


def test_the_report_reuses_the_proof_of_the_search(make_model, monkeypatch):
    """Oracle: the certificate that the search made, and no second one; the cap is written down."""
    model = make_model("maxmin", heads=4, bias=False).float()
    certificate = certify(model)
    settings = CompressConfig(keep=0.5, ridge=1e-4)
    pruning = prune_model(model, TOKENS, settings, limit=certified_limit(model, certificate))

    def again(*_, **__):
        raise AssertionError("certified twice")

    monkeypatch.setattr(recertifying, "certify", again)
    report = make_report(model, certificate, pruning, TOKENS, settings)
    assert report.after is pruning.proof
    assert report.to_dict()["tau"] == ("inf" if math.isinf(pruning.tau) else pruning.tau)
    with torch.no_grad():
        pruning.model.head.weight *= 0.5
    with pytest.raises(AssertionError, match="twice"):
        make_report(model, certificate, pruning, TOKENS, settings)


def biased_model(seed):
    """Return a model whose first MLP adds constants that cancel until neurons go."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LipschitzTransformer(
            ModelConfig(
                vocab_size=11,
                width=8,
                layers=2,
                heads=2,
                context=16,
                activation="relu",
                mlp_width=16,
                mlp_bias=True,
                mlp_residual=0.5,
                attn_residual=0.5,
                softmax_scale=4.0,
            )
        )
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.normal_(std=0.01 if name.endswith("bias") else tensor.shape[-1] ** -0.5)
            mlp, half = model.layers[0].mlp, 0.3 * torch.randn(8, 8)
            mlp.up.weight.mul_(0.05)
            mlp.up.bias.fill_(5.0)
            mlp.down.weight.copy_(torch.cat((half, -half), 1))
            mlp.down.bias.zero_()
    return model.double()


def test_the_account_is_of_the_weights_that_were_made_smaller():
    """Oracle: the stored weights; the first place's error on its inputs, by hand."""
    model = biased_model(4)
    settings = CompressConfig(keep=0.5, ridge=1.0, score="random", seed=4, holdout=0.0)
    capped = dataclasses.replace(settings, tau=1 - 1e-9)
    free = prune_model(model, TOKENS, capped)
    pruning = hold_bound(prune_model(model, TOKENS, capped), naive_limit(model))
    names = [fit.target.name for fit in pruning.fits]
    shrunk = {fit.target.name: fit for fit in pruning.fits}
    for fit in free.fits:
        now = shrunk[fit.target.name]
        stored_CK = pruning.model.layers[now.target.layer].mlp.down.weight
        assert torch.equal(now.weight_IO[now.kept_K].T, stored_CK)
        assert float(now.weight_IO.norm()) < 0.95 * float(fit.weight_IO.norm())
    layer = model.layers[0]
    hidden_MF = layer.mlp.hidden(layer.attend_block(model.embed(TOKENS))).flatten(0, 1)
    wanted_MC = hidden_MF @ layer.mlp.down.weight.T
    lost_MC = wanted_MC - hidden_MF @ shrunk[names[0]].weight_IO
    error = float((lost_MC.square().sum() / wanted_MC.square().sum()).detach())
    assert error <= shrunk[names[0]].error <= 1.5 * error
