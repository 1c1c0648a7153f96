"""The tensors that a waiting forward holds in the local variables of its functions, wherever in the model they are.

Hidden states are handed from layer to layer, but a forward keeps more: embeddings, and what a vision tower made of
images for layers to come. Unknown to the accounts, these would grow with every image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch.nn import Module

from moeprune.scoring.parking import tensors_in


def held_by(frame: FrameType | None, modules: Sequence[Module]) -> Iterator[torch.Tensor]:
    """Tensors in the local variables of this frame and of all that called it, in lists and dictionaries too.

    Not those that belong to one of the modules, such as a table that all forwards share.
    """
    shared = {tensor.untyped_storage().data_ptr() for module in modules for tensor in tensors_in(_own(module))}
    while frame is not None:
        variables = frame.f_locals
        for tensor in tensors_in(dict(variables)):
            if type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() not in shared:
                yield tensor
        with contextlib.suppress(
            ValueError, AttributeError
        ):  # from Python 3.13 on it is no copy, and cannot be cleared
            variables.clear()  # Python keeps this copy with the frame: it would hold what the function has let go
        frame = frame.f_back


def _own(module: Module) -> list[Any]:
    """What a module keeps, but for its parts."""
    return [value for name, value in vars(module).items() if name != "_modules"]
