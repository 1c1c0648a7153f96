"""VPTQ: columns of a weight in pieces, each an entry of a codebook, with a second codebook for what the first leaves.

Legend of the array suffixes: O outputs, I inputs, G groups of inputs with codebooks of their own, g inputs of a group,
V pieces of a column, L outputs of a piece, N entries of a codebook.
"""

from __future__ import annotations

import torch

from moeprune.errors import InputError
from moeprune.scoring.formats import unpack
from moeprune.scoring.formats.decoding import Quantization, Stored

# The first of two numbers is of outliers.
SAID = (
    "vector_lens",
    "num_centroids",
    "num_res_centroids",
    "group_num",
    "group_size",
)  # of outliers first, then of all


def decoded(stored: Stored, settings: Quantization) -> torch.Tensor:
    """The weight [O, I] of one module."""
    missing = [key for key in SAID if key not in settings]
    if missing:
        raise InputError(f"VPTQ's settings for a module lack {missing[0]}; fetch config.json again")
    entries, more = settings["num_centroids"][1], max(0, settings["num_res_centroids"][1])
    low, high = (entries - 1).bit_length(), max(0, more - 1).bit_length()
    index_GVg = unpack.integers(stored["indices"], low + high, settings["group_size"]).long()
    weight_OI = _columns(index_GVg & (2**low - 1), stored["centroids.weight"], entries)
    if more:
        weight_OI = weight_OI + _columns((index_GVg >> low) & (2**high - 1), stored["res_centroids.weight"], more)
    outputs = settings.get("out_features", 0)
    weight_OI = weight_OI[: outputs if outputs > 0 else None]
    if "outlier_indices" in stored:
        index = stored["outlier_indices"].view(torch.int16).long() & 0xFFFF
        first_OI = _columns(index, stored["outlier_centroids.weight"], settings["num_centroids"][0])
        weight_OI = torch.cat([first_OI[: len(weight_OI)], weight_OI], dim=1)
    if "perm" in stored:
        weight_OI = weight_OI[:, torch.argsort(stored["perm"].long() & 0xFFFF)]
    if "weight_scale" in stored:
        weight_OI = weight_OI * stored["weight_scale"].float() + stored["weight_bias"].float()
    return weight_OI


def _columns(index_GVg: torch.Tensor, books: torch.Tensor, entries: int) -> torch.Tensor:
    """[V L, G g] of the entries that the indices name."""
    books_GNL = books.float().unflatten(-1, (entries, -1))
    pieces_GVgL = torch.stack([book[at] for book, at in zip(books_GNL, index_GVg, strict=True)])
    return pieces_GVgL.permute(1, 3, 0, 2).flatten(2, 3).flatten(0, 1)
