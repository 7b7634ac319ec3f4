"""Initial weights: orthogonal matrices of RMS->RMS norm 1, zero outputs, unit embedding rows."""

# Legend: O/I out/in features.

import torch
from torch import Tensor, nn

from train.groups import ROW_RMS, Constraint, role

# Zero outputs make every block start as the plain convex shrinkage of its input.
ZERO_ROLES = ("output", "down", "head")


@torch.no_grad()
def initialise(model: nn.Module, constraint: Constraint, seed: int) -> None:
    """Overwrite all parameters of a ``LipschitzTransformer`` or ``LipschitzMLP``.

    Matrices become orthogonal with RMS->RMS norm ``min(1, cap)``; attention outputs, MLP outputs
    and the head (the last matrix of an MLP classifier) zero; embedding rows Gaussian with RMS 1;
    biases and position biases zero. Same seed, same weights, whatever the global random state.

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
        if kind == "vector" or kind in ZERO_ROLES or name == (linears or [""])[-1]:
            parameter.zero_()
        elif kind == "embedding":
            rows_OI = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(rows_OI * ROW_RMS / rows_OI.square().mean(1, keepdim=True).sqrt())
        else:
            gain = 1.0 if constraint.kind == "none" else min(1.0, constraint.cap(name))
            slices = _slices(model, name, constraint)
            parts = parameter.chunk(slices)
            for part in parts:
                part.copy_(gain * _orthogonal(part, generator))


def _slices(model: nn.Module, name: str, constraint: Constraint) -> int:
    if not constraint.per_head or role(name) not in ("query", "key", "value"):
        return 1
    parameter = dict(model.named_parameters())[name]
    return parameter.shape[0] // model.config.layer(int(name.split(".")[1])).head_dim


def _orthogonal(like_OI: Tensor, generator: torch.Generator) -> Tensor:
    gaussian_OI = torch.randn(like_OI.shape, generator=generator, dtype=torch.float64)
    u_OM, _, vt_MI = torch.linalg.svd(gaussian_OI, full_matrices=False)
    out_features, in_features = like_OI.shape
    return (out_features / in_features) ** 0.5 * (u_OM @ vt_MI)
