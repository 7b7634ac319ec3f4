"""The mathematics of the eviction bound, head by head, against direct attention in float64."""

# Legend: R rows, K key/value heads, G query heads of each, T positions, D head width, C clusters.

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from serve.kv.bias import BiasTable
from serve.kv.deviation import Attended, Masses, cluster_masses, head_deviation
from serve.kv.summary import Summary, segment_exponent

IDENTITY = 1e-12  # float64, outputs of size one
ROWS, GROUP, LENGTH, WIDTH = 6, 2, 24, 6
F64 = torch.float64


@dataclass
class Scene:
    """Keys and values of one key/value head per row, some of them evicted, and queries."""

    q_RKGD: Tensor
    k_RKTD: Tensor
    v_RKTD: Tensor
    is_gone_RKT: Tensor
    bias_GT: Tensor | None
    clusters: int
    with_mean: bool

    def summary(self):
        """Return the summary of what is gone, all evicted at once."""
        shape = (len(self.q_RKGD), 1, self.clusters)
        exponent = segment_exponent(LENGTH, self.clusters)
        summary = Summary.empty(shape, WIDTH, torch.device("cpu"), exponent)
        place = torch.arange(LENGTH).expand(len(self.q_RKGD), 1, LENGTH)
        seen = torch.full((len(place),), LENGTH - 1)
        pairs = torch.stack((self.k_RKTD, self.v_RKTD), 3)
        summary.add(pairs, place, self.is_gone_RKT, seen)
        kept = place.masked_fill(self.is_gone_RKT, -1)[..., :-1].sort(dim=-1).values
        return summary.clusters(self.q_RKGD.dtype, kept)

    def logits(self):
        """Return all logits (R, K, G, T) of a query at the last position."""
        z_RKGT = self.q_RKGD @ self.k_RKTD.mT
        return z_RKGT if self.bias_GT is None else z_RKGT + self.bias_GT.flip(1)

    def masses(self, summary):
        """Return the bounds on the evicted masses."""
        bias = None
        if self.bias_GT is not None:
            table = BiasTable(self.bias_GT[None], 2 ** segment_exponent(LENGTH, self.clusters))
            layer = torch.zeros(len(self.q_RKGD)).long()
            bias = table.masses(layer, torch.full_like(layer, LENGTH - 1)[:, None], summary)
        return cluster_masses(summary, 1.0, self.q_RKGD, bias)

    def attended(self, summary):
        """Return attention over the kept keys, merged with mean tokens if the scene has them."""
        z_RKGT = self.logits().masked_fill(self.is_gone_RKT[:, :, None], -torch.inf)
        kept, lse = z_RKGT.softmax(-1) @ self.v_RKTD, z_RKGT.logsumexp(-1)
        if not self.with_mean:
            return Attended(kept, kept, lse)
        log_count = summary.count.log()[:, :, None]
        if self.bias_GT is not None:
            log_count = torch.stack([self.true_bias(c) for c in range(self.clusters)], -1)
        mean = self.q_RKGD @ summary.keys.mT + log_count
        weights = torch.cat((lse[..., None], mean), -1).softmax(-1)
        used = weights[..., :1] * kept + weights[..., 1:] @ summary.values
        return Attended(kept, used, lse)

    def members(self, cluster):
        """Return which evicted positions belong to a cluster (R, K, 1, T)."""
        length = 2 ** segment_exponent(LENGTH, self.clusters)
        return (self.is_gone_RKT & (torch.arange(LENGTH) // length == cluster))[:, :, None]

    def true_bias(self, cluster):
        """Return the log-sum-exp of the bias over a cluster."""
        bias_GT = self.bias_GT.flip(1).masked_fill(~self.members(cluster), -torch.inf)
        return bias_GT.logsumexp(-1)

    def true_mass(self, cluster):
        """Return the log-sum-exp of the logits of a cluster."""
        return self.logits().masked_fill(~self.members(cluster), -torch.inf).logsumexp(-1)

    def moved(self, attended):
        """Return the true |o - u| (R, H)."""
        full = self.logits().softmax(-1) @ self.v_RKTD
        return (full - attended.used_RKGD).norm(dim=-1).flatten(1)

    def ratio(self):
        """Return true over bound (R, H)."""
        summary = self.summary()
        attended = self.attended(summary)
        return self.moved(attended) / head_deviation(summary, self.masses(summary), attended)


def make_scene(
    *, seed=0, spread=1.0, size=1.0, clusters=4, bias=None, with_mean=False, v_spread=1.0
):
    """A random scene; ``bias`` is None, flat, random or steep."""
    torch.manual_seed(seed)
    biases = {
        None: None,
        "flat": torch.full((GROUP, LENGTH), 0.7, dtype=F64),
        "random": torch.randn(GROUP, LENGTH, dtype=F64),
        "steep": -torch.arange(LENGTH) * torch.tensor([[0.3], [60.0]], dtype=F64),
    }
    centre = torch.randn(2, ROWS, 1, 1, WIDTH, dtype=F64)
    noise = torch.randn(2, ROWS, 1, LENGTH, WIDTH, dtype=F64)
    is_gone = torch.rand(ROWS, 1, LENGTH) < 0.6
    is_gone[..., -1] = False
    q_RKGD = size * torch.randn(ROWS, 1, GROUP, WIDTH, dtype=F64)
    k_RKTD, v_RKTD = centre[0] + spread * noise[0], centre[1] + v_spread * noise[1]
    return Scene(q_RKGD, k_RKTD, v_RKTD, is_gone, biases[bias], clusters, with_mean)


BIASES = [None, "flat", "random", "steep"]


@pytest.mark.parametrize("with_mean", [False, True], ids=["plain", "mean"])
@pytest.mark.parametrize("bias", BIASES)
def test_head_bound_dominates_the_true_error(bias, with_mean):
    """Oracle: full attention, over spreads and sizes of six orders of magnitude."""
    largest = 0.0
    for seed, (spread, size, clusters) in enumerate(
        itertools.product((0.0, 0.01, 0.3, 4.0), (0.01, 1.0, 30.0), (1, 4, LENGTH))
    ):
        made = {"seed": seed, "spread": spread, "size": size, "clusters": clusters}
        largest = max(
            largest, float(make_scene(**made, bias=bias, with_mean=with_mean).ratio().max())
        )
    assert 0.1 < largest <= 1.0


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("spread", [0.0, 0.3, 5.0])
def test_mass_bounds_enclose_the_true_mass(bias, spread):
    """Oracle: the evicted logits; exact where all keys of a cluster coincide."""
    scene = make_scene(spread=spread, size=4.0, bias=bias)
    masses = scene.masses(scene.summary())
    for cluster in range(4):
        true = scene.true_mass(cluster)
        assert bool((masses.lower[..., cluster] <= true).all())
        assert bool((masses.upper[..., cluster] >= true).all())
        if spread == 0.0 and bias != "steep":
            gap = (masses.upper - masses.lower)[..., cluster].nan_to_num()
            assert float(gap.abs().max()) < 1e-8


@pytest.mark.parametrize("bias", BIASES)
def test_tilt_dominates_the_distance_from_uniform_weights(bias):
    """Oracle: the softmax weights of each cluster's keys among themselves."""
    scene = make_scene(spread=0.5, bias=bias)
    masses = scene.masses(scene.summary())
    for cluster in range(4):
        member = scene.members(cluster)
        weights = scene.logits().masked_fill(~member, -torch.inf).softmax(-1).nan_to_num()
        uniform = member.double() / member.sum(-1, keepdim=True).clamp(min=1)
        assert bool(((weights - uniform).abs().sum(-1) <= masses.tilt[..., cluster]).all())


def test_mass_bound_is_nearly_tight_for_two_opposite_keys():
    """Oracle: the mean of exp(a) and exp(-a) is cosh(a), just below exp(a^2 / 2)."""
    keys = torch.zeros(1, 1, LENGTH, WIDTH, dtype=F64)
    keys[0, 0, :2, 0] = torch.tensor([1.0, -1.0])
    q = torch.zeros(1, 1, 1, WIDTH, dtype=F64)
    q[..., 0] = 0.5
    is_gone = (torch.arange(LENGTH) < 2)[None, None]
    scene = Scene(q, keys, keys, is_gone, None, 1, False)
    upper = float(scene.masses(scene.summary()).upper)
    true = math.log(2 * math.cosh(0.5))
    assert true <= upper < true + 0.01


@pytest.mark.parametrize("bias", [None, "flat", "random"])
def test_uniform_values_make_the_bound_exact_for_equal_keys(bias):
    """Oracle: with one key and one value per cluster nothing is unknown: the ratio is 1."""
    scene = make_scene(spread=0.0, v_spread=0.0, bias=bias)
    kept_value = torch.where(scene.is_gone_RKT[..., None], scene.v_RKTD, -scene.v_RKTD)
    scene.v_RKTD = kept_value
    ratio = scene.ratio()
    assert float(ratio.min()) > 1 - 1e-9
    assert float(ratio.max()) <= 1


@pytest.mark.parametrize("bias", BIASES)
def test_mean_token_is_exact_for_equal_keys(bias):
    """Oracle: without a key to prefer, and a flat bias, the mean value is the true one."""
    scene = make_scene(spread=0.0, bias=bias, with_mean=True)
    summary = scene.summary()
    attended = scene.attended(summary)
    moved = float(scene.moved(attended).max())
    if bias in (None, "flat"):
        assert moved < IDENTITY
        assert float(head_deviation(summary, scene.masses(summary), attended).max()) < 1e-5
    else:
        assert moved > 1e-6


def test_head_bound_is_the_largest_value_over_all_masses():
    """Oracle: every vertex of the box of cluster masses."""
    scene = make_scene()
    summary = scene.summary()
    kept, used = torch.randn(2, ROWS, 1, GROUP, WIDTH, dtype=F64)
    lower = torch.randn(ROWS, 1, GROUP, 4, dtype=F64)
    masses = Masses(lower, lower + torch.rand_like(lower), torch.rand_like(lower))
    lse = torch.randn(ROWS, 1, GROUP, dtype=F64)
    got = head_deviation(summary, masses, Attended(kept, used, lse))
    toward = summary.values[:, :, None] - used[..., None, :]
    slip = summary.value_radius[:, :, None] * masses.tilt
    low, high = ((x - lse[..., None]).exp() for x in (masses.lower, masses.upper))
    known = (kept - used + (low[..., None] * toward).sum(-2)).norm(dim=-1)
    best = torch.zeros_like(lse)
    for full in itertools.product((0.0, 1.0), repeat=4):
        extra = torch.tensor(full) * (high - low)
        above = known + (low * slip + extra * (toward.norm(dim=-1) + slip)).sum(-1)
        best = best.maximum(above / (1 + (low + extra).sum(-1)))
    assert float((got / best.flatten(1) - 1).abs().max()) < 1e-9
    assert bool((got >= best.flatten(1)).all())


def test_huge_masses_of_opposite_values_do_not_cancel():
    """Oracle: the limit; the heavier of two clusters decides, whatever float64 can hold."""
    scene = make_scene(clusters=2)
    summary = scene.summary()
    summary.values[:, :, 0], summary.values[:, :, 1] = 1.0, -1.0
    summary.value_norm.copy_(summary.values.norm(dim=-1))
    summary.value_radius.zero_()
    lower = torch.tensor([900.0, 800.0], dtype=F64).expand(ROWS, 1, GROUP, 2)
    nothing = torch.zeros(ROWS, 1, GROUP, WIDTH, dtype=F64)
    attended = Attended(nothing, nothing, nothing[..., 0])
    got = head_deviation(summary, Masses(lower, lower, torch.zeros_like(lower)), attended)
    assert float(got.min()) >= math.sqrt(WIDTH) * (1 - IDENTITY)


@pytest.mark.parametrize("with_mean", [False, True], ids=["plain", "mean"])
def test_nothing_evicted_is_exactly_zero(with_mean):
    """Oracle: attention itself."""
    scene = make_scene(with_mean=with_mean)
    scene.is_gone_RKT[:] = False
    summary = scene.summary()
    attended = scene.attended(summary)
    assert torch.equal(attended.used_RKGD, attended.kept_RKGD)
    assert float(head_deviation(summary, scene.masses(summary), attended).max()) == 0.0


@pytest.mark.parametrize("exponent", [0, 3], ids=["growing", "fixed"])
def test_summary_balls_contain_every_evicted_key_and_value(exponent):
    """Oracle: means and distances themselves, over evictions while the segments double."""
    torch.manual_seed(2)
    summary = Summary.empty((2, 3, 4), 5, torch.device("cpu"), exponent)
    seen = []
    for start in range(0, 30, 6):
        keys, values = torch.randn(2, 2, 3, 6, 5, dtype=F64)
        place = (start + torch.arange(6)).expand(2, 3, 6)
        gone = torch.rand(2, 3, 6) < 0.6
        pairs = torch.stack((keys, values), 3)
        summary.add(pairs, place, gone, torch.full((2,), start + 6))
        seen.append((keys, values, place, gone))
    keys, values, place, gone = (torch.cat(x, 2) for x in zip(*seen, strict=True))
    assert summary.exponent.tolist() == [3, 3]
    for c in range(4):
        inside = gone & (place // 8 == c)
        assert torch.equal(summary.count[:, :, c], inside.sum(2).double())
        now = summary.clusters(F64)
        for x, centre, radius in (
            (keys, now.keys, now.key_radius),
            (values, now.values, now.value_radius),
        ):
            far = (x - centre[:, :, c, None]).norm(dim=-1)
            assert bool((far.where(inside, 0) <= radius[:, :, c, None]).all())
            mean = (x * inside[..., None]).sum(2) / inside.sum(2).clamp(min=1)[..., None]
            assert float((mean - centre[:, :, c]).abs().max()) < IDENTITY


@pytest.mark.parametrize("clusters", [1, 3, 8])
def test_segments_are_the_shortest_powers_of_two_that_cover(clusters):
    """Oracle: counting up."""
    for positions in range(1, 80):
        exponent = segment_exponent(positions, clusters)
        assert clusters * 2**exponent >= positions
        assert exponent == 0 or clusters * 2 ** (exponent - 1) < positions


def adversarial_scene(seed, bias, with_mean):
    """Keys along the query, values along the keys: what the mean hides matters most."""
    scene = make_scene(seed=seed, size=0.7, bias=bias, with_mean=with_mean)
    side = torch.randn(ROWS, 1, LENGTH, 1, dtype=F64).sign()
    direction = scene.q_RKGD.mean(2, keepdim=True)
    scene.k_RKTD = side * direction + 0.05 * scene.k_RKTD
    scene.v_RKTD = side * torch.ones(WIDTH, dtype=F64) + 0.05 * scene.v_RKTD
    return scene


@pytest.mark.parametrize("with_mean", [False, True], ids=["plain", "mean"])
@pytest.mark.parametrize("bias", BIASES)
def test_ascent_on_the_ratio_never_passes_one(bias, with_mean):
    """Property: gradient ascent over queries, keys, values and biases stays below the bound."""
    best = 0.0
    for start in (lambda: make_scene(seed=5, bias=bias, with_mean=with_mean),
                  lambda: adversarial_scene(6, bias, with_mean)):  # fmt: skip
        scene = start()
        free = [scene.q_RKGD, scene.k_RKTD, scene.v_RKTD]
        free += [] if bias is None else [scene.bias_GT]
        first = scene.ratio()
        optimizer = torch.optim.Adam([x.requires_grad_() for x in free], lr=0.05)
        for _ in range(40):
            optimizer.zero_grad()
            ratio = scene.ratio()
            assert bool((ratio <= 1).all())
            (-ratio.log().sum()).backward()
            for x in free:
                x.grad.nan_to_num_()
            optimizer.step()
        with torch.no_grad():
            best = max(best, float(scene.ratio().max()))
            assert float(scene.ratio().mean()) > float(first.mean())
    assert 0.4 < best <= 1.0
