"""Processors of vision-language families, small enough for the tiny models, with a byte-level tokenizer each."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers

from tests.scoring import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}PLACE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
# The tiny models know one image token, 3; the tokens that a family needs besides follow it.
START = ("<|pad|>", "<|im_start|>", "<|im_end|>")
SMALL = {"patch_size": 4, "merge_size": 2}
SIZES = {"size": {"shortest_edge": 64, "longest_edge": 4096}}


def _tokenizer(special: tuple[str, ...], **names: str) -> Any:
    made = byte_tokenizer.plain(START + special)
    for name, token in names.items():
        made.__dict__ |= {name: token, f"{name}_id": made.convert_tokens_to_ids(token)}
    return made


class StandIn:
    """Qwen's image processor, which needs nothing but Pillow, and its rule for tokens written out again.

    One token for each square of 2 x 2 patches. The real processor wants torchvision, for videos.
    """

    image_token_id = 3
    chat_template = TEMPLATE.replace("PLACE", "<|vision_start|><|image_pad|><|vision_end|>")

    def __init__(self) -> None:
        module = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
        self.image_processor = module.Qwen2VLImageProcessorPil(temporal_patch_size=2, **SMALL, **SIZES)
        self.tokenizer = _tokenizer(("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"))

    def __call__(self, text: list[str], images: list[Any], return_tensors: str, add_special_tokens: bool) -> Any:
        """The inputs of one sample."""
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        pieces = text[0].split("<|image_pad|>")
        counts = [int(t * h * w) // 4 for t, h, w in seen["image_grid_thw"]]
        filled = pieces[0] + "".join("<|image_pad|>" * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
        ids = torch.tensor([self.tokenizer(filled, add_special_tokens=add_special_tokens)["input_ids"]])
        return {"input_ids": ids, "attention_mask": ids.ge(0).long(), "mm_token_type_ids": ids.eq(3).long(), **seen}


def qwen() -> Any:
    """Qwen3-VL and Qwen3.5."""
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(temporal_patch_size=2, **SMALL, **SIZES),
        tokenizer=_tokenizer(("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")),
        video_processor=transformers.Qwen3VLVideoProcessor(temporal_patch_size=2, **SMALL),
        chat_template=TEMPLATE.replace("PLACE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def glm() -> Any:
    """GLM-4.5V."""
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(temporal_patch_size=2, **SMALL, **SIZES),
        tokenizer=_tokenizer(("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>")),
        video_processor=transformers.Glm4vVideoProcessor(temporal_patch_size=2, **SMALL),
        chat_template=TEMPLATE.replace("PLACE", "<|begin_of_image|><|image|><|end_of_image|>"),
    )


def ernie() -> Any:
    """ERNIE-4.5-VL."""
    special = ("<|IMAGE|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO|>", "<|VIDEO_START|>", "<|VIDEO_END|>")
    kinds = (
        "image_token",
        "image_start_token",
        "image_end_token",
        "video_token",
        "video_start_token",
        "video_end_token",
    )
    return transformers.Ernie4_5_VLMoeProcessor(
        image_processor=transformers.Ernie4_5_VLMoeImageProcessor(**SMALL, **SIZES),
        tokenizer=_tokenizer(special, **dict(zip(kinds, special, strict=True))),
        video_processor=transformers.Ernie4_5_VLMoeVideoProcessor(),
        chat_template=TEMPLATE.replace("PLACE", "<|IMAGE_START|><|IMAGE|><|IMAGE_END|>"),
    )


def kimi() -> Any:
    """Kimi-K2.5."""
    processing = importlib.import_module("transformers.models.kimi_k25.processing_kimi_k25")
    image = importlib.import_module("transformers.models.kimi_k25.image_processing_kimi_k25")
    video = importlib.import_module("transformers.models.kimi_k25.video_processing_kimi_k25")
    special = ("<|media_pad|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|video_pad|>")
    return processing.Kimi_K25Processor(
        image_processor=image.Kimi_K25ImageProcessor(patch_size=4),
        tokenizer=_tokenizer(special, image_token=special[0], video_token=special[4]),
        video_processor=video.Kimi_K25VideoProcessor(),
        chat_template=TEMPLATE.replace("PLACE", "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"),
    )


# Tiny model -> its processor, and whether that needs torchvision.
FAMILIES = {
    "qwen3_vl_moe with Pillow alone": ("qwen3_vl_moe", StandIn, False),
    "qwen3_vl_moe": ("qwen3_vl_moe", qwen, True),
    "qwen3_5_moe": ("qwen3_5_moe", qwen, True),
    "glm4v_moe": ("glm4v_moe", glm, True),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", ernie, True),
    "kimi_k25": ("kimi_k25", kimi, True),
}
