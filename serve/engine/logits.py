"""What a request's own settings do to its logits before a token is chosen."""

# Legend: R rows, V vocabulary.

from collections.abc import Collection
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from serve.engine.sampling_params import SamplingParams


class TokenCounts:
    """How often each token occurred in one sequence, kept where the logits are.

    Args:
        vocab_size: Tokens of the vocabulary.
        device: Device of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.generated_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.is_seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._length = 0

    def follow(self, tokens: Rows[int], prompt_length: int) -> None:
        """Count the tokens that were added to a sequence since the last call.

        Args:
            tokens: Prompt and generated tokens; they only ever grow.
            prompt_length: How many of them are the prompt: seen, but not generated.
        """
        start, self._length = self._length, len(tokens)
        new = torch.tensor(tokens[start:], dtype=torch.int64, device=self.is_seen_V.device)
        self.is_seen_V[new] = True
        generated = new[max(0, prompt_length - start) :]
        self.generated_V.index_add_(0, generated, torch.ones_like(generated, dtype=torch.float64))


def adjust(
    logits_RV: Tensor,
    params: Rows[SamplingParams],
    counts: Rows[TokenCounts | None],
    banned: Rows[Collection[int]],
) -> Tensor:
    """Return the logits after bias, penalties and bans, in this order.

    Args:
        logits_RV: Logits (R, V); not modified.
        params: Parameters of each row.
        counts: Occurrences for each row whose parameters have a penalty.
        banned: Tokens that each row may not choose now.

    Returns:
        ``logits_RV`` itself where no row asks for anything, else float64 (R, V).
    """
    biased = [r for r, p in enumerate(params) if p.logit_bias]
    punished = [r for r, p in enumerate(params) if p.has_penalty]
    barred = [r for r, tokens in enumerate(banned) if tokens]
    if not (biased or punished or barred):
        return logits_RV
    out_RV = logits_RV.to(torch.float64, copy=True)
    for row in biased:
        ids, values = zip(*params[row].logit_bias.items(), strict=True)
        out_RV[row, list(ids)] += out_RV.new_tensor(values)
    if punished:
        states = [state for row in punished if (state := counts[row]) is not None]
        assert len(states) == len(punished), "a row with a penalty needs its counts"
        out_RV[punished] = _punish(out_RV[punished], [params[row] for row in punished], states)
    for row in barred:
        # The smallest finite number: a row of nothing else still has a softmax.
        out_RV[row, list(banned[row])] = torch.finfo(torch.float64).min
    return out_RV


def _punish(logits_RV: Tensor, params: Rows[SamplingParams], counts: Rows[TokenCounts]) -> Tensor:
    def column(name: str) -> Tensor:
        return logits_RV.new_tensor([getattr(p, name) for p in params])[:, None]

    repetition_R1 = column("repetition_penalty")
    is_seen_RV = torch.stack([state.is_seen_V for state in counts])
    generated_RV = torch.stack([state.generated_V for state in counts])
    scaled_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = torch.where(is_seen_RV, scaled_RV, logits_RV)
    logits_RV = logits_RV - column("frequency_penalty") * generated_RV
    return logits_RV - column("presence_penalty") * (generated_RV > 0)
