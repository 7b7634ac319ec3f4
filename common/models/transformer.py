"""The Lipschitz transformer: one definition for training, certification, pruning and serving."""

# Legend: B batch, T token, C width, V vocabulary.

import torch
from torch import Tensor, nn

from common.errors import ShapeError
from common.models.config import ModelConfig
from common.models.layers import Attend, Layer


class LipschitzTransformer(nn.Module):
    """Decoder without normalisation layers whose blocks are convex residual combinations.

    ``logits = final_scale * W_head stream(embedding(tokens)) + b_head``; see ``Layer`` for the
    blocks. Embedding and head are never tied.

    Source:
        arXiv 2507.13338, section 4; deviations: the optional freedoms of ``ModelConfig``, and
        blocks run in index order (the reference code runs the highest index first).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(
            Layer(
                i,
                config.width,
                config.context,
                config.rope_theta,
                config.layer(i),
                config.rope_dims,
            )
            for i in range(config.layers)
        )
        self.head = nn.Linear(config.width, config.head_rows, bias=config.head_bias)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return the embedded sequence (B, T, C) of integer tokens (B, T)."""
        return self.embedding(tokens_BT)

    def stream(
        self, x_BTC: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Run all blocks on an embedded sequence (B, T, C).

        Args:
            x_BTC: Embedded tokens.
            positions_BT: Original positions (B or 1, T), integer; default 0 ... T-1.
            attend: Replacement of the attention arithmetic, see ``Attend``.

        Returns:
            The final residual stream (B, T, C).

        Raises:
            ShapeError: if the sequence is longer than the context.
        """
        if x_BTC.shape[1] > self.config.context:
            raise ShapeError(
                f"sequence of {x_BTC.shape[1]} tokens: expected at most the model's context of "
                f"{self.config.context}; shorten it"
            )
        for layer in self.layers:
            x_BTC = layer(x_BTC, positions_BT, attend)
        return x_BTC

    def logits(self, x_BTC: Tensor) -> Tensor:
        """Return the logits (B, T, V) of a final stream (B, T, C), without surplus head rows."""
        scaled = self.config.final_scale * nn.functional.linear(x_BTC, self.head.weight)
        rows_BTV = scaled if self.head.bias is None else scaled + self.head.bias
        return rows_BTV[..., : self.config.vocab_size]

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) for integer tokens (B, T); see ``stream`` for the arguments."""
        return self.logits(self.stream(self.embed(tokens_BT), positions_BT, attend))

    @property
    def num_parameters(self) -> int:
        """Number of stored scalars."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def domain_radius(self) -> float:
        """Return the largest l2 norm of an embedding row, rounded up (float64)."""
        norms = self.embedding.weight.detach().double().norm(dim=1)
        return float(norms.max()) * (1 + 1e-12)
