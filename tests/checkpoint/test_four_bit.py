"""Routers quantized by bitsandbytes: after the cut every value means, to the bit, what it meant before.

The oracle decodes value by value in float32: table[nibble] * scale of its block, and a scale stored in eight bits is
table[byte] * scale of its run + offset.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from moeprune.errors import InputError
from tests import handmade
from tests.checkpoint.test_hub_cut import stored
from tests.pruning import cutting

E, WIDTH, BLOCK, RUN = 16, 24, 8, 5  # 16 experts, as the table of four bits has 16 entries; runs cross experts
GATE = "model.layers.0.mlp.gate.weight"
CONFIG = {"model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 1}


def build(folder, double, **state):
    """A layer whose router, shared gate and experts are all quantized."""
    chance = random.Random(3)
    matrices = {GATE: E, "model.layers.0.mlp.shared_expert_gate.weight": 1}
    matrices |= {f"model.layers.0.mlp.experts.{e}.up_proj.weight": 4 for e in range(E)}
    tensors, contents = {}, {}
    for name, rows in matrices.items():
        about = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [rows, WIDTH]} | state
        parts = {"": ("U8", [rows * WIDTH // 2, 1]), ".quant_map": ("F32", [16])}
        blocks = rows * WIDTH // BLOCK
        if double:
            about |= {"nested_blocksize": RUN, "nested_dtype": "float32", "nested_offset": 0.1234567}
            runs = -(-blocks // RUN)
            parts |= {
                ".absmax": ("U8", [blocks]),
                ".nested_absmax": ("F32", [runs]),
                ".nested_quant_map": ("F32", [256]),
            }
        else:
            parts |= {".absmax": ("F32", [blocks])}
        text = json.dumps(about).encode()
        parts[".quant_state.bitsandbytes__nf4"] = ("U8", [len(text)])
        for suffix, (dtype, shape) in parts.items():
            tensors[name + suffix] = (dtype, shape)
            count = int(np.prod(shape))
            plain = np.array([chance.uniform(-1, 1) for _ in range(count)], "<f4").tobytes()
            contents[name + suffix] = plain if dtype == "F32" else chance.randbytes(count)
        contents[f"{name}.quant_state.bitsandbytes__nf4"] = text
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    handmade.write(folder / "model.safetensors", handmade.header(tensors), b"".join(contents[name] for name in tensors))
    return folder


def decoded(arrays, name):
    """The values of a matrix, one after the other."""
    about = json.loads(arrays[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
    table = arrays[f"{name}.quant_map"].view("<f4").ravel()
    nibbles = [n for byte in arrays[name].ravel() for n in (byte >> 4, byte & 15)]
    if "nested_blocksize" in about:
        fine, coarse = arrays[f"{name}.absmax"].ravel(), arrays[f"{name}.nested_absmax"].view("<f4").ravel()
        code, offset = arrays[f"{name}.nested_quant_map"].view("<f4").ravel(), np.float32(about["nested_offset"])
        scales = [np.float32(code[f] * coarse[i // about["nested_blocksize"]]) + offset for i, f in enumerate(fine)]
    else:
        scales = arrays[f"{name}.absmax"].view("<f4").ravel()
    values = [np.float32(table[n] * scales[i // about["blocksize"]]) for i, n in enumerate(nibbles)]
    return np.array(values, np.float32).reshape(about["shape"])


@pytest.mark.parametrize("double", [False, True])
def test_values_of_what_stays_are_the_same_to_the_bit(tmp_path, double):
    parent = build(tmp_path / "parent", double)
    keep = cutting.keep_lists(parent, 6)
    before, after = stored(parent), stored(cutting.cut(parent, keep))
    ids = keep["model.layers.0"]
    assert decoded(after, GATE).tobytes() == decoded(before, GATE)[ids].tobytes()
    assert not any(name.startswith(f"{GATE}.nested") for name in after)
    for new, old in enumerate(ids):
        names = (f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in (new, old))
        assert np.array_equal(*(decoded(arrays, name) for arrays, name in zip((after, before), names, strict=True)))
    shared = {name: array for name, array in before.items() if "shared" in name}
    assert len(shared) > 3
    assert all(np.array_equal(after[name], array) for name, array in shared.items())


@pytest.mark.parametrize(
    ("state", "message"), [({"blocksize": 16}, "across experts"), ({"shape": [8, 48]}, "not a router of 16")]
)
def test_what_would_not_be_exact_is_refused(tmp_path, state, message):
    parent = build(tmp_path / "parent", double=False, **state)
    with pytest.raises(InputError, match=message):
        cutting.cut(parent, cutting.keep_lists(parent, 6))
