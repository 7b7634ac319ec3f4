"""From a prompt and parameters to checked requests: everything wrong with them is found here."""

import logging
import secrets
from collections.abc import Collection
from collections.abc import Sequence as Rows

from common.errors import ConfigError, DataError
from serve.engine.request import Compaction, Request, new_tokens_limit
from serve.engine.sampler import choice_seed
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy

log = logging.getLogger(__name__)


class Admission:
    """Builds the requests of one engine.

    Args:
        vocab_size: Tokens of the model.
        context: Longest sequence, in tokens.
        policy: Cache policy; None or one without a budget never compacts.
        eos_ids: Tokens that end a text unless the parameters ignore them.
    """

    def __init__(
        self, vocab_size: int, context: int, policy: Policy | None, eos_ids: Collection[int] = ()
    ) -> None:
        self.vocab_size, self.context = vocab_size, context
        self.policy, self.eos_ids = policy, frozenset(eos_ids)

    def requests(
        self,
        name: str,
        prompt: Rows[int],
        params: SamplingParams,
        *,
        compress: bool = True,
        cache_salt: str = "",
    ) -> list[Request]:
        """Return one request for each choice; the first has the given seed.

        Args:
            name: Name of all of them together.
            prompt: Token ids.
            params: Sampling parameters; ``max_tokens`` beyond the context ends in "length".
            compress: False keeps these caches whole.
            cache_salt: Only requests with the same salt share cached prefixes.

        Raises:
            DataError: if the prompt is empty, foreign to the vocabulary or leaves no room in the
                context.
            ConfigError: for parameters that name tokens outside the vocabulary, or are none.
        """
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"params={params!r}: expected SamplingParams(...); construct it")
        check_prompt(prompt, self.vocab_size, self.context)
        self._check_tokens("logit_bias", params.logit_bias)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        seed = params.seed
        if seed is None:
            seed = secrets.randbits(63)
            log.debug("request %r draws seed %d", name, seed)
        max_total = new_tokens_limit(len(prompt), self.context, params.max_tokens)
        stop_ids = frozenset(params.stop_token_ids)
        compaction = None
        if compress and params.prompt_logprobs is None:
            compaction = self._compaction(len(prompt), max_total)
        return [
            Request(
                request_id=name,
                prompt=tuple(prompt),
                params=params,
                seed=choice_seed(seed, choice),
                max_total=max_total,
                choice=choice,
                stop_ids=stop_ids if params.ignore_eos else stop_ids | self.eos_ids,
                compaction=compaction,
                prefix_limit=self._prefix_limit(len(prompt), compaction, params, choice),
                cache_salt=cache_salt,
            )
            for choice in range(params.n)
        ]

    def _compaction(self, prompt: int, max_total: int) -> Compaction | None:
        policy = self.policy
        if policy is None or policy.budget is None:
            return None
        compaction = Compaction(
            budget=policy.budget_for(prompt),
            interval=policy.interval,
            in_prompt=policy.compress_prefill,
        )
        # The last token is never fed back: a cache that ends at the trigger is left alone.
        return compaction if max_total - 1 > compaction.trigger else None

    def _prefix_limit(
        self, prompt: int, compaction: Compaction | None, params: SamplingParams, choice: int
    ) -> int | None:
        if params.prompt_logprobs is not None and choice == 0:
            return 0
        if compaction is None or self.policy is None:
            return None
        return self.policy.prefix_limit(
            min(prompt, compaction.trigger) if compaction.in_prompt else prompt
        )

    def _check_tokens(self, name: str, tokens: Collection[int]) -> None:
        for token in tokens:
            if token >= self.vocab_size:
                raise ConfigError(
                    f"{name} has token {token}: expected ids from 0 to {self.vocab_size - 1}; "
                    "correct it"
                )


def check_prompt(prompt: Rows[int], vocab_size: int, context: int) -> None:
    """Raise ``DataError`` unless the prompt is usable with this vocabulary and context."""
    if len(prompt) == 0:
        raise DataError("prompt is empty: expected at least one token; add text")
    if len(prompt) >= context:
        raise DataError(
            f"prompt has {len(prompt)} tokens, the model's context is {context} and must hold at"
            " least one new token; shorten the prompt"
        )
    for token in prompt:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise DataError(
                f"prompt token {token!r}: expected an integer from 0 to {vocab_size - 1}; "
                "encode the text with this model's tokenizer"
            )
