"""Go on after a kill: what the last saved layer put out for every batch, and the sums up to it.

On the next run every layer of that stack up to the saved one just hands out its saved output, so nothing before it is
loaded or computed, and the layers behind it run as usual. That needs no knowledge of the model, and gives the same
bits. A state is written into a folder of its own; renaming state.json over the old one makes it valid.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moeprune import console
from moeprune.metadata import sync, write_json

SHARE = 0.03  # of the time may go into saving; a layer that took less is not saved
FIRST_SAVE_S = 0.5  # assumed cost of the first save, before one was measured


class SavedState:
    """The folder with the state of one run."""

    def __init__(self, folder: Path, fingerprint: str, collect: Callable[[], Any]) -> None:
        self.folder, self.fingerprint, self.collect = folder, fingerprint, collect
        self.layer: str | None = None  # the last saved layer of an earlier run
        self._data: Path | None = None
        self._writing: Path | None = None
        self._cost_s, self._last = FIRST_SAVE_S, time.monotonic()
        self._clock = 0.0
        self._find()

    def _find(self) -> None:
        """Take up the state of an earlier run, or remove what is left of another one."""
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            found = {}
        if found.get("fingerprint") == self.fingerprint and (self.folder / str(found.get("data"))).is_dir():
            self.layer, self._data = found["layer"], self.folder / found["data"]
            console.say(f"going on behind {self.layer}, which an earlier run saved in {self.folder}")
        self._tidy()

    def _tidy(self) -> None:
        """Only the valid state stays."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.is_dir() and path != self._data:
                    shutil.rmtree(path)
                elif path.is_file() and not (path.name == "state.json" and self._data):
                    path.unlink()

    def sums(self) -> Any:
        """What was saved with the layer."""
        assert self._data is not None
        return torch.load(self._data / "sums.pt", weights_only=True)

    def output(self, batch: int, device: torch.device) -> Any:
        """The saved layer's output for a batch. It is mapped copy-on-write, as the model may write into it."""
        assert self._data is not None
        path = self._data / f"{batch:06d}.pt"
        return torch.load(path, weights_only=True, map_location=device, mmap=device.type == "cpu")

    def begin(self, layer: str, held_bytes: int) -> bool:
        """A layer is about to run: whether its outputs, about as large as what the forwards hold, are to be kept."""
        if time.monotonic() - self._last < self._cost_s / SHARE:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < 2 * held_bytes:
            console.warn(
                f"{console.size(free)} are free in {self.folder}, too little to save {console.size(held_bytes)} of "
                "hidden states: if this run is killed, it begins anew"
            )
            return False
        self._writing = self.folder / f"behind-{layer}"
        self._writing.mkdir(parents=True, exist_ok=True)
        self._clock = 0.0
        return True

    def put(self, batch: int, output: Any) -> None:
        """Keep the output of the layer that runs."""
        assert self._writing is not None
        begun = time.monotonic()
        save(compact(output), self._writing / f"{batch:06d}.pt")
        self._clock += time.monotonic() - begun

    def commit(self, layer: str) -> None:
        """All batches have passed the layer: from now on the run goes on from here."""
        assert self._writing is not None
        begun = time.monotonic()
        save(self.collect(), self._writing / "sums.pt")
        sync(self._writing)
        state = {"fingerprint": self.fingerprint, "layer": layer, "data": self._writing.name}
        write_json(self.folder / "state.json", state)
        self._data, self._writing = self._writing, None
        self._tidy()
        self._last = time.monotonic()
        self._cost_s = self._clock + self._last - begun

    def remove(self) -> None:
        """The run is complete, or its state is of no use."""
        shutil.rmtree(self.folder, ignore_errors=True)


def save(value: Any, path: Path) -> None:
    """Write tensors, and wait until they are on the disk."""
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def compact(value: Any) -> Any:
    """The same nested value on the CPU; a slice of a larger storage becomes a tensor of its own."""
    if isinstance(value, torch.Tensor):
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value.cpu() if whole else value.cpu().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(compact(item) for item in value)
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    return value
