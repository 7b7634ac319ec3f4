"""The proof object of a model: block constants, domain, hashes, and how deviations propagate.

A certificate speaks about the real-arithmetic function of the stored weights, on sequences whose
tokens have l2 norm at most ``radius``; distances between sequences are the largest token distance.
``reference`` is a published formula, ``attack`` an estimate from below; neither is a bound.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.config import one_of
from common.errors import CertificateError
from common.norms import SLACK, TINY, round_up
from common.proof_file import FORMAT_VERSION, JSON_FILE, ProofFile, read_proof

KINDS = ("attention", "mlp")
BOUNDS = ("tightened", "naive", "reference")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockProof:
    """One residual block ``x -> (1 - a) x + a f(x)`` and its proved constants.

    Attributes:
        index: Position in the network; ``2 * layer`` attention, ``2 * layer + 1`` MLP.
        layer: Layer number.
        kind: ``attention`` or ``mlp``.
        reference: Constant by the published formula (not a bound for several heads).
        naive: Bound from operator norms alone, on the ball of ``naive_radius_in``.
        tightened: Bound re-proved from multipliers, on the tokens that can enter the block.
        radius_in: Bound on the l2 norm of every token entering the block.
        radius_out: Bound on the l2 norm of every token leaving it.
        naive_radius_in: As ``radius_in``, tracked with operator norms alone.
        naive_radius_out: As ``radius_out``, tracked with operator norms alone.
        dual: The solver's lower bound on what multipliers can reach (estimate), or None.
        evals: Operator evaluations of the solver.
        seconds: Wall time of the solver.
        method: Solver that found the multipliers; empty when there was none.
        components: Parts of the bound (``tau``, ``query``, ``key`` ...) and ``attack``, the
            largest ratio an attack on this block reached (estimate from below).
    """

    index: int
    layer: int
    kind: str
    reference: float
    naive: float
    tightened: float
    radius_in: float
    radius_out: float
    naive_radius_in: float
    naive_radius_out: float
    dual: float | None = None
    evals: int = 0
    seconds: float = 0.0
    method: str = ""
    components: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Prefix of this block's multiplier tensors."""
        return f"blocks.{self.index}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate(ProofFile):
    """Bounds of a whole network in units of RMS per token: embedding in, logits out.

    Attributes:
        format_version: Version of the file format.
        width: Width C of the residual stream.
        vocab_size: Number of logits V.
        radius: Domain: every embedded token has l2 norm at most this.
        blocks: One proof per residual block, in execution order.
        head_norm: Bound on ``final_scale * |W_head|_2`` (l2 -> l2).
        pair_norm: Bound on ``final_scale * max_ij |U_i - U_j|_2`` over head rows.
        stream: Bound on the l2 movement of a token of the final stream when every embedded token
            moves by at most 1 (l2): the product of the tightened block bounds, or less.
        reference: The published formula for the whole network.
        naive: Product of the naive block bounds with ``head_norm * sqrt(C / V)``.
        tightened: Product of the tightened block bounds with the same factor, or less: changes of
            the stream are followed in ellipsoids through all blocks to the head.
        log10_reference: Decimal logarithm of ``reference``; finite where the number overflows.
        log10_naive: Decimal logarithm of ``naive``, rounded up.
        log10_tightened: Decimal logarithm of ``tightened``, rounded up.
        attack: Largest ratio any attack reached (estimate from below), or None.
        reference_sound: Whether the reference happens to be a bound; never for several heads.
        weights_sha256: Hash per weight tensor, see ``tensor_sha256``.
        config_sha256: Hash of the model configuration.
        multipliers_sha256: Hash per multiplier tensor.
        multipliers: Positive float64 tensors from which the checker re-proves each block.
        settings: Settings of the run that made the certificate.
        versions: Versions of the libraries that made it.
    """

    totals: ClassVar[tuple[str, ...]] = (*BOUNDS, "stream")
    block: ClassVar[type] = BlockProof

    format_version: int = FORMAT_VERSION
    width: int
    vocab_size: int
    radius: float
    blocks: tuple[BlockProof, ...]
    head_norm: float
    pair_norm: float
    stream: float
    reference: float
    naive: float
    tightened: float
    log10_reference: float
    log10_naive: float
    log10_tightened: float
    attack: float | None = None
    reference_sound: bool = False
    weights_sha256: Mapping[str, str]
    config_sha256: str
    multipliers_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    multipliers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def block_multipliers(self, index: int) -> dict[str, Tensor]:
        """Return the multipliers of one block by their names within it."""
        key = self.blocks[index].key
        return {k.removeprefix(key): t for k, t in self.multipliers.items() if k.startswith(key)}

    def amplification(self, index: int, which: str = "tightened") -> float:
        """Return a bound on how much the blocks after block ``index`` enlarge a deviation (l2)."""
        constants = [self.constant(block, which) for block in self.blocks if block.index > index]
        return product_up(constants)

    def logit_deviation(self, deltas: Sequence[float]) -> float:
        """Bound the movement of the logits when every block's output moves a little.

        Args:
            deltas: One number per block: bound on the l2 distance between the block's output and
                the changed block's output at the same input, residual weight included. It must
                hold on the changed network's own trajectory, whose tokens must stay within this
                certificate's radii (certify both networks on a common radius if they may not).

        Returns:
            Bound on the RMS over the vocabulary of the logits' movement, largest over tokens.

        Raises:
            CertificateError: for a wrong number of deltas or a negative or non-finite delta.

        Source:
            Error recursion ``e_{l+1} <= rho_l e_l + delta_l``.
        """
        if len(deltas) != len(self.blocks):
            raise CertificateError(
                f"{len(deltas)} deviations: expected one per block ({len(self.blocks)})"
            )
        error = 0.0
        for block, delta in zip(self.blocks, deltas, strict=True):
            if not 0 <= delta < math.inf:
                raise CertificateError(
                    f"deviation {delta} of block {block.index}: expected a finite number >= 0"
                )
            moved = round_up(block.tightened * error + delta)
            # A small but positive error must not vanish by underflow.
            error = max(moved, TINY) if error or delta else 0.0
        return round_up(error * self.head_norm / math.sqrt(self.vocab_size))

    @staticmethod
    def constant(block: BlockProof, which: str) -> float:
        """Return one of a block's three constants by name."""
        one_of("which", which, BOUNDS)
        return float(getattr(block, which))

    @classmethod
    def load(cls, directory: str | Path) -> "Certificate":
        """Read a certificate; nothing is proved here, see ``solvers.bounds.verify``.

        Raises:
            CertificateError: if a file is missing or damaged, or of a foreign version.
        """
        directory = Path(directory)
        return cls.from_content(*read_proof(directory), directory / JSON_FILE)


def product_up(factors: Sequence[float]) -> float:
    """Return the product of non-negative factors, rounded up; never 0 unless a factor is.

    Exponents are summed apart: a partial product may leave the range that the whole one is in.
    """
    if any(factor == 0 for factor in factors):
        return 0.0
    mantissa, exponent = 1.0 + SLACK, 0
    for factor in factors:
        mantissa, shift = math.frexp(mantissa * math.frexp(factor)[0])
        exponent += shift + math.frexp(factor)[1]
    try:
        return max(math.ldexp(mantissa, exponent), TINY)
    except OverflowError:
        return math.inf


def log10_up(factors: Sequence[float]) -> float:
    """Return the sum of the factors' decimal logarithms, rounded up by ``SLACK``, in log space."""
    if any(factor == 0 for factor in factors):
        return -400.0
    logs = [math.log10(factor) for factor in factors]
    return math.fsum(logs) + SLACK * (1 + math.fsum(map(abs, logs)))


def tensor_sha256(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and raw bytes, in hex.

    Half-precision tensors are hashed as the float32 numbers that they hold exactly: a proof about
    weights stored in half precision speaks about the float32 model that computes with them.
    """
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the hash of every tensor, by name in sorted order."""
    return {name: tensor_sha256(tensors[name]) for name in sorted(tensors)}


def config_sha256(config: Any) -> str:
    """Return the hash of a model configuration (anything with ``to_dict``), in hex."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
