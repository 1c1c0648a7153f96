"""Routers quantized by HQQ: after the cut every value of an expert that stays is what it was.

The oracle takes the values out one by one: value (row, column) of the grid lies in the item (row mod R, column) of R
stored rows, in the bits of share row // R, the first share highest.
"""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

from moeprune.errors import InputError, ResultError
from tests import handmade
from tests.checkpoint.test_hub_cut import stored
from tests.pruning import cutting
from tests.pruning.test_verify import check

E, WIDTH = 16, 24
GATE = "model.layers.0.mlp.gate"
CONFIG = {"model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 1}
BITS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "2bit_u8": (2, 4), "1bit_u8": (1, 8), "3bit_32": (3, 10)}


def build(folder, packing="4bit_u8", group=8, *, axis=1, experts=E, floats=False):
    """A layer whose router is quantized; its stored bits are random."""
    chance = random.Random(7)
    groups = E * WIDTH // group
    rows, size = -(-groups // BITS[packing][1]), 4 if "32" in packing else 1
    kind, columns = ("BF16", group * size // 2) if floats else ("I32" if size == 4 else "U8", group)
    parts = {
        "W_q": (kind, [rows, columns], chance.randbytes(rows * group * size)),
        "scale": ("F32", [groups, 1], np.arange(groups, dtype="<f4").tobytes()),
        "zero": ("F32", [groups, 1], np.arange(groups, dtype="<f4")[::-1].tobytes()),
        "shape": ("I64", [2], np.array([experts, WIDTH], "<i8").tobytes()),
        "axis": ("I32", [], np.array(axis, "<i4").tobytes()),
        "packing": ("U8", [len(packing)], packing.encode()),
    }
    tensors = {f"{GATE}.{name}": (dtype, shape) for name, (dtype, shape, _) in parts.items()}
    contents = [content for *_, content in parts.values()]
    for expert in range(E):
        tensors[f"model.layers.0.mlp.experts.{expert}.up_proj.W_q"] = ("U8", [4, 4])
        contents.append(chance.randbytes(16))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "hqq"}}))
    handmade.write(folder / "model.safetensors", handmade.header(tensors), b"".join(contents))
    return folder


def decoded(arrays):
    """The values of the router, a row for each expert."""
    packing = arrays[f"{GATE}.packing"].tobytes().decode()
    bits, shares = BITS[packing]
    experts, width = arrays[f"{GATE}.shape"].view("<i8").ravel().tolist()
    items = arrays[f"{GATE}.W_q"]
    items = items.reshape(len(items), -1).view("<u4" if "32" in packing else "u1")
    rows, columns = items.shape
    grid = [
        int(items[row % rows, column]) >> bits * (shares - 1 - row // rows) & 2**bits - 1
        for row in range(experts * width // columns)
        for column in range(columns)
    ]
    return np.array(grid).reshape(experts, width)


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("packing", BITS)
def test_values_of_what_stays_are_the_same(tmp_path, packing, floats):
    parent = build(tmp_path / "parent", packing, floats=floats)
    keep = cutting.keep_lists(parent, 8)
    before, after = stored(parent), stored(cutting.cut(parent, keep))
    ids = keep["model.layers.0"]
    assert np.array_equal(decoded(after), decoded(before)[ids])
    assert decoded(before).max() >= 2 ** (BITS[packing][0] - 1)
    for part in ("scale", "zero"):
        old = before[f"{GATE}.{part}"].reshape(E, -1)
        assert np.array_equal(after[f"{GATE}.{part}"].reshape(8, -1), old[ids])


def test_a_group_that_is_a_whole_row(tmp_path):
    parent = build(tmp_path / "parent", "4bit_u8", group=WIDTH)
    keep = cutting.keep_lists(parent, 6)
    assert np.array_equal(decoded(stored(cutting.cut(parent, keep))), decoded(stored(parent))[keep["model.layers.0"]])


@pytest.mark.parametrize(
    ("made", "count", "words"),
    [
        ({"axis": 0}, 8, "groups along axis 0"),
        ({"experts": 8}, 8, "run across the 16 experts"),
        ({"group": WIDTH}, 7, "7 groups of the experts that stay do not divide into 2 shares"),
    ],
)
def test_what_cannot_be_packed_anew_is_refused(tmp_path, made, count, words):
    parent = build(tmp_path / "parent", **made)
    with pytest.raises(InputError, match=words):
        cutting.cut(parent, cutting.keep_lists(parent, count))


@pytest.mark.parametrize(("part", "words"), [("W_q", "values of the kept experts"), ("shape", "its shape became")])
def test_the_verification_looks_at_every_value(tmp_path, part, words):
    parent = build(tmp_path / "parent")
    keep = cutting.keep_lists(parent, 8)
    child = cutting.cut(parent, keep)
    check(parent, child, keep)
    path = child / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])[f"{GATE}.{part}"]["data_offsets"]
    data[8 + length + begin] ^= 1
    shutil.copy(path, tmp_path / "good.safetensors")
    path.write_bytes(data)
    with pytest.raises(ResultError, match=words):
        check(parent, child, keep)
