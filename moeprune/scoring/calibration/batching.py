"""Documents of tokens -> the batches that the model's forward gets.

Legend of the array suffixes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moeprune.metadata import IMAGE
from moeprune.scoring.calibration.documents import SLICES, Document
from moeprune.scoring.calibration.pixels import joined

__all__ = ["NOT_COUNTED", "SLICES", "SPECIAL", "Batch", "can_pack", "fill_rows", "packed", "unpacked"]

NOT_COUNTED = -1  # the domain of padding
SPECIAL = -2  # special tokens that are left out: SPECIAL - d for those of domain d


@dataclass(frozen=True)
class Batch:
    """What one forward gets, and to which domain and slice each of its tokens belongs."""

    inputs: dict[str, torch.Tensor]  # keyword arguments of the model's forward
    domain_BT: torch.Tensor  # int16; below zero, what does not count: see NOT_COUNTED and SPECIAL
    slice_BT: torch.Tensor  # int8


def unpacked(documents: Sequence[Document], domains: Sequence[str], batch_size: int, pad: int) -> list[Batch]:
    """One document a row, rows of like length together, padded on the right: no document sees another.

    The longest come first, so that memory that is too small shows at once and not after hours.
    """
    order = sorted(documents, key=lambda document: -len(document.ids))
    return [_padded(rows, domains, pad) for rows in _groups(order, batch_size)]


def _groups(documents: Sequence[Document], batch_size: int) -> Iterator[list[Document]]:
    """Runs of at most `batch_size` documents whose images can be stacked."""
    rows: list[Document] = []
    shapes: dict[str, torch.Size] = {}
    for document in documents:
        own = {name: value.shape[1:] for name, value in document.stacked.items()}
        if rows and (len(rows) == batch_size or any(shapes.get(name, shape) != shape for name, shape in own.items())):
            yield rows
            rows, shapes = [], {}
        rows.append(document)
        shapes |= own
    if rows:
        yield rows


def _padded(rows: Sequence[Document], domains: Sequence[str], pad: int) -> Batch:
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids_BT = torch.full(shape, pad, dtype=torch.int64)
    mask_BT = torch.zeros(shape, dtype=torch.int64)
    domain_BT, slice_BT = _empty(shape)
    aligned: dict[str, torch.Tensor] = {}
    for b, row in enumerate(rows):
        length = len(row.ids)
        ids_BT[b, :length] = torch.tensor(row.ids, dtype=torch.int64)
        mask_BT[b, :length] = 1
        domain_BT[b, :length] = _domain_of_tokens(row, domains)
        slice_BT[b, :length] = row.slice
        for name, value in row.aligned.items():
            aligned.setdefault(name, torch.zeros(shape, dtype=value.dtype))[b, :length] = value
    names = sorted({name for row in rows for name in row.stacked})
    stacked = {name: joined([row.stacked[name] for row in rows if name in row.stacked]) for name in names}
    return Batch({"input_ids": ids_BT, "attention_mask": mask_BT, **aligned, **stacked}, domain_BT, slice_BT)


def _empty(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full(shape, NOT_COUNTED, dtype=torch.int16), torch.zeros(shape, dtype=torch.int8)


def _domain_of_tokens(document: Document, domains: Sequence[str]) -> torch.Tensor:
    domain_T = torch.full((len(document.ids),), domains.index(document.domain), dtype=torch.int16)
    if document.uncounted:
        domain_T[_among(document.ids, document.uncounted)] = SPECIAL - domains.index(document.domain)
    if document.seen:
        domain_T[_among(document.ids, document.image_tokens)] = domains.index(document.domain + IMAGE)
    return domain_T


def _among(ids: Sequence[int], chosen: Collection[int]) -> torch.Tensor:
    return torch.isin(torch.tensor(ids), torch.tensor(sorted(chosen)))


OPEN_ROWS = 64  # rows that packing keeps open: enough to fill them well, few enough to stay fast


def fill_rows(documents: Sequence[Document], length: int) -> list[list[Document]]:
    """Whole documents to rows of `length` tokens, each in the first open row with room for it."""
    rows: list[list[Document]] = []
    room: list[int] = []
    first_open = 0
    for document in documents:
        size = len(document.ids)
        index = next((index for index in range(first_open, len(rows)) if room[index] >= size), len(rows))
        if index == len(rows):
            rows.append([])
            room.append(length)
            first_open = max(0, len(rows) - OPEN_ROWS)
        rows[index].append(document)
        room[index] -= size
    return rows


def packed(
    rows: Sequence[Sequence[Document]], domains: Sequence[str], length: int, batch_size: int, pad: int
) -> list[Batch]:
    """Several documents a row, as `fill_rows` arranges them.

    Positions restart with every document and there is no attention mask: that is how transformers' mask functions
    recognise packed documents and keep them from seeing each other. It holds only without a KV cache: use_cache=False.
    """
    return [
        _packed(rows[start : start + batch_size], domains, length, pad) for start in range(0, len(rows), batch_size)
    ]


def _packed(rows: Sequence[Sequence[Document]], domains: Sequence[str], length: int, pad: int) -> Batch:
    shape = (len(rows), length)
    ids_BT = torch.full(shape, pad, dtype=torch.int64)
    position_BT = torch.arange(length).repeat(len(rows), 1)
    domain_BT, slice_BT = _empty(shape)
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document.ids)
            ids_BT[b, start:end] = torch.tensor(document.ids, dtype=torch.int64)
            domain_BT[b, start:end] = _domain_of_tokens(document, domains)
            slice_BT[b, start:end] = document.slice
            start = end
            position_BT[b, start:] = torch.arange(length - start)  # the next document, or the padding, starts anew
    return Batch({"input_ids": ids_BT, "position_ids": position_BT}, domain_BT, slice_BT)


# Model types whose attention was seen to keep packed documents apart. Not all code gives the positions to the mask:
# gpt-oss does not. Layers that carry a state (linear, state space) or pick keys by an index know no documents.
# fmt: off
PACKS = {
    "aria_text", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "dots1",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "granitemoe",
    "granitemoeshared", "hunyuan_v1_moe", "jetmoe", "llama4_text", "minimax_m2", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
}
# fmt: on


def can_pack(config: Any) -> bool:
    """Whether packed documents are known not to see each other in this model."""
    return getattr(config, "model_type", "") in PACKS and not getattr(config, "auto_map", None)
