"""The four parts of the data: the class to forget and the rest, trained on and held out."""

# Legend: N samples (images or sequences), I pixels, T tokens.

import dataclasses

import torch
from torch import Tensor

from common.document_classes import DocumentClasses
from common.errors import DataError
from common.images import Images
from common.tokenizer import Tokenizer
from compress.unlearning.settings import UnlearnConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Samples:
    """Inputs and what is to be predicted from them.

    Attributes:
        inputs: Images (N, I) or tokens (N, T).
        targets: Classes (N) or next tokens (N, T), int64.
        bytes_per_token: Of the text; None for images.
    """

    inputs: Tensor
    targets: Tensor
    bytes_per_token: float | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    def first(self, count: int) -> "Samples":
        """Return at most so many samples, spread evenly over all."""
        if count >= len(self):
            return self
        index = spread(len(self), count)
        return dataclasses.replace(self, inputs=self.inputs[index], targets=self.targets[index])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassData:
    """One class and the rest.

    Attributes:
        forget_train: The class, as trained on.
        forget_held: The class, held out.
        retain_train: The rest, as trained on.
        retain_held: The rest, held out.
        is_unseen: Whether the model has never seen ``forget_held``.
        rule: What belongs to which part, in words.
    """

    forget_train: Samples
    forget_held: Samples
    retain_train: Samples
    retain_held: Samples
    is_unseen: bool
    rule: str

    @property
    def is_text(self) -> bool:
        """Whether the samples are sequences of tokens."""
        return self.forget_train.bytes_per_token is not None

    def parts(self) -> dict[str, Samples]:
        """Return the parts by name: ``forget_train`` and so on."""
        names = ("forget_train", "forget_held", "retain_train", "retain_held")
        return {name: getattr(self, name) for name in names}


def image_classes(images: Images, settings: UnlearnConfig) -> ClassData:
    """Divide images: one class by its number; training and validation split as they are.

    Raises:
        DataError: for a class that the images do not have, in either split.
    """
    name = settings.forget
    label = int(name) if str(name).isdecimal() else -1
    splits = {
        "train": (images.train_NI, images.train_labels_N),
        "held": (images.val_NI, images.val_labels_N),
    }
    parts = {}
    for split, (pixels_NI, labels_N) in splits.items():
        is_class_N = labels_N == label
        if not is_class_N.any() or is_class_N.all():
            raise DataError(
                f"unlearn.forget={name}: expected the number of a class, 0 to "
                f"{images.classes - 1}, with images of it and of others in both splits"
            )
        for part, mask_N in (("forget", is_class_N), ("retain", ~is_class_N)):
            parts[f"{part}_{split}"] = Samples(inputs=pixels_NI[mask_N], targets=labels_N[mask_N])
    return ClassData(**parts, is_unseen=True, rule="training and validation split of the images")


def text_classes(
    texts: DocumentClasses, tokenizer: Tokenizer, length: int, settings: UnlearnConfig
) -> ClassData:
    """Cut the texts of a corpus into sequences, evenly spread over each part.

    Args:
        texts: The class and the rest.
        tokenizer: Of the model.
        length: Tokens per sequence.
        settings: ``tokens`` of the training parts, ``eval_tokens`` of the held-out ones.

    Raises:
        DataError: when a part holds no whole sequence.
    """
    parts = {}
    for name in ("forget_train", "forget_held", "retain_train", "retain_held"):
        limit = settings.tokens if name.endswith("train") else settings.eval_tokens
        text = getattr(texts, name)
        ids = tokenizer.encode(text)
        if len(ids) <= length:
            raise DataError(
                f"unlearn.forget={settings.forget}: {len(ids)} tokens of {name.replace('_', ' ')} "
                f"text, expected more than {length}; choose a larger class or lower unlearn.length"
            )
        windows_NT = torch.from_numpy(ids).unfold(0, length + 1, length)
        parts[name] = Samples(
            inputs=windows_NT[:, :-1],
            targets=windows_NT[:, 1:],
            bytes_per_token=len(text) / len(ids),
        ).first(max(1, limit // length))
    return ClassData(**parts, is_unseen=texts.is_unseen, rule=texts.rule)


def spread(total: int, count: int) -> Tensor:
    """Return so many indices, or all if there are fewer, spread evenly over ``total``."""
    count = min(count, total)
    return torch.linspace(0, total - 1, count, dtype=torch.float64).round().long()


def shuffled(samples: Samples, count: int, seed: int) -> Samples:
    """Return at most so many samples, drawn without replacement."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count]
    return dataclasses.replace(
        samples, inputs=samples.inputs[order], targets=samples.targets[order]
    )
