"""Documents of tokens -> the batches that the model's forward gets.

Legend of the array suffixes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SLICES = 4  # parts of each domain's samples, to see how stable the scores are
NOT_COUNTED = -1  # the domain of padding


@dataclass(frozen=True)
class Document:
    """The tokens of one sample."""

    ids: list[int]
    domain: int
    slice: int


@dataclass(frozen=True)
class Batch:
    """What one forward gets, and to which domain and slice each of its tokens belongs."""

    inputs: dict[str, torch.Tensor]  # keyword arguments of the model's forward
    domain_BT: torch.Tensor  # int16, -1 does not count (padding)
    slice_BT: torch.Tensor  # int8


def unpacked(documents: Sequence[Document], batch_size: int, pad: int) -> list[Batch]:
    """One document a row, rows of like length together, padded on the right: no document sees another.

    The longest come first, so that memory that is too small shows at once and not after hours.
    """
    order = sorted(documents, key=lambda document: -len(document.ids))
    return [_padded(order[start : start + batch_size], pad) for start in range(0, len(order), batch_size)]


def _padded(rows: Sequence[Document], pad: int) -> Batch:
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids_BT = torch.full(shape, pad, dtype=torch.int64)
    mask_BT = torch.zeros(shape, dtype=torch.int64)
    domain_BT = torch.full(shape, NOT_COUNTED, dtype=torch.int16)
    slice_BT = torch.zeros(shape, dtype=torch.int8)
    for b, row in enumerate(rows):
        length = len(row.ids)
        ids_BT[b, :length] = torch.tensor(row.ids, dtype=torch.int64)
        mask_BT[b, :length] = 1
        domain_BT[b, :length] = row.domain
        slice_BT[b, :length] = row.slice
    return Batch({"input_ids": ids_BT, "attention_mask": mask_BT}, domain_BT, slice_BT)
