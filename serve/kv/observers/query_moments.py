"""Mean and second moment of the queries of each sequence, before RoPE."""

# Legend: R rows of a call, T tokens of a chunk, H query heads with content, D head width, F bands.

import torch

from serve.decoder import Decoder, LayerSpec
from serve.kv.observer import Attended
from serve.kv.observers.rows import RowObserver, Tensors
from serve.kv.trigonometry import phasors, turned


class QueryMoments(RowObserver):
    """Sums queries and their outer products in float64.

    Rotations are undone; a factor of RoPE on the length (``rope_scale``) stays. ``count`` (rows,),
    ``total`` (rows, H, D), ``outer`` (rows, H, D, D).

    Args:
        decoder: Supplies shapes and device.
        skip: First positions of a sequence that are left out.
    """

    def __init__(self, decoder: Decoder, skip: int) -> None:
        super().__init__(decoder)
        self.skip = skip

    def empty(self, spec: LayerSpec, rows: int) -> Tensors:
        """Return sums of nothing."""
        count = torch.zeros(rows, dtype=torch.float64, device=self.device)
        shape = (rows, spec.content_heads, spec.head_dim)
        outer = count.new_zeros(*shape, spec.head_dim)
        return {"count": count, "total": count.new_zeros(shape), "outer": outer}

    @torch.inference_mode()
    def attended(self, event: Attended) -> None:
        """Add queries."""
        spec = self.specs.get(event.layer)
        if spec is None:
            return
        is_used_RT = (event.positions_RT >= self.skip).double()
        back_RT1F = phasors(-spec.inverse_frequency.to(self.device), event.positions_RT)[:, :, None]
        q_RTHD = event.q_RTHD[:, :, : spec.content_heads].double()
        q_RTHD = turned(q_RTHD, back_RT1F, interleaved=spec.interleaved)
        q_RTHD = q_RTHD * is_used_RT[:, :, None, None]
        q_RHTD = q_RTHD.transpose(1, 2)
        # All is computed before anything is added: memory may run out.
        outer_RHDD = q_RHTD.mT @ q_RHTD
        index, state = self.index(event.rows), self.state[event.layer]
        state["count"].index_add_(0, index, is_used_RT.sum(1))
        state["total"].index_add_(0, index, q_RHTD.sum(2))
        state["outer"].index_add_(0, index, outer_RHDD)
