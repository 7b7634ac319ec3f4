"""Teacher-forced comparison against masks, identities and the certificate."""

import math
from dataclasses import replace

import pytest
import torch

from common.errors import ShapeError
from common.models import LipschitzTransformer, ModelConfig
from serve.decoder import as_decoder
from serve.engine.config import EngineConfig
from serve.engine.request import Item
from serve.evaluate import frontier, full_logits, score_policy, with_budget
from serve.kv import FullPolicy, Policy, TriAttentionPolicy, WindowPolicy
from serve.kv.calibrate import calibrate, layer_stats
from serve.kv.eviction import EvictionLedger
from serve.replay import Session, replay
from solvers.bounds.network import certify

CONTEXT, VOCAB = 64, 40
# Float64 sums of a few dozen terms of size about 1.
FLOAT64 = 1e-9
WINDOW = WindowPolicy(budget=14, interval=5, sinks=2, window=4)
TRIATTENTION = TriAttentionPolicy(budget=14, interval=5, sinks=2, window=4)


@pytest.fixture(scope="module")
def model() -> LipschitzTransformer:
    """A tiny float64 model with content and positional heads."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        content_heads=2,
        head_dim=4,
        context=CONTEXT,
        position_bias=True,
        attn_residual=0.5,
        softmax_scale=3.0,
    )
    model = LipschitzTransformer(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.8 / math.sqrt(16))
    torch.nn.init.normal_(model.embedding.weight)
    return model


@pytest.fixture(scope="module")
def tokens_NT() -> torch.Tensor:
    """Three windows of random tokens."""
    return torch.randint(VOCAB, (3, 60), generator=torch.Generator().manual_seed(3))


def masked_window(model: LipschitzTransformer, tokens_T: torch.Tensor) -> torch.Tensor:
    """Oracle: dense attention under the mask that WINDOW leaves at each token."""
    total, visible, alive = len(tokens_T), [], []
    for position in range(total):
        alive.append(position)
        visible.append(torch.zeros(total, dtype=torch.bool))
        visible[-1][alive] = True
        if len(alive) == WINDOW.trigger:
            alive = alive[: WINDOW.sinks] + alive[WINDOW.sinks - WINDOW.budget :]
    hidden_TS = ~torch.stack(visible)

    def attend(layer, q, k, v):
        config = model.config.layer(layer)
        distance = torch.arange(total)[:, None] - torch.arange(total)
        bias = model.layers[layer].attention.position_bias[:, distance.clamp(min=0)]
        k, v = (x[0].repeat_interleave(config.group, 0) for x in (k, v))
        z = q[0] @ k.mT * config.logit_scale + bias
        return (torch.softmax(z.masked_fill(hidden_TS, -torch.inf), -1) @ v)[None]

    return model(tokens_T[None], torch.arange(total)[None], attend)[0]


def test_replay_equals_masked_dense_attention(model, tokens_NT) -> None:
    """Oracle: one forward pass with the eviction mask written out, every logit."""
    run = replay(model, tokens_NT, WINDOW, config=EngineConfig(block_size=4))
    expected = torch.stack([masked_window(model, row) for row in tokens_NT])
    torch.testing.assert_close(run.logits_NTV, expected, atol=FLOAT64, rtol=FLOAT64)
    assert run.tokens_per_s > 0


def test_replay_counts_the_kept_tokens(model, tokens_NT) -> None:
    """Oracle: the cache grows to budget + interval and falls to the budget."""
    kept_T = replay(model, tokens_NT, WINDOW).kept_T
    length, expected = 0, []
    for position in range(60):
        length += 1
        expected.append(length / (position + 1))
        length = WINDOW.budget if length == WINDOW.trigger else length
    assert kept_T.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("policy", [WINDOW, TRIATTENTION])
def test_score_stays_below_the_certificate(model, tokens_NT, policy: Policy) -> None:
    """Oracle: the certified figure bounds the measured one; KL obeys Hoeffding's bound."""
    stats = layer_stats(calibrate(model, [tokens_NT]), model)
    ledger = EvictionLedger(model, certify(model, tighten=False))
    score = score_policy(model, tokens_NT, policy, stats=stats, ledger=ledger)
    assert 0 < score.measured_deviation <= score.certified_deviation < math.inf
    assert 0 < score.kl_vs_full <= VOCAB * score.measured_deviation**2 / 2
    assert 0 <= score.certified_top1 <= score.top1_agreement <= 1
    assert score.kept_fraction < 0.7
    again = score_policy(model, tokens_NT, policy, stats=stats, ledger=ledger)
    assert again.certified_deviation == score.certified_deviation


def test_policies_with_and_without_mean_tokens_share_a_ledger(model, tokens_NT) -> None:
    """Oracle: a ledger of their own gives the same figures."""
    certificate = certify(model, tighten=False)
    policies = [replace(WINDOW, summary_tokens=1), WINDOW]
    shared = frontier(model, tokens_NT, policies, ledger=EvictionLedger(model, certificate))
    for policy, score in zip(policies, shared, strict=True):
        own = score_policy(model, tokens_NT, policy, ledger=EvictionLedger(model, certificate))
        assert score.certified_deviation == own.certified_deviation
        assert 0 < score.measured_deviation <= score.certified_deviation


def test_score_of_a_cache_that_keeps_all_is_exactly_zero(model, tokens_NT) -> None:
    """Oracle: identity; for the full policy and for a budget beyond the window."""
    ledger = EvictionLedger(model, certify(model, tighten=False))
    for policy in (FullPolicy(), WindowPolicy(budget=59, interval=1)):
        score = score_policy(model, tokens_NT, policy, ledger=ledger)
        assert score.kl_vs_full == score.measured_deviation == score.certified_deviation == 0
        assert score.kept_fraction == score.top1_agreement == score.certified_top1 == 1


def test_kl_is_the_textbook_sum(model, tokens_NT) -> None:
    """Oracle: scalar KL over the same logits, token by token."""
    score = score_policy(model, tokens_NT, WINDOW)
    full, cut = full_logits(model, tokens_NT), replay(model, tokens_NT, WINDOW).logits_NTV
    total = 0.0
    for p, q in zip(full.flatten(0, 1), cut.flatten(0, 1), strict=True):
        p, q = torch.softmax(p, 0), torch.softmax(q, 0)
        total += float((p * (p / q).log()).sum())
    assert score.kl_vs_full == pytest.approx(total / tokens_NT.numel(), abs=FLOAT64)
    assert score.certified_deviation is None


def test_frontier_improves_with_the_budget(model, tokens_NT) -> None:
    """Oracle: monotone kept fraction; the whole budget ends at zero."""
    policies = [with_budget(WINDOW, budget) for budget in (6, 15, 30, 64)]
    seen = []
    scores = frontier(model, tokens_NT, policies, on_point=seen.append)
    kept = [score.kept_fraction for score in scores]
    assert kept == sorted(kept)
    assert [score.budget for score in scores] == [6, 15, 30, 64]
    assert scores[0].kl_vs_full > scores[2].kl_vs_full > scores[3].kl_vs_full == 0
    assert seen == [1, 2, 3, 4]
    assert set(scores[0].to_dict()) >= {"policy", "budget", "kl_vs_full", "tokens_per_s"}


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 16, 64])
def test_with_budget_always_gives_a_valid_policy(budget: int) -> None:
    """Oracle: the policy's own validation."""
    policy = with_budget(WindowPolicy(budget=64), budget)
    assert policy.budget == budget
    assert policy.sinks + policy.window <= budget


@pytest.mark.parametrize("shape", [(1, CONTEXT + 1), (0, 5)])
def test_score_rejects_impossible_windows(model, shape: tuple[int, int]) -> None:
    """Oracle: the documented error."""
    with pytest.raises(ShapeError, match="windows"):
        score_policy(model, torch.zeros(shape, dtype=torch.long), WINDOW)


def test_a_chunk_over_a_compressed_cache_equals_single_tokens(model, tokens_NT) -> None:
    """Oracle: decode rows; the dense path must use each head's own positions."""
    policy = TriAttentionPolicy(budget=14, interval=5, sinks=2, window=4)
    stats = layer_stats(calibrate(model, [tokens_NT]), model)
    config = EngineConfig(block_size=4)
    logits = []
    for as_decodes in (True, False):
        session = Session(as_decoder(model), tokens_NT, policy, stats, None, config)
        session.advance(40)
        for sequence in session.sequences:
            session.blocks.grow(sequence.block_table, sequence.kv_len + 4)
        items = [Item(sequence=sequence, count=4) for sequence in session.sequences]
        assert all(s.compressed and s.kv_len == 15 for s in session.sequences)
        logits.append(session.runner.forward(items, as_decodes=as_decodes))
    last = logits[0].unflatten(0, (3, 4))[:, -1]
    torch.testing.assert_close(logits[1], last, atol=FLOAT64, rtol=FLOAT64)
