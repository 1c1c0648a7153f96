"""How fast this machine computes, reads and writes, measured in two seconds or so.

torch is not imported here: a product of matrices by numpy stands for it on a CPU, and a process of its own asks it on a
GPU. Scoring reaches a share of that, because its products are smaller and it does other things besides.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from moeprune.console import size

SIDE = 1024  # of the matrices
COMPUTE_S = 0.5
DISK_S = 1.0  # for reading, and once more for writing
SAMPLE_BYTES = 256_000_000
CHUNK_BYTES = 8_000_000
ENOUGH_BYTES = 32_000_000  # a smaller file says little about a disk
GPU_PATIENCE_S = 120.0  # importing torch and waking a GPU

# What scoring reaches of numpy's product in float32; measured on 2 CPU cores by benchmarks/forecast.py: 0.40 to 0.54 in
# float32, 0.69 to 0.94 in bfloat16 where the CPU has instructions for it.
SHARE, SHARE_16_BIT = 0.45, 0.8
SHARE_GPU = 0.1  # of a product in bfloat16; not measured
ASSUMED_FLOPS = 50e12  # of scoring on a device that could not be measured
CPU_FLAGS = Path("/proc/cpuinfo")
ASSUMED_BYTES = 1e9

GPU_PROGRAM = """
import json, time, torch
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
def once():
    torch.cuda.synchronize(); begun = time.perf_counter(); a @ b; torch.cuda.synchronize()
    return 2 * 8192**3 / (time.perf_counter() - begun)
for _ in range(3): once()
print(json.dumps([sorted(once() for _ in range(9))[4], torch.cuda.get_device_name()]))
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """Operations or bytes per second, and where the number is from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast tokens are scored, weights are read, and a result is written."""

    compute: Rate
    read: Rate
    write: Rate


def computing(device: str, width: int) -> Rate:
    """Operations per second of scoring with numbers of so many bytes, for the device that --device names."""
    has_gpu = device in {"auto", "cuda"} and shutil.which("nvidia-smi") is not None
    if not has_gpu and device in {"auto", "cpu"}:
        flops, share = products(), scoring_share(width)
        source = f"measured: {share:.0%} of the {flops / 1e12:.3g} TFLOP/s of a product of matrices on this CPU"
        return Rate(share * flops, source)
    found = gpu_products() if has_gpu else None
    if found is None:
        kind = "a GPU" if device in {"auto", "cuda"} else device
        return Rate(ASSUMED_FLOPS, f"assumed for {kind}, which could not be measured here")
    flops, name = found
    source = f"{SHARE_GPU:.0%}, which is assumed, of the {flops / 1e12:.3g} TFLOP/s measured for a product on {name}"
    return Rate(SHARE_GPU * flops, source)


def scoring_share(width: int) -> float:
    """What scoring reaches of numpy's product on this CPU with numbers of so many bytes.

    A CPU that multiplies in bfloat16 has avx512_bf16, amx_bf16 or bf16 among its flags.
    """
    knows_16_bit = CPU_FLAGS.is_file() and "bf16" in CPU_FLAGS.read_text(encoding="utf-8", errors="replace")
    return SHARE_16_BIT if width == 2 and knows_16_bit else SHARE


def products() -> float:
    """Operations per second of products of matrices in float32, on as many cores as numpy takes; the median of them."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((SIDE, SIDE), dtype=np.float32) for _ in range(2))
    a @ b  # threads are started
    times: list[float] = []
    end = time.perf_counter() + COMPUTE_S
    while not times or time.perf_counter() < end:
        begun = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begun)
    return float(2 * SIDE**3 / statistics.median(times))


def gpu_products() -> tuple[float, str] | None:
    """Operations per second of a product in bfloat16 on the GPU, and its name; None where torch cannot say."""
    if find_spec("torch") is None:
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-c", GPU_PROGRAM], capture_output=True, text=True, timeout=GPU_PATIENCE_S
        )
        flops, name = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError, OSError):
        return None
    return float(flops), str(name)


def disk(weights: Sequence[Path], output: Path) -> tuple[Rate, Rate]:
    """Bytes per second of reading and of writing.

    Read is the model's largest file, where it is here and large enough, else what is written for a moment where the
    output goes.
    """
    here = max((path for path in weights if path.is_file()), key=lambda path: path.stat().st_size, default=None)
    large = here if here is not None and here.stat().st_size >= ENOUGH_BYTES else None
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            written = Rate(*_write(file.fileno(), place))
            read = Rate(*_read(file.fileno(), "a temporary file")) if large is None else None
    except OSError as error:
        assumed = Rate(ASSUMED_BYTES, f"assumed: {place} could not be written ({error.strerror})")
        written, read = assumed, assumed if large is None else None
    if read is None and large is not None:
        with large.open("rb") as weights_file:
            read = Rate(*_read(weights_file.fileno(), large.name))
    assert read is not None
    return read, written


def _write(handle: int, place: Path) -> tuple[float, str]:
    """Bytes per second until they are on the disk."""
    chunk = os.urandom(CHUNK_BYTES)  # nothing that could be compressed on the way

    def step(_at: int) -> int:
        return os.write(handle, chunk)

    begun = time.perf_counter()
    done, _ = _repeat(step, min(SAMPLE_BYTES, shutil.disk_usage(place).free // 10))
    os.fsync(handle)
    return done / (time.perf_counter() - begun), f"measured on {size(done)} in {place}"


def _read(handle: int, name: str) -> tuple[float, str]:
    """Bytes per second past the page cache, as far as the system lets go of it."""
    length = min(os.fstat(handle).st_size, SAMPLE_BYTES)
    _forget(handle, length)
    cached = _is_cached(handle, length)
    buffer = bytearray(CHUNK_BYTES)
    done, seconds = _repeat(lambda at: os.preadv(handle, [buffer], at), length)
    where = "from memory, for the system did not let go of it" if cached else "past the page cache"
    return done / seconds, f"measured on {size(done)} of {name}, {where}"


def _repeat(step: Callable[[int], int], length: int) -> tuple[int, float]:
    """Steps until so many bytes are done or the time is up; the bytes and the seconds."""
    begun, done = time.perf_counter(), 0
    while done < max(length, 1):
        count = step(done)
        done += count
        if not count or time.perf_counter() - begun > DISK_S:
            break
    return done, max(time.perf_counter() - begun, 1e-9)


def _forget(handle: int, length: int) -> None:
    """Ask the system to drop its copy of the file in memory; not every system can be asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, length, os.POSIX_FADV_DONTNEED)


def _is_cached(handle: int, length: int) -> bool:
    """Whether most of some places of the file could be read without waiting for the disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    hits, places = 0, [length * part // 16 for part in range(16)]
    for place in places:
        try:
            hits += os.preadv(handle, [bytearray(512)], place, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            pass
        except OSError:  # this file system cannot be asked
            return True
    return hits > len(places) // 2
