"""Reads off a model of ``transformers`` what its cache has to know, and proves it on the model.

A few tokens run at several positions, and every attention returns its own values. Then the stream
does not know the positions, so that the queries of one token differ by the rotation alone: the
frequencies and the pairing that are read from the model must explain them, in every layer.
"""

# Legend: P probed positions, A probed tokens, N = P * A, H query heads, K key/value heads,
# D head width, F rotated bands.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoints import first_line
from common.errors import ConfigError
from serve.decoder import LayerSpec
from serve.hugging_face.dispatch import hooked
from serve.rotation import rotate

FIXED_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
POSITIONS = (0, 1, 29, 997)
NUM_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Rotation:
    """Frequencies (F,) of a rotary module, float64 on the CPU, and its factor on cos and sin."""

    inverse_frequency: Tensor
    scale: float


@dataclass(slots=True)
class Call:
    """One attention of the probe: its inputs and options."""

    q_NHD: Tensor
    k_NKD: Tensor
    v_NKD: Tensor
    mask_window: int
    options: dict[str, Any]
    is_causal: bool


@dataclass(slots=True)
class Recorder:
    """Collects the attention calls by layer; returns values in the place of outputs."""

    calls: dict[int, Call] = field(default_factory=dict)
    has_other_mask: bool = False

    def attention(
        self,
        module: Any,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Record a call and return values (N, H, D)."""
        window = 0 if mask is None else int(mask)
        is_causal = options.get("is_causal")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        layer = getattr(module, "layer_idx", len(self.calls))
        self.calls[layer] = Call(q_NHD, k_NKD, v_NKD, window, options, bool(is_causal))
        return v_NKD.repeat_interleave(q_NHD.shape[1] // v_NKD.shape[1], dim=1)

    def mask(self, options: dict[str, Any]) -> Tensor:
        """Return the window of the mask that the library asks for; 0 for a causal one."""
        self.has_other_mask |= bool(options.get("use_vmap"))
        return torch.tensor([[[[options.get("local_size") or 0]]]])


@torch.no_grad()
def probe(model: Any, context: int) -> tuple[tuple[LayerSpec, ...], int]:
    """Return the attention of each layer and the number of logits.

    Args:
        model: Model whose attention is dispatched to ``serve.hugging_face.dispatch``.
        context: Longest sequence, in tokens.

    Raises:
        ConfigError: for what the cache cannot hold: other positions than rotations, frequencies
            that depend on the length, soft-capped logits, sinks, latent keys, recurrent layers.
    """
    kind = model.config.model_type
    _require_fixed_frequencies(model.config)
    positions_P = [p for p in POSITIONS if p < context]
    vocab = model.get_input_embeddings().weight.shape[0]
    tokens_A = torch.linspace(0, vocab - 1, NUM_TOKENS + 2).long()[1:-1]
    positions_N = torch.tensor(positions_P).repeat_interleave(NUM_TOKENS)
    tokens_N, recorder = tokens_A.repeat(len(positions_P)), Recorder()
    try:
        with hooked(recorder.attention, recorder.mask):
            output = model(
                input_ids=tokens_N[None].to(model.device),
                position_ids=positions_N[None].to(model.device),
                use_cache=False,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # such as a layer that cannot have another shape than the others
        raise _refusal(kind, f"it does not run ({first_line(error)})", "such models") from error
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(recorder.calls) != list(range(layers)):
        raise _refusal(
            kind,
            f"{len(recorder.calls)} of {layers} layers attend through the library's registry",
            "recurrent and convolutional layers, and classes with attention of their own,",
        )
    if recorder.has_other_mask:
        raise _refusal(kind, "its mask is not causal alone", "such masks")
    rotations = find_rotations(model)
    specs = [
        _layer_spec(kind, layer, recorder.calls[layer], positions_N, rotations)
        for layer in range(layers)
    ]
    return tuple(specs), output.logits.shape[-1]


def find_rotations(model: nn.Module) -> list[Rotation]:
    """Return the different rotations that a model's rotary modules hold."""
    found: list[Rotation] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name:
                continue
            scale = getattr(module, name.removesuffix("inv_freq") + "attention_scaling", 1.0)
            rotation = Rotation(buffer.detach().double().cpu(), float(scale))
            if not any(_same(rotation, other) for other in found):
                found.append(rotation)
    return found


def _same(first: Rotation, second: Rotation) -> bool:
    return first.scale == second.scale and torch.equal(
        first.inverse_frequency, second.inverse_frequency
    )


def _layer_spec(
    kind: str, layer: int, call: Call, positions_N: Tensor, rotations: Sequence[Rotation]
) -> LayerSpec:
    _require_plain(kind, layer, call)
    window = call.options.get("sliding_window") or None
    if (window or 0) != call.mask_window:
        raise _refusal(
            kind,
            f"layer {layer} masks {call.mask_window or 'all'} tokens, attends to {window or 'all'}",
            "chunked attention",
        )
    none = Rotation(torch.zeros(0, dtype=torch.float64), 1.0)
    for rotation in (*rotations, none):
        for interleaved in (False, True):
            spec = LayerSpec(
                heads=call.q_NHD.shape[1],
                kv_heads=call.k_NKD.shape[1],
                head_dim=call.q_NHD.shape[2],
                content_heads=call.q_NHD.shape[1],
                scale=float(call.options["scaling"]),
                inverse_frequency=rotation.inverse_frequency,
                interleaved=interleaved,
                rope_scale=rotation.scale,
                sliding_window=window,
            )
            if _explains(spec, call, positions_N):
                return spec
    raise _refusal(
        kind,
        f"layer {layer}: queries at other positions are not rotations of one another by the "
        "frequencies of its rotary module",
        "other encodings of positions",
    )


def _require_plain(kind: str, layer: int, call: Call) -> None:
    shapes = [x.shape[2] for x in (call.q_NHD, call.k_NKD, call.v_NKD)]
    if len(set(shapes)) > 1:
        raise _refusal(kind, f"layer {layer}: keys and values of {shapes} widths", "latent keys")
    if call.options.get("softcap") is not None:
        raise _refusal(kind, f"layer {layer} caps its attention logits", "soft caps")
    if call.options.get("s_aux") is not None:
        raise _refusal(kind, f"layer {layer} has attention sinks", "sinks")
    if not call.is_causal:
        raise _refusal(kind, f"layer {layer} is not causal", "bidirectional layers")
    if call.options.get("position_bias") is not None or call.options.get("scaling") is None:
        raise _refusal(kind, f"layer {layer} has a bias, or no stated scale", "such layers")


def _explains(spec: LayerSpec, call: Call, positions_N: Tensor) -> bool:
    """Return whether the rotation turns position 0 into all others, and values do not move."""
    if 2 * spec.bands > spec.head_dim:
        return False
    first = slice(NUM_TOKENS)
    repeats = (len(positions_N) // NUM_TOKENS, 1, 1)
    tolerance = max(1e-3, 8 * torch.finfo(call.q_NHD.dtype).eps)
    for x_NHD in (call.q_NHD, call.k_NKD):
        x_NHD = x_NHD.double().cpu()
        expected_NHD = rotate(x_NHD[first].repeat(repeats), positions_N, spec)
        error = (x_NHD - expected_NHD).abs().amax()
        if not error <= tolerance * expected_NHD.abs().amax():
            return False
    v_NKD = call.v_NKD.double().cpu()
    error = (v_NKD - v_NKD[first].repeat(repeats)).abs().amax()
    return bool(error <= tolerance * v_NKD.abs().amax())


def _require_fixed_frequencies(config: Any) -> None:
    """Refuse rotations whose frequencies depend on the length of the text."""
    found = _rope_types(getattr(config.get_text_config(), "rope_parameters", None))
    found |= _rope_types(getattr(config.get_text_config(), "rope_scaling", None))
    for name in sorted(found):
        if name not in FIXED_TYPES:
            raise _refusal(
                config.model_type,
                f"rope_type {name!r} changes frequencies with the length",
                f"other types than {', '.join(FIXED_TYPES)}",
            )


def _rope_types(settings: Any) -> set[str]:
    if not isinstance(settings, dict):
        return set()
    own = settings.get("rope_type", settings.get("type"))
    nested = set().union(*(_rope_types(value) for value in settings.values()))
    return nested | ({own} if isinstance(own, str) else set())


def _refusal(kind: str, reason: str, unsupported: str) -> ConfigError:
    return ConfigError(
        f"{kind}: {reason}; {unsupported} are not supported by the cache: choose another model"
    )
