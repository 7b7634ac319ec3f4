"""Command ``generate``: continue prompts under the full and the compressed cache, and compare."""

# Legend: N windows, T tokens.

import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from common.config import build, one_of
from common.device import resolve_device
from common.errors import BackendError, BundleError, DataError
from common.files import write_json
from common.runs import Outcome, Run, hydra_command
from common.tracking import LoggerConfig, record
from serve.calibrate_app import calibrate
from serve.engine.config import EngineConfig
from serve.engine.sampling_params import SamplingParams
from serve.evaluate import KvScore, frontier, with_budget
from serve.kv import POLICIES, FullPolicy, Policy
from serve.llm import LLM, policy_stats, progress_bar
from serve.loading import Served, load_served
from serve.outputs import RequestOutput
from serve.settings import GenerateConfig
from serve.texts import Text, served_text

log = logging.getLogger(__name__)

# Where there is neither a prompt nor a text that the model can read.
NO_TEXT_PROMPT = "\n"
FOREIGN_TEXT = (
    "data=stdlib is program code, with characters that this model does not know; give a text of "
    "its own kind with data=local data.path=FILE"
)


def generate(cfg: DictConfig, run: Run) -> Outcome:
    """Continue prompts with the bundle that ``cfg.bundle`` names.

    Args:
        cfg: Keys ``bundle``, ``kv_stats``, ``data``, ``kv``, ``sampling``, ``engine``,
            ``generate``, ``logger``, ``device``.
        run: Where to write ``samples.json`` (texts; per new token of the compressed cache the
            certified deviation and whether it is proved; what ``sampling`` asks for beside) and
            ``kv_frontier.json``.

    Returns:
        The ``serve/*`` metrics, measured on held-out text; artifacts ``samples`` and
        ``kv_frontier``. The objective of sweeps is the KL divergence from the full cache.

    Raises:
        LipError: for anything the user can correct.
    """
    settings: GenerateConfig = build(cfg.generate)
    for name in settings.policies:
        one_of("generate.policies", name, POLICIES)
    policy: Policy = build(cfg.kv)
    params: SamplingParams = build(cfg.sampling)
    engine: EngineConfig = build(cfg.engine)
    bundle = load_served(
        cfg.bundle, device=resolve_device(cfg.device), dtype=engine.dtype, stats=cfg.get("kv_stats")
    )
    compressed = LLM(bundle, kv=policy, engine=engine)
    corpus = _corpus(cfg, bundle, settings)
    prompts = _prompts(settings, compressed, corpus)
    outputs, seconds = _timed(compressed, prompts, params)
    references, full_seconds = outputs, seconds
    if policy.budget is not None:
        references, full_seconds = _timed(LLM(bundle, engine=engine), prompts, params)
    scores = _compare(settings, compressed, corpus, engine)
    samples = [_sample(*row) for row in zip(prompts, references, outputs, strict=True)]
    _show(samples, policy)
    paths = {"samples": run.directory / "samples.json"}
    write_json(paths["samples"], samples)
    if scores:
        paths["kv_frontier"] = run.directory / "kv_frontier.json"
        write_json(paths["kv_frontier"], [score.to_dict() for score in scores])
    metrics = _speed(outputs, seconds, references, full_seconds)
    metrics |= _quality(scores[0]) if scores else _kept(outputs)
    _track(build(cfg.logger), metrics, run)
    return Outcome(metrics=metrics, artifacts=paths, objective=metrics.get("serve/kl_vs_full"))


def _track(config: LoggerConfig, metrics: dict[str, float], run: Run) -> None:
    # One row of CSV alone would only repeat summary.json.
    if "wandb" in config.kinds:
        record(config, run, {0: metrics})


def _corpus(cfg: DictConfig, bundle: Served, settings: GenerateConfig) -> Text | None:
    """Prepare held-out text; optional where the user brought the prompts."""
    has_prompts = bool(settings.prompts or settings.prompt_file)
    if has_prompts and not settings.eval_windows:
        return None
    try:
        return served_text(build(cfg.data), bundle)
    except DataError as error:
        # The default text is program code: a model of other characters cannot read it.
        is_foreign = cfg.data.source == "stdlib" and getattr(bundle.tokenizer, "kind", "") == "char"
        if not (has_prompts or is_foreign):
            raise
        reason = error if not is_foreign else FOREIGN_TEXT
        log.warning("the caches are not compared: %s", reason)
        return None


def _prompts(settings: GenerateConfig, llm: LLM, corpus: Text | None) -> list[str]:
    if settings.prompts:
        return list(settings.prompts)
    if settings.prompt_file is not None:
        return _read_prompts(Path(settings.prompt_file).expanduser())
    if corpus is None:
        return [NO_TEXT_PROMPT]
    length = min(settings.prompt_tokens, max(1, llm.core.decoder.context // 2))
    windows_NT = corpus.windows("val", length, settings.num_prompts)[:, :-1]
    texts = [llm.tokenizer.decode(row_T.tolist()) for row_T in windows_NT]
    # A window may begin inside a character: what is left of it is no text.
    return [text.lstrip("\ufffd").rstrip("\ufffd") or " " for text in texts]


def _read_prompts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"generate.prompt_file={path}: {reason}; give a UTF-8 file with one prompt per line"
        ) from None
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DataError(f"generate.prompt_file={path}: no prompt in it; write one per line")
    return prompts


def _timed(
    llm: LLM, prompts: list[str], params: SamplingParams
) -> tuple[list[RequestOutput], float]:
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    completions = [completion for output in outputs for completion in output.outputs]
    errors = [completion.error for completion in completions if completion.error is not None]
    if len(errors) == len(completions):
        raise BackendError(f"every prompt ended with an error, the first with: {errors[0]}")
    for error in errors:
        log.error("a prompt ended with an error: %s", error)
    return outputs, seconds


def _sample(prompt: str, full: RequestOutput, compressed: RequestOutput) -> dict[str, Any]:
    sample = {
        "prompt": prompt,
        "full": full.text,
        "compressed": compressed.text,
        "certified_deviation": compressed.certified_deviation,
        "certified_top1": compressed.certified_top1,
    }
    asked = {
        "choices": [choice.text for choice in compressed.outputs[1:]],
        "logprobs": compressed.logprobs,
        "prompt_logprobs": compressed.prompt_logprobs,
    }
    return sample | {name: value for name, value in asked.items() if value}


def _compare(
    settings: GenerateConfig, llm: LLM, corpus: Text | None, engine: EngineConfig
) -> list[KvScore]:
    """Score the configured policy first, then the full cache and the frontier."""
    if corpus is None or not settings.eval_windows:
        return []
    length = min(settings.eval_tokens, llm.core.decoder.context)
    tokens_NT = corpus.windows("val", length, settings.eval_windows)[:, :-1]
    others = _frontier_policies(settings, llm, tokens_NT)
    policies = list(dict.fromkeys([llm.policy or FullPolicy(), *others]))
    stats = next((s for p in policies if (s := policy_stats(llm.bundle, p)) is not None), None)
    ledger = llm.core.ledger
    with progress_bar("compare", len(policies)) as advance:
        return frontier(
            llm.core.decoder,
            tokens_NT,
            policies,
            stats=stats,
            ledger=ledger,
            config=engine,
            on_point=advance,
        )


def _frontier_policies(settings: GenerateConfig, llm: LLM, tokens_NT: Tensor) -> list[Policy]:
    policies: list[Policy] = [FullPolicy()] if settings.frontier else []
    for name in settings.policies:
        kind = POLICIES[name]
        if kind is FullPolicy:
            continue
        like = llm.policy if isinstance(llm.policy, kind) else kind()
        try:
            policy_stats(llm.bundle, like)
        except BundleError as error:
            log.warning("policy %s is left out of the comparison: %s", name, error)
            continue
        budgets = {max(1, round(share * tokens_NT.shape[1])) for share in settings.frontier}
        policies += [with_budget(like, budget) for budget in sorted(budgets)]
    return policies


def _speed(
    outputs: list[RequestOutput],
    seconds: float,
    references: list[RequestOutput],
    full_seconds: float,
) -> dict[str, float]:
    count = sum(len(output.token_ids) for output in outputs)
    return {
        "serve/tokens_per_s": count / seconds,
        "serve/tokens_per_s_full": sum(len(r.token_ids) for r in references) / full_seconds,
        "serve/requests": float(len(outputs)),
        "serve/generated_tokens": float(count),
        "serve/seconds": seconds,
    }


def _kept(outputs: list[RequestOutput]) -> dict[str, float]:
    metrics = {"serve/kv_kept_fraction": statistics.mean(o.kv_kept_fraction for o in outputs)}
    bounds = [max(o.certified_deviation) for o in outputs if o.certified_deviation]
    return metrics | ({"serve/certified_deviation": max(bounds)} if bounds else {})


def _quality(score: KvScore) -> dict[str, float]:
    metrics = {
        "serve/kv_kept_fraction": score.kept_fraction,
        "serve/kv_budget": float(score.budget),
        "serve/kl_vs_full": score.kl_vs_full,
        "serve/measured_deviation": score.measured_deviation,
        "serve/top1_agreement": score.top1_agreement,
    }
    if score.certified_deviation is not None:
        metrics["serve/certified_deviation"] = score.certified_deviation
    if score.certified_top1 is not None:
        metrics["serve/certified_top1"] = score.certified_top1
    return metrics


def _show(samples: list[dict[str, Any]], policy: Policy) -> None:
    """Write the texts to standard output; control characters are shown as dots."""
    for sample in samples:
        lines = [f"--- prompt\n{sample['prompt']}", f"--- full cache\n{sample['full']}"]
        if policy.budget is not None:
            title = f"--- {policy.name}, {policy.budget} tokens kept"
            same = sample["compressed"] == sample["full"]
            lines.append(f"{title}\n{'(the same text)' if same else sample['compressed']}")
        sys.stdout.write("\n".join(map(_printable, lines)) + "\n")
    sys.stdout.flush()


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "." for c in text)


main_calibrate = hydra_command("calibrate", calibrate)
main_generate = hydra_command("generate", generate)
