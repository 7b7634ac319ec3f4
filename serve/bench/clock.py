"""Seconds of the bench: which clock is right depends on where the work is done."""

import time
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since some moment; waits for the device's queued work first.

    One CPU thread is timed in processor seconds: those of an idle machine, on a busy one too.
    Processor seconds of several threads add up, and a GPU's work costs none of them: there the
    wall counts.

    Attributes:
        kind: ``processor`` or ``wall``.
        device: Where the work is done.
    """

    kind: Literal["processor", "wall"]
    device: torch.device

    @classmethod
    def of(cls, device: str | torch.device) -> "Clock":
        """Return the clock that is right for work on a device."""
        device = torch.device(device)
        is_single = device.type == "cpu" and torch.get_num_threads() == 1
        return cls("processor" if is_single else "wall", device)

    def __call__(self) -> float:
        """Return the seconds, when all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.kind == "processor" else time.perf_counter()

    @property
    def keys(self) -> dict[str, str]:
        """What a row says of its clock: the device and which seconds were counted."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            threads = torch.get_num_threads()
            name = f"{self.device.type}, {threads} thread{'s' * (threads > 1)}"
        return {"device": name, "clock": self.kind}
