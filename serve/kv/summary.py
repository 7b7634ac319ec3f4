"""What is remembered of evicted keys and values: means, and radii around them, by position.

Positions are cut into segments; all evicted tokens of a segment form a cluster. Segments double
when a sequence outgrows them, so that a few clusters serve any length.
"""

# Legend: R rows, K key/value heads, C clusters, E evicted slots (padded), W kept tokens (padded),
# D head width. Keys and values lie side by side on an axis of 2.

from dataclasses import dataclass

import torch
from torch import Tensor

DOUBLINGS = 48  # of segments; more than positions can need


def outward(dtype: torch.dtype) -> float:
    """Return a relative allowance that covers some hundred roundings in ``dtype``."""
    return 1e-11 if dtype == torch.float64 else 500 * torch.finfo(dtype).eps / 2


@dataclass(frozen=True, slots=True)
class Clusters:
    """What a step needs of evicted tokens, in working precision.

    Attributes:
        count: Evicted tokens (R, K, C).
        log_count: Its logarithm, -inf for empty clusters.
        keys: Mean evicted key (R, K, C, D).
        values: Mean evicted value (R, K, C, D).
        key_norm: l2 norm of the mean key (R, K, C).
        key_radius: Bound on the distance of an evicted key from the exact mean (R, K, C).
        value_norm: l2 norm of the mean value (R, K, C).
        value_radius: As for keys.
        kept: Positions that survived the last eviction (R, K, W), ascending, -1 in padding first;
            only biases ask for them.
        seen: From this position on (R,) everything is kept.
    """

    count: Tensor
    log_count: Tensor
    keys: Tensor
    values: Tensor
    key_norm: Tensor
    key_radius: Tensor
    value_norm: Tensor
    value_radius: Tensor
    kept: Tensor
    seen: Tensor

    def rows(self, first: int, count: int) -> "Clusters":
        """Return some rows, as views."""
        fields = (getattr(self, name) for name in self.__slots__)
        return Clusters(*(field[first : first + count] for field in fields))


@dataclass(slots=True)
class Summary:
    """Evicted keys and values of some rows; float64.

    Attributes:
        count: Evicted tokens (R, K, C).
        centre: Their mean keys and values (R, K, C, 2, D).
        radius: Largest distance from these (R, K, C, 2), rounded up.
        exponent: Segments have ``2 ** exponent`` positions (R,), int64.
        seen: A number above every evicted position (R,), int64.
    """

    count: Tensor
    centre: Tensor
    radius: Tensor
    exponent: Tensor
    seen: Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], width: int, device: torch.device, exponent: int = 0
    ) -> "Summary":
        """Return the summary of no evictions.

        Args:
            shape: (R, K, C).
            width: Head width.
            device: Where it lives.
            exponent: Segments have at least ``2 ** exponent`` positions.
        """
        double = {"dtype": torch.float64, "device": device}
        return cls(
            torch.zeros(*shape, **double),
            torch.zeros(*shape, 2, width, **double),
            torch.zeros(*shape, 2, **double),
            torch.full(shape[:1], exponent, dtype=torch.int64, device=device),
            torch.zeros(shape[:1], dtype=torch.int64, device=device),
        )

    def fields(self) -> tuple[Tensor, ...]:
        """Return the tensors in declaration order."""
        return self.count, self.centre, self.radius, self.exponent, self.seen

    def add(
        self, x_RKE2D: Tensor, positions_RKE: Tensor, is_gone_RKE: Tensor, seen_R: Tensor
    ) -> None:
        """Add evicted slots.

        Args:
            x_RKE2D: Keys after RoPE, and values.
            positions_RKE: Original positions; any value where nothing is evicted.
            is_gone_RKE: Which slots are evicted now.
            seen_R: A number above every position so far.
        """
        self._widen(seen_R)
        self.seen = seen_R
        clusters, old_count = self.count.shape[2], self.count
        where_RKE = positions_RKE.clamp(min=0)
        cluster_RKE = (where_RKE >> self.exponent[:, None, None]).clamp(max=clusters - 1)
        ids_C = torch.arange(clusters, device=old_count.device)
        is_member_RKEC = (cluster_RKE[..., None] == ids_C) & is_gone_RKE[..., None]
        member_RKEC, x_RKE2D = is_member_RKEC.double(), x_RKE2D.double()
        self.count = old_count + member_RKEC.sum(2)
        total = (member_RKEC.mT @ x_RKE2D.flatten(3)).view_as(self.centre)
        total += old_count[..., None, None] * self.centre
        moved = total / self.count.clamp(min=1)[..., None, None]
        # The old ball, seen from the new centre, grows by the shift.
        shift = (moved - self.centre).norm(dim=-1)
        grown = (self.radius + shift).masked_fill_(old_count[..., None] == 0, 0.0)
        first = torch.arange(0, old_count.numel(), clusters, device=ids_C.device)
        own = first.view(cluster_RKE.shape[:2])[..., None] + cluster_RKE
        own_RKE2D = moved.flatten(0, 2).index_select(0, own.flatten()).view_as(x_RKE2D)
        far_RKE2 = own_RKE2D.sub_(x_RKE2D).norm(dim=-1) * is_gone_RKE[..., None]
        self.centre = moved
        self.radius = _largest(grown, far_RKE2, cluster_RKE)

    def clusters(self, dtype: torch.dtype, kept_RKW: Tensor | None = None) -> Clusters:
        """Return what a step needs, in working precision; radii are rounded up.

        Args:
            dtype: Working precision.
            kept_RKW: Positions that survived, see ``Clusters.kept``; None where nobody asks.
        """
        centre, count = self.centre.to(dtype), self.count.to(dtype)
        key_norm, value_norm = centre.norm(dim=-1).unbind(-1)
        key_radius, value_radius = (self.radius.to(dtype) * (1 + outward(dtype))).unbind(-1)
        keys, values = centre.unbind(3)
        sizes = (key_norm, key_radius, value_norm, value_radius)
        if kept_RKW is None:
            kept_RKW = self.seen.new_zeros(*count.shape[:2], 0)
        return Clusters(count, count.log(), keys, values, *sizes, kept_RKW, self.seen)

    def _widen(self, seen_R: Tensor) -> None:
        """Double segments until they cover ``seen_R``; clusters that now share one are joined."""
        clusters, device = self.count.shape[2], self.count.device
        reach = clusters << torch.arange(DOUBLINGS, device=device)
        needed_R = (reach < seen_R[:, None]).sum(1).maximum(self.exponent)
        shift_R, self.exponent = needed_R - self.exponent, needed_R
        # A device would have to be waited for.
        if not shift_R.is_cuda and not bool(shift_R.any()):
            return
        ids_C = torch.arange(clusters, device=device)
        into_RKC = (ids_C >> shift_R[:, None])[:, None].expand_as(self.count)
        # Entry (c, b): old cluster b lies in the new cluster c.
        joins_R1CB = (ids_C[:, None] == into_RKC[:, :1, None]).double()
        total = joins_R1CB @ (self.count[..., None] * self.centre.flatten(3))
        count = (joins_R1CB @ self.count[..., None])[..., 0]
        moved = total / count.clamp(min=1)[..., None]
        shift = (joins_R1CB.mT @ moved).view_as(self.centre) - self.centre
        grown = self.radius + shift.norm(dim=-1)
        grown.masked_fill_(self.count[..., None] == 0, 0.0)
        self.radius = _largest(torch.zeros_like(grown), grown, into_RKC)
        self.count, self.centre = count, moved.view_as(self.centre)


def _largest(floor_RKC2: Tensor, x_RKE2: Tensor, into_RKE: Tensor) -> Tensor:
    """Return the largest number that goes into each cluster, at least the floor, rounded up."""
    into = into_RKE[..., None].expand_as(x_RKE2)
    largest = floor_RKC2.scatter_reduce(2, into, x_RKE2, "amax")
    return largest * (1 + outward(torch.float64))


def segment_exponent(positions: int, clusters: int) -> int:
    """Return the smallest e such that ``clusters`` segments of ``2 ** e`` cover the positions."""
    return max(0, (-(-positions // clusters) - 1).bit_length())
