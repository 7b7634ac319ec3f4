"""Offline generation: ``LLM(path).generate(prompts, params)`` over the paged engine."""

import copy
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from common.bundle import Bundle
from common.errors import BundleError, ConfigError, DataError
from common.models import LipschitzTransformer
from common.tokenizer import Tokenizer
from serve.decoder import Decoder, LipschitzDecoder, as_decoder
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.request import Sequence
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy, policy_by_name
from serve.kv.calibrate import layer_stats
from serve.kv.eviction import EvictionLedger
from serve.loading import Served, load_served
from serve.outputs import Reader, RequestOutput, Writer

log = logging.getLogger(__name__)

Prompt = str | Rows[int]


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
        decoder = as_decoder(self.model)
        self.core = EngineCore(
            decoder,
            self.engine_config,
            self.policy,
            policy_stats(self.bundle, self.policy),
            make_ledger(self.bundle, decoder, self.engine_config),
            end_tokens(self.bundle),
        )

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Rows[Prompt],
        params: SamplingParams | Rows[SamplingParams] | None = None,
        *,
        kv_compression: bool = True,
        cache_salt: str = "",
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt, many at a time.

        Args:
            prompts: Texts or token ids; one text alone counts as a list of one.
            params: For all prompts, or one for each; the defaults when absent. ``max_tokens``
                beyond the context ends with finish reason "length".
            kv_compression: False keeps these caches whole.
            cache_salt: Only requests with the same salt share cached prefixes.
            progress: Show a progress bar; by default only on a terminal.

        Returns:
            One output per prompt, in order.

        Raises:
            DataError: for no prompt, or one that is empty, too long, foreign to the tokenizer or
                too large for the pool; then nothing is generated.
            ConfigError: if the number of parameters differs from that of the prompts.
        """
        given = _plain(prompts)
        is_list = isinstance(given, Iterable) and not isinstance(given, str)
        texts: list[Any] = list(given) if is_list else [given]
        if not texts:
            raise DataError("there is no prompt: expected at least one; add it")
        if isinstance(params, Rows):
            settings = list(params)
        else:
            settings = [params or SamplingParams()] * len(texts)
        if len(settings) != len(texts):
            raise ConfigError(
                f"{len(settings)} sampling parameters for {len(texts)} prompts: "
                "expected one for each, or one for all"
            )
        prepared = [
            self.core.prepare(
                self.encode(text), one, compress=kv_compression, cache_salt=cache_salt
            )
            for text, one in zip(texts, settings, strict=True)
        ]
        sequences = list(itertools.chain.from_iterable(prepared))
        try:
            for choices in prepared:
                self.core.submit(choices)
            pieces = self._run(prepared, progress)
        finally:
            for sequence in sequences:
                self.core.finish(sequence, "abort")
        return [RequestOutput.joined(part) for part in pieces]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; ids stay as they are.

        Raises:
            DataError: for text that the tokenizer does not know, or what is neither text nor ids.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt).tolist()
        plain = _plain(prompt)
        if isinstance(plain, bytes) or not isinstance(plain, Iterable):
            raise DataError(
                f"prompt {plain!r}: expected text or a list of token ids; give a list of prompts, "
                "each of them one or the other"
            )
        return [_plain(token) for token in plain]

    def reader(self, sequence: Sequence) -> Reader:
        """Return what reads the news of one of the engine's sequences."""
        return Reader(sequence, is_proved=self.core.ledger is not None)

    def writer(self, sequences: Rows[Sequence]) -> Writer:
        """Return what writes the text of all choices of a prompt."""
        return Writer(self.tokenizer, [sequence.request for sequence in sequences])

    def _run(
        self, prepared: list[list[Sequence]], progress: bool | None
    ) -> list[list[RequestOutput]]:
        """Run to the end and return the pieces of each prompt's output."""
        pieces: list[list[RequestOutput]] = [[] for _ in prepared]
        writers = [self.writer(choices) for choices in prepared]
        readers = {
            sequence: (self.reader(sequence), index)
            for index, choices in enumerate(prepared)
            for sequence in choices
        }
        left = {sequence: _left(sequence) for sequence in readers}
        done = 0
        with progress_bar("generate", sum(left.values()), progress) as advance:
            while self.core.has_work:
                for sequence in self.core.step():
                    if sequence not in readers:
                        continue
                    reader, index = readers[sequence]
                    piece = writers[index].write(reader.read())
                    if piece is not None:
                        pieces[index].append(piece)
                        self._stop(sequence, piece)
                    done += left[sequence] - _left(sequence)
                    left[sequence] = _left(sequence)
                advance(done)
        return pieces

    def _stop(self, sequence: Sequence, piece: RequestOutput) -> None:
        """Tell the engine of a stop string, which only the text shows."""
        if piece.finish_reason is not None:
            self.core.finish(sequence, piece.finish_reason)


def _plain(value: Any) -> Any:
    """Return the numbers of an array or tensor as Python has them; other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def _left(sequence: Sequence) -> int:
    """Return the tokens to come at most."""
    is_finished = sequence.finish_reason is not None
    return 0 if is_finished else sequence.request.max_total - len(sequence.tokens)


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
    # A checkpoint's tokenizer is not saved by us; all else is as the protocol says.
    return cast(Tokenizer, bundle.tokenizer)


def end_tokens(served: Served) -> tuple[int, ...]:
    """Return the tokens that end a text of this model."""
    if not isinstance(served, Bundle):
        return tuple(served.stop_token_ids)
    end = require_tokenizer(served).document_end
    return () if end is None else (end,)


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
    stats = bundle.kv_stats
    try:
        return layer_stats(stats, bundle.model)
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error}") from None


def make_ledger(
    bundle: Served, model: LipschitzTransformer | Decoder, config: EngineConfig
) -> EvictionLedger | None:
    """Return the ledger that bounds eviction error, None without certificate.

    Weights rounded to a smaller dtype are not those that were certified: then there is none.

    Raises:
        CertificateError: for a void certificate.
    """
    if not isinstance(bundle, Bundle) or not config.certificate or bundle.certificate is None:
        return None
    decoder = as_decoder(model)
    assert isinstance(decoder, LipschitzDecoder), "the model of a bundle is ours"
    stored, served = bundle.model.embedding.weight.dtype, decoder.dtype
    if torch.promote_types(stored, served) != served:
        log.warning("engine.dtype=%s rounds the certified weights: no certified deviation", served)
        return None
    return EvictionLedger(decoder, bundle.certificate)


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
