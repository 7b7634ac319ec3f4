"""The ``train`` command: text in, a trained and constrained model directory out."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig

from common.bundle import save_bundle
from common.config import build
from common.corpus import Corpus, prepare_corpus
from common.files import write_json
from common.models import LipschitzTransformer, ModelConfig
from common.runs import Outcome, Run, hydra_command
from common.tracking import build_loggers
from train.callbacks import CHECKPOINT, Certify, Checkpoint, Progress, Sample
from train.data import TokenDataModule
from train.evaluate import bits_per_byte, evaluate, reference_windows
from train.groups import Constraint, OptimConfig, parameter_groups
from train.init import initialise, initialise_biases
from train.loop import accelerator_and_devices, build_trainer, quiet
from train.module import LipschitzModule
from train.probes import matrix_norms, naive_certificate
from train.schedules import Schedule
from train.settings import CallbacksConfig, TrainerConfig

log = logging.getLogger(__name__)

# Rows of the probe batch on which activations are measured, and prompt of a sample, in tokens.
PROBE_WINDOWS = 4
PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Every settings object of a training run, validated before any work."""

    seed: int
    device: str
    optim: OptimConfig
    constraint: Constraint
    schedule: Schedule
    trainer: TrainerConfig
    callbacks: CallbacksConfig


def train(cfg: DictConfig, run: Run) -> Outcome:
    """Train a model and write its bundle.

    Args:
        cfg: Groups ``data model optim constraint schedule trainer callbacks logger``, ``seed``
            and ``device``.
        run: Where; a resumed run continues from its last checkpoint.

    Returns:
        Validation figures, speed, corpus entropy, naive bound; artifacts ``bundle`` and
        ``samples``; the objective is the validation loss in bits per byte.

    Raises:
        ConfigError, DataError: before anything is trained.
    """
    settings = read_settings(cfg)
    build(cfg.model, vocab_size=256)
    corpus = prepare_corpus(build(cfg.data))
    model = build_model(cfg, corpus, settings)
    data = _data(corpus, model.config, settings)
    module = LipschitzModule(
        model,
        settings.optim,
        settings.constraint,
        settings.schedule,
        total_steps=settings.trainer.max_steps,
        bytes_per_token=corpus.bytes_per_token,
    )
    loggers = build_loggers(build(cfg.logger), run.directory, run)
    progress = Progress(settings.callbacks.log_every)
    callbacks = _callbacks(progress, corpus, model, settings, run.directory)
    with quiet():
        trainer = build_trainer(settings.trainer, settings.device, callbacks, loggers)
        trainer.fit(module, datamodule=data, ckpt_path=_checkpoint(run), weights_only=True)
    model.eval()
    metrics = _final_metrics(model, corpus, settings)
    metrics |= {
        "train/params": model.num_parameters,
        "train/steps": trainer.global_step,
        "train/tokens_seen": data.consumed * trainer.world_size * data.tokens_per_batch,
        "train/tokens_per_s": progress.tokens_per_s,
    }
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.finalize("success")
    return _outcome(model.cpu(), corpus, metrics, run, trainer)


def read_settings(cfg: DictConfig) -> Settings:
    """Build and validate the settings objects of a configuration.

    Raises:
        ConfigError: for the first impossible value.
    """
    trainer: TrainerConfig = build(cfg.trainer)
    accelerator_and_devices(cfg.device, trainer.devices)
    return Settings(
        seed=cfg.seed,
        device=cfg.device,
        optim=build(cfg.optim),
        constraint=build(cfg.constraint),
        schedule=build(cfg.schedule),
        trainer=trainer,
        callbacks=build(cfg.callbacks),
    )


def build_model(cfg: DictConfig, corpus: Corpus, settings: Settings) -> LipschitzTransformer:
    """Return the initialised model for a corpus; its groups are checked as well."""
    config = build(cfg.model, vocab_size=corpus.tokenizer.vocab_size)
    corpus.require(config.context)
    model = LipschitzTransformer(config)
    parameter_groups(model, settings.optim, settings.constraint)
    initialise(model, settings.constraint, settings.seed)
    counts_V = np.bincount(corpus.tokens("train"), minlength=config.vocab_size)
    initialise_biases(model, settings.trainer.init, counts_V)
    if settings.trainer.compile:
        model.compile()
    return model


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
    # The checkpoint comes last: an interruption must not cut off another callback.
    return [
        progress,
        Certify(watch.certificate_every, probe_BT),
        Sample(watch.sample_every, samples, corpus.tokenizer, prompt_T, watch.sample_tokens),
        Checkpoint(watch.checkpoint_every, directory / "checkpoints"),
    ]


def _checkpoint(run: Run) -> Path | None:
    path = run.directory / "checkpoints" / CHECKPOINT
    return path if run.resumed and path.is_file() else None


def _final_metrics(
    model: LipschitzTransformer, corpus: Corpus, settings: Settings
) -> dict[str, float]:
    loop, context = settings.trainer, model.config.context
    autocast = loop.precision == "bf16-mixed"
    windows_NT = corpus.windows("val", context, loop.final_windows)
    nats, full = evaluate(model, windows_NT, loop.val_batch_size, autocast=autocast)
    ids = torch.from_numpy(corpus.tokens("val")[: context + 2048].astype(np.int64))
    overlapping_NT = reference_windows(ids, context)
    _, reference = evaluate(model, overlapping_NT, loop.val_batch_size, autocast=autocast)
    return {
        "train/val_loss_nats": nats,
        "train/val_bits_per_byte": bits_per_byte(nats, corpus.bytes_per_token),
        "train/val_acc_full": full,
        "train/val_acc_ref": reference,
        "data/unigram_entropy_bits": corpus.unigram_entropy_bits,
        "cert/naive": naive_certificate(model).naive,
    }


def _outcome(
    model: LipschitzTransformer,
    corpus: Corpus,
    metrics: dict[str, float],
    run: Run,
    trainer: L.Trainer,
) -> Outcome:
    objective = metrics["train/val_bits_per_byte"]
    if not trainer.is_global_zero:
        return Outcome(metrics=metrics, objective=objective)
    write_json(run.directory / "corpus.json", corpus.describe())
    bundle = run.directory / "bundle"
    save_bundle(bundle, model, corpus.tokenizer, command=" ".join(["lipllm", *sys.argv[1:]]))
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


main = hydra_command("train", train)
