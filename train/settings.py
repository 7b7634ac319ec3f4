"""Settings of the training loop and of what is watched while it runs."""

from dataclasses import dataclass, field
from typing import Literal

from common.config import check_types, positive
from common.errors import ConfigError
from train.budget import Budget
from train.init import InitConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """The training loop.

    Attributes:
        max_steps: Optimizer steps, at least 1.
        batch_size: Windows or images per device and micro-batch, at least 1.
        accumulate_grad_batches: Micro-batches per optimizer step.
        gradient_clip_val: Largest gradient norm, or None (Muon ignores the scale of gradients).
        precision: ``32-true`` or ``bf16-mixed`` (autocast; weights and constraints stay float32).
        compile: Compile the model with ``torch.compile``.
        compile_backend: Its backend: ``inductor``, ``aot_eager``, ``eager`` ...
        devices: Devices on one node, a count or ``auto``.
        num_nodes: Nodes; more than one needs a launcher (torchrun, SLURM) on each of them.
        strategy: ``auto``, ``ddp`` (every device holds the model) or ``fsdp2`` (every device holds
            rows of each parameter; ``fsdp2`` does not go with ``compile``).
        shard_updates: Under ``ddp``, share the optimizer's matrix work out over the devices.
        ema: Decay per step of an average of the weights, 0 for none, below 1; the average is what
            is validated, certified and stored.
        deterministic: Ask for deterministic kernels (bit-exact resume on a GPU needs it).
        val_every: Optimizer steps between validations, 0 for none before the end.
        val_windows: Validation windows of those, spread evenly over the split; of images the whole
            split is read.
        final_windows: Windows of the last validation, None for the whole split.
        val_batch_size: Windows or images per validation batch.
        save_dtype: Type of the stored weights: ``float32``, or ``bfloat16``, to which they are
            rounded before the last validation.
        certify: Bound of the finished model: ``naive`` from operator norms, or ``tightened``,
            which is stored with its proof in the bundle (a tightened budget's always is).
        budget: Largest certified constant of the finished language model.
        init: Initial biases of a language model.
    """

    max_steps: int = 300
    batch_size: int = 32
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool = False
    compile_backend: str = "inductor"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    shard_updates: bool = True
    ema: float = 0.0
    deterministic: bool = False
    val_every: int = 50
    val_windows: int = 128
    final_windows: int | None = 2048
    val_batch_size: int = 64
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    certify: Literal["naive", "tightened"] = "naive"
    budget: Budget = field(default_factory=Budget)
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "max_steps",
            "batch_size",
            "accumulate_grad_batches",
            "num_nodes",
            "val_windows",
            "val_batch_size",
        ):
            positive(f"trainer.{name}", getattr(self, name))
        positive("trainer.val_every", self.val_every, zero=True)
        for name in ("gradient_clip_val", "final_windows"):
            if getattr(self, name) is not None:
                positive(f"trainer.{name}", getattr(self, name))
        if not 0 <= self.ema < 1:
            raise ConfigError(f"trainer.ema={self.ema}: expected 0 to below 1; 0.999 is usual")
        if self.strategy == "fsdp2" and self.compile:
            raise ConfigError(
                "trainer.compile=true: trainer.strategy=fsdp2 runs uncompiled only; use "
                "trainer.strategy=ddp or trainer.compile=false"
            )
        is_count = isinstance(self.devices, int) and self.devices >= 1
        if not is_count and self.devices != "auto":
            raise ConfigError(f"trainer.devices={self.devices!r}: expected a count or auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallbacksConfig:
    """What is watched during training; every period is in optimizer steps, 0 switches it off.

    Samples and model FLOP utilisation exist for text only.

    Attributes:
        log_every: Steps between logged losses and throughputs.
        certificate_every: Steps between naive certificates and layer norms.
        sample_every: Steps between text samples (``samples.txt``).
        sample_prompt: Text to continue; empty for the first validation characters.
        sample_tokens: Tokens per sample.
        checkpoint_every: Steps between checkpoints; Ctrl-C writes one as well.
        peak_flops: Peak FLOP/s of one device, for model FLOP utilisation; None looks up known GPUs.
    """

    log_every: int = 10
    certificate_every: int = 20
    sample_every: int = 100
    sample_prompt: str = ""
    sample_tokens: int = 200
    checkpoint_every: int = 100
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        positive("callbacks.log_every", self.log_every)
        if self.peak_flops is not None:
            positive("callbacks.peak_flops", self.peak_flops)
        positive("callbacks.sample_tokens", self.sample_tokens)
        for name in ("certificate_every", "sample_every", "checkpoint_every"):
            positive(f"callbacks.{name}", getattr(self, name), zero=True)
