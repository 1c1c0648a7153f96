"""What the scoring tests share: tiny checkpoints, batches with padding and domains, a scoring run, the plain model."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers

from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.metadata import Sums
from moeprune.scoring.adapters import attached, find_sites
from moeprune.scoring.calibration.batching import Batch
from moeprune.scoring.observer import Observer
from moeprune.scoring.run import forward
from moeprune.scoring.streaming import LayerStream
from moeprune.settings import Settings
from tests import tiny

DOMAINS = ("first", "second")


@cache
def checkpoint(family: str, **overrides: Any) -> Path:
    """A tiny checkpoint that all tests of a process share."""
    folder = Path(mkdtemp(prefix=f"{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return tiny.make(family, folder, **overrides)


def batches(count: int = 3, length: int = 12, vocabulary: int = 250) -> list[Batch]:
    """Batches of two rows, one of each domain; the second row of the middle one ends in padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids_BT = torch.randint(10, vocabulary, (2, length), generator=generator)
        mask_BT = torch.ones_like(ids_BT)
        if index == 1:
            mask_BT[1, length - 5 :] = 0
        domain_BT = torch.where(mask_BT.bool(), torch.tensor([[0], [1]]), -1).to(torch.int16)
        slice_BT = torch.full_like(ids_BT, index % 4).to(torch.int8)
        made.append(Batch({"input_ids": ids_BT, "attention_mask": mask_BT}, domain_BT, slice_BT))
    return made


def settings(tmp_path: Path, **values: Any) -> Settings:
    return Settings(device="cpu", dtype="float32", output_path=tmp_path, **values)


def score(folder: Path, data: list[Batch], tmp_path: Path, mode: str = "routed") -> Sums:
    """The sums of a streamed run."""
    opened = open_checkpoint(folder)
    stream = LayerStream(opened, settings(tmp_path))
    observer = Observer(stream, data, DOMAINS, mode)
    find_sites(observer, understand(opened).blocks)
    last = max((site.layer for site in observer.sites), key=stream.order.__getitem__)
    with attached(observer):
        stream.run([forward(batch) for batch in data], watchers=(observer,), until=last)
    return observer.result()


def plain(folder: Path) -> transformers.PreTrainedModel:
    """The model in memory. Its parameters get memory of their own, as a matrix product may round by alignment."""
    architecture = tiny.read_config(folder)["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
