"""Images of calibration samples: opened safely, and turned into tokens by the model's own processor.

An image that cannot be used is never dropped in silence: each is named, and more than `bad_images` end the run.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moeprune import console
from moeprune.errors import InputError, MachineError
from moeprune.scoring.calibration.samples import Sample
from moeprune.scoring.calibration.templates import Refused, Rules, render

BOMB_PIXELS = 100_000_000  # declared by the file's header; such an image is refused before it is unpacked
FILE_LIMIT = 200_000_000  # bytes of one image file
PLACEHOLDER = "<image>"  # marks the place of an image in plain text, as LLaVA's data does


class BadImage(Exception):
    """An image that cannot be used; the message says which and why."""


@dataclass
class Reader:
    """Opens images, scales down large ones, and keeps account of those that cannot be used."""

    max_pixels: int
    allowed_bad: int
    bad: list[str] = field(default_factory=list)

    def open(self, source: str | bytes, place: str) -> Any:
        """An image in RGB, from a path or from the bytes of a file."""
        name = source if isinstance(source, str) else f"{place} (inside the file)"
        try:
            return self._scaled(_unpacked(source, name))
        except BadImage as problem:
            self.bad.append(str(problem))
            raise

    def _scaled(self, image: Any) -> Any:
        width, height = image.size
        if width * height > self.max_pixels:
            share = (self.max_pixels / (width * height)) ** 0.5
            image = image.resize((max(1, int(width * share)), max(1, int(height * share))))
        return image

    def judge(self) -> None:
        """End the run when more images were unusable than the setting allows; else say which they were."""
        if not self.bad:
            return
        listed = "; ".join(self.bad[:5]) + (f"; and {len(self.bad) - 5} more" if len(self.bad) > 5 else "")
        if len(self.bad) > self.allowed_bad:
            raise InputError(
                f"{len(self.bad)} calibration images cannot be used: {listed}. "
                f"Mend them, or go on without their samples: --bad-images {len(self.bad)}"
            )
        console.warn(f"{len(self.bad)} calibration images cannot be used, their samples are left out: {listed}")


def _unpacked(source: str | bytes, name: str) -> Any:
    if importlib.util.find_spec("PIL") is None:
        raise MachineError("calibration images need the package pillow; install it, or give text only")
    from PIL import Image

    if isinstance(source, str) and "://" in source:
        raise BadImage(f"{name}: an address, not a file; images are not downloaded")
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    try:
        size = len(source) if isinstance(source, bytes) else file.stat().st_size
        if size > FILE_LIMIT:
            raise BadImage(f"{name}: a file of {console.size(size)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            opened = Image.open(file)
        with opened as image:
            if image.width * image.height > BOMB_PIXELS:
                raise BadImage(f"{name}: claims {image.width} x {image.height} pixels")
            return image.convert("RGB")
    except FileNotFoundError:
        raise BadImage(f"{name}: missing") from None
    except Image.DecompressionBombError:
        raise BadImage(f"{name}: claims more pixels than any picture has") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:  # what damaged files raise in Pillow
        raise BadImage(f"{name}: damaged or not an image ({type(error).__name__})") from None


def takes_images(config: Any) -> bool:
    """Whether the model has a vision tower."""
    return any(getattr(config, name, None) is not None for name in ("vision_config", "vit_config", "vision_model"))


def placed(sample: Sample) -> Sample:
    """The sample as chat whose content names the place of every image; images without a place come first."""
    messages = [dict(message) for message in sample.messages or ()]
    count = 0
    for message in messages:
        if isinstance(message["content"], str) and PLACEHOLDER in message["content"]:
            message["content"] = _split(message["content"])
        if not isinstance(message["content"], str):
            count += sum(part["type"] == "image" for part in message["content"])
    missing = len(sample.images) - count
    user = next((message for message in messages if message["role"] == "user"), None)
    if missing < 0 or user is None:
        raise BadImage(f"{sample.origin}: {len(sample.images)} images for {count} places")
    content = user["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    user["content"] = [{"type": "image"}] * missing + parts
    return replace(sample, messages=tuple(messages))


def _split(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece.strip())
    return parts


def without_images(sample: Sample) -> Sample:
    """The text of the sample alone, for a model that does not see."""

    def text_of(content: Any) -> str:
        if isinstance(content, str):
            return content.replace(PLACEHOLDER, "")
        return "\n".join(part["text"] for part in content if part["type"] == "text")

    messages = tuple({**message, "content": text_of(message["content"])} for message in sample.messages or ())
    return replace(sample, messages=messages, images=())


def encode_images(sample: Sample, processor: Any, rules: Rules, reader: Reader) -> Mapping[str, torch.Tensor]:
    """What the model gets for one sample: tokens with the images' places filled in, and the images themselves."""
    sample = placed(sample)
    opened = [reader.open(source, sample.origin) for source in sample.images]
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if not template:
        raise Refused("the model has images but no chat template that says where they go")
    text, _ = render(sample, processor.tokenizer, rules, template)
    try:
        made = processor(text=[text], images=opened, return_tensors="pt", add_special_tokens=False)
    except (ValueError, IndexError, TypeError) as error:
        reader.bad.append(f"{sample.origin}: the processor refuses it: {str(error)[:120]}")
        raise BadImage(reader.bad[-1]) from None
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def encode_again(sample: Sample, processor: Any, rules: Rules, max_pixels: int) -> Mapping[str, torch.Tensor]:
    """The same a second time, when the model is to see it."""
    try:
        return encode_images(sample, processor, rules, Reader(max_pixels, 0))
    except BadImage as problem:
        raise InputError(f"{problem}, though it could be used before; leave the images in place during a run") from None


def split_inputs(
    made: Mapping[str, torch.Tensor],
) -> tuple[list[int], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Token ids, what has one value per token, and what is stacked image by image."""
    ids = made["input_ids"][0].tolist()
    others = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
    aligned = {name: value[0] for name, value in others.items() if value.shape == (1, len(ids))}
    return ids, aligned, {name: value for name, value in others.items() if name not in aligned}
