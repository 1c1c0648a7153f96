"""Tensors that are read straight into their parameter lie where transformers' own conversion puts them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.scoring import memory
from moeprune.scoring.loading import OUTSIDE
from moeprune.scoring.placing import straight
from moeprune.scoring.streaming import LayerStream
from tests.scoring import streamed

GATE, UP = "experts.*.gate.weight", "experts.*.up.weight"


def loaded(stream, layer):
    stream.loader.load(layer)
    return {name: tensor.clone() for name, tensor in stream.model.state_dict().items() if name.startswith(layer + ".")}


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("family", ("qwen3_moe", "gpt_oss", "deepseek_v3"))
def test_straight_and_converted_parameters_are_the_same(family, dtype, tmp_path):
    """In the type of the checkpoint and in another one; `deepseek_v3` keeps a tensor of each layer in float32."""
    settings = dataclasses.replace(streamed.settings(tmp_path), dtype=dtype)
    stream, other = (LayerStream(open_checkpoint(streamed.checkpoint(family)), settings) for _ in range(2))
    other.loader.direct.ways = {}
    assert len(stream.loader.direct.ways) == len(stream.loader.model.state_dict())
    for layer in stream.layers:
        found, expected = loaded(stream, layer), loaded(other, layer)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])
        stream.loader.drop(layer)
        other.loader.drop(layer)


def test_a_layer_takes_the_memory_of_the_dropped_one(tmp_path):
    stream = LayerStream(open_checkpoint(streamed.checkpoint("qwen3_moe")), streamed.settings(tmp_path))
    first, second, third = tuple(stream.layers)[:3]

    def memory_of(layer):
        stream.loader.load(layer)
        return {parameter.data_ptr() for parameter in stream.layers[layer].parameters()}

    used = memory_of(first)
    stream.loader.read_ahead(second)
    stream.loader.drop(first)
    beside = memory_of(second)
    stream.loader.drop(second)
    assert not used & beside
    assert memory_of(third) == beside
    stream.loader.drop(third)
    stream.loader.drop(OUTSIDE)
    assert not stream.loader.direct._spare


def way(operations, patterns, shape):
    """How the tensors of an open checkpoint of the family go into a parameter of this shape."""
    stored = open_checkpoint(streamed.checkpoint("qwen3_moe")).tensors
    experts = "model.layers.0.mlp.experts"
    names = {f"{experts}.{i}.{kind}_proj.weight": p for i in range(2) for kind, p in patterns.items()}
    converter = WeightConverter(list(patterns.values()), "experts.whole", operations=operations)
    found = straight(stored, names, [converter], torch.empty(shape, device="meta"))
    return found, [stored[name].shape for name in names]


def test_only_what_lies_side_by_side_is_read_straight():
    both = {"gate": GATE, "up": UP}
    inner, hidden = way([MergeModulelist()], {"gate": GATE}, (2, 1, 1))[1][0]
    merged = [MergeModulelist(dim=0), Concatenate(dim=1)]
    found, _ = way(merged, both, (2, 2 * inner, hidden))
    whole = torch.zeros(2, 2 * inner, hidden)
    for number, place in enumerate(found.places(whole)):
        place.fill_(number + 1)
    assert whole[:, [0, inner], 0].tolist() == [[1, 3], [2, 4]]  # gates of both experts, then both up projections
    assert way([*merged, Transpose(1, 2)], both, (2, hidden, 2 * inner))[0] is not None
    assert way(merged, both, (3, 2 * inner, hidden))[0] is None
    assert way([*merged, Transpose(1, 2, check_dims=True)], both, (2, 2 * inner, hidden))[0] is None
    assert way([MergeModulelist(dim=0), Chunk(dim=1)], {"gate": GATE}, (2, inner, hidden))[0] is None


def test_memory_that_has_grown_goes_back(monkeypatch):
    """Once after it has grown; from there on the level is that of the smaller process."""
    freed, sizes = memory.FreedMemory(), iter([100, 100 + memory.GROWTH, 101 + memory.GROWTH, 50, 51])
    monkeypatch.setattr(memory, "resident", lambda: next(sizes))
    for level in (100, 100, 50, 50):
        freed.layer_done()
        assert freed._level == level
