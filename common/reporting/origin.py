"""Where a report's figures come from: times, commands, data, versions, hashes."""

from collections.abc import Mapping
from typing import Any

from common.reporting.charts import time_chart
from common.reporting.page import (
    code,
    definitions,
    details,
    escape,
    figure,
    figures,
    kind,
    missing,
    number,
    section,
    table,
)
from common.reporting.runs import Story, read_json


def timings(story: Story) -> str:
    """Return how long each stage took."""
    lead = "Wall-clock time of each stage, as recorded in its summary."
    finished = [s for s in story.stages.values() if s.summary.get("seconds") is not None]
    if not finished:
        return section("Time", lead, missing("No stage has finished."))
    seconds = [float(stage.summary["seconds"]) for stage in finished]
    chart = time_chart([stage.name for stage in finished], seconds)
    caption = f"<b>{sum(seconds):.1f} s in total.</b> {kind('measured')} On this machine, once."
    return section("Time", lead, figures(figure(chart, caption), _speeds(story)))


def _speeds(story: Story) -> str:
    names = [
        ("Training", "train/tokens_per_s", "tokens/s"),
        ("Generation", "serve/tokens_per_s", "tokens/s"),
        ("Certificate", "cert/seconds", "s"),
    ]
    found = [(label, story.metric(name), unit) for label, name, unit in names]
    rows = [
        (label, f"{number(value)} {escape(unit)}")
        for label, value, unit in found
        if value is not None
    ]
    if not rows:
        return missing("No speeds were recorded.")
    caption = f"<b>Speed.</b> {kind('measured')} As recorded by the stages."
    return figure(definitions(rows), caption)


def origin(story: Story) -> str:
    """Return the command, data, versions, hashes and settings that made the report's figures."""
    lead = "What is needed to make these figures again."
    data = story.stages.get("train", story.root).record.get("config", {}).get("data") or {}
    pairs = [("Command", code(story.root.command_line)), *_data_pairs(story, data)]
    for label, names in (("Trained model", ("train",)), ("Pruned model", ("compress",))):
        bundle = story.bundle(*names)
        manifest = None if bundle is None else read_json(bundle / "manifest.json")
        if isinstance(manifest, dict):
            pairs.append((label, code(f"sha256 {manifest.get('fingerprint')}")))
    stages = [stage for stage in story.stages.values() if stage.summary]
    versions = stages[-1].summary.get("versions", {}) if stages else {}
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    pairs.append(("Versions", escape(text or "not recorded")))
    hashes = [[escape(s.name), code(str(s.summary.get("config_hash", ""))[:16])] for s in stages]
    parts = [definitions(pairs)]
    if hashes:
        parts.append(details("Settings hash of each stage", table(["Stage", "sha256"], hashes)))
    every = [
        [code(name), escape(stage.name), number(value, 6)]
        for stage in stages
        for name, value in stage.metrics.items()
    ]
    if every:
        parts.append(
            details("All metrics", table(["Metric", "Stage", "value"], every, text_columns=2))
        )
    return section("Origin", lead, *parts)


def _data_pairs(story: Story, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    stage = story.stages.get("train")
    corpus = (stage.json("corpus.json") if stage else None) or {}
    source = corpus.get("source") or data.get("path") or data.get("name") or data.get("source")
    if not source:
        return [("Data", "not recorded")]
    parts = [f"{escape(source)}, {escape(data.get('tokenizer', 'byte'))} tokens"]
    if corpus.get("split_rule"):
        parts.append(escape(corpus["split_rule"]))
    pairs = [("Data", "; ".join(parts))]
    if corpus.get("text_sha256"):
        pairs.append(("Text", code(f"sha256 {corpus['text_sha256']}")))
    entropy, bits = (
        story.metric("data/unigram_entropy_bits"),
        story.metric("train/val_bits_per_byte"),
    )
    if entropy is not None:
        text = f"single-byte entropy {number(entropy, 4)} bits per byte"
        text += f"; model {number(bits, 4)} bits per byte" if bits is not None else ""
        pairs.append(("Validation text", text))
    return pairs
