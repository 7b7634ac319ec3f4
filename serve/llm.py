"""Offline generation: ``LLM(path).generate(prompts, params)`` over the paged engine."""

import copy
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.bundle import Bundle
from common.errors import BundleError, ConfigError
from common.models import LipschitzTransformer
from common.tokenizer import Tokenizer
from serve.decoder import Decoder
from serve.engine import request as engine_request
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.request import FinishReason
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy, policy_by_name
from serve.kv.calibrate import layer_stats
from serve.kv.eviction import EvictionLedger
from serve.loading import Served, load_served

log = logging.getLogger(__name__)

Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        text: New text; ends before a stop string or stop token.
        token_ids: New tokens, a stop token included.
        finish_reason: "stop", "length", "abort" or "error".
        prompt_token_ids: The prompt as tokens.
        seed: Seed in force; giving it again repeats the text.
        kv_kept_fraction: Mean over the new tokens of cached / seen tokens; 1 for a full cache.
        logprobs: Per new token, natural log-probabilities by token id, the chosen one first.
        certified_deviation: Per new token, a bound on how far its logits are from those of the
            full cache on the same tokens: RMS over the vocabulary, largest up to that token. None
            without a certificate.
        certified_top1: Per new token, whether the full cache provably has the same most probable
            token. None without a certificate.
        error: What went wrong, for ``finish_reason`` "error".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    seed: int
    kv_kept_fraction: float = 1.0
    logprobs: list[dict[int, float]] | None = None
    certified_deviation: list[float] | None = None
    certified_top1: list[bool] | None = None
    error: str | None = None


class LLM:
    """A bundle, or a checkpoint of ``transformers``, ready to generate.

    Args:
        path: Bundle or checkpoint, its directory, or the name of a shipped model.
        kv: Cache policy, or the name of one with its default options; None keeps every token.
        engine: Engine settings.
        device: Where the model runs; ignored for a loaded bundle.

    Raises:
        BundleError: for a damaged bundle, a classifier, or missing calibration statistics.
        CertificateError: for a void certificate, unless ``engine.certificate`` is false.
        ConfigError: for an unknown policy.
    """

    def __init__(
        self,
        path: str | Path | Served,
        *,
        kv: Policy | str | None = None,
        engine: EngineConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.engine_config = engine or EngineConfig()
        if isinstance(path, str | Path):
            path = load_served(path, device=device, dtype=self.engine_config.dtype)
        self.bundle = path
        self.policy = policy_by_name(kv) if isinstance(kv, str) else kv
        self.tokenizer = require_tokenizer(self.bundle)
        self.model = cast_model(self.bundle.model, self.engine_config.dtype)
        self.core = EngineCore(
            self.model,
            self.engine_config,
            self.policy,
            policy_stats(self.bundle, self.policy),
            make_ledger(self.bundle, self.model, self.engine_config),
            () if isinstance(path, Bundle) else path.stop_token_ids,
        )

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt, many at a time.

        Args:
            prompts: Texts or token ids; one text alone counts as a list of one.
            params: For all prompts, or one for each; the defaults when absent. ``max_tokens``
                beyond the context ends with finish reason "length".
            progress: Show a progress bar; by default only on a terminal.

        Returns:
            One output per prompt, in order.

        Raises:
            DataError: for a prompt that is empty, too long, foreign to the tokenizer or too large
                for the pool; then nothing is generated.
            ConfigError: if the number of parameters differs from that of the prompts.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(params, Sequence):
            settings = list(params)
        else:
            settings = [params or SamplingParams()] * len(texts)
        if len(settings) != len(texts):
            raise ConfigError(
                f"{len(settings)} sampling parameters for {len(texts)} prompts: "
                "expected one for each, or one for all"
            )
        live: list[engine_request.Sequence] = []
        try:
            for text, one in zip(texts, settings, strict=True):
                live.append(self.core.add(self.encode(text), one))
            self._run(live, progress)
        finally:
            for sequence in live:
                if sequence.finish_reason is None:
                    self.core.abort(sequence.request.request_id)
        return [self._output(sequence) for sequence in live]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; ids stay as they are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt).tolist()
        return [token.item() if hasattr(token, "item") else token for token in prompt]

    def _run(self, live: list[engine_request.Sequence], progress: bool | None) -> None:
        total = sum(_work(sequence, whole=True) for sequence in live)
        with progress_bar("generate", total, progress) as advance:
            while self.core.has_work:
                for sequence in self.core.step():
                    self._check_stop(sequence)
                advance(sum(_work(sequence) for sequence in live))

    def _check_stop(self, sequence: engine_request.Sequence) -> None:
        if sequence.finish_reason is None and sequence.request.params.stop:
            text = self.tokenizer.decode(sequence.output)
            if any(stop in text for stop in sequence.request.params.stop):
                self.core.abort(sequence.request.request_id, "stop")

    def _output(self, sequence: engine_request.Sequence) -> RequestOutput:
        params, tokens = sequence.request.params, sequence.output
        ends_in_stop_token = bool(tokens) and tokens[-1] in sequence.request.stop_ids
        text = self.tokenizer.decode(tokens[:-1] if ends_in_stop_token else tokens)
        cuts = [text.index(stop) for stop in params.stop if stop in text]
        reason = sequence.finish_reason or "abort"
        is_tracked = self.core.ledger is not None
        return RequestOutput(
            text=text[: min(cuts)] if cuts else text,
            token_ids=tokens,
            finish_reason="stop" if cuts and reason == "length" else reason,
            prompt_token_ids=list(sequence.request.prompt),
            seed=sequence.request.seed,
            kv_kept_fraction=sequence.kept_fraction,
            logprobs=sequence.logprobs if params.logprobs is not None else None,
            certified_deviation=sequence.deviations[: len(tokens)] if is_tracked else None,
            certified_top1=sequence.keeps_top1[: len(tokens)] if is_tracked else None,
            error=sequence.error,
        )


def _work(sequence: engine_request.Sequence, *, whole: bool = False) -> int:
    """Return the tokens generated; a request that stopped early counts as complete."""
    if whole or sequence.finish_reason is not None:
        return sequence.request.max_total - len(sequence.request.prompt)
    return len(sequence.output)


def require_tokenizer(bundle: Served) -> Tokenizer:
    """Return the tokenizer of a language model's bundle.

    Raises:
        BundleError: if the bundle is a classifier or lacks a tokenizer.
    """
    is_language = isinstance(bundle.model, LipschitzTransformer | Decoder)
    if not is_language or bundle.tokenizer is None:
        raise BundleError(
            f"{bundle.path}: a {bundle.kind} cannot generate text; expected a transformer with a "
            "tokenizer"
        )
    return bundle.tokenizer


def cast_model(
    model: LipschitzTransformer | Decoder, dtype: str | None
) -> LipschitzTransformer | Decoder:
    """Return the model in ``dtype``; a copy when that differs from its own.

    Raises:
        ConfigError: for a loaded checkpoint of another dtype.
    """
    target = None if dtype is None else getattr(torch, dtype)
    if isinstance(model, Decoder):
        if target not in (None, model.dtype):
            raise ConfigError(
                f"engine.dtype={dtype}: the checkpoint is loaded as {model.dtype}; load it in that "
                "type, or give its folder"
            )
        return model
    if target is None or model.embedding.weight.dtype == target:
        return model
    return copy.deepcopy(model).to(target)


def policy_stats(bundle: Served, policy: Policy | None) -> list[Any] | None:
    """Return the statistics of each layer that the policy needs, None if it needs none.

    Raises:
        BundleError: if they are missing or of another model.
    """
    if policy is None or not policy.needs_stats or policy.budget is None:
        return None
    return layer_stats(bundle.kv_stats, bundle.model)


def make_ledger(
    bundle: Served, model: LipschitzTransformer | Decoder, config: EngineConfig
) -> EvictionLedger | None:
    """Return the ledger that bounds eviction error, None without certificate.

    Weights rounded to a smaller dtype are not those that were certified: then there is none.

    Raises:
        CertificateError: for a void certificate.
    """
    if not config.certificate or bundle.certificate is None or isinstance(model, Decoder):
        return None
    stored, served = bundle.model.embedding.weight.dtype, model.embedding.weight.dtype
    if torch.promote_types(stored, served) != served:
        log.warning("engine.dtype=%s rounds the certified weights: no certified deviation", served)
        return None
    return EvictionLedger(model, bundle.certificate)


@contextmanager
def progress_bar(label: str, total: int, show: bool | None = None) -> Iterator[Any]:
    """Show a progress bar on a terminal.

    Args:
        label: Name of the work.
        total: Units of work.
        show: True or False to override the terminal check.

    Yields:
        ``advance(done)``, to be called with the units done so far.
    """
    if not (sys.stdout.isatty() if show is None else show):
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
