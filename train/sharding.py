"""Muon whose matrices are shared out over ranks: each is orthogonalised and projected once.

Replicas of a model would otherwise repeat the same arithmetic on every device. The averages of a
shared-out parameter live on its owner alone, and are brought together for a checkpoint.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.exchange import Replicas, Shards, assign_owners, gather_state, update_cost
from train.optim import Muon

# Constraints that take no longer than sending the result would.
_CHEAP = ("none", "row_clip")


class ShardedMuon(Muon):
    """``Muon`` on several ranks that all take the same steps.

    With replicated parameters (DDP) the matrices of ``muon`` and of constrained groups are shared
    out, balanced by cost; the rest is cheap and repeated, since a message would take longer. With
    parameters sharded over rows (FSDP2) each is assembled on one rank, updated whole and sent back,
    so that norms are those of the matrix and not of its pieces.

    Weights are bit-identical on all ranks after each step. ``state_dict`` has to be called on
    every rank and is complete on rank 0; ``load_state_dict`` takes a complete one, also from
    another number of ranks or from a plain ``Muon``. One rank, or none initialised: plain ``Muon``.

    Args:
        params: As for ``Muon``.
        shard: Whether replicated parameters are shared out; sharded ones always are.
        **settings: As for ``Muon``.
    """

    def __init__(self, params: Iterable[Any], *, shard: bool = True, **settings: Any):
        self._is_shared_out = shard
        super().__init__(params, **settings)

    def update(self) -> None:
        """Update this rank's share and exchange the results."""
        exchange = self._exchange()
        if exchange is None:
            super().update()
            return
        exchange.collect()
        with self._only_own(exchange):
            super().update()
        exchange.deliver()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; shares are dealt again."""
        super().add_param_group(param_group)
        self._dealt: Replicas | Shards | None = None
        self._is_dealt = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all ranks (complete on rank 0); every rank has to call it."""
        exchange = self._exchange()
        if exchange is None:
            return super().state_dict()
        local = {}
        for index, p in enumerate(self._params()):
            whole = exchange.whole(p)
            if whole is not None and whole in self.state:
                local[index] = self.state[whole]
        params, shared = self._params(), self._shared()
        everything = self.state
        try:
            kept = {p: everything[p] for p in params if p in everything and id(p) not in shared}
            self.state = kept
            packed = super().state_dict()
        finally:
            self.state = everything
        packed["state"] |= gather_state(local, params[0].device)
        packed["state"] = dict(sorted(packed["state"].items()))
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a complete state and keep this rank's share of it."""
        super().load_state_dict(state_dict)
        exchange = self._exchange()
        if exchange is None:
            return
        shared = self._shared()
        for p in [p for p in self._params() if id(p) in shared and p in self.state]:
            state, whole = self.state.pop(p), exchange.whole(p)
            if whole is not None:
                self.state[whole] = state

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _shared(self) -> set[int]:
        return {
            id(p)
            for group in self.param_groups
            for p in group["params"]
            if isinstance(p, DTensor)
            or group["kind"] == "muon"
            or group["constraint"] not in _CHEAP
        }

    def _exchange(self) -> Replicas | Shards | None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        if not self._is_dealt:
            self._dealt, self._is_dealt = self._deal(), True
        return self._dealt

    def _deal(self) -> Replicas | Shards | None:
        shared = self._shared()
        params, costs = [], []
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in shared:
                    params.append(p)
                    costs.append(update_cost(p.shape, group["slices"]))
        world_size = dist.get_world_size()
        is_sharded = any(isinstance(p, DTensor) for p in params)
        if not is_sharded and (not params or world_size == 1 or not self._is_shared_out):
            return None
        kind = Shards if is_sharded else Replicas
        owners = assign_owners(costs, world_size)
        return kind(params, owners, dist.get_rank(), world_size)

    @contextmanager
    def _only_own(self, exchange: Replicas | Shards) -> Iterator[None]:
        """Let the groups hold this rank's parameters alone (and the repeated ones)."""
        shared = self._shared()
        everything = [group["params"] for group in self.param_groups]
        try:
            for group, params in zip(self.param_groups, everything, strict=True):
                own = [exchange.whole(p) if id(p) in shared else p for p in params]
                group["params"] = [p for p in own if p is not None]
            yield
        finally:
            for group, params in zip(self.param_groups, everything, strict=True):
                group["params"] = params
