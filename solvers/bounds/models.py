"""``certify``, ``attack`` and ``with_attack`` for every kind of model."""

from typing import Any, overload

from common.certificate import Certificate
from common.classifier_certificate import AnyCertificate, ClassifierCertificate
from common.models import LipschitzMLP, LipschitzTransformer
from solvers.bounds.attack import attack as attack_transformer
from solvers.bounds.attack import with_attack as with_transformer_attack
from solvers.bounds.attack_settings import AttackResult, AttackSettings
from solvers.bounds.classifier import certify_classifier
from solvers.bounds.classifier_attack import attack_classifier, with_classifier_attack
from solvers.bounds.network import TightenSettings
from solvers.bounds.network import certify as certify_transformer


@overload
def certify(
    model: LipschitzTransformer, tighten: bool = True, *, settings: TightenSettings | None = None
) -> Certificate: ...


@overload
def certify(
    model: LipschitzMLP, tighten: bool = True, *, settings: TightenSettings | None = None
) -> ClassifierCertificate: ...


def certify(
    model: LipschitzTransformer | LipschitzMLP,
    tighten: bool = True,
    *,
    settings: TightenSettings | None = None,
) -> AnyCertificate:
    """Prove how far the logits can move; arguments as in ``network.certify``.

    Returns:
        A ``Certificate``, or of a classifier a ``ClassifierCertificate``.
    """
    if isinstance(model, LipschitzMLP):
        return certify_classifier(model, tighten, settings=settings)
    return certify_transformer(model, tighten, settings=settings)


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


def with_attack(certificate: Any, result: AttackResult) -> Any:
    """Return the certificate of either kind with the attacks' values stored in it.

    Raises:
        CertificateError: if an attack exceeds a bound, which would refute the proof.
    """
    if isinstance(certificate, ClassifierCertificate):
        return with_classifier_attack(certificate, result)
    return with_transformer_attack(certificate, result)
