"""Training a language model: text in, a constrained transformer and its figures out."""

# Legend: N windows, B batch, T token position.

import logging
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig

from common.certificate import Certificate
from common.config import build
from common.corpus import Corpus, DataConfig, prepare_corpus
from common.files import write_json
from common.ledger import Outcome, Run
from common.models import LipschitzTransformer, ModelConfig
from solvers.bounds import certify
from train.budget import KeepBudget, enforce
from train.callbacks import Certify, Checkpoint, Sample
from train.cost import Cost, flops_per_token
from train.data import TokenDataModule
from train.evaluate import bits_per_byte, evaluate, inputs_and_targets, reference_windows
from train.groups import parameter_groups
from train.init import freeze_unused, initialise, initialise_biases
from train.margins import MARGINS_FILE, MOST_POSITIONS, text_margins
from train.module import LipschitzModule
from train.probes import activation_maxima, certificate_figures, matrix_norms
from train.progress import Progress
from train.session import (
    STORED,
    Settings,
    compiled,
    finished,
    fit,
    log_final,
    module_options,
    store,
)

log = logging.getLogger(__name__)

# Rows of the probe batch on which activations are measured, and prompt of a sample, in tokens.
PROBE_WINDOWS = 4
PROMPT_TOKENS = 32


def train_language(cfg: DictConfig, source: DataConfig, settings: Settings, run: Run) -> Outcome:
    """Train a transformer on the corpus of ``source`` and write its bundle.

    Args:
        cfg: Groups ``model`` and ``logger``.
        source: Which text.
        settings: Everything else.
        run: Where; a resumed run continues from its last checkpoint.

    Returns:
        Validation figures, speed, corpus entropy, naive bound; artifacts ``bundle`` and
        ``samples``; the objective is the validation loss in bits per byte. Nothing on the ranks
        that do not lead.

    Raises:
        ConfigError, DataError: before anything is trained.
    """
    corpus = prepare_corpus(source)
    model = build_model(cfg, corpus, settings)
    data = _data(corpus, model.config, settings)
    module = LipschitzModule(
        model,
        settings.optim,
        settings.constraint,
        settings.schedule,
        bytes_per_token=corpus.bytes_per_token,
        **module_options(settings),
    )
    progress = Progress(settings.callbacks.log_every)
    callbacks = _callbacks(progress, corpus, model, settings, run.directory)
    trainer = fit(module, data, callbacks, settings, cfg, run)
    model = finished(module, trainer, settings)
    if not trainer.is_global_zero:
        return Outcome()  # The leading rank alone measures, proves and stores the model.
    certificate = _certificate(model, settings)
    metrics = _final_metrics(model, corpus, settings) | certificate_figures(certificate)
    metrics |= {
        "train/params": model.num_parameters,
        "train/steps": trainer.global_step,
        "train/tokens_seen": data.consumed * trainer.world_size * data.tokens_per_batch,
        "train/tokens_per_s": progress.tokens_per_s,
    }
    log_final(trainer, metrics)
    context = model.config.context
    windows_NT = corpus.windows("val", context, max(1, MOST_POSITIONS // context))
    margins = text_margins(model, windows_NT, certificate)
    write_json(run.directory / MARGINS_FILE, margins)
    return _outcome(model.cpu(), corpus, certificate, metrics, run, settings)


def build_model(cfg: DictConfig, corpus: Corpus, settings: Settings) -> LipschitzTransformer:
    """Return the initialised model for a corpus; its groups are checked as well."""
    config = build(cfg.model, vocab_size=corpus.tokenizer.vocab_size)
    corpus.require(config.context)
    model = LipschitzTransformer(config)
    parameter_groups(model, settings.optim, settings.constraint)
    initialise(model, settings.constraint, settings.seed)
    initialise_biases(model, settings.trainer.init, corpus.token_counts())
    freeze_unused(model)
    return compiled(model, settings)


def _data(corpus: Corpus, config: ModelConfig, settings: Settings) -> TokenDataModule:
    return TokenDataModule(
        corpus,
        config.context,
        settings.trainer.batch_size,
        seed=settings.seed,
        val_windows=settings.trainer.val_windows,
        val_batch_size=settings.trainer.val_batch_size,
    )


def _callbacks(
    progress: Progress,
    corpus: Corpus,
    model: LipschitzTransformer,
    settings: Settings,
    directory: Path,
) -> list[L.Callback]:
    watch = settings.callbacks
    context = model.config.context
    probe_BT = corpus.windows("val", context, PROBE_WINDOWS)[:, :-1]
    prompt_T = probe_BT[0, :PROMPT_TOKENS]
    if watch.sample_prompt:
        prompt_T = torch.from_numpy(corpus.tokenizer.encode(watch.sample_prompt))
    samples = directory / "samples.txt"
    cost = Cost(watch.log_every, progress, flops_per_token(model, context), watch.peak_flops)
    budget = settings.trainer.budget
    # The checkpoint comes last: an interruption must not cut off another callback.
    return [
        progress,
        *([] if budget.target is None else [KeepBudget(budget)]),
        cost,
        Certify(watch.certificate_every, partial(activation_maxima, tokens_BT=probe_BT)),
        Sample(watch.sample_every, samples, corpus.tokenizer, prompt_T, watch.sample_tokens),
        Checkpoint(watch.checkpoint_every, directory / "checkpoints"),
    ]


def _certificate(model: LipschitzTransformer, settings: Settings) -> Certificate:
    """Certify the finished model, within its budget where it has one."""
    loop = settings.trainer
    tighten = loop.certify == "tightened"
    if loop.budget.target is not None:
        certificate = enforce(model, loop.budget, STORED[loop.save_dtype])
        if loop.budget.tighten or not tighten:
            return certificate
    return certify(model, tighten=tighten)


def _final_metrics(
    model: LipschitzTransformer, corpus: Corpus, settings: Settings
) -> dict[str, float]:
    loop, context = settings.trainer, model.config.context
    autocast = loop.precision == "bf16-mixed"
    windows_NT = corpus.windows("val", context, loop.final_windows)
    size = loop.val_batch_size
    nats, full = evaluate(model, *inputs_and_targets(windows_NT), size, autocast=autocast)
    ids = torch.from_numpy(corpus.tokens("val")[: context + 2048].astype(np.int64))
    overlapping_NT = reference_windows(ids, context)
    _, reference = evaluate(model, *inputs_and_targets(overlapping_NT), size, autocast=autocast)
    return {
        "train/val_loss_nats": nats,
        "train/val_bits_per_byte": bits_per_byte(nats, corpus.bytes_per_token),
        "train/val_acc_full": full,
        "train/val_acc_ref": reference,
        "data/unigram_entropy_bits": corpus.unigram_entropy_bits,
    }


def _outcome(
    model: LipschitzTransformer,
    corpus: Corpus,
    certificate: Certificate,
    metrics: dict[str, float],
    run: Run,
    settings: Settings,
) -> Outcome:
    objective = metrics["train/val_bits_per_byte"]
    write_json(run.directory / "corpus.json", corpus.describe())
    bundle = store(
        run,
        model,
        settings,
        tokenizer=corpus.tokenizer,
        corpus=corpus,
        certificate=certificate if certificate.multipliers else None,
        metrics=metrics,
    )
    artifacts = {"bundle": bundle}
    samples = run.directory / "samples.txt"
    if samples.is_file():
        artifacts["samples"] = samples
    log.info(
        "%.4f bits per byte (single bytes: %.4f), naive bound %.4g, largest norm %.4f",
        objective,
        metrics["data/unigram_entropy_bits"],
        metrics["cert/naive"],
        max(matrix_norms(model).values()),
    )
    return Outcome(metrics=metrics, artifacts=artifacts, objective=objective)
