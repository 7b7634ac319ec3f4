"""What a change of a transformer may touch so that its effect can be certified."""

# Legend: K kept inputs.

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import CertificateError
from compress.adapters import LipschitzAdapter
from compress.targets import Target, block_indices

REWEIGHTED = ("attention.output.weight", "mlp.down.weight", "mlp.down.bias")
"""Tensors of a layer that may differ by more than missing rows and columns."""


def kept_inputs(dense: Any, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the kept inputs of every block that has an effect, all of them where none is named.

    Args:
        dense: Transformer before the change.
        kept: Kept input indices (K) per target name.
    """
    targets = LipschitzAdapter(dense).targets()
    device = dense.head.weight.device
    return {t.name: kept.get(t.name, torch.arange(t.inputs)).to(device) for t in targets}


def require_cut(dense: Any, changed: Any, inputs: Mapping[str, Tensor]) -> None:
    """Refuse a pair that differs in more than removed components and re-weighted outputs.

    So the kept heads have the same softmax weights and the kept neurons the same activations, at
    the same input; the bounds on changes rest on that.

    Args:
        dense: Transformer before the change.
        changed: After it.
        inputs: From ``kept_inputs``.

    Raises:
        CertificateError: naming what differs.
    """
    remedy = "so the change cannot be certified; prune with compress.prune"
    adapter = LipschitzAdapter(dense)
    for target in adapter.targets():
        if not _is_whole(inputs[target.name], target):
            raise CertificateError(
                f"{target.name}: kept inputs are not whole components in ascending order, {remedy}"
            )
    expected = adapter.cut(inputs)
    if changed.config != expected.config:
        raise CertificateError(
            f"changed model: its configuration is not that of the kept components, {remedy}"
        )
    own = changed.state_dict()
    for name, tensor in expected.state_dict().items():
        if not name.endswith(REWEIGHTED) and not torch.equal(own[name].to(tensor.device), tensor):
            raise CertificateError(
                f"changed model: {name} is not what stays of the dense one, {remedy}"
            )


def _is_whole(kept_K: Tensor, target: Target) -> bool:
    whole_K = block_indices(kept_K[:: target.unit] // target.unit, target.unit)
    return len(kept_K) > 0 and torch.equal(kept_K, whole_K) and bool((kept_K.diff() > 0).all())
