"""What a forward holds while it waits in front of a layer: kept on the device, else in memory, else in a file.

A waiting forward keeps its tensors in its own local variables (see frames.py) and hands some of them to the next layer.
Their storage is exchanged in place, and put back before the forward goes on. What was seen once stays known.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

SMALL = 100_000  # bytes; below this a tensor is not worth moving


class Parking:
    """Accounts for the tensors of all waiting forwards and moves what is beyond the limits."""

    def __init__(self, device: torch.device, device_limit: int, memory_limit: int, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.device_limit, self.memory_limit = device_limit, memory_limit
        self._known: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        self._bytes: dict[int, tuple[int, int, int]] = {}  # batch -> on the device, in memory, in files
        self.on_device = self.in_memory = self.in_files = 0
        self.spilled = 0  # bytes written to files so far

    def park(self, batch: int, held: Any) -> None:
        """A forward waits and holds these tensors. The oldest ones are moved first."""
        tensors = {id(tensor): tensor for tensor in self._alive(batch)}
        tensors |= {id(tensor): tensor for tensor in tensors_in(held) if _is_worth(tensor)}
        self._known[batch] = [weakref.ref(tensor) for tensor in tensors.values()]
        self._count(batch)
        for tensor in tensors.values():
            if tensor.device.type != "cpu" and self.on_device > self.device_limit:
                tensor.data = tensor.data.cpu()
                self._count(batch)
            if tensor.device.type == "cpu" and self.in_memory > self.memory_limit:
                self._to_file(tensor)
                self._count(batch)

    def unpark(self, batch: int) -> None:
        """The forward goes on: what it holds must be where the layer is. A file needs no moving back to memory."""
        for tensor in self._alive(batch):
            if tensor.device.type != self.device.type:
                tensor.data = tensor.data.to(self.device)

    def forget(self, batch: int) -> None:
        """The forward has ended."""
        self._known.pop(batch, None)
        self._count(batch)

    @property
    def held(self) -> int:
        """Bytes that the waiting forwards hold, wherever they are."""
        return self.on_device + self.in_memory + self.in_files

    def _alive(self, batch: int) -> list[torch.Tensor]:
        return [tensor for ref in self._known.get(batch, []) if (tensor := ref()) is not None]

    def _count(self, batch: int) -> None:
        """Bring the totals up to date for one batch; tensors that share their storage count once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self._alive(batch)}
        here = sum(storage.nbytes() for storage in storages.values() if storage.device.type != "cpu")
        memory = sum(s.nbytes() for s in storages.values() if s.device.type == "cpu" and s.filename is None)
        files = sum(s.nbytes() for s in storages.values() if s.device.type == "cpu" and s.filename is not None)
        before = self._bytes.pop(batch, (0, 0, 0))
        self._bytes[batch] = (here, memory, files)
        self.on_device += here - before[0]
        self.in_memory += memory - before[1]
        self.in_files += files - before[2]

    def _to_file(self, tensor: torch.Tensor) -> None:
        """Exchange a tensor's storage for a file that has no name any more: it goes when the tensor does."""
        if tensor.untyped_storage().filename is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        size = tensor.numel() * tensor.element_size()
        handle, name = tempfile.mkstemp(dir=self.folder, prefix="hidden-")
        try:
            os.posix_fallocate(handle, 0, size)  # a full disk must be an error here, not a bus error later
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            Path(name).unlink()
            with suppress(OSError):  # what an earlier run saved may lie there too
                self.folder.rmdir()
        mapped = mapped.view(tensor.shape)
        mapped.copy_(tensor.data)
        tensor.data = mapped
        self.spilled += size


def _is_worth(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() >= SMALL and not isinstance(tensor, torch.nn.Parameter)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
