"""The streamed forward is the model's own: the same bits as in memory, whatever the limits on memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from moeprune import console
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError, MachineError
from moeprune.scoring import memory, resume, streaming
from moeprune.scoring.run import forward
from moeprune.scoring.streaming import LayerStream
from tests.scoring import streamed

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe")


def logits(batch):
    return lambda model: model(**batch.inputs, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_in_memory_to_the_bit(family, tmp_path):
    folder, data = streamed.checkpoint(family), streamed.batches()
    stream = LayerStream(open_checkpoint(folder), streamed.settings(tmp_path))
    forwards = [logits(batch) for batch in data]
    results = stream.run(forwards)
    again = stream.run(forwards)
    model = streamed.plain(folder)
    with torch.no_grad():
        for result, second, run in zip(results, again, forwards, strict=True):
            assert torch.equal(result, run(model))
            assert torch.equal(second, result)


def test_bfloat16_too(tmp_path):
    folder, data = streamed.checkpoint("qwen3_moe", dtype=torch.bfloat16), streamed.batches()
    settings = dataclasses.replace(streamed.settings(tmp_path), dtype="auto")
    stream = LayerStream(open_checkpoint(folder), settings)
    model = type(stream.model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert stream.model.dtype == torch.bfloat16
    with torch.no_grad():
        for result, batch in zip(stream.run([logits(batch) for batch in data]), data, strict=True):
            assert torch.equal(result, logits(batch)(model))


def test_hidden_states_beyond_the_limit_lie_in_files(tmp_path):
    """Rows long enough to be worth a file; the same bits, and next to nothing left in memory."""
    folder, data = streamed.checkpoint("qwen3_moe"), streamed.batches(length=240)
    forwards = [logits(batch) for batch in data]
    in_memory = LayerStream(open_checkpoint(folder), streamed.settings(tmp_path)).run(forwards)
    stream = LayerStream(open_checkpoint(folder), streamed.settings(tmp_path, hidden_memory=1000))
    held = []

    class Look:
        def batch_begins(self, _batch):
            pass

        def layer_begins(self, _layer):
            held.append(stream.parking.in_memory)

        def layer_ends(self, _layer):
            pass

    spilled = stream.run(forwards, watchers=(Look(),))
    hidden = 2 * 240 * 64 * 4  # bytes of one batch's hidden states
    assert all(torch.equal(a, b) for a, b in zip(in_memory, spilled, strict=True))
    assert stream.parking.spilled >= len(data) * len(stream.layers) * hidden
    assert max(held) < hidden
    assert not (tmp_path / "reap_state").exists()


def test_nothing_behind_the_last_wanted_layer_is_loaded_or_run(tmp_path):
    folder, data = streamed.checkpoint("qwen3_moe"), streamed.batches()
    stream = LayerStream(open_checkpoint(folder), streamed.settings(tmp_path))
    loaded = []
    load = stream.loader.load
    stream.loader.load = lambda layer, **more: (loaded.append(layer), load(layer, **more))[1]
    assert stream.run([forward(batch) for batch in data], until="model.layers.1") == [None] * len(data)
    assert loaded == ["", "model.layers.0", "model.layers.1"]
    assert stream.model.lm_head.weight.is_meta


def test_after_a_run_no_weights_are_left_in_memory(tmp_path):
    stream = LayerStream(open_checkpoint(streamed.checkpoint("qwen3_moe")), streamed.settings(tmp_path))
    stream.run([logits(batch) for batch in streamed.batches()])
    assert all(parameter.is_meta for parameter in stream.model.parameters())


def test_a_missing_tensor_is_refused(tmp_path):
    opened = open_checkpoint(streamed.checkpoint("qwen3_moe"))
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    norm = "model.layers.2.input_layernorm.weight"
    tensors = {name: tensor for name, tensor in opened.tensors.items() if name not in (lost, norm)}
    stream = LayerStream(dataclasses.replace(opened, tensors=tensors), streamed.settings(tmp_path))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts"):
        stream.run([logits(batch) for batch in streamed.batches()])


def test_a_layer_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 20_000)
    with pytest.raises(MachineError, match="of memory while it is loaded"):
        LayerStream(open_checkpoint(streamed.checkpoint("qwen3_moe")), streamed.settings(tmp_path))


def test_an_error_in_one_forward_ends_the_run_and_leaves_no_hooks(tmp_path):
    stream = LayerStream(open_checkpoint(streamed.checkpoint("qwen3_moe")), streamed.settings(tmp_path))

    def broken(model):
        raise InputError("broken on purpose")

    with pytest.raises(InputError, match="on purpose"):
        stream.run([logits(streamed.batches()[0]), broken])
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in stream.layers.values())
    assert streaming.find_layers(stream.model)


def test_a_disk_that_is_too_small_for_the_state_is_said_and_does_no_harm(tmp_path, monkeypatch):
    folder, data = streamed.checkpoint("qwen3_moe"), streamed.batches(length=240)
    monkeypatch.setattr(resume, "SHARE", 1e9)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    stream = LayerStream(open_checkpoint(folder), streamed.settings(tmp_path))
    state = resume.SavedState(tmp_path / "state", "x", dict)
    stream.run([logits(batch) for batch in data], state=state)
    assert any("too little to save" in line for line in console.warnings())
    assert not list((tmp_path / "state").iterdir())
