"""The big table: every score with every compensation at every budget, on the same tokens.

One pass over the calibration text and one ranking per score serve all budgets (one-shot order);
the default method is also fitted in sequence. Rows are written as they are made.
"""

# Legend: B sequences, T tokens.

import dataclasses
import hashlib
import json
import logging
import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from common.bundle import Bundle
from common.certificate import Certificate
from common.errors import DataError
from common.files import write_json
from common.reporting.runs import read_json
from compress.adapters import LipschitzAdapter
from compress.deviation.network import certified_deviation
from compress.deviation.recertify import recertify
from compress.flops import token_flops
from compress.hold import certified_limit
from compress.measure import Reference
from compress.pruner import Survey, chosen_targets, prune_model, share_budget, survey
from compress.settings import CompressConfig
from compress.statistics.collect import Statistics, collect
from compress.study.config import KINDS, ROTATION, Case, StudyConfig
from compress.study.config import cases as grid
from compress.study.rotation import directions, slice_width, width_for
from compress.study.verdict import mark
from compress.timing import decode_speed, forward_speed
from solvers.bounds import certify

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FILE = "study.json"


class Study:
    """A dense model, the texts, and everything that rows share.

    Args:
        bundle: Transformer.
        certificate: Its proof.
        settings: The rows.
        base: What all rows share; its score and compensation are the default method.
        texts: Calibration tokens (B, T) and validation windows (B, T + 1).
        bytes_per_token: Of the corpus.
    """

    def __init__(
        self,
        bundle: Bundle,
        certificate: Certificate,
        settings: StudyConfig,
        base: CompressConfig,
        texts: tuple[Tensor, Tensor],
        bytes_per_token: float,
    ):
        self.dense: Any = bundle.model
        self.certificate, self.settings, self.base = certificate, settings, base
        self.tokens_BT, self._windows_BT = texts
        self._bytes_per_token = bytes_per_token
        self._adapter = LipschitzAdapter(self.dense)
        self._gains = self._adapter.amplifications(certificate)
        self._limit = certified_limit(self.dense, certificate, base.hold)
        self._surveys: dict[str, Survey] = {}
        self._identity = _identity(bundle, settings, base, texts)

    @property
    def default(self) -> str:
        """The default method."""
        return f"{self.base.score}+{self.base.comp_for(certifiable=True)}"

    def run(self, path: Path) -> dict[str, Any]:
        """Measure the rows that ``path`` does not have yet, writing after each one.

        Returns:
            The content of the file, rows marked, see ``verdict.mark``.

        Raises:
            DataError: when the file is of another model, text or settings.
        """
        content = self._stored(path) or self._fresh()
        cases = list(grid(self.settings, self.default))
        missing = [c for c in cases if not any(c.is_of(point) for point in content["points"])]
        log.info("study: %d rows, %d of them to do", len(cases), len(missing))
        began = time.monotonic()
        for done, case in enumerate(missing, start=1):
            point = self._point(case, content["shapes"])
            content["points"].append(point)
            write_json(path, content)
            left = (time.monotonic() - began) / done * (len(missing) - done)
            _log_progress(case, point, done + len(cases) - len(missing), len(cases), left)
        content["verdicts"] = mark(content["points"], content["dense"], self.default)
        write_json(path, content)
        return content

    def _stored(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        content = read_json(path)
        if not isinstance(content, dict) or content.get("identity") != self._identity:
            raise DataError(
                f"{path}: rows of another model, text or settings; choose another hydra.run.dir "
                "or set force=true, which makes all rows again"
            )
        return content

    def _fresh(self) -> dict[str, Any]:
        quality = self._reference.quality(self.dense)
        proof = self.certificate
        dense = {
            "val_bits_per_byte": quality.bits_per_byte,
            "cert_naive": certify(self.dense, tighten=False).naive,
            "cert_tightened": proof.tightened,
            "params": self.dense.num_parameters,
            "flops": token_flops(self.dense.config),
        }
        if not all(math.isfinite(value) for value in dense.values()):
            raise DataError("study: the dense model's certificate or loss is not finite")
        return {
            "format_version": FORMAT_VERSION,
            "identity": self._identity,
            "default": self.default,
            "dense": dense,
            "shapes": {},
            "points": [],
        }

    def _point(self, case: Case, shapes: dict[str, Any]) -> dict[str, Any]:
        """Make and measure one row; ``shapes`` holds the times of shapes already seen."""
        began = time.monotonic()
        model, kept, known = self._model(case)
        quality = self._reference.quality(model)
        proof = self._proof(model, kept, known)
        certified = None
        if kept is not None and self.settings.deviation:
            certified = certified_deviation(
                self.dense,
                model,
                kept,
                self.certificate,
                changed_certificate=proof,
                max_evals=self.settings.bound_evals,
            ).logits
        return dataclasses.asdict(case) | {
            "val_bits_per_byte": quality.bits_per_byte,
            "kl_nats": quality.kl_nats,
            "top1_agreement": quality.top1_agreement,
            "measured_deviation": quality.deviation,
            "certified_deviation": certified,
            "cert_naive": proof.naive,
            "cert_tightened": proof.tightened if self.settings.tighten else None,
            "params": model.num_parameters,
            "flops": token_flops(model.config),
            "shape": self._timed(model, shapes),
            "seconds": time.monotonic() - began,
        }

    def _proof(
        self, model: Any, kept: dict[str, Tensor] | None, known: Certificate | None
    ) -> Certificate:
        """Certify a pruned model; a sliced one has no blocks in common with the dense one."""
        tighten = self.settings.tighten
        if kept is None:
            return certify(model, tighten)
        # Rows from norms alone are compared: a tightened proof of some would favour them.
        known = known if tighten else None
        return recertify(self.dense, model, kept, self.certificate, tighten=tighten, known=known)

    def _model(self, case: Case) -> tuple[Any, dict[str, Tensor] | None, Certificate | None]:
        """Return the pruned model, the kept inputs (None where the stream itself is cut), a proof.

        The proof is that of the search for caps, where there was one.
        """
        if case.score == ROTATION:
            width = width_for(self.dense, self._params_at(case))
            return slice_width(self.dense, self._directions, width), None, None
        changes = {"score": case.score, "comp": case.comp, "order": case.order}
        settings = self._settings(case.kind, case.keep, **changes)
        found = self._survey(case.score) if case.order == "one_shot" else None
        pruning = prune_model(
            self.dense,
            self.tokens_BT,
            settings,
            gains=self._gains,
            found=found,
            limit=self._limit,
        )
        return pruning.model, pruning.kept, pruning.proof

    def _settings(self, kind: str, keep: float, **changes: Any) -> CompressConfig:
        budget = {"keep": 1.0, "keep_heads": 1.0, KINDS[kind]: keep}
        return dataclasses.replace(self.base, frontier=(), **budget, **changes)

    def _params_at(self, case: Case) -> int:
        """Return the parameters that every method leaves at a budget, from the counts alone."""
        settings = self._settings(case.kind, case.keep)
        targets = chosen_targets(self._adapter, settings)
        counts = share_budget(
            self._adapter,
            targets,
            self.tokens_BT,
            settings,
            found=self._survey(settings.score),
            gains=self._gains,
        )
        gone = sum((target.components - counts[target.name]) * target.params for target in targets)
        return int(self.dense.num_parameters) - gone

    def _survey(self, score: str) -> Survey:
        """Return the ranking of every place by one score, down to the smallest budgets."""
        if score not in self._surveys:
            lowest = dataclasses.replace(
                self.base,
                score=score,
                keep=min((*self.settings.keeps, *self.settings.heads), default=1.0),
                keep_heads=min(self.settings.heads, default=1.0),
            )
            self._surveys[score] = survey(
                self._adapter, self.tokens_BT, lowest, statistics=self._statistics
            )
        return self._surveys[score]

    def _timed(self, model: Any, shapes: dict[str, Any]) -> str:
        """Return the key of a model's shape; its times are measured where they are not known."""
        key = _digest(model.config.to_dict())[:12]
        if key not in shapes:
            settings = self.settings
            length = settings.length or self.dense.config.context
            forward = forward_speed(
                self.dense, model, batch=settings.batch, length=length, rounds=settings.rounds
            )
            decode = decode_speed(
                self.dense, model, length=max(1, length // 2), rounds=settings.rounds
            )
            shapes[key] = {
                "forward": dataclasses.asdict(forward),
                "decode": dataclasses.asdict(decode),
            }
        return key

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self.dense, self._windows_BT, self._bytes_per_token)

    @cached_property
    def _statistics(self) -> Statistics:
        targets = self._adapter.targets()
        return collect(self._adapter, self.tokens_BT, targets, holdout=self.base.holdout)

    @cached_property
    def _directions(self) -> Tensor:
        return directions(self.dense, self.tokens_BT)


def _identity(
    bundle: Bundle, settings: StudyConfig, base: CompressConfig, texts: tuple[Tensor, Tensor]
) -> dict[str, str]:
    """Return what rows of one file have in common; which rows there are does not count."""
    shared = dataclasses.asdict(settings)
    for name in ("keeps", "heads", "scores", "comps", "rotation"):
        del shared[name]
    own = dataclasses.asdict(base)
    for name in ("keep", "keep_heads", "order", "frontier"):
        del own[name]
    texts_sha256 = [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in texts]
    return {
        "bundle": bundle.fingerprint,
        "texts": _digest(texts_sha256),
        "settings": _digest([own, shared]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _log_progress(case: Case, point: dict[str, Any], done: int, total: int, left: float) -> None:
    log.info(
        "study %d/%d: %s keep %g, %s %s: %.4f bits per byte, %.1f s; about %.0f min left",
        done,
        total,
        case.kind,
        case.keep,
        case.method,
        case.order,
        point["val_bits_per_byte"],
        point["seconds"],
        left / 60,
    )
