"""Our Lipschitz MLPs for images: hidden neurons, or MaxMin pairs of them."""

# Legend: N images, I inputs of a pruned map, O its outputs, K kept inputs.

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.classifier_certificate import ClassifierCertificate
from common.models import LipschitzMLP
from common.norms import EIGEN_MARGIN, round_up, spectral_norm
from compress.adapters.base import CertifiableAdapter, Stage
from compress.targets import Target


class ClassifierAdapter(CertifiableAdapter):
    """A ``LipschitzMLP``: the inputs of every matrix but the first can go."""

    reach = 2

    def targets(self) -> tuple[Target, ...]:
        """Return every hidden layer."""
        sizes, unit = self.model.sizes, 2 if self.model.activation == "maxmin" else 1
        return tuple(
            Target(
                name=f"linears.{index}",
                layer=index,
                kind="mlp",
                inputs=sizes[index],
                unit=unit,
                params=unit * (sizes[index - 1] + int(self.model.bias) + sizes[index + 1]),
                flops=unit * 2.0 * (sizes[index - 1] + sizes[index + 1]),
            )
            for index in range(1, len(sizes) - 1)
        )

    def inputs(self, batch: Tensor) -> Tensor:
        """Return flat images (N, I) on the device and in the type of the model."""
        return super().inputs(batch).flatten(1)

    def start(self, batch: Tensor) -> Tensor:
        """Return flat images (N, I) on the device and in the type of the model."""
        return self.inputs(batch)

    def stages(self) -> tuple[Stage, ...]:
        """Return one matrix after the other, each with its activation."""
        names = [(), *((target.name,) for target in self.targets())]
        return tuple(
            Stage(name, functools.partial(self._step, index)) for index, name in enumerate(names)
        )

    def module(self, target: Target) -> Any:
        """Return the matrix that reads the hidden layer."""
        return self.model.linears[target.layer]

    def cap(self, target: Target, kept_K: Tensor, tau: float) -> float:
        """Return the norm that keeps the product with the matrix before.

        Losing rows frees norm of that matrix, which is already refitted and capped itself, so
        ``tau=1`` never lets the product of all norms grow. A little is withheld for rounding to
        the stored type and for the distance of certified norms from true ones.
        """
        producer_OI = self.model.linears[target.layer - 1].weight
        module = self.module(target)
        narrow = spectral_norm(producer_OI[kept_K])
        if narrow == 0:
            return math.inf
        limit = tau * spectral_norm(module.weight) * spectral_norm(producer_OI) / narrow
        rank = min(len(kept_K), module.out_features)
        rounding = torch.finfo(module.weight.dtype).eps / 2 * math.sqrt(rank)
        return limit / (1 + rounding + 4 * EIGEN_MARGIN)

    def amplifications(self, certificate: ClassifierCertificate) -> dict[str, float]:
        """Return the product of the norms that follow, see ``Adapter``."""
        gain, gains = 1.0, {}
        for target in reversed(self.targets()):
            gains[target.name] = gain
            gain = round_up(gain * certificate.norms[target.layer])
        return gains

    @torch.no_grad()
    def cut(self, kept: Mapping[str, Tensor]) -> LipschitzMLP:
        """Return the MLP with only the kept neurons; see ``Adapter.cut``."""
        sizes = list(self.model.sizes)
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        for target in self.targets():
            if target.name not in kept:
                continue
            kept_K = kept[target.name]
            sizes[target.layer] = len(kept_K)
            consumer, producer = f"linears.{target.layer}.", f"linears.{target.layer - 1}."
            state[consumer + "weight"] = state[consumer + "weight"][:, kept_K].contiguous()
            for name in ("weight", "bias"):
                if producer + name in state:
                    state[producer + name] = state[producer + name][kept_K].contiguous()
        # Initial weights are overwritten; drawing them must not disturb the caller's random state.
        with torch.random.fork_rng(devices=[]):
            model = LipschitzMLP(dataclasses.replace(self.model.config, sizes=tuple(sizes)))
        model = model.to(self.model.linears[0].weight)
        model.load_state_dict(state)
        for old, new in zip(self.model.parameters(), model.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        return model.train(self.model.training)

    def _step(self, index: int, stream: Tensor) -> Tensor:
        stream = self.model.linears[index](stream)
        is_last = index + 1 == len(self.model.linears)
        return stream if is_last else self.model.activate(stream)
