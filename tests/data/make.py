"""Tiny checkpoints as quantization libraries write them, and what each library says that its numbers mean.

    python -m tests.data.make ct_fp8 torchao_int8       # in an environment that has these libraries

Each folder here holds what the library wrote, and made.json: the libraries' versions, and a digest of every quantized
weight as the library itself dequantizes it. The tests compare with these and need none of the libraries.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny

FOLDER = Path(__file__).parent
SIZES = {
    "vocab_size": 64,
    "num_experts": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
OSS = {"vocab_size": 64, "num_local_experts": 5, "num_attention_heads": 2, "num_hidden_layers": 2} | {
    "layer_types": ["sliding_attention", "full_attention"]
}
UNQUANTIZED = ["lm_head", "re:.*embed_tokens", "re:.*mlp.gate$", "re:.*norm$"]
Values = dict[str, torch.Tensor]  # plain name -> what the library makes of it


def digest(value: torch.Tensor) -> str:
    """Equal for equal numbers of the same type and shape; there is one zero."""
    content = (value + 0).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{value.dtype} {list(value.shape)} ".encode() + content).hexdigest()[:16]


def base() -> Path:
    """The model that is quantized, with a tokenizer, as some libraries ask for one."""
    folder = Path(tempfile.mkdtemp())
    tiny.make("qwen3_moe", folder, dtype=torch.bfloat16, **SIZES)
    tiny.tokenizer(folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    """The model in memory."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def linears(tensors: Iterable[str], ending: str) -> list[str]:
    """The modules that have a tensor of this ending."""
    return [name.removesuffix(f".{ending}") for name in tensors if name.endswith(f".{ending}")]


def torchao(out: Path, kind: str) -> Values:
    """Weights and whole stacks of experts, through transformers."""
    from torchao import quantization

    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(version=2),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
        "int4": lambda: quantization.Int4WeightOnlyConfig(group_size=32),
    }[kind]()
    everything = quantization.FqnToConfig(
        {r"re:.*experts\.gate_up_proj": config, r"re:.*experts\.down_proj": config, "_default": config}
    )
    with int4_packing() if kind == "int4" else contextlib.nullcontext():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base(), dtype=torch.bfloat16, quantization_config=transformers.TorchAoConfig(everything)
        )
    model.save_pretrained(out)
    quantized = {name: t for name, t in model.state_dict().items() if type(t) is not torch.Tensor}
    if kind != "int4":
        return {name: t.dequantize() for name, t in quantized.items()}
    weights = load(base()).state_dict()  # the same again: its numbers are seeded
    return {name: int4_values(t, weights[name]) for name, t in quantized.items()}


@contextlib.contextmanager
def int4_packing() -> Iterator[None]:
    """torchao's own import of mslk, whose packing is plain torch while the rest of it needs a GPU."""
    from torchao.quantization.quantize_.workflows.int4 import int4_tensor

    gpu = "mslk.quantize.triton.fp8_quantize"
    parents = [gpu.rsplit(".", count)[0] for count in range(4)]
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in parents}):
        packing = runpy.run_path(str(metadata.distribution("mslk-cuda").locate_file("mslk/quantize/shuffle.py")))
    names = ("pack_int4", "int4_row_quantize_zp")
    with mock.patch.multiple(int4_tensor, **{name: packing[name] for name in names}):
        yield


def int4_values(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What mslk's kernels multiply with: value * scale + zero; never farther from the weight than half a step."""
    low, high = tensor.qdata << 4 >> 4, tensor.qdata >> 4  # signed, so the sign bit is spread
    value = torch.stack((low, high), dim=-1).flatten(-2).unflatten(-1, (-1, tensor.block_size[-1])).float()
    scale, zero = (part.mT.unsqueeze(-1).float() for part in (tensor.scale, tensor.zero_point))
    values = value * scale + zero
    assert ((values.flatten(-2) - weight.float()).abs() <= (scale * 0.55 + 1e-3).expand_as(value).flatten(-2)).all()
    return values.flatten(-2)


def torchao_each(out: Path) -> Values:
    """A matrix of each expert, as older models have them in memory; torchao writes and describes the tensors."""
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    folder, config = base(), quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    state = load_file(folder / "model.safetensors")
    for name, layer in linear_layers(state).items():
        quantization.quantize_(layer, config)
        state[f"{name}.weight"] = layer.weight.data
    tensors, about = flatten_tensor_state_dict(state)
    save_file(tensors, out / "model.safetensors", about | {"format": "pt"})
    write_config(out, folder, transformers.TorchAoConfig(config).to_dict())
    return {name: t.dequantize() for name, t in state.items() if type(t) is not torch.Tensor}


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


def replace(state: Values, name: str, parts: Values) -> None:
    """The weight of a layer gives way to what a library keeps of it."""
    del state[f"{name}.weight"]
    state |= {f"{name}.{part}": tensor.detach().clone() for part, tensor in parts.items()}


def linear_layers(state: Values, *endings: str) -> dict[str, torch.nn.Linear]:
    """Every matrix of such a name (without one: all but routers), as a module of its own."""
    layers = {}
    for name, weight in state.items():
        if name.endswith(endings or "_proj.weight"):
            layers[name.removesuffix(".weight")] = layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight
    return layers


def write_config(out: Path, parent: Path, settings: object) -> None:
    """The parent's config with settings of the quantization."""
    config = tiny.read_config(parent) | {"quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config, indent=2))


def compressed_tensors(out: Path, scheme: str) -> Values:
    """llm-compressor without a model; its own converter turns the result back."""
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, convert_checkpoint
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import model_free_ptq

    if scheme == "W4A16":
        args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
        chosen: object = QuantizationScheme(targets=["Linear"], weights=args)
    else:
        chosen = scheme
    model_free_ptq(base(), out, scheme=chosen, ignore=UNQUANTIZED, device="cpu")
    plain = Path(tempfile.mkdtemp())
    convert_checkpoint(out, plain, CompressedTensorsDequantizer(out))
    stored, values = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    return {f"{name}.weight": values[f"{name}.weight"] for name in linears(stored, "weight_scale")}


def modelopt(out: Path, kind: str) -> Values:
    """modelopt's own tensors turn the exported numbers back."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    def forward(model: torch.nn.Module) -> None:
        model(torch.arange(48).view(2, 24) % 64)

    config = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}[kind]
    model = mtq.quantize(load(base()), config, forward)
    export_hf_checkpoint(model, export_dir=out)
    stored, values = load_file(out / "model.safetensors"), {}
    for name in linears(stored, "weight_scale"):
        weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        if kind == "fp8":
            made = FP8QTensor(weight.shape, torch.float32, weight).dequantize(scale=scale)
        else:
            shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
            outer = stored[f"{name}.weight_scale_2"]
            made = NVFP4QTensor(shape, torch.float32, weight).dequantize(
                scale=scale, double_scale=outer, block_sizes={-1: 16}
            )
        values[f"{name}.weight"] = made.float()
    return values


def auto_round(out: Path, layout: str) -> Values:
    """AutoRound in its own layout and in those of others; its linear layers, given the unit matrix, show the weight."""
    from auto_round import AutoRound

    quantizer = AutoRound(
        str(base()), scheme="W4A16", group_size=32, sym=False, iters=0, disable_opt_rtn=True, device_map="cpu"
    )
    quantizer.quantize_and_save(output_dir=str(out), format=layout)
    for written in out.glob("*/*"):  # some layouts get a folder of their own
        shutil.move(written, out / written.name)
    stored, values = load_file(out / "model.safetensors"), {}
    for name in linears(stored, "qweight"):
        parts = [stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        values[f"{name}.weight"] = _awq(*parts) if layout == "auto_awq" else _linear(*parts, layout)
    return values


def _linear(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, layout: str) -> torch.Tensor:
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    inputs, outputs = qweight.shape[0] * 8, qweight.shape[1]
    module = qlinear_torch_zp if layout == "auto_gptq" else qlinear_torch
    layer = module.QuantLinear(4, 32, inputs, outputs, bias=False)
    layer.qweight, layer.qzeros, layer.scales = qweight, qzeros, scales
    layer.post_init()
    return layer(torch.eye(inputs, dtype=torch.float16)).T


def _awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(qweight, qzeros, scales, 4, 32).T


def quark(out: Path, kind: str) -> Values:
    """Quark from file to file; its linear layers, filled with what it wrote, turn the weights back."""
    from quark.torch import ModelQuantizer
    from quark.torch.export.api import _map_to_quark
    from quark.torch.quantization.config import config

    spec = {
        "fp8": lambda: config.FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False),
        "mxfp4": lambda: config.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False),
    }[kind]().to_quantization_spec()
    everything = config.QLayerConfig(weight=spec)
    plan = config.QConfig(
        global_quant_config=everything,
        exclude=["lm_head", "*mlp.gate", "*embed_tokens"],
        quant_flow=config.QuantFlow.file2file,
    )
    ModelQuantizer(plan).direct_quantize_checkpoint(str(base()), str(out), device="cpu")
    stored = load_file(out / "model.safetensors")
    names = linears(stored, "weight_scale")
    values = {}
    for name in names:
        weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        inputs = weight.shape[1] * (2 if kind == "mxfp4" else 1)
        layers = torch.nn.ModuleDict({"one": torch.nn.Linear(inputs, len(weight), bias=False, dtype=torch.float32)})
        _map_to_quark(layers, config.QConfig(global_quant_config=everything), "reorder", "quark")
        layers["one"].weight = torch.nn.Parameter(weight, requires_grad=False)
        layers["one"].weight_quantizer.scale = scale
        values[f"{name}.weight"] = layers["one"].weight_quantizer(weight).float()
    return values


def mlx(out: Path, family: str) -> Values:
    """mlx-lm: Qwen3-MoE in affine 4 bits with a router of 8, gpt-oss kept in MXFP4; layers named as in MLX."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm import utils

    from tests.pruning import test_quantized

    folder = Path(tempfile.mkdtemp()) / "parent"
    if family == "gpt_oss":
        tiny.make("gpt_oss", folder, dtype=torch.bfloat16, **OSS)
        test_quantized.rewrite(folder, test_quantized.to_mxfp4, {"quant_method": "mxfp4"})
    else:
        folder = base()
    config = tiny.read_config(folder)
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "num_experts": 5}
    config.setdefault("head_dim", 32)
    (folder / "config.json").write_text(json.dumps(config))
    model, config = utils.load_model(folder)
    if family != "gpt_oss":
        model, config = utils.quantize_model(model, config, 32, 4)
    utils.save_model(out, model)
    utils.save_config(config, out / "config.json")
    if family == "gpt_oss":
        return _mxfp4(load_file(folder / "model.safetensors"))
    values, parts = {}, dict(tree_flatten(model.parameters()))
    for name in linears(parts, "scales"):
        own = config["quantization"].get(name, config["quantization"])
        settings = {"group_size": own["group_size"], "bits": own["bits"]}
        scales, biases = (parts[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        made = torch.from_numpy(np.array(mx.dequantize(parts[f"{name}.weight"], scales, biases, **settings)))
        experts = enumerate(made) if made.dim() == 3 else [(-1, made)]
        for expert, matrix in experts:
            values[f"{name.replace('switch_mlp', f'experts.{expert}')}.weight"] = matrix
    return values


def _mxfp4(parent: Values) -> Values:
    """The experts of gpt-oss before MLX laid them out anew, as transformers reads them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stems = [name.removesuffix("_blocks") for name in parent if name.endswith("_blocks")]
    return {stem: convert_moe_packed_tensors(parent[f"{stem}_blocks"], parent[f"{stem}_scales"]) for stem in stems} | {
        name: tensor for name, tensor in parent.items() if name.endswith("proj_bias")
    }


def bitsandbytes(out: Path) -> Values:
    """gpt-oss as unsloth lays it out: a linear layer of each expert, in NF4 with doubly quantized scales."""
    from bitsandbytes import functional

    folder = Path(tempfile.mkdtemp())
    tiny.make("gpt_oss", folder, dtype=torch.bfloat16, **OSS)
    shutil.copytree(folder, out, dirs_exist_ok=True)
    stored, values = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = tensor
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        bias = load_file(folder / "model.safetensors")[f"{name}_bias"]
        del stored[name]
        for expert, matrix in enumerate(tensor):
            layer = f"{name}s.{expert}"
            packed, state = functional.quantize_4bit(matrix.T.contiguous(), quant_type="nf4", compress_statistics=True)
            stored |= {f"{layer}.weight": packed, f"{layer}.bias": bias[expert].clone()}
            stored |= {f"{layer}.weight.{part}": t for part, t in state.as_dict(packed=True).items()}
            state.dtype = torch.float32
            values.setdefault(name, []).append(functional.dequantize_4bit(packed, state).T)
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(("up_proj_bias", "down_proj_bias"))}
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    config = tiny.read_config(out) | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return {name: torch.stack(experts) for name, experts in values.items()}


MAKERS: dict[str, tuple[Callable[[Path], Values], tuple[str, ...]]] = {
    "torchao_int8": (functools.partial(torchao, kind="int8"), ("torchao",)),
    "torchao_float8": (functools.partial(torchao, kind="float8"), ("torchao",)),
    "torchao_int4": (functools.partial(torchao, kind="int4"), ("torchao", "mslk-cuda")),
    "torchao_each": (torchao_each, ("torchao",)),
    "ct_fp8": (functools.partial(compressed_tensors, scheme="FP8_DYNAMIC"), ("llmcompressor", "compressed-tensors")),
    "ct_mxfp8": (functools.partial(compressed_tensors, scheme="MXFP8"), ("llmcompressor", "compressed-tensors")),
    "ct_nvfp4": (functools.partial(compressed_tensors, scheme="NVFP4A16"), ("llmcompressor", "compressed-tensors")),
    "ct_mxfp4": (functools.partial(compressed_tensors, scheme="MXFP4A16"), ("llmcompressor", "compressed-tensors")),
    "ct_int4": (functools.partial(compressed_tensors, scheme="W4A16"), ("llmcompressor", "compressed-tensors")),
    "ct_int8": (functools.partial(compressed_tensors, scheme="W8A8"), ("llmcompressor", "compressed-tensors")),
    "modelopt_fp8": (functools.partial(modelopt, kind="fp8"), ("nvidia-modelopt",)),
    "modelopt_nvfp4": (functools.partial(modelopt, kind="nvfp4"), ("nvidia-modelopt",)),
    "auto_round": (functools.partial(auto_round, layout="auto_round"), ("auto-round",)),
    "gptq": (functools.partial(auto_round, layout="auto_gptq"), ("auto-round",)),
    "awq": (functools.partial(auto_round, layout="auto_awq"), ("auto-round", "autoawq")),
    "quark_fp8": (functools.partial(quark, kind="fp8"), ("amd-quark",)),
    "quark_mxfp4": (functools.partial(quark, kind="mxfp4"), ("amd-quark",)),
    "mlx": (functools.partial(mlx, family="qwen3_moe"), ("mlx", "mlx-lm")),
    "mlx_gpt_oss": (functools.partial(mlx, family="gpt_oss"), ("mlx", "mlx-lm")),
    "hqq": (hqq, ("hqq",)),
    "quanto": (quanto, ("optimum-quanto",)),
    "aqlm": (aqlm, ("aqlm",)),
    "vptq": (vptq, ("vptq",)),
    "unsloth": (bitsandbytes, ("bitsandbytes",)),
}
KEPT = ("model.safetensors", "config.json", "hf_quant_config.json", "quantization_config.json", "quanto_qmap.json")


def make(name: str) -> None:
    """Write one folder anew."""
    maker, libraries = MAKERS[name]
    work = Path(tempfile.mkdtemp())
    values = maker(work)
    out = FOLDER / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in KEPT:
        if (work / file).exists():
            shutil.copy(work / file, out / file)
    about = {
        "made_by": {library: metadata.version(library) for library in (*libraries, "transformers", "torch")},
        "plain": {plain: digest(value) for plain, value in sorted(values.items())},
        "dtype": str(next(iter(values.values())).dtype).removeprefix("torch."),
    }
    (out / "made.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.modules["mslk"] = None  # type: ignore[assignment]  # needs a GPU, and torchao imports it where it is installed
    for name in sys.argv[1:]:
        make(name)
