"""The contract of all cache policies, and the selection rule they share."""

import dataclasses

import pytest
import torch

from common.errors import ConfigError
from common.models import LipschitzTransformer, ModelConfig
from serve.decoder import LipschitzDecoder, layer_spec
from serve.kv import POLICIES, CacheView, FullPolicy, WindowPolicy, choose, policy_by_name
from serve.kv.observer import Attended
from serve.kv.selection import is_protected

COMPRESSING = sorted(name for name in POLICIES if name != "full")


def random_view(policy, lengths, *, kv_heads=2, group=2, width=8, slots=40, seed=0):
    """A layer's cache with pages of 8 slots and positions with gaps, plus what its policy needs."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=5, width=8, layers=1, heads=kv_heads * group, kv_heads=kv_heads,
        head_dim=width, context=128, position_bias=True,
    )  # fmt: skip
    model = LipschitzTransformer(config)
    rows, pages = len(lengths), slots // 8
    shape = (rows * pages, kv_heads, 8)
    positions = torch.stack([torch.randperm(120)[:slots].sort().values for _ in lengths])
    pos_pool = positions.view(rows, pages, 1, 8).expand(-1, -1, kv_heads, -1).reshape(shape).int()
    q_mean = torch.randn(kv_heads * group, width // 2, 2, dtype=torch.float64)
    spec = layer_spec(model.layers[0].attention)
    view = CacheView(
        layers=(0,),
        spec=spec,
        bias_LHT=spec.bias_HT[None],
        context=128,
        prompts_R=torch.full((rows,), 100),
        seeds_R=torch.arange(rows),
        k_pool=torch.randn(*shape, width),
        v_pool=torch.randn(*shape, width),
        pos_pool=pos_pool,
        tables_RN=torch.arange(rows * pages).view(rows, pages).int(),
        lengths_R=torch.tensor(lengths),
        positions_R=positions[torch.arange(rows), torch.tensor(lengths) - 1] + 1,
        stats={"q_mean": q_mean[None], "q_abs": 1.2 * q_mean.norm(dim=-1)[None]},
    )
    decoder = LipschitzDecoder(model)
    return dataclasses.replace(view, observed=observe(policy, decoder, view)), positions


def observe(policy, decoder, view):
    """Let the policy's observer see one random query per row."""
    observer = policy.observer(decoder)
    if observer is None:
        return {}
    rows = [observer.open() for _ in view.lengths_R]
    q = torch.randn(len(rows), 1, view.spec.heads, view.spec.head_dim)
    event = Attended(
        layer=0,
        rows=rows,
        q_RTHD=q,
        positions_RT=view.positions_R[:, None] - 1,
        k_pool=view.k_pool,
        pos_pool=view.pos_pool,
        tables_RW=view.tables_RN,
        lengths_R=view.lengths_R,
    )
    observer.attended(event)
    return observer.observed((0,), rows)


@pytest.mark.parametrize("name", COMPRESSING)
def test_kept_slots_honour_budget_sinks_and_window(name):
    """Property of every policy: distinct filled slots in order, protected ones among them."""
    policy = policy_by_name(name, budget=14, sinks=6, window=5, interval=3)
    view, positions = random_view(policy, [40, 27, 20])
    keep = choose(policy, [view], policy.budget)[0]
    assert keep.shape == (3, 2, 14)
    assert keep.dtype == torch.int64
    assert bool((keep.diff(dim=-1) > 0).all())
    for row, length in enumerate([40, 27, 20]):
        pos = positions[row, :length]
        must = set(pos[(pos < 6) | (pos >= int(pos[-1]) - 4)].tolist())
        for head in range(2):
            slots = keep[row, head]
            assert int(slots.max()) < length
            assert must <= set(pos[slots].tolist())


@pytest.mark.parametrize("name", COMPRESSING)
def test_selection_does_not_depend_on_the_batch(name):
    """Property: a row chooses the same slots alone as beside others."""
    policy = policy_by_name(name, budget=14, sinks=2, window=4)
    view, _ = random_view(policy, [40, 27, 20])
    together = choose(policy, [view], 14)[0]
    for row in range(3):
        fields = {field: getattr(view, field) for field in CacheView.__slots__}
        for field in ("tables_RN", "lengths_R", "positions_R", "prompts_R", "seeds_R"):
            fields[field] = fields[field][row : row + 1]
        fields["observed"] = {n: x[row : row + 1] for n, x in view.observed.items()}
        alone = choose(policy, [CacheView(**fields)], 14)[0]
        assert torch.equal(alone[0], together[row])


def test_protection_covers_sinks_recent_tokens_and_short_prompts():
    """Oracle: the definition, token by token."""
    policy = WindowPolicy(budget=8, sinks=1, window=2)
    positions = torch.tensor([[[0, 11, 2, 9, 4, 10, 3, -1]]] * 2)
    protected = is_protected(policy, positions, torch.tensor([4, 5]))
    # A prompt of 4 is at most half the budget and pinned, one of 5 is not.
    expected = [{0, 11, 2, 10, 3}, {0, 11, 10}]
    for row in range(2):
        assert set(positions[row][protected[row]].tolist()) == expected[row]


def test_window_keeps_sinks_and_the_most_recent_positions():
    """Oracle: the definition of the policy."""
    policy = WindowPolicy(budget=12, sinks=8, window=2)
    view, positions = random_view(policy, [40])
    keep = choose(policy, [view], 12)[0]
    sinks = int((positions[0] < 8).sum())
    expected = [*range(sinks), *range(40 - (12 - sinks), 40)]
    assert keep[0, 0].tolist() == expected
    assert keep[0, 1].tolist() == expected


def test_trigger_depends_on_the_length_alone():
    """Oracle: budget plus interval; the full policy never compacts."""
    policy = WindowPolicy(budget=20, interval=4, window=3)
    assert policy.trigger == 24
    assert FullPolicy().trigger is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("window", {"budget": 0}, r"kv\.budget=0"),
        ("window", {"budget": 8, "sinks": 4, "window": 5}, "raise the budget"),
        ("window", {"interval": 0}, r"kv\.interval=0"),
        ("window", {"sinks": -1}, r"kv\.sinks=-1"),
        ("window", {"budget": "many"}, "budget='many'"),
        ("window", {"budget": None}, "expects a number"),
        ("full", {"budget": 8}, "choose kv=window"),
        ("triattention", {"window": -2}, r"kv\.window=-2"),
        ("window", {"budgets": 8}, "budgets"),
        ("snapkv", {"window": 0}, "judges by the queries of the window"),
        ("snapkv", {"kernel": 4}, r"kv\.kernel=4"),
        ("snapkv", {"queries": 0}, r"kv\.queries=0"),
        ("rkv", {"attention": 1.5}, r"kv\.attention=1\.5"),
        ("rkv", {"threshold": -2.0}, r"kv\.threshold=-2"),
        ("expected_attention", {"horizon": 0}, r"kv\.horizon=0"),
        ("h2o", {"budget": None}, "expects a number"),
        ("triattention", {"aggregation": "sum"}, "aggregation='sum'"),
        ("newest", {}, "full, "),
    ],
)
def test_impossible_options_are_refused_in_one_line(name, options, message):
    """Oracle: the error contract: value, expectation, remedy, one line."""
    with pytest.raises(ConfigError, match=message) as caught:
        policy_by_name(name, **options)
    assert "\n" not in str(caught.value)
