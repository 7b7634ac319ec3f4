"""Our transformers: MLP neurons (or MaxMin pairs) and groups of attention heads."""

# Legend: C width, I inputs of a pruned map, O its outputs, K kept inputs, H heads, D head width.

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.certificate import Certificate
from common.models import LayerConfig, LipschitzTransformer, ModelConfig
from common.norms import spectral_norm
from compress.adapters.base import CertifiableAdapter, Stage
from compress.flops import token_flops
from compress.targets import Target

HALVINGS = 30
"""Bisection steps of ``bounded``: the weights are then at the limit to nine digits."""
RESERVE = 1e-6
"""Relative distance to the limit, for rounding to the stored type."""


class LipschitzAdapter(CertifiableAdapter):
    """A ``LipschitzTransformer``; blocks with residual weight 0 have no effect and no target."""

    def targets(self) -> tuple[Target, ...]:
        """Return heads and MLP of every layer that has an effect."""
        config = self.model.config
        found = []
        for index in range(config.layers):
            layer = config.layer(index)
            if layer.attn_residual:
                found.append(_head_target(config, layer, index))
            if layer.mlp_residual:
                found.append(_mlp_target(config, layer, index))
        return tuple(found)

    def flops(self, batch: Tensor) -> float:
        """Return the operations per token of a forward pass over the whole context.

        Args:
            batch: Not looked at.
        """
        return token_flops(self.model.config)

    def start(self, batch: Tensor) -> Tensor:
        """Return the embedded sequences (B, T, C) of tokens (B, T)."""
        return self.model.embed(batch.to(self.model.embedding.weight.device))

    def stages(self) -> tuple[Stage, ...]:
        """Return attention and MLP blocks in turn."""
        config = self.model.config
        steps = []
        for index, layer in enumerate(self.model.layers):
            shape = config.layer(index)
            heads = (f"layers.{index}.heads",) if shape.attn_residual else ()
            mlp = (f"layers.{index}.mlp",) if shape.mlp_residual else ()
            steps += [Stage(heads, layer.attend_block), Stage(mlp, layer.mlp_block)]
        return tuple(steps)

    def module(self, target: Target) -> Any:
        """Return the output projection of the heads or the down projection."""
        layer = self.model.layers[target.layer]
        return layer.attention.output if target.kind == "heads" else layer.mlp.down

    def cap(self, target: Target, kept_K: Tensor, tau: float) -> float:
        """Return the norm that keeps the product of the block's norms.

        Narrowing an up projection frees norm for the down projection. Where heads go the output
        matrix keeps its own norm: the naive bound knows forms in which nothing is freed. A little
        is withheld for rounding to the stored type.
        """
        module = self.module(target)
        limit = tau * spectral_norm(module.weight)
        if target.kind == "mlp":
            up_FC = self.model.layers[target.layer].mlp.up.weight
            narrow = spectral_norm(up_FC[kept_K])
            if narrow == 0:
                return math.inf
            limit *= spectral_norm(up_FC) / narrow
        rank = min(len(kept_K), module.out_features)
        rounding = torch.finfo(module.weight.dtype).eps / 2 * math.sqrt(rank)
        return limit / (1 + rounding)

    def bounded(self, target: Target, kept_K: Tensor, weight_KO: Tensor, tau: float) -> Tensor:
        """Pull an output matrix back towards its old columns until the value path obeys ``tau``.

        ``cap`` bounds all other forms of the naive attention bound. The old columns alone never
        exceed it, so the bisection ends.
        """
        if target.kind != "heads" or math.isinf(tau):
            return weight_KO
        attention = self.model.layers[target.layer].attention
        old_KO = self.weight(target)[kept_K]
        every = torch.arange(target.inputs, device=kept_K.device)
        limit = tau * (1 - RESERVE) * _value_path(attention, every, self.weight(target))
        low, high = 0.0, 1.0
        if _value_path(attention, kept_K, weight_KO) <= limit:
            return weight_KO
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            mixed_KO = torch.lerp(old_KO, weight_KO, middle)
            is_bounded = _value_path(attention, kept_K, mixed_KO) <= limit
            low, high = (middle, high) if is_bounded else (low, middle)
        return torch.lerp(old_KO, weight_KO, low)

    def amplifications(self, certificate: Certificate) -> dict[str, float]:
        """Return what residual weight and later blocks make of an error, see ``Adapter``."""
        config, gains = self.model.config, {}
        for target in self.targets():
            layer, is_mlp = config.layer(target.layer), target.kind == "mlp"
            gain = layer.mlp_residual if is_mlp else layer.attn_residual * layer.attn_factor
            gains[target.name] = gain * certificate.amplification(2 * target.layer + is_mlp)
        return gains

    @torch.no_grad()
    def cut(self, kept: Mapping[str, Tensor]) -> LipschitzTransformer:
        """Return the transformer with only the kept neurons and heads; see ``Adapter.cut``."""
        config = self.model.config
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        for target in self.targets():
            if target.name not in kept:
                continue
            layer = config.layer(target.layer)
            cutter = _cut_heads if target.kind == "heads" else _cut_mlp
            changes = cutter(state, target, layer, kept[target.name])
            config = config.with_layer(target.layer, **changes)
        return assemble(config, state, self.model)


def assemble(config: ModelConfig, state: dict[str, Tensor], like: Any) -> LipschitzTransformer:
    """Build a transformer from a state, with the type, device and mode of another one.

    Args:
        config: Shapes of the new model.
        state: Every tensor of it.
        like: Model whose device, parameter type, mode and gradient flags are taken over.
    """
    parameter = next(like.parameters())
    # Initial weights are overwritten; drawing them must not disturb the caller's random state.
    with torch.random.fork_rng(devices=[]):
        model = LipschitzTransformer(config)
    model = model.to(device=parameter.device, dtype=parameter.dtype)
    model.load_state_dict(state)
    model.train(like.training)
    flags = {name: old.requires_grad for name, old in like.named_parameters()}
    for name, new in model.named_parameters():
        new.requires_grad_(flags[name])
    return model


def _mlp_target(config: ModelConfig, layer: LayerConfig, index: int) -> Target:
    return Target(
        name=f"layers.{index}.mlp",
        layer=index,
        kind="mlp",
        inputs=layer.mlp_width,
        unit=layer.unit,
        params=layer.unit * (2 * config.width + int(layer.mlp_bias)),
        flops=layer.unit * 4.0 * config.width,
    )


def _head_target(config: ModelConfig, layer: LayerConfig, index: int) -> Target:
    """Heads that share keys and values go together; content heads own more than positional ones."""
    per_matrix = layer.head_dim * config.width
    content = layer.content_heads + layer.content_kv_heads
    matrices = per_matrix * (layer.heads + layer.kv_heads + content)
    biases = layer.heads * config.context if layer.position_bias else 0
    # Each query meets half the context on average: scores of content heads, mixing of all.
    mixing = config.context * layer.head_dim * (layer.heads + layer.content_heads)
    return Target(
        name=f"layers.{index}.heads",
        layer=index,
        kind="heads",
        inputs=layer.heads * layer.head_dim,
        unit=layer.group * layer.head_dim,
        params=(matrices + biases) // layer.kv_heads,
        flops=(2.0 * matrices + mixing) / layer.kv_heads,
    )


def _cut_mlp(
    state: dict[str, Tensor], target: Target, layer: LayerConfig, kept_K: Tensor
) -> dict[str, int]:
    prefix = f"layers.{target.layer}.mlp."
    for name in ("up.weight", "up.bias"):
        if prefix + name in state:
            state[prefix + name] = state[prefix + name][kept_K].contiguous()
    state[prefix + "down.weight"] = state[prefix + "down.weight"][:, kept_K].contiguous()
    return {"mlp_width": len(kept_K)}


def _cut_heads(
    state: dict[str, Tensor], target: Target, layer: LayerConfig, kept_K: Tensor
) -> dict[str, int]:
    """Content groups come first and stay first; only they own rows of queries and keys."""
    prefix = f"layers.{target.layer}.attention."
    kv_heads = kept_K[:: target.unit] // target.unit
    content = kv_heads[kv_heads < layer.content_kv_heads]
    state[prefix + "output.weight"] = state[prefix + "output.weight"][:, kept_K].contiguous()
    owners = {
        "value.weight": (kv_heads, layer.head_dim),
        "query.weight": (content, target.unit),
        "key.weight": (content, layer.head_dim),
        "position_bias": (kv_heads, layer.group),
    }
    for name, (groups, size) in owners.items():
        if prefix + name in state:
            rows = state[prefix + name].unflatten(0, (-1, size))[groups].flatten(0, 1)
            state[prefix + name] = rows.contiguous()
            if not len(groups):
                del state[prefix + name]
    return {
        "heads": len(kv_heads) * layer.group,
        "kv_heads": len(kv_heads),
        "content_heads": len(content) * layer.group,
    }


def _value_path(attention: Any, kept_K: Tensor, weight_KO: Tensor) -> float:
    """Return the smaller of the two forms that bound all value paths of a block together."""
    layer = attention.layer
    dim = layer.head_dim
    v_KDC = attention.value.weight.detach().double().unflatten(0, (-1, dim))
    heads = kept_K[::dim] // dim
    v_HDC = v_KDC[heads // layer.group]
    o_HOD = weight_KO.reshape(len(heads), dim, -1).transpose(1, 2)
    spread = spectral_norm(weight_KO) * float(torch.linalg.matrix_norm(v_HDC, 2).norm())
    return min(spread, float(torch.linalg.matrix_norm(o_HOD @ v_HDC, 2).sum()))
