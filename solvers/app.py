"""Commands ``certify``, ``verify``, ``attack`` (the bounds) and ``solve`` (the solvers)."""

import dataclasses
import logging
import math
import time
from typing import Any

from torch import Tensor

from common.bundle import Bundle, extend_bundle, load_bundle
from common.classifier_certificate import AnyCertificate, ClassifierCertificate
from common.config import build
from common.errors import ConfigError
from common.runs import Outcome, Run, hydra_command
from solvers import bounds
from solvers.attack_app import attack
from solvers.bounds.checker import check
from solvers.bounds.local.command import certify_around, verify_around
from solvers.bounds.warm import warm_start
from solvers.solve_app import solve

log = logging.getLogger(__name__)


def certify(cfg: Any, run: Run) -> Outcome:
    """Certify the model of ``cfg.bundle`` and store the proof in the bundle.

    Reads ``bundle``, ``certify`` and ``seed``. Attacks are part of it; what is stored has passed
    the independent checker. With prompts in ``around`` it proves local certificates instead, from
    the stored proof.
    """
    around = build(cfg.around) if "around" in cfg else None
    if around is not None and around.texts:
        return certify_around(cfg.bundle, around, run)
    settings = build(cfg.certify)
    bundle = load_bundle(cfg.bundle)
    began = time.perf_counter()
    certificate = bounds.certify(
        bundle.model,
        settings.tighten,
        settings=settings.tightening(),
        warm=_warm(settings.warm, bundle),
    )
    metrics = {"cert/seconds": time.perf_counter() - began}
    if settings.attack_steps:
        began = time.perf_counter()
        result = bounds.attack(bundle.model, certificate, settings=settings.attacks(int(cfg.seed)))
        certificate = bounds.with_attack(certificate, result)
        metrics["cert/attack_seconds"] = time.perf_counter() - began
    certificate = _with_best_attack(certificate, bundle)
    report = check(bundle.model.config, bundle.model.state_dict(), certificate)
    metrics["cert/verify_seconds"] = report.seconds
    found = f"; largest sensitivity found {certificate.attack:.6g}" if certificate.attack else ""
    log.info("proved: tightened %.6g, naive %.6g%s", report.tightened, report.naive, found)
    extended = extend_bundle(
        bundle.path,
        certificate=certificate,
        command=run.command,
        copy_to=run.directory / "bundle",
    )
    return Outcome(
        metrics=_finite(figures(certificate) | metrics),
        artifacts={"bundle": extended.path},
        objective=certificate.log10_tightened,
    )


def _warm(path: str | None, bundle: Bundle) -> dict[int, dict[str, Tensor]]:
    """Return the multipliers of another bundle to start from; none without one."""
    if path is None:
        return {}
    other = load_bundle(path)
    if other.kind != "transformer" or bundle.kind != "transformer":
        raise ConfigError(f"certify.warm={path}: expected two transformers; leave it out")
    if other.certificate is None or other.void is not None:
        raise ConfigError(f"certify.warm={path}: it has no valid certificate; certify it first")
    return warm_start(bundle.model, other.model, other.certificate)


def _with_best_attack(certificate: Any, bundle: Bundle) -> Any:
    """Keep what an earlier search found; a void certificate is of other weights."""
    stored = None if bundle.void is not None else bundle.certificate
    if stored is None:
        return certificate
    # Nobody has checked that file: what no search can have found must not outlive it.
    claims: list[Any] = [certificate.attack or 0.0, stored.attack, stored.tightened]
    if not all(isinstance(x, float) for x in claims) or not claims[0] < claims[1] <= claims[2]:
        return certificate
    return dataclasses.replace(certificate, attack=stored.attack)


def verify(cfg: Any, run: Run) -> Outcome:
    """Re-prove the certificate stored in ``cfg.bundle``, or the local ones in ``cfg.around``."""
    if cfg.get("around") is not None:
        return verify_around(cfg.bundle, cfg.around)
    report = bounds.verify(cfg.bundle)
    log.info(
        "re-proved %d blocks: tightened %.9g, naive %.9g, of which rounding margin at most %.1e",
        report.blocks,
        report.tightened,
        report.naive,
        report.margin,
    )
    metrics = {
        "verify/blocks": float(report.blocks),
        "verify/seconds": report.seconds,
        "verify/tightened": report.tightened,
        "verify/naive": report.naive,
    }
    return Outcome(metrics=_finite(metrics))


def figures(certificate: AnyCertificate) -> dict[str, float]:
    """Return a certificate's numbers under their declared metric names."""
    names = ("reference", "naive", "tightened")
    values = {f"cert/{name}": float(getattr(certificate, name)) for name in names}
    values |= {f"cert/log10_{n}": float(getattr(certificate, f"log10_{n}")) for n in names}
    blocks = certificate.blocks
    gaps = [(b.tightened - b.dual) / b.tightened for b in blocks if b.dual is not None]
    values |= {
        "cert/naive_over_tightened": _ratio(certificate),
        "cert/evals": float(sum(block.evals for block in blocks)),
        "cert/gap": max(gaps, default=0.0),
    }
    if isinstance(certificate, ClassifierCertificate):
        names = ("naive_l2", "tightened_l2", "pair_l2")
        values |= {f"cert/{name}": float(getattr(certificate, name)) for name in names}
    else:
        values["cert/radius"] = certificate.radius
    values |= {f"cert/block/{block.index}": block.tightened for block in blocks}
    if certificate.attack:
        values["cert/attack"] = certificate.attack
        values["cert/tightened_over_attack"] = certificate.tightened / certificate.attack
    return values


def _ratio(certificate: AnyCertificate) -> float:
    # Both are -400 for a constant of 0, and neither overflows where the numbers do.
    return float(10 ** (certificate.log10_naive - certificate.log10_tightened))


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    # Bounds above the largest float stay visible through their logarithms.
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


main_certify = hydra_command("certify", certify)
main_verify = hydra_command("verify", verify)
main_attack = hydra_command("attack", attack)
main_solve = hydra_command("solve", solve)
