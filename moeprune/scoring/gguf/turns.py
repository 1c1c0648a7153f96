"""The way back from what llama.cpp's converter does to values, and from parameters that it takes apart.

Legend: C channels, K steps of a convolution, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moeprune.scoring.gguf.facts import Facts

Turn = Callable[[Facts, torch.Tensor], torch.Tensor]
Join = Callable[[Facts, list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Made:
    """A parameter that the file holds in several tensors: their leaves, and what puts them together."""

    leaves: tuple[str, ...]
    join: Join


def less_one(_facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """A norm that is stored as w + 1."""
    return value - 1


def logarithm(_facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """A_log, which is stored as exp(A_log); in 64 bits, so that it does not depend on whose logarithm it is."""
    return torch.log(value.cpu().double()).to(value)


def decay(facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """A_log, which is stored as -exp(A_log)."""
    return logarithm(facts, -value)


def logarithm_of_heads(facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """A_log, which is stored as exp(A_log) in a column."""
    return flat(facts, logarithm(facts, value))


def decay_of_heads(facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """The same where the file has it as a column."""
    return flat(facts, decay(facts, value))


def decay_in_grid(facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """The same as [1, 1, H, 1], of which a file may leave axes of one out."""
    return decay(facts, value).view(1, 1, -1, 1)


def flat(_facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """A vector that is stored as a matrix."""
    return value.flatten()


def rows_of_all(_facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """A stack of experts whose rows lie under each other in memory."""
    return value.flatten(0, 1)


def columns_of_all(_facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """The same of columns."""
    return value.transpose(1, 2).flatten(0, 1)


def row(_facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """A matrix of one row that is stored as a vector."""
    return value.view(1, -1)


def kernel(_facts: Facts, value: torch.Tensor) -> torch.Tensor:
    """[C, 1, K], of which llama.cpp leaves axes of one out or adds some."""
    return value.reshape(-1, 1, value.shape[-1])


def unpermuted(key: str) -> Turn:
    """Rows of a head as transformers has them: llama.cpp puts the two halves of a rotation side by side."""

    def turn(facts: Facts, value: torch.Tensor) -> torch.Tensor:
        heads = int(facts.get(key, facts["attention.head_count"]))
        halves: torch.Tensor = value.unflatten(0, (heads, -1, 2))
        return halves.transpose(1, 2).flatten(0, 2)

    return turn


def one_after_another(_facts: Facts, parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of all."""
    return torch.cat(parts)


def keys_and_values(_facts: Facts, parts: list[torch.Tensor]) -> torch.Tensor:
    """Of each head the keys' rows, which lie as columns, and then the values'."""
    keys, values = parts
    return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)


TURNS: Mapping[str, Turn] = {
    "ffn_gate_inp_shexp.weight": row,
    "shortconv.conv.weight": kernel,
    "ssm_conv1d.weight": kernel,
}
PERMUTED: Mapping[str, Turn] = {
    f"attn_{x}.{ending}": unpermuted(f"attention.{key}")
    for x, key in {"q": "head_count", "k": "head_count_kv"}.items()
    for ending in ("weight", "bias")
}
MADE: Mapping[str, Made] = {"self_attn.kv_b_proj.weight": Made(("attn_k_b.weight", "attn_v_b.weight"), keys_and_values)}
