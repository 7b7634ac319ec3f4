"""Initial weights: orthogonal matrices, zero outputs, unit embedding rows, informed biases.

Biases cost nothing in the certificate, so they start with what is known before training: the head
with the unigram log-probabilities, positional heads looking back a few tokens each.
"""

# Legend: O/I out/in features, H heads, V vocabulary, T query position (distance).

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.config import check_types, positive
from common.errors import ConfigError
from common.models import LipschitzTransformer
from train.groups import ROW_RMS, Constraint, role, row_slices

# Zero outputs make every block start as the plain convex shrinkage of its input.
ZERO_ROLES = ("output", "down", "head")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Initial biases of a ``LipschitzTransformer``; parts that the model lacks are skipped.

    Attributes:
        unigram_bias: Start the head bias at the training corpus' unigram log-probabilities.
        offsets: Distance (tokens back) that each positional head starts at, for one layer after
            another; the last list serves all further layers, a list is repeated over the heads.
            Empty leaves all position biases at zero.
        slope: Fall of a positional head's bias per token away from that distance, nats.
        content_slope: Fall of a content head's bias per token of distance, nats: without it the
            head starts as the mean of the whole context, which says little.
        floor: Lowest initial position bias, nats, below 0: -8 carries hardly any weight and still
            a gradient, -30 makes a head read its one token for good.
    """

    unigram_bias: bool = True
    offsets: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4),)
    slope: float = 1.0
    content_slope: float = 0.2
    floor: float = -8.0

    def __post_init__(self) -> None:
        check_types(self)
        positive("trainer.init.slope", self.slope, zero=True)
        positive("trainer.init.content_slope", self.content_slope, zero=True)
        if not self.floor < 0:
            raise ConfigError(f"trainer.init.floor={self.floor:g}: expected a number below 0")
        if any(not row or min(row) < 0 for row in self.offsets):
            raise ConfigError(
                f"trainer.init.offsets={self.offsets}: expected lists of distances of at least 0"
            )


@torch.no_grad()
def initialise(model: nn.Module, constraint: Constraint, seed: int) -> None:
    """Overwrite all parameters of a ``LipschitzTransformer`` or ``LipschitzMLP``.

    Matrices become orthogonal with RMS->RMS norm ``min(1, cap)``, embedding rows Gaussian with RMS
    1. The head (the last matrix of an MLP classifier), the outputs of blocks with a skip path,
    biases and position biases become zero. Same seed, same weights, whatever the global random
    state.

    Args:
        model: Modified in place.
        constraint: Its caps bound the initial norms.
        seed: Seed of the weights.

    Source:
        arXiv 2507.13338's trainer; deviation: an MLP classifier starts from a zero last layer
        (a zero first layer never learns where relu'(0) = 0).
    """
    generator = torch.Generator().manual_seed(seed)
    linears = [name for name, _ in model.named_parameters() if role(name) == "linear"]
    for name, parameter in model.named_parameters():
        kind = role(name)
        if kind == "vector" or name == (linears or [""])[-1] or _is_zero(model, name, constraint):
            parameter.zero_()
        elif kind == "embedding":
            rows_VC = torch.randn(parameter.shape, generator=generator)
            rms_V1 = rows_VC.square().mean(dim=1, keepdim=True).sqrt()
            parameter.copy_(rows_VC * ROW_RMS / rms_V1)
        else:
            cap = 1.0 if constraint.kind_of(name) == "none" else min(1.0, constraint.cap(name))
            parts = parameter.chunk(row_slices(model, name, constraint))
            gains = constraint.gains(name) or (1.0,) * len(parts)
            for gain, part_OI in zip(gains, parts, strict=True):
                part_OI.copy_(gain * cap * _orthogonal(part_OI, generator))


@torch.no_grad()
def initialise_biases(
    model: LipschitzTransformer, settings: InitConfig, counts_V: np.ndarray
) -> None:
    """Set the head bias and the relative-position biases (see ``InitConfig``).

    Args:
        model: Modified in place.
        settings: Which biases.
        counts_V: Occurrences of every token in the training corpus, integer (V,).
    """
    if settings.unigram_bias and model.head.bias is not None:
        smoothed_V = np.asarray(counts_V, dtype=np.float64) + 1
        log_share_V = torch.from_numpy(np.log(smoothed_V / smoothed_V.sum()))
        model.head.bias[: len(log_share_V)].copy_(log_share_V)
    if not settings.offsets:
        return
    for index, layer in enumerate(model.layers):
        table_HT = layer.attention.position_bias
        if table_HT is None:
            continue
        row = settings.offsets[min(index, len(settings.offsets) - 1)]
        content = layer.layer.content_heads
        distance_T = torch.arange(table_HT.shape[1], dtype=table_HT.dtype)
        table_HT[:content] = -settings.content_slope * distance_T
        for head in range(content, layer.layer.heads):
            table_HT[head] = -settings.slope * (distance_T - row[(head - content) % len(row)]).abs()
        table_HT.clamp_(min=settings.floor)


def freeze_unused(model: LipschitzTransformer) -> None:
    """Ask for no gradients in blocks with residual weight 0, which the forward pass leaves out.

    DDP waits for every gradient that is asked for.
    """
    for block in model.layers:
        if block.layer.attn_residual == 0:
            block.attention.requires_grad_(False)
        if block.layer.mlp_residual == 0:
            block.mlp.requires_grad_(False)


def _is_zero(model: nn.Module, name: str, constraint: Constraint) -> bool:
    kind = role(name)
    if kind not in ZERO_ROLES or kind == "head":
        return kind == "head"
    layer = model.config.layer(int(name.split(".")[1]))
    residual = layer.attn_residual if kind == "output" else layer.mlp_residual
    # Without a skip path a zero output would cut the network in two.
    return residual < 1 and constraint.kind_of(name) != "stiefel"


def _orthogonal(like_OI: Tensor, generator: torch.Generator) -> Tensor:
    gaussian_OI = torch.randn(like_OI.shape, generator=generator, dtype=torch.float64)
    u_OM, _, vt_MI = torch.linalg.svd(gaussian_OI, full_matrices=False)
    out_features, in_features = like_OI.shape
    return (out_features / in_features) ** 0.5 * (u_OM @ vt_MI)
