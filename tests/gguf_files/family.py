"""What an entry of the table of GGUF families is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Config = Mapping[str, Any]
Back = Callable[[np.ndarray], Arrays]
Written = tuple[str, np.ndarray, Back]  # name in the file, array, way back from its values to the checkpoint's tensors


@dataclass(frozen=True)
class Family:
    """One family of transformers."""

    architecture: str
    overrides: Config = field(default_factory=dict)  # of the tiny configuration, where llama.cpp knows one way only
    engine: Config = field(default_factory=dict)  # more of them, where llama.cpp is to compute the same
    keys: Callable[[Config], Config] = lambda _: {}  # of the metadata, beside those that all families have
    turned: Callable[[Config, str, str, np.ndarray], Iterable[Written]] = lambda *_: ()
    named_as: str = ""  # the architecture whose names these are, where the gguf package lacks this one


def joined(join: Callable[[np.ndarray, np.ndarray], Arrays]) -> Back:
    """For two arrays of the file that are one tensor of the checkpoint."""
    first: list[np.ndarray] = []

    def back(value: np.ndarray) -> Arrays:
        return join(first.pop(), value) if first else first.append(value) or {}

    return back


def block(name: str) -> str:
    """The layer of a tensor, as the file names it."""
    return "blk." + re.search(r"layers\.(\d+)", name)[1]  # type: ignore[index]


def sigmoid(config: Config) -> Config:
    """The router's function."""
    return {"expert_gating_func": 2}


def rotated(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Rows of queries and keys as llama.cpp's rotary embedding wants them."""
    if not re.search(r"\.[qk]_proj\.weight", name):
        return
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    turned = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
    yield (
        stored_as,
        turned,
        lambda value: {name: value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)},
    )


def granite(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Gate and up, which checkpoints have in one; and rotated rows."""
    if name.endswith("input_linear.weight"):
        gate, up = np.split(array, 2, axis=-2)
        whole = joined(lambda gate, up: {name: np.concatenate((gate, up), axis=-2)})
        kind = "shexp" if "shared" in name else "exps"
        yield f"{block(name)}.ffn_gate_{kind}.weight", gate, whole
        yield f"{block(name)}.ffn_up_{kind}.weight", up, whole
    yield from rotated(config, stored_as, name, array)
