"""How much memory there is, and whether a layer fits into it; asked before anything is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from pathlib import Path

import torch

from moeprune.console import size, warn
from moeprune.errors import MachineError
from moeprune.scoring.loading import OUTSIDE, LayerLoader

CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))
KEEP = {-4: 0, -1: -1}  # settings of the GNU C library: M_MMAP_MAX, M_TRIM_THRESHOLD
GROWTH = 32_000_000  # bytes that a process may grow by before it hands back what it does not use
HIDDEN_SHARE = 0.5  # of the device memory left beside two layers: hidden states; the rest is for computing


def available() -> int:
    """Bytes of memory that can still be taken here, within the limit of a container."""
    free = 0
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(FileNotFoundError, ValueError):  # "max" where there is no limit
        limit, used = (int(path.read_text(encoding="ascii")) for path in CGROUP)
        free = min(free or limit, limit - used)
    return free or 2**62  # unknown on this system: let it try


def peak(device: torch.device) -> int:
    """The most memory in bytes that this process has taken, on the device that computes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(FileNotFoundError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # elsewhere; may count the parent process too


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    with contextlib.suppress(FileNotFoundError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return 0


class FreedMemory:
    """Freed memory stays with the process, as every batch takes the same large tensors in every layer.

    By itself the GNU C library hands each of them back to the system, which clears it page by page for the next batch:
    a fifth of the processor time of a forward. What it keeps comes in more and more pieces from layer to layer, so it
    goes back when it has grown.
    """

    def __init__(self) -> None:
        self._level = 0
        with contextlib.suppress(OSError, AttributeError):  # another C library
            library = ctypes.CDLL(None)
            for setting, value in KEEP.items():
                library.mallopt(setting, value)

    def layer_done(self) -> None:
        """A layer is dropped: the memory of the process after it should be that after the layer before."""
        if self._level and resident() > self._level + GROWTH:
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            self._level = 0
        self._level = self._level or resident()


def check_memory(loader: LayerLoader, device: torch.device) -> bool:
    """Refuse a model whose single layer does not fit; say whether there is room to read one layer ahead."""
    largest = max(loader.layers, key=lambda layer: loader.nbytes[layer])
    layer, stored, outside = loader.nbytes[largest], loader.stored_bytes[largest], loader.nbytes[OUTSIDE]
    direct, on_cpu = loader.direct.nbytes(loader.wanted[largest]), device.type == "cpu"
    free = available()
    # What is converted lies there as stored, as one tensor for each expert where that is not the same, and stacked.
    need = outside + layer + stored + (layer - direct if loader.dequantizes else 0) if on_cpu else direct + 2 * stored
    ahead = stored + (direct if on_cpu else 0)
    if need > free:
        raise MachineError(
            f"{largest} needs {size(need)} of memory while it is loaded, and {size(free)} are free here; "
            "a machine with more memory can do it"
        )
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
        if outside + 2 * layer > room:
            raise MachineError(
                f"{largest} needs {size(outside + 2 * layer)} of device memory and {size(room)} are free; "
                "set REAP_DEVICE=cpu or use a larger device"
            )
    if need + ahead > free:
        warn(f"memory is short ({size(free)} free): the next layer is not read while one computes")
        return False
    return True


def device_limit(loader: LayerLoader, device: torch.device) -> int:
    """Bytes of hidden states that may stay on the device; without one there is no limit here."""
    if device.type != "cuda":
        return 2**62
    layers = 2 * max(loader.nbytes[layer] for layer in loader.layers)
    return max(0, int((torch.cuda.mem_get_info(device)[0] - layers - loader.nbytes[OUTSIDE]) * HIDDEN_SHARE))
