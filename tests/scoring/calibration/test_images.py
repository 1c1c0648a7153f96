"""Calibration images: opened safely, counted as image tokens, apart from every other document."""

from __future__ import annotations

import importlib.util
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from moeprune import console
from moeprune.errors import InputError, MachineError
from moeprune.scoring.calibration.images import BadImage, Reader, placed
from moeprune.scoring.calibration.load import load_calibration
from moeprune.scoring.calibration.samples import Sample
from moeprune.settings import Settings
from tests import tiny
from tests.scoring import byte_tokenizer, vision

SIZES = [(40, 24), (64, 64), (16, 48)]


def noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height * width * 3,), generator=generator, dtype=torch.uint8)
    Image.frombytes("RGB", (width, height), pixels.numpy().tobytes()).save(path)
    return path


def png_that_claims(path: Path, width: int, height: int, text: bytes = b"") -> Path:
    """A few dozen bytes whose header promises a huge picture, or a note that is huge once it is unpacked."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"zTXt", b"note\0\0" + text) if text else b"")
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )
    return path


def mixed(folder: Path, seed: int = 0) -> str:
    """Three images and two texts, as V11's calibration_data.json and as lines of text."""
    (folder / "images").mkdir(parents=True)
    for i, (width, height) in enumerate(SIZES):
        noise(folder / "images" / f"{i}.png", width, height, seed if i == 1 else i)
    items = [{"id": str(i), "image": f"images/{i}.png", "regions": ["a tree", "a car"]} for i in range(3)]
    (folder / "calibration_data.json").write_text(json.dumps(items))
    (folder / "text.jsonl").write_text('{"text": "just words"}\n{"prompt": "1+1=", "answer": "2"}\n')
    return str(folder)


# ------------------------------------------------------------------------------------------------- through models


@pytest.fixture(scope="module", params=vision.FAMILIES)
def family(request):
    name, family = request.param, vision.FAMILIES[request.param]
    if family.needs_torchvision and importlib.util.find_spec("torchvision") is None:
        pytest.skip("transformers has no image processor of this family that does without torchvision")
    return tiny.build(name, **family.model), vision.processor(name), family.budget


def test_image_tokens_are_counted_as_such(family, tmp_path):
    model, processor, budget = family
    calibration = load_calibration(Settings(calibration_path=mixed(tmp_path / "data")), processor, model.config)
    assert calibration.domains == ("calibration_data", "calibration_data [image]", "text")
    found = dict.fromkeys(range(3), 0)
    for batch in calibration.batches:
        assert torch.equal(batch.domain_BT == 1, (batch.inputs["input_ids"] == 3) & (batch.domain_BT >= 0))
        assert torch.equal(batch.domain_BT != -1, batch.inputs["attention_mask"].bool())
        for domain in found:
            found[domain] += int((batch.domain_BT == domain).sum())
    summary = calibration.summary["domains"]
    assert [summary[name]["tokens"] for name in calibration.domains] == list(found.values())
    assert summary["calibration_data [image]"]["samples"] == 3
    pixels = sum(width * height for width, height in SIZES)
    if budget:
        assert 3 * budget / 2 <= found[1] <= 3 * budget
    else:  # at least one token per 16 x 16 pixels and at most one per 8 x 8
        assert pixels / 256 <= found[1] <= pixels / 64 + 3


def test_changing_an_image_moves_no_other_document(family, tmp_path):
    model, processor, _ = family

    def logits(seed):
        settings = Settings(calibration_path=mixed(tmp_path / str(seed), seed))
        (batch,) = load_calibration(settings, processor, model.config).batches
        with torch.no_grad():
            return model(**vision.inputs(batch), use_cache=False).logits, batch

    (before_BTV, batch), (after_BTV, _) = logits(7), logits(8)
    moved = []
    for b, mask_T in enumerate(batch.inputs["attention_mask"].bool()):
        same = torch.allclose(before_BTV[b][mask_T], after_BTV[b][mask_T], rtol=1e-4, atol=1e-4)
        moved += [] if same else [b]
    assert len(batch.domain_BT) == 5
    assert moved == [0]  # the largest image makes the longest document, which comes first


def test_images_give_the_same_logits_alone_and_together(family, tmp_path):
    model, processor, _ = family
    path = mixed(tmp_path / "data")

    def first_rows(batch_size):
        found = {}
        for batch in load_calibration(
            Settings(calibration_path=path, batch_size=batch_size), processor, model.config
        ).batches:
            with torch.no_grad():
                logits_BTV = model(**vision.inputs(batch), use_cache=False).logits
            for ids, mask, logits_TV in zip(
                *(batch.inputs[k] for k in ("input_ids", "attention_mask")), logits_BTV, strict=True
            ):
                found[tuple(ids[mask.bool()].tolist())] = logits_TV[mask.bool()]
        return found

    together, alone = first_rows(8), first_rows(1)
    assert together.keys() == alone.keys()
    for key, logits_TV in together.items():
        torch.testing.assert_close(logits_TV, alone[key], rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- bad images


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="with torchvision it works")
def test_a_processor_that_needs_torchvision_says_so():
    with pytest.raises(MachineError, match=r"needs torchvision, not installed here; install"):
        vision.processor("kimi_k25")


@pytest.fixture
def qwen():
    return vision.processor("qwen3_vl_moe"), tiny.config("qwen3_vl_moe")


def bad_images(folder: Path) -> dict[str, str]:
    noise(folder / "good.png", 16, 16)
    whole = noise(folder / "whole.png", 32, 32).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.png").write_text("not an image")
    png_that_claims(folder / "bomb.png", 60_000, 60_000)
    png_that_claims(folder / "half.png", 12_000, 10_000)
    png_that_claims(folder / "flood.png", 4, 4, text=zlib.compress(b"\0" * 100_000_000))
    return {
        "missing.png": "missing",
        "cut.png": "damaged or not an image",
        "words.png": "damaged or not an image",
        "bomb.png": "more pixels than any picture|claims 60000 x 60000",
        "flood.png": "damaged or not an image",
        "half.png": "claims 12000 x 10000 pixels",
        "https://example.org/a.png": "an address, not a file",
    }


def test_each_bad_image_is_named_with_its_reason(tmp_path):
    for name, reason in bad_images(tmp_path).items():
        reader = Reader(10**6, 0)
        with pytest.raises(BadImage, match=reason):
            reader.open(name if "://" in name else str(tmp_path / name), "x.jsonl:1")
        assert name in reader.bad[0]


def test_bad_images_end_the_run_unless_allowed(tmp_path, qwen):
    names = [*bad_images(tmp_path), "good.png"]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"image": name, "prompt": "What is it?"}) + "\n" for name in names))
    with pytest.raises(InputError, match=r"7 calibration images cannot be used: .*--bad-images 7") as caught:
        load_calibration(Settings(calibration_path=str(path)), *qwen)
    assert "\n" not in str(caught.value)
    calibration = load_calibration(Settings(calibration_path=str(path), bad_images=7), *qwen)
    assert calibration.summary["skipped"] == {"an image that cannot be used": 7}
    assert len(calibration.summary["bad_images"]) == 7
    assert any("7 calibration images cannot be used" in line for line in console.warnings())


def test_images_inside_parquet(tmp_path, qwen):
    import pyarrow.parquet

    content = noise(tmp_path / "a.png", 24, 24).read_bytes()
    rows = [{"image": {"bytes": content, "path": "a.png"}, "question": "What?", "answer": "Noise."}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    summary = load_calibration(Settings(calibration_path=str(tmp_path / "x.parquet")), *qwen).summary
    assert summary["domains"]["x [image]"] == {"samples": 1, "tokens": 9}


def test_large_images_are_scaled_down(tmp_path):
    image = Reader(10_000, 0).open(str(noise(tmp_path / "a.png", 400, 200)), "")
    assert 9_000 < image.width * image.height <= 10_000
    assert abs(image.width - 2 * image.height) <= 2


def test_a_sample_that_is_too_long_with_its_image_is_not_cut(tmp_path, qwen):
    path = mixed(tmp_path / "data")
    summary = load_calibration(Settings(calibration_path=path, max_seq_len=140), *qwen).summary
    assert summary["skipped"] == {"longer than max_seq_len with its images": 1}
    assert summary["cut_to_max_seq_len"] == 0


def test_a_model_without_eyes_gets_the_text_and_a_warning(tmp_path):
    path = mixed(tmp_path / "data")
    calibration = load_calibration(
        Settings(calibration_path=path), byte_tokenizer.of_family("chatml"), tiny.config("qwen3_moe")
    )
    assert calibration.domains == ("calibration_data", "text")
    assert any("of 3 samples only the text is used" in line for line in console.warnings())


def test_images_find_their_places():
    marked = Sample("d", messages=({"role": "user", "content": "Left <image> right <image>"},), images=("a", "b"))
    kinds = [part.get("text", part["type"]) for part in placed(marked).messages[0]["content"]]
    assert kinds == ["Left ", "image", " right ", "image"]
    unmarked = Sample("d", messages=({"role": "user", "content": "What?"},), images=("a",))
    assert [part["type"] for part in placed(unmarked).messages[0]["content"]] == ["image", "text"]
    with pytest.raises(BadImage, match="1 images for 2 places"):
        placed(Sample("d", messages=marked.messages, images=("a",)))
