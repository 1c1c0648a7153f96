"""Tiny checkpoints as quantization libraries write them, and what each library says that its numbers mean.

    python -m tests.data.make ct_fp8 torchao_int8       # in an environment that has these libraries

Each folder here holds what the library wrote, and made.json: the libraries' versions, and a digest of every quantized
weight as the library itself dequantizes it. The tests compare with these and need none of the libraries.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.data import matrices
from tests.data.of_torchao import torchao, torchao_each
from tests.data.plain import Values, base, load

FOLDER = Path(__file__).parent
OSS = {"vocab_size": 64, "num_local_experts": 5, "num_attention_heads": 2, "num_hidden_layers": 2} | {
    "layer_types": ["sliding_attention", "full_attention"]
}
UNQUANTIZED = ["lm_head", "re:.*embed_tokens", "re:.*mlp.gate$", "re:.*norm$"]


def digest(value: torch.Tensor) -> str:
    """Equal for equal numbers of the same type and shape; there is one zero."""
    content = (value + 0).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{value.dtype} {list(value.shape)} ".encode() + content).hexdigest()[:16]


def linears(tensors: Iterable[str], ending: str) -> list[str]:
    """The modules that have a tensor of this ending."""
    return [name.removesuffix(f".{ending}") for name in tensors if name.endswith(f".{ending}")]


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
    "hqq": (matrices.hqq, ("hqq",)),
    "quanto": (matrices.quanto, ("optimum-quanto",)),
    "aqlm": (matrices.aqlm, ("aqlm",)),
    "vptq": (matrices.vptq, ("vptq",)),
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
