"""Checkpoints of libraries that know linear layers only: a matrix of each expert, as transformers 4.57 had them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.data.plain import Values, base, linear_layers, replace, write_config


def hqq(out: Path) -> Values:
    """A matrix of each expert, as transformers 4.57 saves them: the state of HQQ's own layers, bits in turns."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    folder, values = base(), {}
    state = load_file(folder / "model.safetensors")
    kinds = [
        {"nbits": 4, "group_size": 32},
        {"nbits": 3, "group_size": 64, "view_as_float": True},
        {"nbits": 2, "group_size": 32, "axis": 0},
        {"nbits": 8, "group_size": None},
    ]
    for at, (name, layer) in enumerate(linear_layers(state, "_proj.weight", "mlp.gate.weight").items()):
        kind = kinds[".1." in name] if name.endswith("gate") else kinds[at % len(kinds)]
        config = BaseQuantizeConfig(**{"axis": 1} | kind)
        made = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
        values[f"{name}.weight"] = made.dequantize()
        replace(state, name, {key: value for key, value in made.state_dict().items() if value is not None})
    save_file(state, out / "model.safetensors", {"format": "pt"})
    settings = transformers.HqqConfig(nbits=4, group_size=32, skip_modules=["lm_head"]).to_dict()
    write_config(out, folder, settings)
    return values


def quanto(out: Path) -> Values:
    """optimum-quanto, for which the model is one with a matrix of each expert; config.json does not know."""
    from optimum.quanto import QLinear, freeze, qfloat8, qint8

    folder, values, quantized = base(), {}, {}
    state = load_file(folder / "model.safetensors")
    for at, (name, layer) in enumerate(linear_layers(state).items()):
        kind = (qint8, qfloat8)[at % 2]
        made = QLinear.from_module(layer, weights=kind)
        freeze(made)
        values[f"{name}.weight"] = made.weight.dequantize()
        quantized[name] = {"weights": kind.name, "activations": "none"}
        replace(state, name, made.state_dict())
    save_file(state, out / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", out / "config.json")
    (out / "quanto_qmap.json").write_text(json.dumps(quantized, indent=4))
    return values


def aqlm(out: Path) -> Values:
    """AQLM's own layers, filled at random; its kernels for a CPU would turn the codes, so its formula is asked."""
    from aqlm import QuantizedLinear
    from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data

    folder, values = base(), {}
    state = load_file(folder / "model.safetensors")
    books, bits = 2, 5
    for name, layer in linear_layers(state).items():
        made = QuantizedLinear(layer.in_features, layer.out_features, 8, 1, books, bits, bias=False)
        made.codebooks.data.normal_(0, layer.in_features**-0.5)
        made.scales.data.uniform_(0.5, 1.5)
        codes = torch.randint(0, 2**bits, made.codes.shape)
        made.codes.data = pack_int_data(codes, bits)
        values[f"{name}.weight"] = _dequantize_weight(unpack_int_data(made.codes, bits), made.codebooks, made.scales)
        replace(state, name, made.state_dict())
    save_file(state, out / "model.safetensors", {"format": "pt"})
    settings = transformers.AqlmConfig(8, 1, books, bits, linear_weights_not_to_quantize=["lm_head.weight"]).to_dict()
    write_config(out, folder, settings)
    return {name: value.detach() for name, value in values.items()}


# Outliers, a residual, a permutation, and pieces of six outputs, which leave a rest; and none of these.
VPTQ_KINDS = (
    {"vector_lens": [4, 6], "num_centroids": [16, 32], "num_res_centroids": [-1, 8], "outlier_size": 8}
    | {"enable_norm": True, "enable_perm": True},
    {"vector_lens": [-1, 4], "num_centroids": [-1, 64], "num_res_centroids": [-1, -1], "outlier_size": 0}
    | {"enable_norm": False, "enable_perm": False},
)


def vptq(out: Path) -> Values:
    """VPTQ's own layers, filled at random; given the unit matrix, they show the weight."""
    unused = ("sentence_transformers", "sentence_transformers.SentenceTransformer")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in unused}):
        from vptq import VQuantLinear
        from vptq.utils.pack import pack_index

    folder, values, by_name = base(), {}, {}
    state = load_file(folder / "model.safetensors")
    for name, layer in linear_layers(state).items():
        said = VPTQ_KINDS["down_proj" in name] | {"group_num": 2, "indices_as_float": False, "is_indice_packed": True}
        said["group_size"] = (layer.in_features - said["outlier_size"]) // 2
        sizes = layer.in_features, layer.out_features
        made = VQuantLinear(*sizes, **said, dtype=torch.float32, enable_proxy_error=False).requires_grad_(False)
        made.indices.data = pack_index(*filled(made), made.res_index_bits)
        values[f"{name}.weight"] = made(torch.eye(layer.in_features)).T
        by_name[name] = said | {"in_features": layer.in_features, "out_features": layer.out_features}
        replace(state, name, made.state_dict())
    save_file(state, out / "model.safetensors", {"format": "pt"})
    write_config(out, folder, transformers.VptqConfig(config_for_layers=by_name).to_dict())
    return values


def filled(layer: torch.nn.Module) -> tuple[torch.Tensor, int, torch.Tensor | None]:
    """Random numbers for a layer of VPTQ; the indices, their bits and those of the residual are yet to be packed."""
    for name, tensor in layer.named_parameters():
        if tensor.is_floating_point():
            tensor.data.normal_(0, layer.in_features**-0.5)
        elif name == "perm":
            tensor.data = torch.randperm(layer.in_features).short()
        elif name == "outlier_indices":
            tensor.data.random_(0, layer.num_outlier_centroids)
    shape = (layer.num_codebooks, layer.num_indices, layer.group_size)
    more = torch.randint(0, layer.num_res_centroids, shape).short() if layer.enable_residual else None
    return torch.randint(0, layer.num_centroids, shape).short(), layer.index_bits, more
