"""The certificate: totals, and the constants of every block."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.reporting.charts import Series, bar_chart, key
from common.reporting.page import escape, figure, figures, kind, missing, number, section, table
from common.reporting.runs import Story, read_json


def certificate(bundle: Path | None) -> dict[str, Any]:
    """Return the content of a bundle's ``certificate.json``; empty when there is none."""
    content = None if bundle is None else read_json(bundle / "certificate.json")
    return content if isinstance(content, dict) and "blocks" in content else {}


def proof(story: Story) -> str:
    """Return the certificate: totals and per-block constants, dense and pruned."""
    title = "Certificate"
    lead = "How far any change of the input can move the logits, block by block and in total."
    dense = certificate(story.bundle("certify", "train"))
    pruned = certificate(story.bundle("recertify", "compress"))
    if not dense and not pruned:
        return section(title, lead, missing("No certificate: the certify stage has not finished."))
    parts = [_totals(dense, pruned)]
    charts = [_blocks(c, name) for name, c in (("Trained", dense), ("Pruned", pruned)) if c]
    return section(title, lead, *parts, figures(*charts))


def _totals(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    names = {
        "tightened": ("Tightened", "proved", "from the solvers, re-proved from multipliers"),
        "naive": ("Naive", "proved", "from operator norms alone"),
        "attack": ("Attack", "estimate", "largest sensitivity found: a lower bound"),
        "reference": ("Reference", "estimate", "published formula, not a bound for several heads"),
    }
    shown = [(name, c) for name, c in (("Trained", dense), ("Pruned", pruned)) if c]
    rows = []
    for field, (label, badge, meaning) in names.items():
        values = [bound(content, field) for _, content in shown]
        is_sound = field == "reference" and any(c.get("reference_sound") for _, c in shown)
        text = "published formula, sound here" if is_sound else meaning
        rows.append([label, kind(badge), escape(text), *values])
    heads = ["Constant", "", "Meaning", *(f"{name} model" for name, _ in shown)]
    return table(heads, rows, text_columns=3)


def bound(content: Mapping[str, Any], field: str) -> str:
    """Return one of a certificate's totals as HTML; a power of ten where the number overflows."""
    value = content.get(field)
    log10 = content.get(f"log10_{field}")
    if value is None and isinstance(log10, int | float) and math.isfinite(log10):
        return f"10<sup>{log10:.1f}</sup>"
    return number(value)


def _blocks(content: Mapping[str, Any], name: str) -> str:
    blocks = content["blocks"]
    groups = [f"{'A' if block['kind'] == 'attention' else 'M'}{block['layer']}" for block in blocks]
    attacks = [block.get("components", {}).get("attack") for block in blocks]
    series = [
        Series(label="naive", y=[block["naive"] for block in blocks], tone="naive"),
        Series(label="tightened", y=[block["tightened"] for block in blocks], tone="proved"),
    ]
    if any(value is not None for value in attacks):
        series.append(Series(label="best attack", y=attacks, tone="measured"))
    caption = (
        f"<b>{name} model.</b> {kind('proved')} Lipschitz constant of each residual block: A "
        "attention, M MLP, numbered by layer; 1 leaves distances as they are."
    )
    if len(series) > 2:
        caption += (
            f" {kind('estimate')} Orange: the largest constant that an attack reached; the "
            "true one lies between orange and dark blue."
        )
    chart = bar_chart(groups, series, "constant of the residual block (l2)")
    return figure(key(series) + chart, caption)
