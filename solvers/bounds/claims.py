"""Trusted: how a checker compares what a certificate claims with what can be proved."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.certificate import config_sha256, tensors_sha256
from common.errors import CertificateError
from solvers.bounds.admissible import check_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Outcome of a successful check; ``margin`` is the relative rounding allowance in the bound."""

    tightened: float
    naive: float
    blocks: int
    multipliers: int
    margin: float
    seconds: float


def check_identity(config: Any, tensors: Mapping[str, Tensor], certificate: Any) -> None:
    """Check that a certificate speaks about this model, and that its weights admit a proof.

    Raises:
        CertificateError: naming the first tensor that differs or is not usable.
    """
    check_hashes("weight", tensors_sha256(tensors), certificate.weights_sha256)
    found = tensors_sha256(certificate.multipliers)
    check_hashes("multiplier", found, certificate.multipliers_sha256)
    if config_sha256(config) != certificate.config_sha256:
        raise CertificateError("model configuration: differs from the certified one (config hash)")
    check_weights(tensors)


def check_hashes(what: str, found: Mapping[str, str], stated: Mapping[str, str]) -> None:
    """Raise ``CertificateError`` naming the first tensor that is not the certified one."""
    for name in sorted(found.keys() | stated.keys()):
        if name not in found or name not in stated:
            state = "missing" if name in stated else "not in the certificate"
            raise CertificateError(f"{what} tensor {name}: {state}; certify again")
        if found[name] != stated[name]:
            raise CertificateError(
                f"{what} tensor {name}: content differs from the certified one (sha256 "
                f"{found[name][:12]}, expected {str(stated[name])[:12]}); certify again"
            )


def at_least(name: str, stored: Any, proved: Any, *, infinite: bool = False) -> None:
    """Raise ``CertificateError`` unless ``stored`` is a number not below ``proved``.

    Args:
        name: What the message calls the number.
        stored: Whatever the file holds.
        proved: What the checker has proved; compared as it is.
        infinite: Whether infinity is an admissible claim.
    """
    # JSON may hold anything, among them integers beyond the range of floats.
    is_number = all(
        type(x) is float or (type(x) is int and abs(x) < 2**1023) for x in (stored, proved)
    )
    if not is_number or math.isnan(stored) or (math.isinf(stored) and not infinite):
        raise CertificateError(f"{name}={stored!r}: expected a finite number; certify again")
    if not stored >= proved:
        raise CertificateError(
            f"{name}={stored!r}: below {proved!r}, which is what can be proved; certify again"
        )
