"""A small trained classifier of digits, and second moments of two classes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.images import Images, load_digits
from common.models import LipschitzMLP
from compress.unlearning.edits import Classes


@pytest.fixture(scope="session")
def digits() -> Images:
    """Return the digits that scikit-learn carries."""
    return load_digits()


@pytest.fixture(scope="session")
def classifier(digits: Images) -> LipschitzMLP:
    """Return a 64-48-48-10 MLP trained on the digits for a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LipschitzMLP((64, 48, 48, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(digits.train_NI), digits.train_labels_N).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def make_classes():
    """Return ``(seed, ...) -> (Classes, forget rows, retain rows)`` of correlated activations."""

    def make(
        seed: int = 0, *, inputs: int = 12, outputs: int = 5, rows: int = 400, unit: int = 1
    ) -> tuple[Classes, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        normal = {"generator": generator, "dtype": torch.float64}
        mixing = torch.randn(inputs, inputs, **normal)
        forget = torch.relu(torch.randn(rows, inputs, **normal) @ mixing + 1)
        retain = torch.relu(torch.randn(rows, inputs, **normal) @ mixing.T - 0.2)
        classes = Classes(
            forget_II=forget.T @ forget / rows,
            forget_mean_I=forget.mean(0),
            retain_II=retain.T @ retain / rows,
            retain_mean_I=retain.mean(0),
            weight_IO=torch.randn(inputs, outputs, **normal),
            unit=unit,
        )
        return classes, forget, retain

    return make
