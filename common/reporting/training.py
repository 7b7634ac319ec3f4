"""Training curves: loss, and the bound that holds at every step."""

from typing import Any

from common.reporting.charts import Series, key, line_chart
from common.reporting.page import figure, figures, kind, missing, number, section
from common.reporting.runs import Story


def training(story: Story) -> str:
    """Return loss and bound over steps."""
    title, lead = "Training", "Every weight matrix is held inside its norm constraint at each step."
    stage = story.stage("train")
    rows = stage.rows() if stage else []
    if not rows:
        return section(title, lead, missing("No training curve: metrics.csv of train is missing."))
    return section(title, lead, figures(_loss_figure(story, rows), _bound_figure(rows)))


def _loss_figure(story: Story, rows: list[dict[str, float]]) -> str:
    series = [
        _column(rows, "train/loss", "training batch", tone="naive"),
        _column(rows, "train/val_loss_nats", "validation", tone="measured", markers=True),
    ]
    series = [one for one in series if one.x]
    if not series:
        return missing("No losses in metrics.csv.")
    caption = (
        f"<b>Loss.</b> {kind('measured')} Cross-entropy of the next token in nats. Validation text "
        "was held out before training."
    )
    bits, entropy = (
        story.metric("train/val_bits_per_byte"),
        story.metric("data/unigram_entropy_bits"),
    )
    if bits is not None and entropy is not None:
        caption += (
            f" At the end {number(bits, 4)} bits per byte; a model that knows only how often each "
            f"byte occurs needs {number(entropy, 4)}."
        )
    chart = line_chart(series, "optimizer step", "cross-entropy, nats per token")
    return figure(key(series) + chart, caption)


def _bound_figure(rows: list[dict[str, float]]) -> str:
    activation = _column(
        rows, "train/max_activation", "largest activation", tone="measured", dashed=True
    )
    bound = _column(rows, "train/bound_naive", "bound from operator norms", tone="proved")
    if not bound.x:
        return missing("No bound was logged during training.")
    series = [one for one in (bound, activation) if one.x]
    caption = (
        f"<b>Sensitivity.</b> {kind('proved')} Product of the blocks' operator-norm bounds: the "
        "logits' RMS moves at most this many times as far as the embeddings' RMS, for any input."
    )
    if activation.x:
        caption += (
            f" {kind('measured')} Dashed: the largest absolute activation seen on a training batch."
        )
    chart = line_chart(series, "optimizer step", "log scale, dimensionless", log_y=True)
    return figure(key(series) + chart, caption)


def _column(rows: list[dict[str, float]], name: str, label: str, **style: Any) -> Series:
    kept = [row for row in rows if name in row]
    return Series(
        label=label, x=[row["step"] for row in kept], y=[row[name] for row in kept], **style
    )
