"""Checkpoint folders of vision-language families as the hub has them, small enough for the tiny models.

A folder holds what a published one does: the tokenizer, the chat template and the image processor's settings. The real
processor of the family is made from them by the code that a run uses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import AutoTokenizer

from moeprune.scoring.calibration.batching import Batch
from moeprune.scoring.calibration.pixels import moved
from moeprune.scoring.calibration.processors import load_processor
from tests import tiny
from tests.scoring import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}PLACE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
START = ("<|pad|>", "<|im_start|>", "<|im_end|>")  # the tiny models' image token, 3, follows
PATCHES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}}


@dataclass(frozen=True)
class Family:
    """What tells one family's folder from another's."""

    processor: str
    image_processor: str
    place: str  # of an image, as the chat template writes it
    special: tuple[str, ...]  # tokens; the first stands for a piece of an image
    named: tuple[str, ...] = ()  # attributes of the tokenizer for the first special tokens
    settings: dict[str, Any] = field(default_factory=dict)
    processor_settings: dict[str, Any] = field(default_factory=dict)
    one_file: bool = False  # processor_config.json with the image processor inside, as transformers 5 saves
    needs_torchvision: bool = False
    budget: int = 0  # tokens of an image of any size; else one for each square of 2 x 2 patches
    model: dict[str, Any] = field(default_factory=dict)  # for tiny.make


QWEN = Family(
    "Qwen3VLProcessor",
    "Qwen2VLImageProcessorFast",
    "<|vision_start|><|image_pad|><|vision_end|>",
    ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    settings=PATCHES | {"temporal_patch_size": 2},
)
FAMILIES = {
    "qwen3_vl_moe": QWEN,
    "qwen3_5_moe": QWEN,
    "glm4v_moe": Family(
        "Glm4vProcessor",
        "Glm4vImageProcessor",
        "<|begin_of_image|><|image|><|end_of_image|>",
        ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>"),
        settings=PATCHES | {"temporal_patch_size": 2},
    ),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeProcessor",
        "Ernie4_5_VLMoeImageProcessor",
        "<|IMAGE_START|><|IMAGE|><|IMAGE_END|>",
        ("<|IMAGE|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
        tuple(f"{kind}{part}_token" for kind in ("image", "video") for part in ("", "_start", "_end")),
        settings=PATCHES,
    ),
    "gemma4": Family(
        "Gemma4Processor",
        "Gemma4ImageProcessor",
        "<|image|>",
        ("<|image|>", "<|boi|>", "<|eoi|>", "<|audio|>", "<|boa|>", "<|eoa|>", "<|video|>"),
        tuple(f"{kind}_token" for kind in ("image", "boi", "eoi", "audio", "boa", "eoa")),
        settings={"patch_size": 4, "max_soft_tokens": 70},
        one_file=True,
        budget=70,
        model={"vision_config": {"position_embedding_size": 128}},
    ),
    "kimi_k25": Family(
        "Kimi_K25Processor",
        "Kimi_K25ImageProcessor",
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        ("<|media_pad|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|video_pad|>"),
        settings={"patch_size": 4},
        needs_torchvision=True,
    ),
    "llama4": Family(
        "Llama4Processor",
        "Llama4ImageProcessor",
        "<|image|>",
        ("<|patch|>", "<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        settings={"size": {"height": 8, "width": 8}, "max_patches": 4},
        processor_settings={"patch_size": 4, "pixel_shuffle_ratio": 0.5},
        one_file=True,
        needs_torchvision=True,
        budget=5,  # up to four tiles and the whole, a token each
        model={"vision_config": {"intermediate_size": 128}},  # four pixels of 32 in one
    ),
}


def dress(folder: Path, name: str) -> Path:
    """Put beside a tiny model what a published one brings to see with."""
    family = FAMILIES[name]
    tokenizer = byte_tokenizer.plain(START + family.special)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE.replace("PLACE", family.place)
    tokenizer.save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told["extra_special_tokens"] = dict(zip(family.named, family.special, strict=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    images = {"image_processor_type": family.image_processor, **family.settings}
    if family.one_file:
        whole = {"processor_class": family.processor, "image_processor": images, **family.processor_settings}
        text, file = whole, "processor_config.json"
    else:
        text, file = images | {"processor_class": family.processor}, "preprocessor_config.json"
    (folder / file).write_text(json.dumps(text))
    return folder


def inputs(batch: Batch, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What a model of this type gets, as a run gives it; Llama 4's processor makes bfloat16 by itself."""
    return {name: moved(value, torch.device("cpu"), dtype) for name, value in batch.inputs.items()}


@cache
def processor(name: str) -> Any:
    """The family's processor, as a run makes it."""
    folder = dress(Path(mkdtemp(prefix=f"{name}-sight-")), name)
    return load_processor(AutoTokenizer.from_pretrained(folder), tiny.config(name), False)
