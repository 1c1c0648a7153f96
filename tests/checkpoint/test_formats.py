"""Number formats are recognised by what their makers write; what is not known, or cannot be cut exactly, is refused."""

from __future__ import annotations

import json

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from moeprune.checkpoint import formats
from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError
from tests import handmade

E = 8
CONFIG = {"model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 1}


def stacked(dtype="BF16"):
    return {
        "model.layers.0.mlp.gate.weight": ("F32", [E, 4]),
        "model.layers.0.mlp.experts.gate_up_proj": (dtype, [E, 8, 32]),
        "model.layers.0.mlp.experts.down_proj": (dtype, [E, 4, 64]),
    }


def written(folder, settings, key="quantization_config", tensors=None):
    config = CONFIG | ({key: settings} if settings else {})
    return open_checkpoint(handmade.checkpoint(folder, config, tensors or stacked()))


# As they stand in config.json of published checkpoints, shortened.
WRITTEN = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "deepseek_fp4": {"quant_method": "fp8", "expert_dtype": "fp4", "scale_fmt": "ue8m0"},
    "ct_int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
    },
    "ct_fp8": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {}}},
    "ct_int8": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "nvfp4": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]},
    "mxfp4_ct": {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {"group_0": {"format": "mxfp4-pack-quantized"}},
    },
    "modelopt_nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8}},
    "modelopt_fp8": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "auto_round": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    "quark": {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "aqlm": {"quant_method": "aqlm", "in_group_size": 8, "num_codebooks": 1, "nbits_per_codebook": 16},
    "vptq": {"quant_method": "vptq", "config_for_layers": {}, "shared_layer_config": {}},
    "spqr": {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, "shapes": {}},
    "higgs": {"quant_method": "higgs", "bits": 4, "p": 2, "tune_metadata": {}},
    "fp_quant": {"quant_method": "fp_quant", "forward_dtype": "nvfp4", "hadamard_group_size": 32},
    "eetq": {"quant_method": "eetq", "weights": "int8"},
    "bitnet": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    "gemma": {"quant_method": "gemma", "num_bits": 4},
    "fouroversix": {"quant_method": "fouroversix", "dtype": "nvfp4"},
    "mlx": {"bits": 4, "group_size": 64, "mode": "affine", "model.layers.0.mlp.gate": {"bits": 8, "group_size": 64}},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_format_is_recognised(tmp_path, name):
    key = "quantization" if name == "mlx" else "quantization_config"
    assert formats.format_of(written(tmp_path, WRITTEN[name], key)) == name


def test_what_transformers_writes_for_metal_is_that_of_mlx(tmp_path):
    assert formats.format_of(written(tmp_path, {"quant_method": "metal", "bits": 4, "group_size": 64})) == "mlx"


def test_mxfp8_of_transformers_is_fp8(tmp_path):
    assert formats.format_of(written(tmp_path, {"quant_method": "mxfp8", "weight_block_size": [1, 32]})) == "fp8"


def test_every_method_of_transformers_is_known():
    """Each is cut, or refused with a reason."""
    inside = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "fp8": "fp8"}
    methods = {inside.get(name, name) for name in AUTO_QUANTIZER_MAPPING} - {"gguf", "compressed-tensors", "metal"}
    known = {name for name in methods if any(entry.recognise({"quant_method": name}) for entry in formats.FORMATS)}
    assert methods - known == set(formats.REFUSED)


@pytest.mark.parametrize("name", ["spqr", "higgs", "fp_quant", "eetq", "fouroversix"])
def test_what_is_cut_only_says_so_before_it_is_scored(tmp_path, name):
    with pytest.raises(InputError, match="score the original checkpoint and cut this one"):
        formats.check_scorable(written(tmp_path, WRITTEN[name]))
    for other in ("awq", "hqq", "vptq", "quark"):
        formats.check_scorable(written(tmp_path / other, WRITTEN[other]))


def test_a_kernels_own_order_is_not_scored(tmp_path):
    with pytest.raises(InputError, match="'gemv_fast'"):
        formats.check_scorable(written(tmp_path, WRITTEN["awq"] | {"version": "GEMV_FAST"}))


@pytest.mark.parametrize("said", [{"use_rms_norm": True}, {"quantization_mode": "online"}])
def test_layers_of_bitnet_that_the_model_does_not_have_are_not_scored(tmp_path, said):
    formats.check_scorable(written(tmp_path / "plain", WRITTEN["bitnet"]))
    with pytest.raises(InputError, match="cannot be scored"):
        formats.check_scorable(written(tmp_path, WRITTEN["bitnet"] | said))


def test_optimum_quanto_is_known_by_its_map(tmp_path):
    folder = written(tmp_path, None).folder
    (folder / "quanto_qmap.json").write_text("{}")
    assert formats.format_of(open_checkpoint(folder)) == "quanto"


# What the router of 8 experts would be in each: some of it has a size of 8, which means nothing.
PACKED_ROUTERS = {
    "quanto": {"weight._data._data": ("U8", [4, 4]), "weight._scale": ("BF16", [E, 1])},
    "aqlm": {"codes": ("I8", [E, 1, 1]), "codebooks": ("F16", [1, E, 1, 8]), "scales": ("F16", [E, 1, 1, 1])},
    "vptq": {"indices": ("I32", [1, 1, E]), "centroids.weight": ("F16", [1, 64]), "weight_scale": ("F16", [E])},
    "spqr": {"dense_weights": ("I64", [E, 2]), "row_offsets": ("I32", [E])},
    "higgs": {"weight": ("I32", [E, 4]), "scales": ("F16", [E, 1]), "tables2": ("F16", [16, 16, 2])},
    "fp_quant": {"qweight": ("U8", [E, 2]), "scales": ("U8", [E, 1])},
    "eetq": {"weight": ("I8", [E, E]), "weight_scales": ("F16", [E])},
    "bitnet": {"weight": ("U8", [E, 4]), "weight_scale": ("BF16", [1])},
    "fouroversix": {"quantized_weight_values": ("U8", [E, 2]), "quantized_weight_amax": ("F32", [1])},
}


@pytest.mark.parametrize("name", PACKED_ROUTERS)
def test_matrices_that_can_only_be_moved_as_a_whole(tmp_path, name):
    """One matrix of each expert may be packed; the router, whose rows are cut, may not."""
    assert set(PACKED_ROUTERS) == {entry.name for entry in formats.FORMATS if entry.packed}
    apart = {
        f"model.layers.0.mlp.{place}.{part}": stored
        for place in (*(f"experts.{e}.up_proj" for e in range(E)), "shared_experts.up_proj")
        for part, stored in PACKED_ROUTERS[name].items()
    }
    good = apart | {"model.layers.0.mlp.gate.weight": ("BF16", [E, 4])}
    checkpoint = written(tmp_path / "good", WRITTEN[name], tensors=good)
    formats.check_cuttable(checkpoint, understand(checkpoint))
    router = {f"model.layers.0.mlp.gate.{part}": stored for part, stored in PACKED_ROUTERS[name].items()}
    checkpoint = written(tmp_path / "bad", WRITTEN[name], tensors=apart | router)
    with pytest.raises(InputError, match=r"mlp\.gate\.\S+ is packed across experts|this router is packed"):
        formats.check_cuttable(checkpoint, understand(checkpoint))


def test_every_format_is_recognised_here():
    assert {entry.name for entry in formats.FORMATS} - set(WRITTEN) == {"modelopt"}


@pytest.mark.parametrize(
    ("dtype", "name"), [("BF16", "bf16"), ("F16", "fp16"), ("F64", "fp64"), ("F8_E4M3", "f8_e4m3")]
)
def test_a_plain_checkpoint_is_named_after_most_of_its_bytes(tmp_path, dtype, name):
    assert formats.format_of(written(tmp_path, None, tensors=stacked(dtype))) == name


def test_settings_are_found_in_a_part_of_the_config_and_beside_it(tmp_path):
    inner = written(tmp_path / "a", {"quantization_config": WRITTEN["awq"]}, key="text_config")
    assert formats.format_of(inner) == "awq"
    folder = written(tmp_path / "b", None).folder
    side = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(side))
    assert formats.format_of(open_checkpoint(folder)) == "modelopt_nvfp4"


@pytest.mark.parametrize(
    "settings",
    [*({"quant_method": name} for name in formats.REFUSED), {"quant_method": "compressed-tensors", "format": "odd"}],
)
def test_an_unknown_format_is_refused(tmp_path, settings):
    with pytest.raises(InputError, match=settings["quant_method"]):
        formats.format_of(written(tmp_path, settings))


def test_what_torchao_keeps_beside_stacked_experts_may_forbid_the_cut(tmp_path):
    checkpoint = written(tmp_path, WRITTEN["torchao"])
    stack, router = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.gate.weight"
    tensors = {
        "model.layers.0.mlp.gate._weight_qdata": ("I8", [E, 2]),
        "model.layers.0.mlp.experts._down_proj_qdata": ("I8", [E, 4, 16]),
    }
    for name, data, refused in (
        (stack, {"block_size": [1, 4, 64], "shape": [E, 4, 64]}, False),  # follows the cut
        (stack, {"_type": "T", "original_shape": [E, 4, 64]}, True),
        (stack, {"inner": {"shape": [E, 4, 64]}}, True),
        (router, {"shape": [E, 4]}, True),
        (stack, {"_type": "NVFP4Tensor", "is_swizzled_scales": False}, False),
        (stack, {"_type": "NVFP4Tensor", "is_swizzled_scales": True}, True),
    ):
        metadata = {"format": "pt", name: json.dumps({"_type": "X", "_data": data})}
        handmade.shard(checkpoint.folder / "model.safetensors", tensors, metadata)
        again = open_checkpoint(checkpoint.folder)
        if refused:
            with pytest.raises(InputError, match=rf"{name}.*cannot be cut"):
                formats.check_cuttable(again, understand(again))
        else:
            formats.check_cuttable(again, understand(again))
