"""A model too large for memory, asked layer by layer: every weight is read once for all batches and all variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moeprune import console
from moeprune.checking import masking
from moeprune.checking.samples import Batch
from moeprune.checking.subject import Head, head_logits, judged_states, vocabulary
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.scoring.loading import OUTSIDE
from moeprune.scoring.streaming import LayerStream
from moeprune.settings import Settings


class Streamed:
    """See `subject.Subject`; needs memory for one layer, the head, and the hidden states of waiting batches."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.stream = LayerStream(open_checkpoint(folder), settings)
        self.model = self.stream.model
        self.vocabulary = vocabulary(self.model)

    def variants(self, batches: Sequence[Batch], keeps: Sequence[masking.Keep | None]) -> list[list[torch.Tensor]]:
        """See `Subject`. One pass over the weights; hidden states beyond their budget wait on the disk."""

        def forward(batch: Batch, keep: masking.Keep | None) -> Callable[[PreTrainedModel], torch.Tensor]:
            def run(model: PreTrainedModel) -> torch.Tensor:
                with masking.keeping(keep):
                    return judged_states(model, batch)

            return run

        jobs = [forward(batch, keep) for keep in keeps for batch in batches]
        masked = any(keep is not None for keep in keeps)
        with masking.maskable(masking.routed_blocks(self.model) if masked else ()):
            results = self.stream.run(jobs, watchers=(_Layers(len(self.stream.layers)),))
        states = [result for result in results if result is not None]
        return [states[start : start + len(batches)] for start in range(0, len(states), len(batches))]

    @contextmanager
    def head(self) -> Iterator[Head]:
        """See `Subject`."""
        self.stream.loader.load(OUTSIDE)
        self.model.tie_weights()
        try:
            yield lambda states_ND: head_logits(self.model, states_ND)
        finally:
            self.stream.loader.drop(OUTSIDE)


class _Layers:
    """A watcher of the stream that shows one line of progress."""

    def __init__(self, count: int) -> None:
        self.bar = console.Progress("layer", count)

    def batch_begins(self, batch: int) -> None:
        """Nothing to show."""

    def layer_begins(self, layer: str) -> None:
        """Nothing to show."""

    def layer_ends(self, layer: str) -> None:  # noqa: ARG002
        """One more."""
        self.bar.step()
