"""What waiting forwards hold: all of it is known, so that memory stays flat however many images there are."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from greenlet import getcurrent, greenlet

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.scoring import parking
from moeprune.scoring.calibration.batching import Batch, unpacked
from moeprune.scoring.frames import held_by
from moeprune.scoring.streaming import LayerStream
from tests.scoring import streamed
from tests.scoring.test_images_scored import DOMAINS, FAMILIES, documents

LIMIT = 20_000  # bytes of hidden states in memory
WORTH = 1_000  # bytes from which a tensor is moved


@pytest.fixture(autouse=True)
def small_tensors_are_worth_it(monkeypatch):
    monkeypatch.setattr(parking, "SMALL", WORTH)


def batches(family: str, count: int) -> list[Batch]:
    return [batch for _ in range(count) for batch in unpacked(documents(FAMILIES[family]), DOMAINS, 1, 0)]


def in_memory() -> int:
    """Bytes of all tensors that are worth moving and are not in files, whoever holds them; parameters aside."""
    gc.collect()
    found = (each for each in gc.get_objects() if type(each) is torch.Tensor and each.device.type == "cpu")
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in found}
    return sum(s.nbytes() for s in storages.values() if s.filename is None and s.nbytes() >= WORTH)


class Most:
    """The most that was in memory when a layer began, and no batch was running."""

    def __init__(self) -> None:
        self.bytes = 0

    def layer_begins(self, _layer: str) -> None:
        self.bytes = max(self.bytes, in_memory())

    def batch_begins(self, _batch: int) -> None:
        pass

    def layer_ends(self, _layer: str) -> None:
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_flat_and_the_result_is_that_of_the_model_in_memory(family, tmp_path):
    folder, most = streamed.checkpoint(family), []
    for count in (2, 12):
        data, before = batches(family, count), in_memory()
        stream = LayerStream(open_checkpoint(folder), streamed.settings(tmp_path, hidden_memory=LIMIT))
        watch = Most()
        found = stream.run(
            [lambda model, b=b: model(**b.inputs, use_cache=False).logits for b in data], watchers=[watch]
        )
        most.append(watch.bytes - before)
    assert most[1] - most[0] < LIMIT  # ten times the images and texts
    model = streamed.plain(folder)
    with torch.no_grad():
        for batch, logits in zip(data, found, strict=True):
            assert torch.equal(logits, model(**batch.inputs, use_cache=False).logits)


def test_looking_finds_nested_tensors_and_keeps_none():
    scheduler, own = getcurrent(), torch.zeros(7)

    def function(argument: torch.Tensor) -> None:
        result = {"nested": [torch.ones(9)], "other": "text"}
        scheduler.switch(weakref.ref(result["nested"][0]))
        del result
        scheduler.switch(len(argument))

    waiting = greenlet(function)
    kept = waiting.switch(own)
    assert sorted(len(tensor) for tensor in held_by(waiting.gr_frame, [])) == [7, 9]
    waiting.switch()
    assert kept() is None
    assert [len(tensor) for tensor in held_by(waiting.gr_frame, [])] == [7]


def test_tensors_of_the_model_are_not_those_of_a_forward():
    module, scheduler = torch.nn.Module(), getcurrent()
    module.register_buffer("table", torch.zeros(11))
    module.cached = torch.zeros(13)

    def function() -> None:
        held = module.table, module.cached[2:], torch.zeros(3)
        scheduler.switch()
        del held

    waiting = greenlet(function)
    waiting.switch()
    assert [len(tensor) for tensor in held_by(waiting.gr_frame, [module])] == [3]
