"""The headline figures of a report."""

from common.reporting.page import card, number, percent
from common.reporting.proof import bound, certificate
from common.reporting.runs import Story


def headline(story: Story) -> str:
    """Return the headline cards of whatever stages there are."""
    cards = [
        _loss_card(story),
        _bound_card(story),
        _pruning_card(story),
        _deviation_card(story),
        _cache_card(story),
    ]
    return f'<div class="cards">{"".join(filter(None, cards))}</div>'


def _loss_card(story: Story) -> str:
    bits = story.metric("train/val_bits_per_byte")
    if bits is None:
        return ""
    entropy = story.metric("data/unigram_entropy_bits")
    detail = f"single bytes alone: {number(entropy)}" if entropy is not None else ""
    return card("Validation loss", number(bits), "bits/byte", detail, "measured")


def _bound_card(story: Story) -> str:
    content = certificate(story.bundle("certify", "train"))
    if not content:
        return ""
    attack = content.get("attack")
    detail = f"from norms {bound(content, 'naive')}"
    detail += f", best attack {number(attack)}" if attack is not None else ""
    return card("Lipschitz bound", bound(content, "tightened"), "", detail, "proved")


def _pruning_card(story: Story) -> str:
    removed = story.metric("compress/removed_fraction")
    if removed is None:
        return ""
    loss = ""
    for name, unit in (("val_bits_per_byte", "bits/byte"), ("val_accuracy", "accuracy")):
        after, before = (story.metric(f"compress/{name}{when}") for when in ("", "_before"))
        if before is not None:
            loss = f"{number(before)} &rarr; {number(after)} {unit}"
    return card("Parameters removed", percent(removed), "", loss, "measured")


def _deviation_card(story: Story) -> str:
    proved = story.metric("compress/certified_deviation")
    if proved is None:
        return ""
    detail = f"for any input; measured {number(story.metric('compress/measured_deviation'))}"
    return card("Logit shift by pruning", number(proved), "RMS", detail, "proved")


def _cache_card(story: Story) -> str:
    kept = story.metric("serve/kv_kept_fraction")
    if kept is None:
        return ""
    detail = f"KL to the full cache {number(story.metric('serve/kl_vs_full'))} nats"
    return card("Cache kept", percent(kept), "", detail, "measured")
