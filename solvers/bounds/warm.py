"""Multipliers of an old certificate as the start of a new search, after pruning or fine-tuning.

Any multipliers are sound, so the old ones of the neurons and heads that survive are a start that
is nearly optimal; the bounds themselves are proved anew.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.certificate import Certificate
from common.errors import CertificateError, ShapeError
from common.models import LipschitzTransformer

_CONTENT = ("query", "key", "mixed")
_WHOLE = ("skip", "excess")


def warm_multipliers(
    multipliers: Mapping[str, Tensor], kept: Mapping[int, Tensor] | None = None
) -> dict[int, dict[str, Tensor]]:
    """Return the multipliers of surviving neurons and heads, by block.

    Args:
        multipliers: Of a certificate, ``blocks.INDEX.NAME`` to positive vectors.
        kept: Block index to the old positions (int64, in their new order) or a mask (bool) of what
            survives: neurons, or pairs for MaxMin, of an MLP block; query heads of an attention
            block. Blocks without an entry keep everything.

    Returns:
        Block index to local names to float64 vectors, as ``tighten_mlp`` (``theta0``, the logarithm
        of ``lambda``) and ``search_attention`` (``warm``) take them.

    Raises:
        ShapeError: for positions that the old vectors do not have.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, vector_N in multipliers.items():
        _, block, local = name.split(".", 2)
        index = int(block)
        positions = (kept or {}).get(index)
        if positions is not None and not local.endswith(_WHOLE):
            vector_N = _selected(vector_N, positions, name)
        found.setdefault(index, {})[local] = vector_N.detach().double().cpu()
    return found


def _selected(vector_N: Tensor, positions: Tensor, name: str) -> Tensor:
    if positions.dtype == torch.bool:
        positions = positions.nonzero().flatten()
    # Vectors of content heads end before the last head: the others have no such multiplier.
    if name.endswith(_CONTENT):
        positions = positions[positions < len(vector_N)]
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(vector_N):
        raise ShapeError(
            f"kept: positions {int(positions.min())} to {int(positions.max())}, but {name} has "
            f"{len(vector_N)} entries; give the old positions of what survives"
        )
    return vector_N[positions]


def warm_start(
    model: LipschitzTransformer, other: LipschitzTransformer, certificate: Certificate
) -> dict[int, dict[str, Tensor]]:
    """Return the multipliers of another model's certificate for the neurons that this one shares.

    A neuron of a pruned model is a row of the other's up projection, found by its bits.

    Args:
        model: The model to certify.
        other: The one that was pruned or fine-tuned; fine-tuned rows match by position.
        certificate: Of ``other``.

    Raises:
        CertificateError: if the two models have another number of layers.
    """
    if model.config.layers != other.config.layers:
        raise CertificateError(
            f"certify.warm: a model of {other.config.layers} layers, expected "
            f"{model.config.layers}; give the bundle that this one was made from"
        )
    kept = {}
    for index in range(model.config.layers):
        unit = model.config.layer(index).unit
        name = f"layers.{index}.mlp.up.weight"
        mine, theirs = (m.state_dict()[name].detach().cpu() for m in (model, other))
        kept[2 * index + 1] = _shared_rows(mine[::unit], theirs[::unit])
    return warm_multipliers(certificate.multipliers, kept)


def _shared_rows(rows_KC: Tensor, all_NC: Tensor) -> Tensor:
    """Return the position among all rows of every row; the identity where none match."""
    places = {row.numpy().tobytes(): i for i, row in enumerate(all_NC)}
    found = [places.get(row.numpy().tobytes(), -1) for row in rows_KC]
    if min(found, default=-1) < 0:
        return torch.arange(min(len(rows_KC), len(all_NC)))
    return torch.tensor(found)
