"""The proof object of an image classifier: constants of its chains of matrices, margins, hashes.

It speaks about the real-arithmetic function of the stored weights on the whole input space R^I.
Names that end in ``_l2`` are l2 to l2; the others are RMS to RMS, ``sqrt(I / O)`` times as large.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from common.certificate import Certificate
from common.proof_file import FORMAT_VERSION, JSON_FILE, ProofFile, read_proof

MODEL = "classifier"
_TOTALS = ("naive_l2", "tightened_l2", "pair_l2", "naive", "tightened", "reference")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChainProof:
    """Consecutive matrices with the activations between them, and their proved l2 constant.

    Attributes:
        index: Position among the chains.
        layer: The same, for readers of both kinds of certificates.
        kind: Always ``chain``.
        first: First matrix of the chain, from 0.
        stop: Matrix after its last one; the activation between two chains is 1-Lipschitz.
        naive: Product of the matrices' norm bounds (l2).
        tightened: Bound re-proved from the multipliers (l2); ``naive`` where there are none.
        dual: The solver's estimate, from below, of what multipliers can reach, or None.
        evals: Newton steps of the solver.
        seconds: Wall time of the solver.
        method: How the multipliers were found; empty when there are none.
        components: ``attack``, the largest l2 ratio found (estimate from below), if there is one.
    """

    index: int
    layer: int
    kind: str = "chain"
    first: int
    stop: int
    naive: float
    tightened: float
    dual: float | None = None
    evals: int = 0
    seconds: float = 0.0
    method: str = ""
    components: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Prefix of this chain's multiplier tensors; ``<key><matrix>`` follows matrix number."""
        return f"blocks.{self.index}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierCertificate(ProofFile):
    """Bounds of an image MLP, input pixels to logits.

    Attributes:
        format_version: Version of the file format.
        model: Always ``classifier``.
        inputs: Pixels I.
        classes: Logits O.
        blocks: One proof per chain, first to last; together they hold every matrix once.
        norms: Bound on the spectral norm of every matrix.
        pair_norm: Bound on ``max_ij |U_i - U_j|_2`` over rows of the last matrix.
        naive_l2: Product of ``norms``: l2 to l2.
        tightened_l2: Product of the chains' tightened bounds: l2 to l2.
        pair_l2: Bound on how far any difference of two logits can move, per l2 of the input.
        naive: ``naive_l2 * sqrt(I / O)``: RMS to RMS.
        tightened: ``tightened_l2 * sqrt(I / O)``: RMS to RMS.
        reference: The published formula, the product of RMS to RMS norms.
        log10_naive: Decimal logarithm of ``naive``, rounded up; finite where it overflows.
        log10_tightened: Decimal logarithm of ``tightened``, rounded up.
        log10_reference: Decimal logarithm of ``reference``.
        attack: Largest RMS to RMS ratio any attack reached (estimate from below), or None.
        reference_sound: Whether the reference is a bound here.
        weights_sha256: Hash per weight tensor.
        config_sha256: Hash of the model configuration.
        multipliers_sha256: Hash per multiplier tensor.
        multipliers: Positive float64 vectors from which the checker re-proves each chain.
        settings: Settings of the run that made the certificate.
        versions: Versions of the libraries that made it.
    """

    totals: ClassVar[tuple[str, ...]] = _TOTALS
    block: ClassVar[type] = ChainProof

    format_version: int = FORMAT_VERSION
    model: str = MODEL
    inputs: int
    classes: int
    blocks: tuple[ChainProof, ...]
    norms: tuple[float, ...]
    pair_norm: float
    naive_l2: float
    tightened_l2: float
    pair_l2: float
    naive: float
    tightened: float
    reference: float
    log10_naive: float
    log10_tightened: float
    log10_reference: float
    attack: float | None = None
    reference_sound: bool = False
    weights_sha256: Mapping[str, str]
    config_sha256: str
    multipliers_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    multipliers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Return ``sqrt(I / O)``: an RMS to RMS constant over the l2 to l2 constant."""
        return math.sqrt(self.inputs / self.classes)

    def radius(self, margin: float) -> float:
        """Return the l2 distance of the input within which the top class is proved unchanged.

        Args:
            margin: Largest logit minus the second largest, at least 0.
        """
        if self.pair_l2 == 0:
            return math.inf if margin > 0 else 0.0
        return margin / self.pair_l2 * (1 - 1e-12)


AnyCertificate = Certificate | ClassifierCertificate


def load_certificate(directory: str | Path) -> AnyCertificate:
    """Read the certificate of either kind of model; nothing is proved here.

    Raises:
        CertificateError: if a file is missing or damaged, or of a foreign version.
    """
    directory = Path(directory)
    content, tensors = read_proof(directory)
    kind = ClassifierCertificate if content.get("model") == MODEL else Certificate
    return kind.from_content(content, tensors, directory / JSON_FILE)
