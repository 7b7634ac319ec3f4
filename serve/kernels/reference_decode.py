"""Torch reference of paged decode attention: CPU product path, the Triton kernel's oracle.

On the CPU the cost is reading keys and values. Long rows are handled one by one, and read in place
where the pages of a row are consecutive; short ones are gathered together.
"""

# Legend: R rows, N table width (blocks), K key/value heads, H query heads, G = H / K,
# S slots of a row, B slots of a block, D head width, T relative distances.

import torch
from torch import Tensor

from serve.kernels.reference import accumulator, gather_pages, page_index, take_pages

LONG = 2048  # slots from which reading twice costs more than the calls that avoid it


def paged_decode(
    q_RHD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    tables_RN: Tensor,
    lengths_RK: Tensor,
    positions_R: Tensor,
    scale: float,
    bias_HT: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attend from one query per row to its cached slots; see ``dispatch``."""
    rows, heads, width = q_RHD.shape
    low, high = _extent(lengths_RK, tables_RN.shape[1] * k_pool.shape[2])
    is_long = high >= LONG and not k_pool.is_cuda
    if is_long and rows > 1:
        parts = [
            paged_decode(
                *(q_RHD[row : row + 1], k_pool, v_pool, pos_pool, tables_RN[row : row + 1]),
                *(lengths_RK[row : row + 1], positions_R[row : row + 1], scale, bias_HT, window),
            )
            for row in range(rows)
        ]
        o_RHD, lse_RH = (torch.cat(part) for part in zip(*parts, strict=True))
        return o_RHD, lse_RH
    cache = _Pages(tables_RN, lengths_RK, low, high, k_pool, in_place=is_long)
    groups = (k_pool.shape[1], heads // k_pool.shape[1])
    q_RKGD = (q_RHD.to(accumulator(k_pool)) * scale).reshape(rows, *groups, width)
    z_RKGS = cache.logits(q_RKGD, k_pool)
    if bias_HT is not None or window is not None:
        pos_RKS = gather_pages(pos_pool, tables_RN[:, : cache.width])[:, :, :high]
        distance_RKS = cache.fill_stale(positions_R[:, None, None] - pos_RKS, 0)
        if bias_HT is not None:
            z_RKGS += _bias_at(bias_HT.to(z_RKGS.dtype), distance_RKS)
        if window is not None:
            z_RKGS.masked_fill_((distance_RKS >= window)[:, :, None], -torch.inf)
    weights_RKGS, lse_RKG = _softmax(z_RKGS)
    o_RKGD = cache.mix(weights_RKGS, v_pool)
    if low == 0 or window is not None:
        # The softmax of nothing is NaN.
        is_empty = (z_RKGS == -torch.inf).all(-1)
        o_RKGD.masked_fill_(is_empty[..., None], 0.0)
        lse_RKG.masked_fill_(is_empty, -torch.inf)
    return o_RKGD.reshape(rows, heads, width).to(q_RHD.dtype), lse_RKG.reshape(rows, heads)


class _Pages:
    """Reads the slots of some rows: the first pages in place, if possible, the others gathered.

    Args:
        tables_RN: Block indices.
        lengths_RK: Filled slots.
        low: Slots that every row and head fills.
        high: Slots that some row or head fills.
        pool: Gives the shape of pages.
        in_place: Look for consecutive pages; the tables have one row and are on the CPU.
    """

    def __init__(
        self,
        tables_RN: Tensor,
        lengths_RK: Tensor,
        low: int,
        high: int,
        pool: Tensor,
        *,
        in_place: bool,
    ) -> None:
        _, kv_heads, block_size, _ = pool.shape
        self.width = -(-high // block_size)
        self.low, self.high = low, high
        self.run = slice(0, 0)
        if in_place:
            table = tables_RN[0, : low // block_size].tolist()
            if table and table == list(range(table[0], table[0] + len(table))):
                self.run = slice(table[0], table[0] + len(table))
        pages = self.run.stop - self.run.start
        self.front = pages * block_size
        self.rest_RKN = page_index(tables_RN[:, pages : self.width], kv_heads)
        self.is_stale: Tensor | None = None
        if low < high:
            slot_S = torch.arange(low, high, device=pool.device)
            self.is_stale = slot_S >= lengths_RK[..., None]

    def fill_stale(self, x_RKS: Tensor, value: float) -> Tensor:
        """Overwrite what stands in unfilled slots, for tensors that end at slot ``high``."""
        if self.is_stale is not None:
            tail = x_RKS.narrow(2, x_RKS.shape[2] - self.high + self.low, self.high - self.low)
            shape = (*self.is_stale.shape, *(1,) * (x_RKS.ndim - 3))
            tail.masked_fill_(self.is_stale.view(shape), value)
        return x_RKS

    def logits(self, q_RKGD: Tensor, pool: Tensor) -> Tensor:
        """Return the products of queries and keys (R, K, G, high); -inf in unfilled slots."""
        z_RKGS = q_RKGD @ self._rest(pool).mT
        if self.is_stale is not None:
            tail = z_RKGS[..., self.low - self.front :]
            tail.masked_fill_(self.is_stale[:, :, None], -torch.inf)
        if not self.front:
            return z_RKGS
        z_NKGB = q_RKGD @ pool[self.run].to(q_RKGD.dtype).mT
        z_1KGS = z_NKGB.permute(1, 2, 0, 3).flatten(2)[None]
        return torch.cat((z_1KGS, z_RKGS), dim=-1)

    def mix(self, weights_RKGS: Tensor, pool: Tensor) -> Tensor:
        """Return the weighted sums of the values (R, K, G, D)."""
        # Stale slots may hold anything, NaN included; zero weights would not silence them.
        v_RKSD = self.fill_stale(self._rest(pool), 0.0)
        if not self.front:
            return weights_RKGS @ v_RKSD
        v_NKBD = pool[self.run].to(v_RKSD.dtype)
        w_KGNB = weights_RKGS[0, ..., : self.front].unflatten(-1, (len(v_NKBD), -1))
        o_KGD = (w_KGNB.permute(2, 0, 1, 3) @ v_NKBD).sum(0)
        return o_KGD + weights_RKGS[..., self.front :] @ v_RKSD

    def _rest(self, pool: Tensor) -> Tensor:
        dense_RKSD = take_pages(pool, self.rest_RKN).to(accumulator(pool))
        return dense_RKSD.narrow(2, 0, self.high - self.front)


def _extent(lengths_RK: Tensor, slots: int) -> tuple[int, int]:
    """Return how many slots all, and some, rows and heads fill; not asked of a GPU, which waits."""
    if lengths_RK.is_cuda or not lengths_RK.numel():
        return 0, slots
    low, high = lengths_RK.aminmax()
    return int(low), max(int(high), 1)


def _softmax(z_RKGS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights and the log-sum-exp."""
    weights_RKGS = z_RKGS.softmax(-1)
    # The largest weight is exp(maximum - log-sum-exp): never small, so its log is accurate.
    return weights_RKGS, z_RKGS.amax(-1) - weights_RKGS.amax(-1).log_()


def _bias_at(bias_HT: Tensor, distance_RKS: Tensor) -> Tensor:
    """Look up the bias of each (query head, slot): (R, K, G, S)."""
    rows, kv_heads, slots = distance_RKS.shape
    heads, context = bias_HT.shape
    group = heads // kv_heads
    index_RKGS = distance_RKS[:, :, None].expand(rows, kv_heads, group, slots)
    table_RKGT = bias_HT.view(1, kv_heads, group, context).expand(rows, -1, -1, -1)
    return table_RKGT.gather(-1, index_RKGS)
