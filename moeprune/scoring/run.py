"""Scoring as one call: stream the calibration batches through the model, watch the experts, return the sums."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedModel

from moeprune import console
from moeprune.checkpoint.families import Layout
from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import InputError, reason
from moeprune.metadata import Sums
from moeprune.scoring.adapters import attached, find_sites
from moeprune.scoring.calibration.batching import Batch
from moeprune.scoring.calibration.load import Calibration
from moeprune.scoring.calibration.pixels import moved
from moeprune.scoring.entrance import also_given, entrance
from moeprune.scoring.gguf import tokenizer as gguf_tokenizer
from moeprune.scoring.memory import peak
from moeprune.scoring.observer import Observer
from moeprune.scoring.resume import SavedState
from moeprune.scoring.streaming import Forward, LayerStream
from moeprune.settings import Settings


def load_tokenizer(folder: Path, settings: Settings) -> Any:
    """The tokenizer of a model folder, or of a GGUF file."""
    if folder.suffix == ".gguf":
        return gguf_tokenizer.load(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
        if len(tokenizer) < 2:  # transformers makes an empty one where the files are missing
            raise ValueError("its vocabulary is empty")
        return tokenizer
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise InputError(
            f"{folder} has no tokenizer that transformers {transformers.__version__} can load ({reason(error)}); "
            "copy tokenizer.json and tokenizer_config.json from the original model"
        ) from None


def score_experts(
    settings: Settings, checkpoint: Checkpoint, layout: Layout, calibration: Calibration, fingerprint: str
) -> Sums:
    """The sums of every block that the model runs."""
    stream = LayerStream(checkpoint, settings)
    observer = Observer(stream, calibration.batches, calibration.domains, settings.scoring_mode)
    find_sites(observer, layout.blocks)
    if not observer.sites:
        raise InputError(
            f"{type(stream.model).__name__} has no module that runs the experts of {layout.blocks[0].name}; "
            "add an adapter to moeprune/scoring/adapters.py"
        )
    last = max((site.layer for site in observer.sites), key=stream.order.__getitem__)
    state = SavedState(settings.output_path / "reap_state", fingerprint, observer.state)
    if state.layer is not None:
        observer.restore(state.sums())
    progress = LayerProgress(stream, calibration.batches, last, state.layer)
    forwards = [forward(batch) for batch in calibration.batches]
    with attached(observer):
        stream.run(forwards, watchers=(observer, progress), until=last, state=state)
    state.remove()
    return observer.result()


def forward(batch: Batch) -> Forward[None]:
    """The forward of one batch."""

    def run(model: PreTrainedModel) -> None:
        called = entrance(model)
        # model.device may be that of a layer that is not loaded.
        device = next(called.get_input_embeddings().parameters()).device
        inputs = {name: moved(value, device, model.dtype) for name, value in batch.inputs.items()}
        called(**inputs, **also_given(model, inputs), use_cache=False)

    return run


class LayerProgress:
    """A line for the person who waits: layer, speed, memory, time left."""

    def __init__(self, stream: LayerStream, batches: list[Batch], last: str, saved: str | None) -> None:
        before = 0 if saved is None else stream.order[saved] + 1
        self.bar = console.Progress("layer", max(1, stream.order[last] + 1 - before))
        self.tokens = sum(int((batch.domain_BT >= 0).sum()) for batch in batches)
        self.device = stream.device
        self.begun = time.monotonic()

    def batch_begins(self, batch: int) -> None:
        """Nothing to show."""

    def layer_begins(self, _layer: str) -> None:
        """The clock of this layer starts."""
        self.begun = time.monotonic()

    def layer_ends(self, _layer: str) -> None:
        """One more layer."""
        seconds = max(time.monotonic() - self.begun, 1e-9)
        self.bar.step(f"{self.tokens / seconds:,.0f} tokens/s, {console.size(peak(self.device))} at most")
