"""``certify``, ``attack`` and ``with_attack`` for every kind of model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from torch import Tensor

from common.certificate import Certificate
from common.classifier_certificate import AnyCertificate, ClassifierCertificate
from common.errors import CertificateError
from common.models import LipschitzMLP, LipschitzTransformer
from solvers.bounds.attack import attack as attack_transformer
from solvers.bounds.attack_settings import AttackResult, AttackSettings
from solvers.bounds.classifier import certify_classifier
from solvers.bounds.classifier_attack import attack_classifier
from solvers.bounds.network import TightenSettings
from solvers.bounds.network import certify as certify_transformer

_Proof = TypeVar("_Proof", Certificate, ClassifierCertificate)


@overload
def certify(
    model: LipschitzTransformer,
    tighten: bool = True,
    *,
    settings: TightenSettings | None = None,
    warm: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Certificate: ...


@overload
def certify(
    model: LipschitzMLP,
    tighten: bool = True,
    *,
    settings: TightenSettings | None = None,
    warm: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> ClassifierCertificate: ...


def certify(
    model: LipschitzTransformer | LipschitzMLP,
    tighten: bool = True,
    *,
    settings: TightenSettings | None = None,
    warm: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> AnyCertificate:
    """Prove how far the logits can move; arguments as in ``network.certify``.

    Classifiers start cold: they ignore ``warm``.

    Returns:
        A ``Certificate``, or of a classifier a ``ClassifierCertificate``.
    """
    if isinstance(model, LipschitzMLP):
        return certify_classifier(model, tighten, settings=settings)
    return certify_transformer(model, tighten, settings=settings, warm=warm)


def attack(
    model: LipschitzTransformer | LipschitzMLP,
    certificate: Any = None,
    *,
    settings: AttackSettings | None = None,
) -> AttackResult:
    """Move the logits as far as can be found, see ``attack.attack`` and ``attack_classifier``."""
    if isinstance(model, LipschitzMLP):
        return attack_classifier(model, certificate, settings=settings)
    return attack_transformer(model, certificate, settings=settings)


def with_attack(certificate: _Proof, result: AttackResult) -> _Proof:
    """Return the certificate of either kind with the attacks' values stored in it.

    Raises:
        CertificateError: if an attack exceeds a bound, which would refute the proof.
    """
    pairs = list(zip(certificate.blocks, result.blocks, strict=True))
    claims = [(f"block {block.index}", value, block.tightened) for block, value in pairs]
    claims.append(("network", result.value, certificate.tightened))
    for name, value, bound in claims:
        if value > bound:
            raise CertificateError(
                f"{name}: attack {value!r} exceeds the bound {bound!r}; the proof is wrong, please "
                "report it"
            )
    blocks = tuple(
        dataclasses.replace(block, components={**block.components, "attack": value})
        for block, value in pairs
    )
    return dataclasses.replace(certificate, blocks=blocks, attack=result.value)
