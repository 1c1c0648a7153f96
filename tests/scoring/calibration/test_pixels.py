"""Pixels exist only while something computes with them, and are then what they were when the run began."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError
from moeprune.scoring.calibration.load import Calibration, load_calibration
from moeprune.scoring.calibration.pixels import Pixels, joined, moved, values
from moeprune.scoring.run import forward
from moeprune.scoring.streaming import LayerStream
from moeprune.settings import Settings
from tests import tiny
from tests.scoring import streamed, vision
from tests.scoring.calibration.test_images import mixed, noise

PATCH = 3 * 2 * 4 * 4  # values of a patch of the tiny Qwen3-VL: colours, two frames, 4 x 4 pixels


def calibrated(folder: Path, **settings: int) -> Calibration:
    processor, config = vision.processor("qwen3_vl_moe"), tiny.config("qwen3_vl_moe")
    return load_calibration(Settings(calibration_path=mixed(folder), **settings), processor, config)


def alive() -> int:
    """Tensors of patches that take memory, whoever holds them."""
    gc.collect()
    found = (each for each in gc.get_objects() if type(each) is torch.Tensor)
    return sum(each.ndim == 2 and each.shape[1] == PATCH and each.is_floating_point() for each in found)


class Watch:
    """How many tensors of patches there are when a batch goes on and when a layer begins or ends."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def batch_begins(self, _batch: int) -> None:
        self.seen.append(alive())

    layer_begins = layer_ends = batch_begins


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_waiting_forward_holds_pixels(tmp_path, dtype):
    before = alive()
    batches = calibrated(tmp_path / "data", batch_size=1).batches
    assert sum("pixel_values" in batch.inputs for batch in batches) == 3
    opened = open_checkpoint(streamed.checkpoint("qwen3_vl_moe"))
    watch = Watch()
    stream = LayerStream(opened, Settings(device="cpu", dtype=dtype, output_path=tmp_path))
    stream.run([forward(batch) for batch in batches], watchers=(watch,))
    assert len(watch.seen) > 10
    assert set(watch.seen) == {before}


def test_pixels_are_made_of_the_file_whenever_they_are_needed(tmp_path):
    """Two operations, two readings, one value; what comes out is a plain tensor."""
    (batch,) = calibrated(tmp_path / "data").batches
    pixels = batch.inputs["pixel_values"]
    assert isinstance(pixels, Pixels)
    assert pixels.shape == (len(values(pixels)), PATCH)
    assert type(pixels + 0) is torch.Tensor
    assert torch.equal(pixels + 0, values(pixels))
    half = moved(pixels, torch.device("cpu"), torch.bfloat16)
    assert half.to(torch.bfloat16) is half  # nothing is made where nothing would change
    assert torch.equal(half.view(-1), values(pixels).bfloat16().view(-1))


def test_stand_ins_and_tensors_are_joined_in_order():
    parts = [torch.ones(2, 3), Pixels(lambda: torch.full((1, 3), 5.0), torch.empty(1, 3)), torch.zeros(1, 3)]
    assert joined(parts).shape == (4, 3)
    assert values(joined(parts))[:, 0].tolist() == [1, 1, 5, 0]


@pytest.mark.parametrize("change", ["another picture", "another size", "gone", "damaged"])
def test_an_image_that_changes_during_the_run_ends_it(tmp_path, change):
    (batch,) = calibrated(tmp_path / "data").batches
    path = tmp_path / "data" / "images" / "1.png"
    if change.startswith("another"):
        noise(path, 64 if change == "another picture" else 32, 64, seed=9)
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"changed while it was in use|though it could be used before"):
        batch.inputs["pixel_values"] + 0


def test_the_fingerprint_follows_the_pixels(tmp_path):
    same = [calibrated(tmp_path / str(number)).fingerprint for number in range(2)]
    noise(tmp_path / "0" / "images" / "1.png", 64, 64, seed=9)
    settings = Settings(calibration_path=str(tmp_path / "0"))
    other = load_calibration(settings, vision.processor("qwen3_vl_moe"), tiny.config("qwen3_vl_moe"))
    assert same[0] == same[1] != other.fingerprint
