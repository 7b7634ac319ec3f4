"""Samples, losses, probes, membership inference and relearning."""

import dataclasses
import math

import pytest
import torch

from common.document_classes import DocumentClasses
from common.errors import DataError
from common.tokenizer import ByteTokenizer
from compress.unlearning.measure import Examined, accuracy, answers, losses, probe
from compress.unlearning.membership import attack_membership
from compress.unlearning.relearning import relearning_steps
from compress.unlearning.samples import image_classes, shuffled, text_classes
from compress.unlearning.settings import UnlearnConfig
from compress.unlearning.standing import measure_standing
from compress.unlearning.unlearner import unlearn_model


def _texts(**changes) -> DocumentClasses:
    parts = {
        "forget_train": bytes(range(100)) * 3,
        "forget_held": b"a" * 40,
        "retain_train": b"b" * 4000,
        "retain_held": b"c" * 17,
        "is_unseen": True,
        "rule": "by hand",
    }
    return DocumentClasses(**(parts | changes))


def test_images_are_divided_by_class(digits):
    """Oracle: counting labels."""
    data = image_classes(digits, UnlearnConfig(forget="7"))
    assert (data.forget_train.targets == 7).all()
    assert (data.retain_held.targets != 7).all()
    assert len(data.forget_held) == int((digits.val_labels_N == 7).sum())
    assert len(data.forget_train) + len(data.retain_train) == len(digits.train_labels_N)


@pytest.mark.parametrize("name", [10, "seven", -1])
def test_unknown_image_classes_are_one_line(digits, name):
    """Oracle: the range of classes in the message."""
    with pytest.raises(DataError, match=rf"unlearn\.forget={name}: .*0 to 9"):
        image_classes(digits, UnlearnConfig(forget=name))


def test_text_is_cut_into_windows_with_next_tokens():
    """Oracle: bytes by hand; windows touch, every byte but the first is a target once."""
    data = text_classes(_texts(), ByteTokenizer(), 16, UnlearnConfig(forget="x", tokens=160))
    assert data.forget_train.inputs.shape == (10, 16)
    assert data.retain_train.inputs.shape == (10, 16)
    assert data.retain_held.inputs.shape == (1, 16)
    assert torch.equal(data.forget_train.inputs[:, 1:], data.forget_train.targets[:, :-1])
    assert data.forget_train.inputs[0].tolist() == list(range(16))
    assert data.forget_train.bytes_per_token == 1.0


def test_text_too_short_for_a_window_is_one_line():
    """Oracle: the part, its size and the remedy."""
    with pytest.raises(DataError, match="16 tokens of forget held text, expected more than 16"):
        text_classes(_texts(forget_held=b"a" * 16), ByteTokenizer(), 16, UnlearnConfig(forget="x"))


def test_bits_per_byte_of_text(make_model):
    """Oracle: cross-entropy of the whole in one pass, over log 2."""
    model = make_model("gelu", vocab_size=256).float()
    data = text_classes(_texts(), ByteTokenizer(), 16, UnlearnConfig(forget="x"))
    part = data.forget_train
    logits = model(part.inputs)
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.targets.flatten())
    found = Examined(model, data).figures()
    assert found["forget_bits_per_byte_train"] == pytest.approx(whole.item() / math.log(2))
    assert answers(model, part).knowledge == -found["forget_bits_per_byte_train"]
    assert losses(model, part).shape == (len(part),)


def test_every_part_is_run_once(make_model, monkeypatch):
    """Oracle: the tokens that pass through the models; fine-tuning is left out."""
    settings = UnlearnConfig(forget="x", relearn_steps=0)
    data = text_classes(_texts(), ByteTokenizer(), 16, settings)
    model, seen = make_model("gelu", vocab_size=256).float(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    dense = Examined(model, data)
    standing = measure_standing(dense, dense, settings)
    assert standing.membership is not None
    assert sum(seen) == sum(len(part) for part in data.parts().values())
    few = dense.on("forget_train").first(3).losses_N
    torch.testing.assert_close(few, losses(model, data.forget_train.first(3)))
    assert sum(seen) == sum(len(part) for part in data.parts().values()) + 3


def test_probe_finds_a_class_that_the_last_map_no_longer_names(classifier, digits):
    """Oracle: hidden layers that are bit for bit the old ones give the same probe."""
    settings = UnlearnConfig(forget=4, layers=0.5)
    data = image_classes(digits, settings)
    found = unlearn_model(classifier, data.forget_train.inputs, data.retain_train.inputs, settings)
    assert accuracy(found.model, data.forget_held) < 0.3
    assert probe(found.model, data) == probe(classifier, data) > 0.8


@pytest.mark.parametrize(
    ("trained", "held", "auc"),
    [
        ([1.0, 2.0], [3.0, 4.0], 1.0),
        ([3.0, 4.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [2.0, 4.0], 0.75),
        ([1.0, 1.0], [1.0, 1.0], 0.5),
        ([1.0, 2.0], [2.0], 0.75),
    ],
)
def test_membership_counts_pairs(trained, held, auc):
    """Oracle: the share of pairs in which the trained sample has the lower loss, ties half."""
    found = attack_membership(torch.tensor(trained), torch.tensor(held))
    assert found.auc == pytest.approx(auc)


def test_membership_beyond_chance_is_said():
    """Oracle: the standard error of the rank statistic on equal samples of 100 is 0.041."""
    generator = torch.Generator().manual_seed(0)
    same, other = torch.rand(100, generator=generator), torch.rand(100, generator=generator)
    assert attack_membership(same, other).error == pytest.approx(0.0409, abs=1e-3)
    assert not attack_membership(same, other).is_attackable
    assert attack_membership(same, other + 0.5).is_attackable


def test_relearning_counts_steps(classifier, digits):
    """Oracle: nothing forgotten takes 0 steps; examples of the class help, none at all do not."""
    settings = UnlearnConfig(forget=6, layers=1.0)
    data = image_classes(digits, settings)
    held = data.forget_held
    same = relearning_steps(classifier, classifier, data.forget_train, held, limit=3)
    assert same == 0
    found = unlearn_model(classifier, data.forget_train.inputs, data.retain_train.inputs, settings)
    few = shuffled(data.forget_train, 16, seed=0)
    before = found.model.linears[2].weight.clone()
    steps = relearning_steps(classifier, found.model, few, held, limit=60, lr=3e-3)
    assert steps is not None
    assert 1 <= steps <= 60
    assert torch.equal(found.model.linears[2].weight, before)
    assert relearning_steps(classifier, found.model, few, held, limit=60, lr=3e-3) == steps
    assert relearning_steps(classifier, found.model, few, held, limit=2, lr=1e-9) is None
    dense, now = Examined(classifier, data), Examined(found.model, data)
    settings = dataclasses.replace(settings, relearn_lr=3e-3, relearn_steps=60)
    told = measure_standing(now, dense, settings).relearning
    assert told.forget == steps == len(told.forget_curve) - 1
    assert told.forget_curve[0] == accuracy(found.model, held)
    assert told.forget_curve[-1] >= told.goal > max(told.forget_curve[:-1])
