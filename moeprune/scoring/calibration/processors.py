"""The model's own processor, which makes tokens and pixels of text and images; with torchvision or without.

Most processors of vision models also hold a part for videos (or sound), which wants libraries that a picture does not.
Where those are missing, the processor is put together without that part: transformers' image processors run on Pillow.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from moeprune import console
from moeprune.errors import InputError, MachineError

PACKAGES = {"pillow": "PIL", "torchvision": "torchvision"}  # what the processors of vision models are made of
UNUSABLE = (ImportError, OSError, ValueError, KeyError, AttributeError, TypeError)
TOKEN_NAMES = ("image_token_id", "image_token_index", "video_token_id", "media_placeholder_token_id")


def load_processor(tokenizer: Any, config: Any, trust_remote_code: bool) -> Any:
    """The model's own processor, from the folder that its tokenizer came from."""
    if hasattr(tokenizer, "tokenizer"):  # it is one
        return tokenizer
    from transformers import AutoProcessor

    folder = tokenizer.name_or_path
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNUSABLE as error:
        whole = error
    try:
        made = _for_images_alone(folder, tokenizer, config)
    except UNUSABLE:
        raise _refusal(folder, whole) from None
    console.say(f"images: {type(made.image_processor).__name__} without the processor's video part, unusable here")
    return made


def _for_images_alone(folder: str, tokenizer: Any, config: Any) -> Any:
    """The processor that transformers names for the model, with the parts that text and images need."""
    from transformers import PROCESSOR_MAPPING, AutoImageProcessor

    kind = _with_gaps(PROCESSOR_MAPPING[type(config)])
    needed = {"tokenizer": tokenizer, "image_processor": AutoImageProcessor.from_pretrained(folder)}
    settings, _ = kind.get_processor_dict(folder)
    return kind.from_args_and_dict([needed.get(name) for name in kind.get_attributes()], settings)


def _refusal(folder: str, error: Exception) -> Exception:
    missing = [package for package, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return InputError(f"{folder}: no image processor can be loaded there: {' '.join(str(error).split())[:300]}")
    return MachineError(
        f"the image processor of this model needs {' and '.join(missing)}, not installed here; "
        "install them (torchvision in the build that fits torch), or give calibration data without images"
    )


def _with_gaps(kind: Any) -> Any:
    """The same class of processor, in which a part may be missing."""

    def checked(self: Any, name: str, part: Any) -> Any:
        return None if part is None else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": checked})


def image_tokens(config: Any, processor: Any) -> set[int]:
    """The ids that stand for pieces of images in the model's input. What the model says goes before its processor."""
    for place in (config, processor):
        found = {getattr(place, name, None) for name in TOKEN_NAMES}
        if tokens := {token for token in found if isinstance(token, int)}:
            return tokens
    return set()
