"""A GGUF file scores as the plain checkpoint with the values that it stands for, family by family.

The files are made by tests/gguf_files from gguf's own tables of names; that llama.cpp computes the same logits from
such files is tried by ./run.sh engines.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moeprune.checking.subject import load_model
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError
from moeprune.scoring.building import read_config
from moeprune.scoring.gguf import weights
from moeprune.settings import Settings
from tests import gguf_files, tiny
from tests.gguf_files.families import FAMILIES
from tests.scoring import streamed


def parent(family: str, folder: Path, **more: Any) -> Path:
    return tiny.make(family, folder / "parent", **FAMILIES[family].overrides | more)


NOT_KEPT = {  # in a file, or by a forward
    "transformers_version", "_name_or_path", "model_type", "architectures", "num_nextn_predict_layers", "head_dim",
    "qk_head_dim", "max_window_layers", "pretraining_tp", "intermediate_size", "sliding_window",
    "dtype", "eos_token_id", "bos_token_id", "pad_token_id",
}  # fmt: skip


def assert_same_config(file: Path, folder: Path) -> None:
    """Every field, also those that make no difference at these sizes."""
    found, right = (read_config(open_checkpoint(path), Settings()).to_dict() for path in (file, folder))
    assert {key: found.get(key) for key in right if key not in NOT_KEPT} == {
        key: value for key, value in right.items() if key not in NOT_KEPT
    }


def assert_same_sums(file: Path, plain: Path, tmp_path: Path, rtol: float = 0.0) -> None:
    data = streamed.batches(2)
    found, expected = streamed.score(file, data, tmp_path), streamed.score(plain, data, tmp_path)
    assert (
        [block.block.removeprefix("blk.") for block in found.blocks]
        == [block.block.rpartition(".")[2] for block in expected.blocks]
        != []
    )
    for a, b in zip(found.blocks, expected.blocks, strict=True):
        for name, array in a.values.items():
            np.testing.assert_allclose(array, b.values[name], rtol=rtol, err_msg=f"{a.block} {name}")


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_values(family, tmp_path):
    """To the bit, whatever the converter does to values on the way."""
    folder = parent(family, tmp_path)
    values = gguf_files.convert(folder, tmp_path / "model.gguf", kind="Q8_0")
    assert_same_config(tmp_path / "model.gguf", folder)
    assert_same_sums(tmp_path / "model.gguf", gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


@pytest.mark.parametrize("family", ["deepseek_v3", "bailing_hybrid", "qwen3_5_moe_text"])
def test_what_transformers_keeps_in_32_bits(family, tmp_path):
    """The bias of a router decides who is chosen; a model that computes in bfloat16 has it in 32 bits."""
    folder = parent(family, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(1)
    for name in tensors:
        if name.endswith(("bias", "A_log")):
            tensors[name] = rng.normal(1, 0.2, tensors[name].shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = gguf_files.convert(folder, tmp_path / "model.gguf", kind="Q8_0")
    plain = gguf_files.twin(folder, values, tmp_path / "twin")
    settings = Settings(device="cpu", dtype="bfloat16")
    found, right = (load_model(path, settings).state_dict() for path in (tmp_path / "model.gguf", plain))
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ["MXFP4", "Q4_1", "Q5_0", "F16", "BF16"])
def test_other_types(kind, tmp_path):
    folder = parent("gpt_oss", tmp_path)
    values = gguf_files.convert(folder, tmp_path / "model.gguf", kind=kind)
    assert_same_sums(tmp_path / "model.gguf", gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


def test_a_split_set(tmp_path):
    folder = parent("deepseek_v3", tmp_path)
    values = gguf_files.convert(folder, tmp_path / "model.gguf", kind="Q8_0", split=True)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) > 1
    assert_same_sums(parts[-1], gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


def rewritten(file: Path, target: Path, change: Any) -> Path:
    """The file with other tensors: `change` gets a name and an array and yields names and arrays."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, str(reader.get_field("general.architecture").contents()))
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            gguf_files.write_value(writer, key, field.contents())
    for tensor in reader.tensors:
        for name, array in change(tensor.name, np.array(tensor.data)):
            writer.add_tensor(name, array, raw_dtype=None if array.dtype == np.float32 else tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return target


def one_by_one(name: str, array: np.ndarray) -> Any:
    """As files of 2023 have it."""
    if "_exps." not in name:
        yield name, array
        return
    for expert, rows in enumerate(array):
        yield name.replace("_exps.", f".{expert}."), rows


def fused() -> Any:
    waiting: dict[str, np.ndarray] = {}

    def change(name: str, array: np.ndarray) -> Any:
        waiting[name] = array
        block = name.rpartition(".ffn_")[0]
        pair = [f"{block}.ffn_{kind}_exps.weight" for kind in ("gate", "up")]
        if name not in pair:
            yield name, array
        elif all(half in waiting for half in pair):
            yield f"{block}.ffn_gate_up_exps.weight", np.concatenate([waiting[half] for half in pair], axis=1)

    return change


@pytest.mark.parametrize("way", ["one by one", "gate and up in one"])
def test_other_ways_to_lay_experts(way, tmp_path):
    folder = parent("mixtral", tmp_path)
    values = gguf_files.convert(folder, tmp_path / "model.gguf", kind="Q8_0")
    change = one_by_one if way == "one by one" else fused()
    file = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
    assert_same_sums(file, gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


def test_projections_in_one(tmp_path):
    """Qwen3-Next's queries, keys, values and gates, as files of 2025 have them."""
    folder = parent("qwen3_next", tmp_path)
    values = gguf_files.convert(folder, tmp_path / "model.gguf")

    def change(name: str, array: np.ndarray) -> Any:
        block, _, leaf = name.rpartition(".attn_qkv")
        if block:
            layer = block.removeprefix("blk.")
            yield f"{block}.ssm_in{leaf}", values[f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight"]
        elif ".attn_gate." not in name:
            yield name, array

    file = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
    assert_same_sums(file, gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


def test_factors_beside_a_matrix(tmp_path):
    """NVFP4 files carry them; they count for every type."""
    folder = parent("qwen3_moe", tmp_path)
    values = gguf_files.convert(folder, tmp_path / "model.gguf", kind="Q8_0")
    factors = np.linspace(0.5, 2, 8, dtype=np.float32)

    def change(name: str, array: np.ndarray) -> Any:
        yield name, array
        if name == "blk.1.ffn_down_exps.weight":
            yield "blk.1.ffn_down_exps.scale", factors
            yield "blk.1.ffn_down_exps.input_scale", factors

    for expert, factor in enumerate(factors):
        values[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] *= factor
    file = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
    assert_same_sums(file, gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


def test_layers_for_further_tokens_are_not_run(tmp_path):
    folder = parent("glm4_moe", tmp_path)
    values = gguf_files.convert(folder, tmp_path / "model.gguf", mtp=1)
    with_layer = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", gguf_files.with_mtp(3, like=2))
    assert_same_sums(with_layer, gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


REFUSALS = {
    "an architecture that is not known": (
        lambda n, a: [(n, a)],
        "architecture newmodel can be cut but not run here, because no table",
    ),
    "one that transformers lacks": (
        lambda n, a: [(n, a)],
        "architecture grovemoe can be cut but not run here, because transformers has no such model",
    ),
    "a tensor that is not known": (
        lambda n, a: [(n, a), ("blk.0.odd.weight", a)] if n == "output_norm.weight" else [(n, a)],
        "blk.0.odd.weight is not known for the architecture qwen3moe",
    ),
    "half of a pair": (
        lambda n, a: [] if n == "blk.0.ffn_up_exps.weight" else [(n, a)],
        "lacks ffn_up_exps.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_read_is_refused(case, tmp_path):
    change, words = REFUSALS[case]
    gguf_files.convert(parent("qwen3_moe", tmp_path), tmp_path / "model.gguf")
    file = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
    if found := re.search("architecture ([a-z]{8}) can be cut", words):
        file.write_bytes(file.read_bytes().replace(b"qwen3moe", found[1].encode()))
    with pytest.raises(InputError, match=words):
        checkpoint = open_checkpoint(file)
        weights.config_of(checkpoint)
        weights.recipes(checkpoint)


def test_layers_at_unequal_distances(tmp_path):
    """The configuration of Jamba has a period for layers that attend."""
    gguf_files.convert(parent("jamba", tmp_path, num_hidden_layers=6), tmp_path / "model.gguf")

    def change(name: str, array: np.ndarray) -> Any:
        return [] if name == "blk.1.attn_q.weight" else [(name, array)]

    file = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", change)
    with pytest.raises(InputError, match=r"attn_q\.weight come at unequal distances \(\[3, 5\]\); score the original"):
        weights.config_of(open_checkpoint(file))


def test_experts_that_clamp(tmp_path):
    """The class of transformers knows no such limit."""
    gguf_files.convert(parent("bailing_hybrid", tmp_path), tmp_path / "model.gguf", swiglu_clamp_exp=[0.0, 7.0, 7.0])
    with pytest.raises(InputError, match="clamp what they compute, which transformers does not; score the original"):
        weights.config_of(open_checkpoint(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("key", "value"), [("rope.scaling.type", "longrope"), ("attention.layer_norm_rms_epsilon", None)]
)
def test_a_file_that_says_too_little_or_too_much(key, value, tmp_path):
    folder = parent("qwen3_moe", tmp_path)
    more = {key: value, "rope.scaling.factor": 4.0} if value else {}
    gguf_files.convert(folder, tmp_path / "model.gguf", without=key if value is None else "", **more)
    with pytest.raises(InputError, match="longrope cannot be read" if value else "does not say qwen3moe.attention"):
        weights.config_of(open_checkpoint(tmp_path / "model.gguf"))


def test_scaled_positions(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32.0, "beta_slow": 1.0}
    folder = parent("deepseek_v2", tmp_path, rope_parameters=rope)
    values = gguf_files.convert(folder, tmp_path / "model.gguf")
    assert_same_sums(tmp_path / "model.gguf", gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


def test_divided_frequencies(tmp_path):
    """They lie beside the weights; to rounding, as a product of numbers is not of the same bits as their quotient."""
    folder = parent("llama4_text", tmp_path, **FAMILIES["llama4_text"].engine)
    values = gguf_files.convert(folder, tmp_path / "model.gguf")
    assert_same_sums(tmp_path / "model.gguf", gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path, rtol=1e-5)


def test_mistral_as_llama_cpp_first_named_it(tmp_path, monkeypatch):
    """Files of Mistral Large 3 say that they are DeepSeek's."""
    way = replace(FAMILIES["mistral4"], architecture="deepseek2", named_as="mistral4")
    monkeypatch.setitem(FAMILIES, "mistral4", way)
    folder = parent("mistral4", tmp_path)
    values = gguf_files.convert(folder, tmp_path / "model.gguf")
    assert_same_sums(tmp_path / "model.gguf", gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)


def test_a_model_without_windows_whose_gates_are_of_single_numbers(tmp_path):
    """Laguna M.1; XS.2, which has both, is the entry of the table."""
    full = {"gating": "per-element", "layer_types": ["full_attention"] * 5, "num_attention_heads_per_layer": [4] * 5}
    folder = parent("laguna", tmp_path, **full)
    values = gguf_files.convert(folder, tmp_path / "model.gguf", without="attention.sliding_window")
    assert_same_config(tmp_path / "model.gguf", folder)
    assert_same_sums(tmp_path / "model.gguf", gguf_files.twin(folder, values, tmp_path / "twin"), tmp_path)
