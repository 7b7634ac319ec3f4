"""State that accompanies a sequence beside its cache: evidence for policies, proofs, summaries.

A companion hears of every attention and every compaction, and is told when a sequence ends.
"""

# Legend: N queries, H query heads, D head width, R rows (layer-major), K key/value heads, V vocab.

import dataclasses
from collections.abc import Sequence as Rows

from torch import Tensor

from serve.engine.attention import Listener, Part
from serve.engine.request import Sequence
from serve.kv.view import CacheView


class Companion:
    """Base of all companions; each overrides what concerns it."""

    def attended(self, part: Part, sequences: Rows[Sequence]) -> Tensor | None:
        """Hear of an attention, twice where its step ran out of memory and had to run again.

        Args:
            part: The decode rows of a layer, or one prompt chunk.
            sequences: The sequence of each decode row; for a chunk the one it belongs to.

        Returns:
            Corrected outputs (N, H, D), or None to leave them.
        """
        return None

    def compacting(self, view: CacheView, sequences: Rows[Sequence], keep_RKS: Tensor) -> None:
        """Hear, before the data moves, which slots of some layers survive."""
        return

    def record(self, sequences: Rows[Sequence], logits_RV: Tensor) -> None:
        """Hear of the logits from which each sequence is about to get a token."""
        return

    def close(self, sequence: Sequence) -> None:
        """Hear that a sequence ended, or has to start again from its tokens."""
        return


class Companions:
    """All companions of an engine, in the order in which they hear of things."""

    def __init__(self, companions: Rows[Companion]) -> None:
        self.companions = list(companions)

    def listener(self, decodes: Rows[Sequence], chunks: Rows[Sequence]) -> Listener | None:
        """Return the listener of a step with these decode rows and prompt chunks."""
        return _StepListener(self.companions, decodes, chunks) if self.companions else None

    def compacting(self, view: CacheView, sequences: Rows[Sequence], keep_RKS: Tensor) -> None:
        """Tell all of a compaction that is about to happen."""
        for companion in self.companions:
            companion.compacting(view, sequences, keep_RKS)

    def record(self, sequences: Rows[Sequence], logits_RV: Tensor) -> None:
        """Tell all of the logits of the tokens to come."""
        for companion in self.companions:
            companion.record(sequences, logits_RV)

    def close(self, sequence: Sequence) -> None:
        """Tell all that a sequence ended or restarts."""
        for companion in self.companions:
            companion.close(sequence)


class _StepListener(Listener):
    def __init__(
        self, companions: Rows[Companion], decodes: Rows[Sequence], chunks: Rows[Sequence]
    ) -> None:
        self.companions, self.decodes, self.chunks = companions, decodes, chunks

    def attended(self, part: Part) -> Tensor:
        sequences = self.decodes if part.chunk is None else [self.chunks[part.chunk]]
        for companion in self.companions:
            corrected = companion.attended(part, sequences)
            if corrected is not None:
                part = dataclasses.replace(part, o_NHD=corrected)
        return part.o_NHD
