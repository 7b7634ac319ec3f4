"""What pruning a classifier does on held-out images: changes, a bound for each image, accuracy."""

# Legend: N images, I pixels, L matrices, V classes.

import dataclasses
import math

import torch
from torch import Tensor

from common.images import Images
from compress.deviation.classifier import ClassifierDeviation, Form, activated


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """Figures of held-out images; both networks run in float64.

    Attributes:
        deltas_LN: l2 change of each matrix's output at the pruned network's input.
        bound_N: Bound on the RMS change of the logits, for that image only: measured changes of
            the matrices, proved propagation; the smaller of forms A and B.
        logits_N: The RMS change of the logits over the classes.
        margins_N: Dense logit of the first minus that of the second class.
        top1_agreement: Share of images whose class is unchanged.
        accuracy: Share of right answers after pruning.
        accuracy_before: And before.
        size: Largest RMS of the dense logits: the scale of their rounding.
    """

    deltas_LN: Tensor
    bound_N: Tensor
    logits_N: Tensor
    margins_N: Tensor
    top1_agreement: float
    accuracy: float
    accuracy_before: float
    size: float


def look(deviation: ClassifierDeviation, activation: str, images: Images) -> Seen:
    """Run both networks on the validation part of some images.

    Args:
        deviation: Certified effect of the pruning; holds both networks.
        activation: Of the classifier.
        images: Pixels in [0, 1] with their classes.
    """
    pixels_NI, labels_N = images.val_NI.double(), images.val_labels_N
    old_NV, deltas_a_LN = _run(deviation.form_a, activation, pixels_NI)
    new_NV, deltas_b_LN = _run(deviation.form_b, activation, pixels_NI)
    top_N2 = old_NV.topk(2, dim=1).values
    return Seen(
        deltas_LN=deltas_b_LN,
        bound_N=torch.minimum(
            _carried(deviation.form_a, deltas_a_LN), _carried(deviation.form_b, deltas_b_LN)
        ),
        logits_N=(old_NV - new_NV).square().mean(1).sqrt(),
        margins_N=top_N2[:, 0] - top_N2[:, 1],
        top1_agreement=_share(old_NV, new_NV.argmax(1)),
        accuracy=_share(new_NV, labels_N),
        accuracy_before=_share(old_NV, labels_N),
        size=float(old_NV.square().mean(1).sqrt().max()),
    )


def _run(form: Form, activation: str, x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of one form's network and the changes of the matrices at its inputs."""
    deltas = []
    for index, (matrix, change) in enumerate(zip(form.matrices, form.changes, strict=True)):
        x_NI = activated(x_NI, activation) if index else x_NI
        deltas.append((x_NI @ change.weight_OI.T + change.bias_O).norm(dim=1))
        x_NI = x_NI @ matrix.weight_OI.T + matrix.bias_O
    return x_NI, torch.stack(deltas)


def _carried(form: Form, deltas_LN: Tensor) -> Tensor:
    """Return the RMS bound per image of changes measured there."""
    gains_L = torch.tensor(form.gains, dtype=torch.float64)
    return gains_L @ deltas_LN / math.sqrt(len(form.matrices[-1].bias_O))


def _share(logits_NV: Tensor, classes_N: Tensor) -> float:
    return float((logits_NV.argmax(1) == classes_N).double().mean())
