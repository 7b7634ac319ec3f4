"""Certificates of classifiers against every activation pattern of small networks."""

import copy
import dataclasses
import itertools
import json
import math
import time

import pytest
import torch
from torch import Tensor

from common.certificate import tensors_sha256
from common.classifier_certificate import ClassifierCertificate, load_certificate
from common.errors import CertificateError
from common.models import LipschitzMLP
from solvers.bounds import TightenSettings, attack, certify, verify, with_attack
from solvers.bounds.attack import AttackSettings
from solvers.bounds.chain_proof import chain_form, chain_proves
from solvers.bounds.chain_search import tighten_chain
from solvers.bounds.classifier import segments
from solvers.bounds.mlp_block import tighten_mlp

ACTIVATIONS = ("relu", "tanh", "abs", "maxmin")
SEARCH = TightenSettings(tol=1e-4)
ATTACK = AttackSettings(steps=12, network_steps=6, restarts=3)
# Rounding of the comparison with an enumeration in float64.
EXACT = 1e-9
# Distance of two optimisers of one problem, relative.
OPTIMUM = 2e-3
SLOW_MACHINE = 20.0  # seconds a loaded machine may take for the starts alone


def build(sizes: tuple[int, ...], activation: str = "relu", seed: int = 0) -> LipschitzMLP:
    """Return a float64 network with Gaussian weights and biases."""
    torch.manual_seed(seed)
    model = LipschitzMLP(sizes, activation).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_()
    return model


def patterns(activation: str, width: int) -> list[Tensor]:
    """Return the Jacobians that an activation of this width can have."""
    if activation == "maxmin":
        swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        blocks = itertools.product((torch.eye(2, dtype=torch.float64), swap), repeat=width // 2)
        return [torch.block_diag(*chosen) for chosen in blocks]
    slopes = (0.0, 1.0) if activation in ("relu", "tanh") else (-1.0, 1.0)
    rows = itertools.product(slopes, repeat=width)
    return [torch.diag(torch.tensor(row, dtype=torch.float64)) for row in rows]


def largest_jacobian(model: LipschitzMLP) -> float:
    """Return the largest l2 norm of ``W_n D W D ... W_1`` over all activation patterns."""
    products = [model.linears[0].weight]
    for linear in model.linears[1:]:
        choices = patterns(model.activation, linear.weight.shape[1])
        products = [linear.weight @ d @ p for d in choices for p in products]
    return float(torch.linalg.matrix_norm(torch.stack(products), 2).max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(3, 4, 2), (2, 4, 4, 3), (7, 4, 2, 2), (3, 2, 2, 2, 2, 3)])
def test_the_bound_holds_for_every_activation_pattern(activation, sizes):
    """Oracle: the enumeration of all patterns; the naive bound is above."""
    for seed in range(2):
        model = build(sizes, activation, seed)
        certificate = certify(model, settings=SEARCH)
        exact = largest_jacobian(model)
        assert exact <= certificate.tightened_l2 * (1 + EXACT)
        assert certificate.tightened_l2 <= certificate.naive_l2
        assert certificate.tightened == pytest.approx(
            certificate.tightened_l2 * math.sqrt(sizes[0] / sizes[-1])
        )
        assert verify(model, certificate).tightened == certificate.tightened
        found = with_attack(certificate, attack(model, certificate, settings=ATTACK))
        assert 0 < found.attack <= certificate.tightened


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_multipliers_prove_less_than_a_pattern_reaches(activation):
    """Oracle: the enumeration; the multipliers are random, so most proofs fail or are loose."""
    model = build((3, 4, 4, 2), activation)
    weights = [linear.weight for linear in model.linears]
    form, exact = chain_form(weights, activation), largest_jacobian(model)
    best = torch.cat(tighten_chain(weights, activation, tol=1e-5).multipliers)
    proofs = 0
    for scale in (0.0, 0.01, 0.1, 1.0):
        for _ in range(50):
            lambda_P = best * torch.exp(scale * torch.randn_like(best))
            assert chain_proves(form, lambda_P, exact * (1 - 1e-6)) is None
            proofs += chain_proves(form, lambda_P, 3 * exact) is not None
    assert proofs > 50


def test_one_dimensional_networks_are_exact():
    """Oracle: |x| = relu(x) + relu(-x) has constant 1, while the norms give 2; slopes multiply."""
    model = LipschitzMLP((1, 2, 1)).double().requires_grad_(False)
    model.linears[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    model.linears[1].weight.fill_(1.0)
    certificate = certify(model, settings=TightenSettings(tol=1e-6))
    assert certificate.naive == pytest.approx(2.0, rel=1e-6)
    assert certificate.tightened == pytest.approx(1.0, rel=1e-4)
    assert attack(model, certificate, settings=ATTACK).value == pytest.approx(1.0, rel=1e-6)
    line = LipschitzMLP((1, 1, 1, 1), bias=False).double().requires_grad_(False)
    for linear, value in zip(line.linears, (2.0, -3.0, 0.5), strict=True):
        linear.weight.fill_(value)
    assert certify(line).tightened == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_one_hidden_layer_agrees_with_the_k_form(activation):
    """Oracle: the K-form solver, which minimises the same bound in another way."""
    w1, w2 = torch.randn(8, 5, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    middle, reach = (0.5, 0.5) if activation == "relu" else (0.0, 1.0)
    other = tighten_mlp(middle * w2 @ w1, reach * w2, w1, tol=1e-4, max_evals=2000, method="lbfgs")
    found = tighten_chain([w1, w2], activation, tol=1e-5)
    assert found.primal == pytest.approx(other.primal, rel=OPTIMUM)
    assert found.dual <= found.primal * (1 + EXACT)
    assert found.dual >= found.primal * (1 - 1e-3)


def test_the_search_gains_on_wide_networks():
    """Oracle: the product of norms; Gaussian ReLU networks leave a factor of about two."""
    certificate = certify(build((16, 32, 32, 10)))
    assert certificate.tightened < 0.6 * certificate.naive
    assert certificate.blocks[0].dual > 0.95 * certificate.tightened_l2


def test_dead_and_zero_parts_are_handled():
    """Oracle: deleting a dead neuron changes nothing; a zero matrix makes the constant 0."""
    model = build((3, 6, 4))
    model.linears[0].weight[2] = 0
    model.linears[1].weight[:, 4] = 0
    smaller = LipschitzMLP((3, 4, 4)).double().requires_grad_(False)
    keep = [0, 1, 3, 5]
    smaller.linears[0].weight.copy_(model.linears[0].weight[keep])
    smaller.linears[1].weight.copy_(model.linears[1].weight[:, keep])
    settings = TightenSettings(tol=1e-5)
    assert certify(model, settings=settings).tightened == pytest.approx(
        certify(smaller, settings=settings).tightened, rel=1e-4
    )
    model.linears[1].weight.zero_()
    certificate = certify(model)
    assert certificate.tightened == certificate.naive == 0
    assert certificate.radius(1.0) == math.inf
    verify(model, certificate)


def test_a_linear_classifier_and_scaled_weights():
    """Oracle: the singular value; scaling a layer scales the bound."""
    model = build((5, 3))
    norm = float(torch.linalg.matrix_norm(model.linears[0].weight, 2))
    assert certify(model).tightened_l2 == pytest.approx(norm, rel=1e-8)
    deep = build((4, 6, 6, 3))
    before = certify(deep, settings=SEARCH).tightened
    deep.linears[1].weight.mul_(1e3)
    deep.linears[2].weight.mul_(1e-5)
    assert certify(deep, settings=SEARCH).tightened == pytest.approx(1e-2 * before, rel=1e-3)


def test_radius_protects_the_top_class():
    """Oracle: gradient steps of exactly that length never change the top class."""
    model = build((4, 8, 3))
    certificate = certify(model, settings=SEARCH)
    assert certificate.pair_l2 <= math.sqrt(2) * certificate.tightened_l2 * (1 + EXACT)
    x_BI = torch.randn(200, 4, dtype=torch.float64)
    top = model(x_BI).topk(2)
    margins = (top.values[:, 0] - top.values[:, 1]).tolist()
    radii_B1 = torch.tensor([certificate.radius(m) for m in margins], dtype=torch.float64)[:, None]
    moved = x_BI.clone().requires_grad_()
    logits = model(moved)
    (logits.gather(1, top.indices[:, :1]) - logits.gather(1, top.indices[:, 1:])).sum().backward()
    step = radii_B1 * torch.nn.functional.normalize(moved.grad, dim=1)
    assert torch.equal(model(x_BI - step).argmax(1), top.indices[:, 0])


def test_a_budget_ends_the_attack():
    """Oracle: a search of hours under a tenth of a second, and what its starts reach."""
    torch.manual_seed(0)
    model = LipschitzMLP([8, 8, 8, 8, 8, 8, 4])
    certificate = certify(model, tighten=False)
    settings = AttackSettings(steps=10**7, network_steps=10**7, restarts=2, budget_s=0.1)
    began = time.monotonic()
    result = attack(model, certificate, settings=settings)
    assert time.monotonic() - began < SLOW_MACHINE
    assert min(result.gradient, result.structured, *result.blocks) > 0


def test_long_networks_are_cut_into_chains():
    """Oracle: the definition: every matrix once, at most four in a chain."""
    assert segments(3) == [(0, 3)]
    assert segments(9) == [(0, 3), (3, 6), (6, 9)]
    model = build((3, 4, 4, 4, 4, 2))
    certificate = certify(model, settings=SEARCH)
    assert [(b.first, b.stop) for b in certificate.blocks] == [(0, 2), (2, 5)]
    result = attack(model, certificate, settings=ATTACK)
    assert len(result.blocks) == 2
    verify(model, with_attack(certificate, result))


@pytest.fixture(scope="module")
def proof() -> tuple[LipschitzMLP, ClassifierCertificate]:
    """Return a network and its certificate."""
    model = build((4, 6, 6, 3), "maxmin")
    return model, certify(model, settings=SEARCH)


@pytest.mark.parametrize(
    "name", ["naive", "tightened", "naive_l2", "tightened_l2", "pair_l2", "pair_norm"]
)
def test_an_edited_total_is_named(proof, name):
    """Oracle: a value lowered by 1e-8 is below what can be proved."""
    model, certificate = proof
    lower = getattr(certificate, name) * (1 - 1e-8)
    with pytest.raises(CertificateError, match=f"{name}"):
        verify(model, dataclasses.replace(certificate, **{name: lower}))
    with pytest.raises(CertificateError, match=f"{name}"):
        verify(model, dataclasses.replace(certificate, **{name: math.nan}))


def test_edited_chains_are_named(proof):
    """Oracle: a lower claim, missing or foreign multipliers, chains that leave a matrix out."""
    model, certificate = proof
    block = certificate.blocks[0]

    def spoiled(**changes):
        blocks = (dataclasses.replace(block, **changes),)
        return dataclasses.replace(certificate, blocks=blocks)

    with pytest.raises(CertificateError, match="block 0 tightened"):
        verify(model, spoiled(tightened=block.tightened * (1 - 1e-3)))
    with pytest.raises(CertificateError, match="block 0 naive"):
        verify(model, spoiled(naive=block.naive * (1 - 1e-8)))
    with pytest.raises(CertificateError, match="chains cover 2"):
        verify(model, spoiled(stop=2))
    norms = (certificate.norms[0], certificate.norms[1] / 2, certificate.norms[2])
    with pytest.raises(CertificateError, match=r"norms\[1\]"):
        verify(model, dataclasses.replace(certificate, norms=norms))


@pytest.mark.parametrize(
    "changes",
    [
        {"tightened": -1e3, "components": {"attack": -1e4}},
        {"first": 0.0},
        {"stop": 3.0},
        {"stop": "3"},
        {"index": False},
    ],
)
def test_claims_of_another_kind_are_refused(proof, changes):
    """Oracle: constants are not negative (squares hide the sign), positions are integers."""
    model, certificate = proof
    blocks = (dataclasses.replace(certificate.blocks[0], **changes),)
    with pytest.raises(CertificateError, match=r"block 0 tightened|chain (0|False): matrices"):
        verify(model, dataclasses.replace(certificate, blocks=blocks))


@pytest.mark.parametrize("name", ["weights_sha256", "multipliers_sha256", "components"])
def test_fields_that_are_no_mappings_are_refused(proof, tmp_path, name):
    """Oracle: the field is named in one line, whatever the file holds."""
    proof[1].save(tmp_path)
    path = tmp_path / "certificate.json"
    content = json.loads(path.read_text())
    (content["blocks"][0] if name == "components" else content)[name] = None
    path.write_text(json.dumps(content))
    with pytest.raises(CertificateError, match=f"{name}=None"):
        load_certificate(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_bad_multipliers_are_refused_even_with_a_right_hash(proof, value):
    """Oracle: only positive finite multipliers prove anything."""
    model, certificate = proof
    multipliers = {name: tensor.clone() for name, tensor in certificate.multipliers.items()}
    multipliers["blocks.0.1"][0] = value
    changed = dataclasses.replace(
        certificate, multipliers=multipliers, multipliers_sha256=tensors_sha256(multipliers)
    )
    with pytest.raises(CertificateError, match=r"multiplier blocks\.0\.1: expected positive"):
        verify(model, changed)


def test_a_changed_weight_is_named(proof):
    """Oracle: the tensor's hash."""
    model, certificate = proof
    changed = copy.deepcopy(model)
    changed.linears[1].weight[0, 0] += 1e-12
    with pytest.raises(CertificateError, match=r"weight tensor linears\.1\.weight"):
        verify(changed, certificate)


def test_certificate_round_trip(proof, tmp_path):
    """Oracle: every field survives the files."""
    model, certificate = proof
    certificate.save(tmp_path)
    loaded = load_certificate(tmp_path)
    assert loaded.to_dict() == certificate.to_dict()
    assert verify(model, loaded).tightened == certificate.tightened
