"""Layouts and number formats of the hub, cut for real: every expert that stays has exactly the bytes that it had.

The oracle reads both folders with the safetensors library's own layout rules spelled out here: each tensor is an array
of bytes whose axes are those of the header, and an expert is what its number in a name, or its row, says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests import handmade
from tests.checkpoint import hub
from tests.pruning import cutting

KEPT = 4
NUMBER = re.compile(r"((?<!chunk_)experts\.(?:local_experts\.)?|projs\.)(\d+)")
CHUNK = re.compile(r"(chunk_experts\.)(\d+)")


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as bytes: the axes of the header, and one more for the bytes of an element."""
    arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                arrays[name] = np.frombuffer(data[start:end], np.uint8).reshape(*entry["shape"], -1)
    return arrays


def expected(parent: dict[str, np.ndarray], case: hub.Case, keep: dict[str, list[int]]) -> dict[str, np.ndarray]:
    result = dict(parent)
    for block, found in case.blocks.items():
        for pattern, what in found.items():
            names = [name for name in parent if NUMBER.sub(r"\1N", CHUNK.sub(r"\1N", name)) == f"{block}.{pattern}"]
            for name in names:
                array = result.pop(name)
                if what.startswith("expert"):
                    shared = what == "expert of 2"
                    regex = CHUNK if shared else NUMBER
                    old = int(regex.search(name)[2]) * (2 if shared else 1)
                    if old in keep[block]:
                        new = keep[block].index(old) // (2 if shared else 1)
                        result[regex.sub(rf"\g<1>{new}", name)] = array
                elif what == "ids":
                    result[name] = array
                else:
                    rows = int(what.split(" x ")[1]) if " x " in what else 1
                    axis = int(what.split()[1])
                    tail = list(range(rows * hub.E, array.shape[axis]))
                    result[name] = array.take([e * rows + i for e in keep[block] for i in range(rows)] + tail, axis)
    return result


@pytest.mark.parametrize("name", hub.CASES)
def test_every_byte_of_what_stays(tmp_path, name):
    case = hub.CASES[name]
    parent = hub.write(tmp_path / "parent", case).folder
    keep = cutting.keep_lists(parent, KEPT)
    child = cutting.cut(parent, keep)
    before, after = stored(parent), stored(child)
    wanted = expected(before, case, keep)
    assert set(after) == set(wanted)
    for tensor, array in wanted.items():
        if not tensor.endswith("tid2eid"):
            assert np.array_equal(after[tensor], array), tensor
    config = json.loads((child / "config.json").read_text())
    assert json.dumps(config).count(f": {hub.E}") < json.dumps(case.config).count(f": {hub.E}")


def test_formats_mixed_and_a_file_outside_the_index(tmp_path):
    """NVFP4 in the trunk, bf16 in the layer behind it, and scales for all experts in a file that no index names."""
    name = "model.layers.0"
    trunk = hub.layer(name, hub.GATE, {f"mlp.experts.{{e}}.up_proj.{k}": v for k, v in hub.NVFP4.items()})
    further = hub.layer("model.layers.1", hub.GATE, hub.GATED)
    config = {"model_type": "deepseek_v3", "n_routed_experts": hub.E, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    config |= {
        "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    }
    parent = handmade.checkpoint(tmp_path / "parent", config, hub.typed(trunk), hub.typed(further))
    handmade.shard(parent / "scales.safetensors", {f"{name}.mlp.experts.a2_gscale": ("F32", [hub.E])})
    keep = cutting.keep_lists(parent, KEPT)
    child = cutting.cut(parent, keep)
    found = {name: {f"mlp.experts.N.up_proj.{k}": "expert" for k in hub.NVFP4} | hub.GATE_FOUND}
    found[name]["mlp.experts.a2_gscale"] = "rows 0"
    case = hub.Case(config, {}, found | {"model.layers.1": hub.GATED_FOUND | hub.GATE_FOUND})
    before, after = stored(parent), stored(child)
    wanted = expected(before, case, keep)
    assert set(after) == set(wanted)
    assert all(np.array_equal(after[tensor], array) for tensor, array in wanted.items())
    assert {path.name for path in child.glob("*.safetensors")} >= {"scales.safetensors"}
    index = json.loads((child / "model.safetensors.index.json").read_text())
    assert f"{name}.mlp.experts.a2_gscale" not in index["weight_map"]
