"""Runs the stages that ``conf/pipeline.yaml`` names, each in its own run directory.

A stage is a command's body. It is skipped when it finished with the same settings and the same
inputs, so a pipeline that was interrupted, or of which one late setting changed, does only what
is left to do.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from common.config import check_types
from common.errors import ConfigError
from common.ledger import (
    RESUMED_VARIABLE,
    RUN_FILE,
    SUMMARY_FILE,
    Body,
    Finished,
    Outcome,
    Run,
    call,
    config_hash,
    is_worker_rank,
    perform,
    read_json,
)
from common.runs import hydra_command, plain

SHARED_KEYS = ("seed", "device")
# What a pipeline cannot prune and serve.
_OF_IMAGES = {"data": "common.images.ImageConfig", "model": "common.models.MLPConfig"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: Also the stage's sub-directory.
        target: ``module:function`` of a command's body.
        keys: Top-level configuration keys that it reads, besides the shared ones.
        bundle: Earlier stage whose bundle it reads or extends; None for a stage that reads no
            bundle and therefore, unless it is the first, everything made so far.
        prefix: Put before its metric names in the pipeline's summary.
        artifacts: Names of its artifacts that the summary carries, to their names there.
    """

    name: str
    target: str
    keys: tuple[str, ...]
    bundle: str | None = None
    prefix: str = ""
    artifacts: dict[str, str] | None = None

    def __post_init__(self) -> None:
        """Check the types."""
        check_types(self)

    def body(self) -> Body:
        """Import the function.

        Raises:
            ConfigError: if there is none of that name.
        """
        module, _, function = self.target.partition(":")
        try:
            body: Body = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"stage {self.name}: target={self.target!r}: expected module:function ({error})"
            ) from error
        return body


def read_stages(nodes: Any) -> list[Stage]:
    """Return the stages that a list of mappings describes, checked against one another.

    Raises:
        ConfigError: for anything but such a list, a malformed stage, a repeated name, or a bundle
            that no earlier stage has.
    """
    if not isinstance(nodes, list) or not all(isinstance(node, Mapping) for node in nodes):
        raise ConfigError(
            f"pipeline.stages={nodes!r}: expected a list of stages; see conf/pipeline.yaml"
        )
    stages: list[Stage] = []
    for node in nodes:
        try:
            stage = Stage(**{str(key): value for key, value in node.items()})
        except TypeError as error:
            raise ConfigError(f"pipeline.stages: {dict(node)}: {error}") from error
        earlier = [other.name for other in stages]
        if stage.name in earlier:
            raise ConfigError(f"pipeline.stages: name={stage.name!r} is used twice: rename one")
        if stage.bundle is not None and stage.bundle not in earlier:
            known = ", ".join(earlier) or "none"
            raise ConfigError(
                f"stage {stage.name}: bundle={stage.bundle!r}: expected an earlier stage ({known})"
            )
        stages.append(stage)
    return stages


def dependencies(stages: Sequence[Stage], index: int) -> list[str]:
    """Return the earlier stages whose results shape what stage ``index`` reads."""
    stage, earlier = stages[index], stages[:index]
    if stage.bundle is None:
        return [other.name for other in earlier]
    return [o.name for o in earlier if o.name == stage.bundle or o.bundle == stage.bundle]


def pipeline(cfg: DictConfig, run: Run) -> Outcome:
    """Run all stages, skipping what is finished.

    Args:
        cfg: Configuration with ``pipeline.stages`` and the union of the stages' keys.
        run: Where; stages get sub-directories.

    Returns:
        The metrics and artifacts of all stages under the names of the summary.
    """
    config = plain(cfg)
    _refuse_images(config)
    stages = read_stages(config["pipeline"]["stages"])
    if is_worker_rank():
        return _join(stages, config, run)
    console = Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty(), highlight=False)
    done: dict[str, Finished] = {}
    hashes: dict[str, str] = {}
    for index, stage in enumerate(stages):
        _print_heading(console, f"{index + 1}/{len(stages)} {stage.name}")
        bundle = None if stage.bundle is None else _bundle_of(stage, done[stage.bundle])
        inputs = [hashes[name] for name in dependencies(stages, index)]
        step = _stage_run(stage, config, run, inputs=inputs, bundle=bundle)
        hashes[stage.name] = step.config_hash
        done[stage.name] = _perform_stage(stage, step, force=bool(config.get("force")))
        state = "already finished, skipped" if done[stage.name].skipped else "finished"
        console.print(f"{stage.name}: {state} ({done[stage.name].summary['seconds']:.1f} s)")
    _print_table(console, stages, done)
    artifacts = _artifacts(stages, done)
    for name, path in artifacts.items():
        console.print(f"{name}: {path}", soft_wrap=True)
    return Outcome(metrics=_metrics(stages, done), artifacts=artifacts)


def _refuse_images(config: Mapping[str, Any]) -> None:
    for key, target in _OF_IMAGES.items():
        if (config.get(key) or {}).get("_target_") == target:
            raise ConfigError(
                f"{key}: {target} is for image classifiers, and a pipeline expects text: run "
                "lipllm train, certify and attack one by one"
            )


def _stage_run(
    stage: Stage, config: Mapping[str, Any], run: Run, *, inputs: Sequence[str], bundle: Path | None
) -> Run:
    missing = [key for key in stage.keys if key not in config]
    if missing:
        raise ConfigError(f"stage {stage.name}: key {missing[0]!r} is not in the configuration")
    keys = (*SHARED_KEYS, *stage.keys)
    fingerprints = [stage.target, *inputs, *_fingerprint(bundle)]
    shown = {key: config[key] for key in (*keys, "force", "name") if key in config}
    return Run(
        command=stage.name,
        directory=run.directory / stage.name,
        config=shown | {"bundle": None if bundle is None else str(bundle)},
        config_hash=config_hash(config, keys=keys, inputs=fingerprints),
    )


def _fingerprint(bundle: Path | None) -> list[str]:
    # Of the model alone: certificates and cache statistics are added to a bundle in place.
    if bundle is None:
        return []
    return [str((read_json(bundle / "manifest.json") or {}).get("fingerprint"))]


def _perform_stage(stage: Stage, step: Run, *, force: bool) -> Finished:
    record = read_json(step.directory / RUN_FILE)
    if record is not None and (force or record.get("config_hash") != step.config_hash):
        _set_aside(step.directory)
    step.directory.mkdir(parents=True, exist_ok=True)
    return perform(step, stage.body(), _settings(step))


def _settings(step: Run) -> DictConfig:
    settings = OmegaConf.create(step.config)
    OmegaConf.set_struct(settings, True)
    OmegaConf.set_readonly(settings, True)
    return settings


def _set_aside(directory: Path) -> None:
    """Keep what a stage made under other settings: it may have taken hours."""
    attic = directory.parent / ".old"
    attic.mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    directory.rename(attic / f"{directory.name}-{stamp}-{time.monotonic_ns() % 10**6:06d}")


def _bundle_of(stage: Stage, finished: Finished) -> Path:
    artifact = finished.summary["artifacts"].get("bundle")
    if artifact is None:
        raise ConfigError(f"stage {stage.name}: stage {stage.bundle!r} made no bundle")
    return (finished.path.parent / artifact).resolve()


def _join(stages: Sequence[Stage], config: Mapping[str, Any], run: Run) -> Outcome:
    """As a further rank, take part in the one stage that the leading rank is running."""
    done: dict[str, Finished] = {}
    for stage in stages:
        path = run.directory / stage.name / SUMMARY_FILE
        summary = read_json(path)
        if summary is not None:
            done[stage.name] = Finished(path=path, summary=summary, objective=None)
            continue
        bundle = None if stage.bundle is None else _bundle_of(stage, done[stage.bundle])
        step = _stage_run(stage, config, run, inputs=(), bundle=bundle)
        step.resumed = os.environ.get(RESUMED_VARIABLE) == "1"
        return call(step, stage.body(), _settings(step))
    return Outcome()


def _metrics(stages: Sequence[Stage], done: Mapping[str, Finished]) -> dict[str, float]:
    return {
        f"{stage.prefix}{name}": float("nan") if value is None else value
        for stage in stages
        for name, value in done[stage.name].summary["metrics"].items()
    }


def _artifacts(stages: Sequence[Stage], done: Mapping[str, Finished]) -> dict[str, Path]:
    return {
        public: done[stage.name].path.parent / done[stage.name].summary["artifacts"][name]
        for stage in stages
        for name, public in (stage.artifacts or {}).items()
    }


def _print_heading(console: Console, text: str) -> None:
    if console.is_terminal:
        console.rule(text, align="left")
    else:
        console.print(f"[{text}]", markup=False)


def _print_table(console: Console, stages: Sequence[Stage], done: Mapping[str, Finished]) -> None:
    if not console.is_terminal:
        for name, value in _metrics(stages, done).items():
            console.print(f"{name} = {value:.6g}")
        return
    table = Table("metric", "value", "stage", title="results")
    for stage in stages:
        for name, value in done[stage.name].summary["metrics"].items():
            shown = "overflow" if value is None else f"{value:.6g}"
            table.add_row(f"{stage.prefix}{name}", shown, stage.name)
        table.add_section()
    console.print(table)


main = hydra_command("pipeline", pipeline, shared=True)
