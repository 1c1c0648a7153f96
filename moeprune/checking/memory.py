"""How much memory loaded models may take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from moeprune.checking.subject import device
from moeprune.settings import Settings

MARGIN = 1.3  # activations, caches and logits beside the weights


def free(settings: Settings) -> int:
    """Bytes that are free on the device that computes; a container's limit counts."""
    if device(settings) == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return min(_available(), _container_limit())


def _available() -> int:
    path = Path("/proc/meminfo")
    if path.exists():
        rows = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _container_limit() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)
