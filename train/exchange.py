"""Who updates which parameter, and how ranks hand each other what they computed.

``Replicas`` serves ranks that hold whole parameters (DDP), ``Shards`` ranks that hold rows of
them (FSDP2). Both move one flat buffer per step and direction.
"""

# Legend: O/I out/in features.

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from common.errors import ConfigError

# Fixed cost of a matrix, in multiply-adds: launching its kernels takes as long as these.
_LAUNCH = 1e6
# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Tensors up to this many entries travel with the description of a state.
_SMALL = 1024


def update_cost(shape: Sequence[int], slices: int = 1) -> float:
    """Return the relative cost of orthogonalising and projecting a matrix, multiply-adds.

    Args:
        shape: (O, I); vectors cost next to nothing.
        slices: Row blocks that are treated one by one.
    """
    if len(shape) != 2:
        return 1.0
    rows, columns = shape[0] // slices, shape[1]
    return slices * min(rows, columns) ** 2 * max(rows, columns) + _LAUNCH


def assign_owners(costs: Sequence[float], world_size: int) -> list[int]:
    """Return the rank that updates each item: longest first, always to the least loaded rank.

    The same on every rank; the largest load exceeds the optimum by at most a third.
    """
    loads, owners = [0.0] * world_size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = min(range(world_size), key=lambda rank: loads[rank])
        loads[owners[index]] += costs[index]
    return owners


class Replicas:
    """Exchange between ranks that hold whole parameters with equal gradients.

    Args:
        params: Shared-out parameters, in the same order on every rank, at least one.
        owners: Rank that updates each.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, params: Sequence[Tensor], owners: Sequence[int], rank: int, world_size: int):
        self.rank = rank
        self.parts = [
            [p for p, owner in zip(params, owners, strict=True) if owner == r]
            for r in range(world_size)
        ]
        self._own = {id(p) for p in self.parts[rank]}
        length = max(sum(p.numel() for p in part) for part in self.parts)
        dtype = params[0].dtype
        for p in params:
            dtype = torch.promote_types(dtype, p.dtype)
        self.sent = torch.zeros(length, dtype=dtype, device=params[0].device)
        self.received = torch.empty(world_size * length, dtype=dtype, device=params[0].device)

    def whole(self, p: Tensor) -> Tensor | None:
        """Return the tensor that this rank updates in place of ``p``; None on other ranks."""
        return p if id(p) in self._own else None

    def collect(self) -> None:
        """Do nothing: gradients are averaged already."""

    def deliver(self) -> None:
        """Copy every parameter from its owner, so that ranks agree bit for bit."""
        _pack(self.sent, self.parts[self.rank])
        _all_gather(self.received, self.sent)
        for rank, row in enumerate(self.received.view(len(self.parts), -1)):
            if rank != self.rank:
                _unpack(row, self.parts[rank])


class Shards:
    """Exchange between ranks that hold rows of each parameter (DTensor, sharded along rows).

    The owner of a parameter receives its whole gradient and value, and sends the rows back.

    Args:
        params: Parameters, in the same order on every rank.
        owners: Rank that updates each.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: for parameters that are laid out in another way.
    """

    def __init__(
        self, params: Sequence[DTensor], owners: Sequence[int], rank: int, world_size: int
    ):
        for p in params:
            if tuple(p.placements) != (Shard(0),):
                raise ConfigError(
                    f"a parameter is laid out as {p.placements}: expected rows over one mesh "
                    "dimension; use trainer.strategy=fsdp2 without tensor parallelism"
                )
        self.rank, self.world_size = rank, world_size
        self.parts: list[list[DTensor]] = [[] for _ in range(world_size)]
        for p, owner in zip(params, owners, strict=True):
            self.parts[owner].append(p)
        self.handles = [
            torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in self.parts[rank]
        ]
        self._gradients = [torch.zeros_like(handle) for handle in self.handles]
        self._own = {
            id(p): handle for p, handle in zip(self.parts[rank], self.handles, strict=True)
        }

    def whole(self, p: Tensor) -> Tensor | None:
        """Return the tensor that this rank updates in place of ``p``; None on other ranks."""
        return self._own.get(id(p))

    def collect(self) -> None:
        """Assemble value and gradient of the parameters that this rank owns.

        Where there is no gradient, which all ranks see alike, there is none to act on either.
        """
        sent = [[*map(_local, part), *map(_local_gradient, part)] for part in self.parts]
        received = [
            [*self._rows(self.handles, source), *self._rows(self._gradients, source)]
            for source in range(self.world_size)
        ]
        _all_to_all(sent, received)
        rows = zip(self.parts[self.rank], self.handles, self._gradients, strict=True)
        for p, handle, gradient in rows:
            handle.grad = None if p.grad is None else gradient

    def deliver(self) -> None:
        """Hand the rows of every updated parameter to the ranks that hold them."""
        sent = [self._rows(self.handles, target) for target in range(self.world_size)]
        _all_to_all(sent, [[_local(p) for p in part] for part in self.parts])

    def _rows(self, handles: Iterable[Tensor], rank: int) -> list[Tensor]:
        parts = []
        for handle in handles:
            size = -(-len(handle) // self.world_size)
            parts.append(handle[min(rank * size, len(handle)) : (rank + 1) * size])
        return parts


def gather_state(
    local: dict[int, dict[str, Any]], device: torch.device
) -> dict[int, dict[str, Any]]:
    """Return the optimizer state of all ranks on rank 0, each rank's own elsewhere.

    Every rank has to call it.

    Args:
        local: Parameter index to named tensors and numbers; each index on one rank alone.
        device: Where large tensors live.
    """
    described = {
        index: {name: _description(value) for name, value in state.items()}
        for index, state in local.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, described)
    leads, merged = dist.get_rank() == 0, dict(local)
    for owner, states in enumerate(everyone):
        for index, state in states.items():
            for name, value in state.items():
                if isinstance(value, _Large):
                    value = _from_owner(local, owner, index, name, value, device)
                if leads:
                    merged.setdefault(index, {})[name] = value
    return merged


class _Large(tuple):
    """Shape and dtype of a tensor that is sent by itself."""


def _description(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() > _SMALL:
        return _Large((tuple(value.shape), value.dtype))
    return value.cpu() if isinstance(value, Tensor) else value


def _from_owner(
    local: dict[int, dict[str, Any]],
    owner: int,
    index: int,
    name: str,
    described: _Large,
    device: torch.device,
) -> Tensor:
    if owner == dist.get_rank():
        tensor = local[index][name].contiguous()
    else:
        shape, dtype = described
        tensor = torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(tensor, src=owner)
    return tensor


def _local(p: Any) -> Tensor:
    return p.detach().to_local()


def _local_gradient(p: Any) -> Tensor:
    return torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad)


def _all_to_all(sent: list[list[Tensor]], received: list[list[Tensor]]) -> None:
    """Send list r to rank r; fill list s, in place, with what rank s sent."""
    dtype, device = torch.float32, torch.device("cpu")
    for tensor in (tensor for part in sent for tensor in part):
        dtype, device = torch.promote_types(dtype, tensor.dtype), tensor.device
    sizes_out = [sum(tensor.numel() for tensor in part) for part in sent]
    sizes_in = [sum(tensor.numel() for tensor in part) for part in received]
    outgoing = torch.empty(sum(sizes_out), dtype=dtype, device=device)
    incoming = torch.empty(sum(sizes_in), dtype=dtype, device=device)
    _pack(outgoing, [tensor for part in sent for tensor in part])
    dist.all_to_all_single(incoming, outgoing, sizes_in, sizes_out)
    _unpack(incoming, [tensor for part in received for tensor in part])


def _pack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    views = flat[: sum(t.numel() for t in tensors)].split([t.numel() for t in tensors])
    for view, tensor in zip(views, tensors, strict=True):
        view.view(tensor.shape).copy_(tensor)


def _unpack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    views = flat[: sum(t.numel() for t in tensors)].split([t.numel() for t in tensors])
    for view, tensor in zip(views, tensors, strict=True):
        tensor.copy_(view.view(tensor.shape))
