"""Rarer layouts of numbers, bit for bit: packed here from known integers, as their libraries' sources lay them out.

What the libraries themselves wrote is in test_made_by_libraries.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations import bitnet, gemma_quant, metal_quantization

from moeprune.errors import InputError
from moeprune.scoring.formats import unpack
from tests.scoring.formats.test_dequantize import bytes_, nibbles, pack, plain, same


def test_int4_of_modelopt(tmp_path):
    """Two neighbouring outputs in a byte; the factors of AWQ belong to the weight."""
    q = np.random.default_rng(0).integers(-8, 8, (16, 64))
    packed = torch.from_numpy(((q[0::2] & 15) | (q[1::2] & 15) << 4).astype(np.uint8))
    scale, factor = torch.rand(16, 2), torch.rand(64)
    tensors = {"m.weight": packed, "m.weight_scale": scale, "m.pre_quant_scale": factor}
    found = plain(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"})["m.weight"]
    same(found, torch.from_numpy(q).float() * scale.repeat_interleave(32, 1) * factor)


def test_nvfp4_of_modelopt_with_a_low_rank_part(tmp_path):
    value, packed = nibbles(8, 64)
    scale, outer = (torch.rand(8, 4) + 0.1).to(torch.float8_e4m3fn), torch.tensor(0.5)
    down, up = torch.randn(2, 64), torch.randn(8, 2)
    tensors = {"m.weight": packed, "m.weight_scale": scale, "m.weight_scale_2": outer}
    tensors |= {"m.svdquant_lora_a": down, "m.svdquant_lora_b": up}
    found = plain(tmp_path, tensors, {"quant_method": "modelopt"})["m.weight"]
    same(found, value * (scale.float() * outer).repeat_interleave(16, 1) + up @ down)


def test_nvfp4_of_modelopt_with_inputs_first(tmp_path):
    """Llama 4 and gpt-oss: [E, I / 2, O] with scales [E, I / 16, O]."""
    value, packed = nibbles(3, 8, 64)
    scale, outer = (torch.rand(3, 8, 4) * 4 + 0.1).to(torch.float8_e4m3fn), torch.rand(3)
    tensors = {"e.up": packed.mT, "e.up_weight_scale": scale.mT, "e.up_weight_scale_2": outer}
    found = plain(tmp_path, tensors, {"quant_method": "modelopt"})["e.up"]
    same(found, (value * (scale.float() * outer[:, None, None]).repeat_interleave(16, 2)).mT.contiguous())


def test_fp8_stacked_with_a_scale_for_each_output(tmp_path):
    weight = (torch.randn(2, 32, 48) * 3).to(torch.float8_e4m3fn)
    for scale, grid in ((torch.rand(2, 32), (2, 32, 1)), (torch.rand(2, 48), (2, 1, 48)), (torch.rand(2), (2, 1, 1))):
        found = plain(tmp_path, {"e.up": weight, "e.up_weight_scale": scale}, {"quant_method": "modelopt"})["e.up"]
        same(found, weight.float() * scale.reshape(grid))


@pytest.mark.parametrize(
    "said",
    [{"weight_block_size": [128, 128]}, {}, {"config_groups": {"g": {"weights": {"block_structure": [128, 128]}}}}],
)
def test_a_last_block_cut_short(tmp_path, said):
    weight, scale = (torch.randn(200, 2880) * 3).to(torch.float8_e4m3fn), torch.rand(2, 23) + 0.1
    if not said:  # 200 rows in two blocks: only the settings tell 128 from 100
        weight = weight[:192].repeat(2, 1)[:256]
    found = plain(tmp_path, {"m.weight": weight, "m.weight_scale": scale}, {"quant_method": "fp8", **said})["m.weight"]
    rows, columns = torch.arange(len(weight)) // 128, torch.arange(2880) // 128
    same(found, weight.float() * scale[rows][:, columns])


def test_blocks_of_no_known_size_are_refused():
    assert [unpack.block_size(*case) for case in ((256, 2), (200, 2, 128), (200, 2, 64), (2880, 23))] == [
        128,
        128,
        100,
        128,
    ]
    with pytest.raises(InputError, match="5 scales for 12 values"):
        unpack.block_size(12, 5)


@pytest.mark.parametrize(
    ("layout", "less"), [("auto_round", 0), ("auto_round:gptqmodel", 0), ("auto_round:auto_gptq", 1)]
)
def test_zero_points_of_auto_round(tmp_path, layout, less):
    generator = np.random.default_rng(4)
    q, zero, scale = generator.integers(0, 16, (64, 32)), generator.integers(1, 16, (2, 32)), torch.rand(2, 32).half()
    tensors = {"m.qweight": pack(q.T, 4).T, "m.qzeros": pack(zero - less, 4), "m.scales": scale}
    found = plain(tmp_path, tensors, {"quant_method": "auto-round", "packing_format": layout})["m.weight"]
    groups = np.arange(64) // 32
    same(found, (torch.from_numpy(q - zero[groups]).float() * scale[groups].float()).T.contiguous())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_awq_of_other_bits_is_that_of_gptqmodel(tmp_path, bits):
    generator = np.random.default_rng(bits)
    q, zero = generator.integers(0, 2**bits, (64, 32)), generator.integers(0, 2**bits, (2, 32))
    tensors = {"m.qweight": pack(q, bits), "m.qzeros": pack(zero, bits), "m.scales": torch.rand(2, 32).half()}
    settings = {"quant_method": "awq", "bits": bits, "group_size": 32}
    found = plain(tmp_path, tensors, settings | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}})["m.weight"]
    groups = np.arange(64) // 32
    same(found, (torch.from_numpy(q - zero[groups]).float() * tensors["m.scales"][groups].float()).T.contiguous())
    with pytest.raises(InputError, match="GPTQModel made it"):
        plain(tmp_path, tensors, settings)


@pytest.mark.parametrize(("group", "groups"), [(32, 4), (-1, 1)])
def test_awq_for_one_kernel(tmp_path, group, groups):
    """The version gemv: outputs first, values in plain order, scales and zero points padded at the end of a row."""
    generator = np.random.default_rng(group % 7)
    q, zero = generator.integers(0, 16, (16, 128)), generator.integers(0, 16, (16, groups))
    scale = torch.rand(16, 32).half()
    padded = np.concatenate([zero, generator.integers(0, 16, (16, 32 - groups))], axis=1)
    tensors = {"m.qweight": pack(q, 4), "m.qzeros": pack(padded, 4), "m.scales": scale}
    settings = {"quant_method": "awq", "bits": 4, "version": "gemv"}
    found = plain(tmp_path, tensors, settings | {"group_size": group})["m.weight"]
    at = np.arange(128) // (128 // groups)
    same(found, torch.from_numpy(q - zero[:, at]).float() * scale[:, at].float())
    with pytest.raises(InputError, match="group_size"):
        plain(tmp_path, tensors, settings)


def test_vptq_with_indices_of_a_whole_word(tmp_path):
    """Sixteen bits of each codebook, where the residual's highest is the word's sign."""
    index = np.random.default_rng(8).integers(0, 2**16, (2, 3, 8))  # of both books: pieces, inputs
    books = torch.randn(2, 2**16 * 2)
    tensors = {"m.indices": pack(index[0] | index[1] << 16, 32)[None], "m.centroids.weight": books[:1]}
    tensors["m.res_centroids.weight"] = books[1:]
    said = {"vector_lens": [-1, 2], "num_centroids": [-1, 2**16], "num_res_centroids": [-1, 2**16]}
    own = {"m": said | {"group_num": 1, "group_size": 8, "out_features": 5}}
    found = plain(tmp_path, tensors, {"quant_method": "vptq", "config_for_layers": own})["m.weight"]
    first, second = (book.view(-1, 2)[torch.from_numpy(at)] for book, at in zip(books, index, strict=True))
    same(found, (first + second).transpose(1, 2).reshape(6, 8)[:5].contiguous())
    with pytest.raises(InputError, match="lack vector_lens"):
        plain(tmp_path, tensors, {"quant_method": "vptq"})


def test_quantos_four_bits_do_not_tell_their_shape(tmp_path):
    parts = {"weight._data._data": bytes_(4, 32), "weight._scale": torch.rand(8, 1), "weight._shift": torch.rand(8, 1)}
    with pytest.raises(InputError, match="how many outputs"):
        plain(tmp_path, {f"m.{name}": part for name, part in parts.items()}, {"quant_method": "quanto"})


AO = {
    "Float8Tensor": ("F8_E4M3", torch.rand(8, 64).to(torch.float8_e4m3fn), torch.rand(8, 1)),
    "MXTensor": ("F8_E8M0", torch.rand(8, 64).to(torch.float8_e4m3fn), torch.full((8, 2), 125, dtype=torch.uint8)),
    "NVFP4Tensor": ("U8", None, (torch.rand(8, 4) + 0.1).to(torch.float8_e4m3fn)),
    "MXTensor in four bits": ("U8", None, torch.full((8, 2), 125, dtype=torch.uint8)),
}


def torchao(folder, kind, data, stored):
    """A tensor of torchao, described in the header."""
    folder.mkdir(exist_ok=True)
    about = {"format": "pt", "m.weight": json.dumps({"_type": kind, "_data": data}), "tensor_names": '["m.weight"]'}
    save_file({f"m._weight_{name}": t.contiguous() for name, t in stored.items()}, folder / "model.safetensors", about)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))


@pytest.mark.parametrize("name", AO)
def test_torchao(tmp_path, name):
    from tests.scoring.formats.test_made_by_libraries import plain as opened

    _, weight, scale = AO[name]
    value, packed = nibbles(8, 64) if weight is None else (weight.float(), weight)
    powers = scale.dtype == torch.uint8
    grid = torch.full(scale.shape, 0.25) if powers else scale.float()
    stored = {"qdata": packed, "scale": scale.view(torch.float8_e8m0fnu) if powers else scale}
    if name == "NVFP4Tensor":
        stored["per_tensor_scale"], grid = torch.tensor(0.3), grid * torch.tensor(0.3)
    torchao(tmp_path, name.split()[0], {"is_swizzled_scales": False}, stored)
    same(opened(tmp_path, torch.float32)["m.weight"], value * grid.repeat_interleave(64 // grid.shape[1], 1))
    for kind, data in (("Int4PreshuffledTensor", {}), (name.split()[0], {"is_swizzled_scales": True})):
        torchao(tmp_path / kind, kind, data, stored)
        with pytest.raises(InputError, match="torchao"):
            opened(tmp_path / kind, torch.float32)


def ao_decoded(folder, kind, data, stored):
    """What becomes of one tensor of torchao."""
    from tests.scoring.formats.test_made_by_libraries import plain as opened

    torchao(folder, kind, data, stored)
    return opened(folder, torch.float32)["m.weight"]


def tensor_core_words(q):
    """As PyTorch's CUDA kernel packs [O, I] in tiles of 8 x 16, eight k-tiles together: word by word, lane by lane."""
    outputs, inputs = q.shape
    words = np.zeros((outputs // 8, inputs // 128, 32, 4), dtype=np.uint32)
    for tile, outer, lane, pair in np.ndindex(words.shape):
        row, start = tile * 8 + lane // 4, outer * 128 + pair * 32
        columns = [start + lane % 4 * 2 + step for step in (0, 8, 16, 24)]
        order = [*columns, *(column + 1 for column in columns)]  # seconds of each pair in the high half
        for place, column in enumerate(order):
            words[tile, outer, lane, pair] |= np.uint32(q[row, column] << 4 * place)
    return torch.from_numpy(words.view(np.int32))


@pytest.mark.parametrize("experts", [0, 3])
def test_int4_of_torchao_in_tiles(tmp_path, experts):
    """Outputs are padded to 8 and inputs to 1024; stacks have one more axis, which comes first."""
    generator = np.random.default_rng(5)
    q = generator.integers(0, 16, (experts or 1, 24, 1024))
    packed = torch.stack([tensor_core_words(one) for one in q])
    both = torch.rand(len(q), 1024 // 64, 24, 2).bfloat16()
    scale, zero = (both[..., i].float().mT.repeat_interleave(64, 2) for i in (0, 1))
    expected = ((torch.from_numpy(q).float() - 8) * scale + zero)[:, :20, :960]
    stored = {"qdata": packed, "scale_and_zero": both}
    shape, block = [20, 960], [1, 64]
    if experts:
        shape, block = [experts, *shape], [1, *block]
    else:
        stored, expected = {name: tensor[0] for name, tensor in stored.items()}, expected[0]
    data = {"block_size": block, "shape": shape}
    same(ao_decoded(tmp_path, "Int4TilePackedTo4dTensor", data, stored), expected.contiguous())


def test_int4_of_torchao_for_intels_gpus(tmp_path):
    generator = np.random.default_rng(6)
    q, zero = generator.integers(0, 16, (16, 64)), generator.integers(0, 16, (2, 16))
    stored = {
        "qdata": pack(q, 4),
        "scale": torch.rand(2, 16).half(),
        "zero_point": torch.from_numpy(zero).to(torch.int8),
    }
    data = {"block_size": [1, 32], "shape": [16, 64]}
    groups = np.arange(64) // 32
    expected = torch.from_numpy((q.T - zero[groups]).T).float() * stored["scale"][groups].T.float()
    same(ao_decoded(tmp_path, "Int4PlainInt32Tensor", data, stored), expected)
    with pytest.raises(InputError, match="for an NPU"):
        ao_decoded(tmp_path / "npu", "Int4PlainInt32Tensor", data, stored | {"zero_point": torch.rand(2, 16)})


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal_of_transformers(tmp_path, bits):
    """transformers names MLX's offsets otherwise, and can read its own packing."""
    packed, scale, bias = metal_quantization._affine_quantize_tensor(torch.randn(8, 128), 64, bits)
    tensors = {"m.weight": packed, "m.scales": scale, "m.qbiases": bias}
    found = plain(tmp_path, tensors, {"quant_method": "metal", "bits": bits, "group_size": 64})["m.weight"]
    same(found, metal_quantization._affine_dequantize_tensor(packed, scale, bias, 64, bits))
    with pytest.raises(InputError, match="scales of one byte"):
        plain(tmp_path, {name: tensors[name] for name in ("m.weight", "m.scales")}, {"bits": bits, "group_size": 64})


@pytest.mark.parametrize("name", ["bitlinear", "autobitlinear"])
def test_bitnet_as_transformers_packs_it(tmp_path, name):
    value, scale = torch.randint(-1, 2, (16, 24)), torch.tensor([0.37])
    stored = {"m.weight": bitnet.pack_weights(value.clone()), "m.weight_scale": scale, "n.weight": value.half()}
    stored["n.weight_scale"] = scale.clone()
    found = plain(tmp_path, stored, {"quant_method": "bitnet", "linear_class": name})
    for module in ("m", "n"):
        same(found[f"{module}.weight"], value / scale if name == "bitlinear" else value * scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gemmas_own_as_transformers_reads_it(tmp_path, bits):
    """The number of bits is the checkpoint's, or that of the first pattern found in a module's name."""
    layer = gemma_quant.QuantizedLinear(64, 16, num_bits=bits)
    table = gemma_quant.QuantizedEmbedding(20, 64, torch.float32, num_bits=bits)
    for packed in (layer.weight, table.embedding_quantized):
        packed.data = bytes_(*packed.shape).view(packed.dtype)
    layer.weight_scale.data, table.embedding_scale.data = torch.rand(16, 1), torch.rand(20, 1)
    stored = {f"m.up.{name}": layer.state_dict()[name] for name in ("weight", "weight_scale")}
    stored |= {f"t.{name}": tensor for name, tensor in table.state_dict().items()}
    by_pattern = {"num_bits": 3, "module_quant_configs": {"up$": {"num_bits": bits}, "t$": {"num_bits": bits}, "u": {}}}
    for said in (by_pattern, {"num_bits": bits}):
        found = plain(tmp_path, stored, {"quant_method": "gemma"} | said)
        same(found["m.up.weight"], layer._dequantize_weights())
        same(found["t.weight"], table.weight)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_packed_weight_that_nothing_explains_is_refused(tmp_path, dtype):
    tensors = {"m.weight": torch.ones(8, 8).to(dtype), "m.weight_scale_inv": torch.ones(8, 8, dtype=torch.int32)}
    with pytest.raises(InputError, match="in a way that is not known"):
        plain(tmp_path, tensors, {})


def test_rotated_inputs_are_refused(tmp_path):
    settings = {"quant_method": "quark", "algo_config": [{"name": "rotation"}]}
    with pytest.raises(InputError, match="rotated"):
        plain(tmp_path, {"m.weight": torch.ones(2, 2)}, settings)


def test_gpt_oss_of_unsloth_before_quantization(tmp_path):
    """One linear layer for each expert, outputs first, numbered past nine."""
    weights, bias = torch.randn(12, 6, 4), torch.randn(12, 6)
    stem = "model.layers.0.mlp.experts.gate_up_projs"
    tensors = {f"{stem}.{e}.weight": weights[e] for e in range(12)} | {f"{stem}.{e}.bias": bias[e] for e in range(12)}
    tensors["model.layers.0.mlp.router.linear.weight"] = torch.randn(12, 4)
    found = plain(tmp_path, tensors, {})
    assert set(found) == {*(f"model.layers.0.mlp.experts.gate_up_proj{end}" for end in ("", "_bias")),
                          "model.layers.0.mlp.router.weight"}  # fmt: skip
    same(found["model.layers.0.mlp.experts.gate_up_proj"], weights.mT.contiguous())
    same(found["model.layers.0.mlp.experts.gate_up_proj_bias"], bias)
