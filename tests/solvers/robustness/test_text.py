"""Language models: exact where the stream is the identity, never refuted, inside the domain."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.certificate import Certificate
from common.errors import CertificateError
from common.models import LipschitzTransformer
from solvers.bounds import certify
from solvers.robustness import RobustnessSettings, TextEvaluator
from solvers.robustness import text as text_module
from solvers.robustness.domain import StreamBound, median_row_distance
from solvers.robustness.text import SHARES, attack_windows

BuildModel = Callable[..., LipschitzTransformer]

SETTINGS = RobustnessSettings(
    domains=("ball", "space"), steps=12, restarts=2, points=9, text_epsilons=(0.005, 0.05, 0.5)
)
MILD = {"norm": 0.7, "attn_residual": 0.5, "mlp_residual": 0.5}


def windows(model: LipschitzTransformer, count: int = 3, length: int = 6) -> Tensor:
    """Return random windows of inputs and targets."""
    return torch.randint(model.config.vocab_size, (count, length + 1))


def evaluator(
    model: LipschitzTransformer,
    settings: RobustnessSettings = SETTINGS,
    certificate: Certificate | None = None,
) -> TextEvaluator:
    """Return an evaluator with the bound from norms, which needs no search."""
    return TextEvaluator(model, certificate or certify(model, tighten=False), settings)


def shrunk(certificate: Certificate, factor: float) -> Certificate:
    """Return a certificate whose blocks claim too little."""
    blocks = tuple(
        dataclasses.replace(b, tightened=b.tightened * factor) for b in certificate.blocks
    )
    stream = math.prod((certificate.stream, *[factor] * len(blocks)))
    return dataclasses.replace(certificate, blocks=blocks, stream=stream)


KINDS: dict[str, dict[str, Any]] = {
    "content": {},
    "positional": {"content_heads": 0, "position_bias": True},
    "mixed": {"kv_heads": 2, "content_heads": 2, "position_bias": True, "vocab_multiple": 8},
    "scaled": {"softmax_scale": 3.0, "final_scale": 2.5, "activation": "maxmin"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_attacks_never_beat_the_certificate(build_model: BuildModel, kind: str) -> None:
    """Oracle: the check inside raises; here: order and monotonicity of all curves and points."""
    model = build_model(head_bias=True, mlp_bias=True, **MILD, **KINDS[kind])
    ids, tokens = windows(model), model.config.vocab_size
    model.head.bias[:tokens] -= model(ids[:, :-1]).mean((0, 1))  # or one token wins everywhere
    found = evaluator(model).evaluate(ids, ids)
    assert len(found.points) == 2 * 2 * len(SETTINGS.text_epsilons)
    assert any(p.certified_top1 > 0 for p in found.points)
    assert any(p.pgd_top1 < 1 for p in found.points)
    assert any(0 < share < 1 for share in found.curves[0].top1)
    for p in found.points:
        assert p.certified_top1 <= p.pgd_top1
        assert p.certified_acc <= p.pgd_acc <= p.fgsm_acc <= p.clean_acc
    for domain, norm in itertools.product(("ball", "space"), ("l2", "linf")):
        values = [p.pgd_top1 for p in found.points if (p.domain, p.norm) == (domain, norm)]
        assert values == sorted(values, reverse=True)
    ball, space = (next(c for c in found.curves if c.domain == d) for d in ("ball", "space"))
    for one in (ball, space):
        assert one.top1[0] == 1.0
        assert one.accuracy[0] == found.accuracy
        assert list(one.top1) == sorted(one.top1, reverse=True)
    assert all(s <= b for s, b in zip(space.top1, ball.top1, strict=True))
    assert kind != "positional" or space.top1 == ball.top1


def test_a_wrong_certificate_is_refuted(build_model: BuildModel) -> None:
    """Oracle: constants far below the true ones; both accuracies are in the message."""
    model = build_model(**MILD)
    wrong = shrunk(certify(model, tighten=False), 0.03)
    ids = windows(model)
    with pytest.raises(CertificateError, match=r"under attack .* certified accuracy"):
        evaluator(model, certificate=wrong).evaluate(ids, ids)


def test_identity_stream_is_exact(build_model: BuildModel) -> None:
    """Oracle: without blocks and with two tokens, radius = gap / |U_0 - U_1| in closed form."""
    model = build_model(vocab_size=2, attn_residual=0.0, mlp_residual=0.0, norm=1.0)
    ids = torch.tensor([[0, 1, 1, 0, 1]])
    difference = model.head.weight[0] - model.head.weight[1]
    gaps = (model.embedding.weight @ difference).abs() / difference.norm()
    unit = float((model.embedding.weight[0] - model.embedding.weight[1]).norm())
    assert median_row_distance(model) == pytest.approx(unit)
    labels = tuple(sorted(float(gap) / unit * f for gap in gaps for f in (0.999, 1.001)))
    settings = RobustnessSettings(
        domains=("space",), norms=("l2",), text_epsilons=labels, restarts=1, steps=20
    )
    found = evaluator(model, settings).evaluate(ids, ids)
    assert [p.certified_top1 for p in found.points] == [p.pgd_top1 for p in found.points]
    assert {p.pgd_top1 for p in found.points} == {1.0, 0.5, 0.0}


def test_headline_shares_by_hand(build_model: BuildModel) -> None:
    """Oracle: loops over positions and classes with the naive certificate's block constants."""
    model = build_model(final_scale=1.7, **MILD)
    certificate = certify(model, tighten=False)
    ids = windows(model, count=4, length=8)
    constant = 1.0
    for block in certificate.blocks:
        constant *= block.naive
    logits = model(ids[:, :-1]).flatten(0, 1)
    rows, radii = 1.7 * model.head.weight, []
    for z in logits:
        top = int(z.argmax())
        others = [v for v in range(len(z)) if v != top]
        radii.append(min(float((z[top] - z[v]) / (rows[top] - rows[v]).norm()) for v in others))
    unit = float(torch.pdist(model.embedding.weight).median())
    found = evaluator(model).evaluate(ids, ids[:1])
    for share in SHARES:
        expected = sum(r / constant > share * unit for r in radii) / len(radii)
        assert found.figures[f"certified_top1_{100 * share:g}"] == expected
    assert 0 < found.figures["certified_top1_1"] < 1


def test_perturbed_embeddings_stay_in_the_ball(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: norms of what the model is given; embeddings lie on the sphere, as after training."""
    model = build_model(**MILD)
    rows = model.embedding.weight
    rows.mul_(4.0 / rows.norm(dim=1, keepdim=True))
    ids = windows(model)
    for domains, leaves in ((("ball",), False), (("space",), True)):
        chosen = evaluator(model, dataclasses.replace(SETTINGS, domains=domains))
        seen: list[float] = []
        logits = chosen.logits

        def spy(x: Tensor, logits: Callable = logits, seen: list = seen) -> Tensor:
            seen.append(float(x.detach().norm(dim=-1).max()))
            return logits(x)

        monkeypatch.setattr(chosen, "logits", spy)
        found = chosen.evaluate(ids, ids)
        assert (max(seen) > chosen.certificate.radius) is leaves
        assert "leaves it is not covered" in found.statement


def test_larger_balls_agree_with_a_certificate_made_there(build_model: BuildModel) -> None:
    """Oracle: certify of a model with the same blocks and a longer embedding row."""
    model = build_model(**MILD)
    certificate = certify(model, tighten=False)
    bound = StreamBound(model, certificate)
    excess = 0.5 * certificate.radius
    factors = bound.beyond([0.1, excess, 3.0])
    assert bound.ball < factors[0] < factors[1] < factors[2] or factors == sorted(factors)
    model.embedding.weight[0].mul_((certificate.radius + excess) / model.embedding.weight[0].norm())
    independent = certify(model, tighten=False).amplification(-1)
    assert factors[1] == pytest.approx(independent, rel=1e-8)
    assert factors[1] > 1.01 * bound.ball


def test_tightened_multipliers_serve_larger_balls(build_model: BuildModel) -> None:
    """Oracle: between the certified ball's constant and the bound from norms on the larger one."""
    model = build_model(**MILD)
    tight, loose = certify(model), certify(model, tighten=False)
    wide = StreamBound(model, tight).beyond([1.0])[0]
    assert tight.amplification(-1) < wide <= StreamBound(model, loose).beyond([1.0])[0]


def test_certified_swaps_change_nothing(build_model: BuildModel) -> None:
    """Oracle: brute force: every subset of exchanges between two close tokens in a context."""
    model = build_model(**MILD)
    rows = model.embedding.weight
    step = torch.randn_like(rows[0])
    rows[1] = rows[0] + 0.01 * step / step.norm()
    ids = torch.randint(2, (4, 6))
    found = evaluator(model).evaluate(ids, ids[:1])
    closest = found.details["swaps"][0]
    assert closest["ids"] == [0, 1]
    assert closest["distance"] == pytest.approx(0.01)
    assert closest["certified_share"] == found.figures["certified_swap"] > 0
    radii = evaluator(model)._survey(ids).stream / evaluator(model).bound.ball
    proved = (radii > closest["distance"]).view(4, 5)
    before = model(ids[:, :-1]).argmax(-1)
    for flips in itertools.product((0, 1), repeat=5):
        after = model(ids[:, :-1] ^ torch.tensor(flips)).argmax(-1)
        assert not bool((proved & (after != before)).any())
    assert bool(proved.any())


def test_chunks_do_not_matter(build_model: BuildModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one window and one position at a time give the same shares."""
    model = build_model(**MILD)
    ids = windows(model)
    whole = evaluator(model).evaluate(ids, ids[:1])
    monkeypatch.setattr(text_module, "_ELEMENTS", 1)
    small = evaluator(model, dataclasses.replace(SETTINGS, batch=1)).evaluate(ids, ids[:1])
    assert [c.top1 for c in small.curves] == [c.top1 for c in whole.curves]
    assert small.points == whole.points


def test_attack_windows_are_prefixes() -> None:
    """Oracle: shapes, and a shorter prefix is the same start of a window."""
    ids = torch.arange(70).view(10, 7)
    assert attack_windows(ids, 18).shape == (3, 7)
    assert torch.equal(attack_windows(ids, 18)[[0, -1]], ids[[0, -1]])
    assert torch.equal(attack_windows(ids, 4), ids[:1, :5])
    assert attack_windows(ids, 10**6).shape == ids.shape


def test_a_bound_that_overflows_is_refused(build_model: BuildModel) -> None:
    """Oracle: no finite constant, no radius; one line with the exponent."""
    model = build_model(**MILD)
    certificate = certify(model, tighten=False)
    huge = shrunk(certificate, 1e200)
    with pytest.raises(CertificateError, match="overflows"):
        evaluator(model, certificate=huge)
