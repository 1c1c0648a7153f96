"""Every type of GGUF that can be run, bit for bit as gguf, llama.cpp's own package, reads it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from moeprune.checkpoint.gguf import NUMBERS, TYPES
from moeprune.errors import InputError
from moeprune.scoring.gguf import types

NO_NUMBERS = {"I8", "I16", "I64", "Q8_K", "Q1_0"}
KNOWN = [name for name, _, _ in TYPES.values() if name not in NO_NUMBERS | {"F64", "I32"}]


def bytes_of(kind: str, rows: int = 5, blocks: int = 24) -> np.ndarray:
    """Any bytes; where they make a number that is none, both sides have to say so."""
    size = TYPES[NUMBERS[kind]][2]
    return np.random.default_rng(len(kind)).integers(0, 256, (rows, blocks * size), dtype=np.uint8)


def expected(raw: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(NUMBERS[kind])).astype(np.float32)


@pytest.mark.parametrize("kind", KNOWN)
def test_bit_for_bit(kind, monkeypatch):
    monkeypatch.setattr(types, "AT_ONCE", 1024)  # so that chunks meet within a row
    raw = bytes_of(kind)
    found = types.dequantize(torch.from_numpy(raw), kind, torch.float32).numpy()
    numbers = ~np.isnan(expected(raw, kind))
    assert numbers.mean() > 0.9
    assert np.array_equal(np.isnan(found), ~numbers)
    assert np.array_equal(found[numbers].view(np.uint32), expected(raw, kind)[numbers].view(np.uint32))


@pytest.mark.parametrize("kind", ["Q4_K", "MXFP4"])
def test_rounded_once_to_the_type_that_computes(kind):
    raw = bytes_of(kind)
    found = types.dequantize(torch.from_numpy(raw), kind, torch.bfloat16)
    right = torch.from_numpy(expected(raw, kind)).to(torch.bfloat16)
    assert torch.equal(found.nan_to_num(), right.nan_to_num())


def test_tables_of_numbers_stay_whole():
    table = torch.tensor([[383, 2], [0, 257]], dtype=torch.int32)
    found = types.dequantize(table.view(torch.uint8), "I32", torch.bfloat16)
    assert found.dtype == torch.int32 and torch.equal(found, table)


@pytest.mark.parametrize("kind", sorted(NO_NUMBERS))
def test_what_cannot_be_made_is_refused(kind):
    with pytest.raises(InputError, match=rf"blk\.0\.x is stored as {kind}.*--other-scores"):
        types.check(kind, "blk.0.x")


def test_every_type_is_either_made_or_refused():
    assert {name for name, _, _ in TYPES.values()} == NO_NUMBERS | {"F64", "I32"} | set(KNOWN)
    for kind in KNOWN:
        types.check(kind, "blk.0.x")


def test_factors_of_nvfp4():
    """One for the whole matrix, or one for each expert."""
    raw = torch.from_numpy(bytes_of("NVFP4", rows=6)).view(2, 3, -1)
    plain = torch.from_numpy(expected(raw.numpy().reshape(6, -1), "NVFP4")).view(2, 3, -1)
    for factor in (torch.tensor([0.3]), torch.tensor([0.3, 0.7])):
        stored, grid = {"up": raw, "up.scale": factor}, factor.view(-1, 1, 1).expand(2, 1, 1)
        assert torch.equal(types.values(stored, "up", "NVFP4", torch.float32), plain * grid)
        assert torch.equal(types.values(stored, "up", "NVFP4", torch.float32, 1), plain[1] * grid[1])
