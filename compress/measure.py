"""What pruning does on text: bits per byte, divergence from the dense model.

Everything here is a measurement; bounds are in ``deviation``, times in ``timing``.
"""

# Legend: B sequences, T tokens, C width, V vocabulary.

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_TOKENS = 8192
KEPT_NUMBERS = 1 << 25
"""Largest number of dense logits that is kept between models: 128 MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How a model does on text, and how far it is from the dense one.

    Attributes:
        bits_per_byte: Cross-entropy of the next token, bits per byte of text.
        kl_nats: KL divergence of its next token from the dense model's, mean, nats per token.
        deviation: Largest RMS change of a token's logits over the vocabulary.
        top1_agreement: Share of positions whose most likely token is the dense model's.
    """

    bits_per_byte: float
    kl_nats: float
    deviation: float
    top1_agreement: float


class Reference:
    """A dense model on a text, for comparisons: each pruned model costs one pass.

    The dense logits are kept where they fit, else they are computed again.

    Args:
        dense: Transformer before pruning.
        windows_BT: Token ids, inputs and the final target (sequences, length + 1).
        bytes_per_token: Of the corpus.
    """

    def __init__(self, dense: Any, windows_BT: Tensor, bytes_per_token: float):
        self._dense = dense
        self._device = next(dense.parameters()).device
        self._parts = [part.to(self._device) for part in _batches(windows_BT)]
        targets = windows_BT.shape[0] * (windows_BT.shape[1] - 1)
        self._targets, self._bytes = targets, targets * bytes_per_token
        is_kept = targets * dense.config.vocab_size <= KEPT_NUMBERS
        self._kept = [self._logits(dense, part) for part in self._parts] if is_kept else None

    @torch.no_grad()
    def quality(self, model: Any) -> Quality:
        """Return how ``model`` does; against itself exactly no divergence and no deviation.

        Args:
            model: Transformer of the same vocabulary, on the same device.
        """
        nats = divergence = deviation = 0.0
        same = 0
        for index, part in enumerate(self._parts):
            old_BTV = self._kept[index] if self._kept else self._logits(self._dense, part)
            new_BTV = self._logits(model, part)
            new_log_BTV = new_BTV.log_softmax(-1)
            nats += _nats(new_log_BTV, part)
            divergence += _divergence(old_BTV.log_softmax(-1), new_log_BTV)
            deviation = max(deviation, float((old_BTV - new_BTV).square().mean(-1).max()) ** 0.5)
            same += int((old_BTV.argmax(-1) == new_BTV.argmax(-1)).sum())
        return Quality(
            bits_per_byte=nats / math.log(2) / self._bytes,
            kl_nats=max(0.0, divergence / self._targets),
            deviation=deviation,
            top1_agreement=same / self._targets,
        )

    @torch.no_grad()
    def _logits(self, model: Any, part: Tensor) -> Tensor:
        return logits_of(model, part[:, :-1])


@torch.no_grad()
def bits_per_byte(model: Any, windows_BT: Tensor, bytes_per_token: float) -> float:
    """Return the mean cross-entropy of next tokens in bits per byte of text.

    Args:
        model: Transformer.
        windows_BT: Token ids, inputs and the final target (sequences, length + 1).
        bytes_per_token: Of the corpus.
    """
    device = next(model.parameters()).device
    total = 0.0
    for part in _batches(windows_BT):
        part = part.to(device)
        total += _nats(logits_of(model, part[:, :-1]).log_softmax(-1), part)
    targets = windows_BT.shape[0] * (windows_BT.shape[1] - 1)
    return total / targets / math.log(2) / bytes_per_token


def logits_of(model: Any, tokens_BT: Tensor) -> Tensor:
    """Return float32 logits (B, T, V) of our transformers and of those of ``transformers``."""
    output = model(tokens_BT)
    return getattr(output, "logits", output).float()


def _nats(log_BTV: Tensor, windows_BT: Tensor) -> float:
    """Return the sum of the next tokens' negative log-probabilities."""
    targets = windows_BT[:, 1:].flatten()
    return float(F.nll_loss(log_BTV.flatten(0, 1), targets, reduction="sum"))


def _divergence(old_log_BTV: Tensor, new_log_BTV: Tensor) -> float:
    """Return the sum over positions of KL(old || new), nats."""
    gap_BTV = old_log_BTV - new_log_BTV
    return float((old_log_BTV.exp() * gap_BTV).sum(dtype=torch.float64))


def _batches(tokens_BT: Tensor) -> tuple[Tensor, ...]:
    return tokens_BT.split(max(1, BATCH_TOKENS // tokens_BT.shape[1]))
