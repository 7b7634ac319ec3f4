"""Base of the observers: tensors of each watched layer with one entry per sequence."""

# Legend: R rows.

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from serve.decoder import Decoder, LayerSpec
from serve.kv.observer import Observer

Tensors = dict[str, Tensor]
FIRST_ROWS = 1  # a row of query moments may be megabytes


class RowObserver(Observer):
    """Keeps rows, doubled when they run out; subclasses define what a row holds.

    Layers whose scores no policy gives (sliding windows, positional heads alone) are not watched:
    nothing is observed of them.

    Args:
        decoder: Supplies shapes, device and dtype.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.device, self.dtype = decoder.device, decoder.dtype
        self.specs = {
            index: spec
            for index, spec in enumerate(decoder.layers)
            if spec.content_heads and spec.sliding_window is None
        }
        self.state: dict[int, Tensors] = {}
        self.rows = 0
        self._free: list[int] = []
        self._indexed: tuple[Sequence[int], Tensor] | None = None

    @abstractmethod
    def empty(self, spec: LayerSpec, rows: int) -> Tensors:
        """Return what rows of a layer hold before anything was observed, rows first."""

    @torch.inference_mode()
    def open(self) -> int:
        """Start a sequence with nothing observed and return its row."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        for layer, spec in self.specs.items():
            for name, value in self.empty(spec, 1).items():
                own = self.state[layer][name][row]
                # A row may have outgrown its first size; what it lacks is zero.
                own.zero_()
                own[tuple(map(slice, value.shape[1:]))] = value[0]
        return row

    def close(self, row: int) -> None:
        """End a sequence; its row may be given to another."""
        self._free.append(row)

    @torch.inference_mode()
    def observed(self, layers: Sequence[int], rows: Sequence[int]) -> Mapping[str, Tensor]:
        """Return what rows hold, one entry per (layer, sequence) pair; empty if not watched."""
        index = self.index(rows)
        parts = [self.state[layer] for layer in layers if layer in self.specs]
        if not parts:
            return {}
        names = parts[0]
        return {name: torch.cat([part[name][index] for part in parts]) for name in names}

    def watched(self, layers: Sequence[int], count: int) -> Iterator[tuple[int, slice]]:
        """Yield the watched layers of a view with their rows, of ``count`` sequences each."""
        for number, layer in enumerate(layers):
            if layer in self.specs:
                yield layer, slice(number * count, (number + 1) * count)

    def index(self, rows: Sequence[int]) -> Tensor:
        """Return rows as an index tensor; all layers of a step ask for the same."""
        if self._indexed is None or self._indexed[0] != list(rows):
            index = torch.tensor(rows, dtype=torch.int64, device=self.device)
            self._indexed = list(rows), index
        return self._indexed[1]

    def _grow(self) -> None:
        extra = max(self.rows, FIRST_ROWS)
        for layer, spec in self.specs.items():
            fresh = self.empty(spec, extra)
            old = self.state.get(layer)
            if old is not None:
                fresh = {name: _append(old[name], value) for name, value in fresh.items()}
            self.state[layer] = fresh
        self._free += range(self.rows + extra - 1, self.rows - 1, -1)
        self.rows += extra


def _append(old: Tensor, fresh: Tensor) -> Tensor:
    """Append rows, enlarged with zeros where the old ones have outgrown them."""
    rows = old.new_zeros(len(fresh), *old.shape[1:])
    rows[(slice(None), *map(slice, fresh.shape[1:]))] = fresh
    return torch.cat((old, rows))
