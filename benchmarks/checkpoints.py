"""Large checkpoints of noise in the number formats of the hub, with the names, types and shapes that lie there.

Sizes are Qwen3-30B-A3B's: a hidden size of 2048, 768 in each expert, groups of 128 or less. There are 32 experts in a
layer, so that a file of two gigabytes has several layers.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

EXPERTS, HIDDEN, INTER = 32, 2048, 768
SHARD_BYTES = 500_000_000
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1}

Tensors = dict[str, tuple[str, list[int]]]  # name -> type and shape
Linear = Callable[[str, int, int], Tensors]  # a matrix by name, outputs and inputs


def plain(name: str, out: int, inputs: int) -> Tensors:
    """bf16."""
    return {f"{name}.weight": ("BF16", [out, inputs])}


def fp8(name: str, out: int, inputs: int) -> Tensors:
    """DeepSeek's blocks of 128 x 128."""
    scales = [out // 128, inputs // 128]
    return {f"{name}.weight": ("F8_E4M3", [out, inputs]), f"{name}.weight_scale_inv": ("F32", scales)}


def packed(name: str, out: int, inputs: int) -> Tensors:
    """compressed-tensors, four bits."""
    return {
        f"{name}.weight_packed": ("I32", [out, inputs // 8]),
        f"{name}.weight_scale": ("BF16", [out, inputs // 32]),
        f"{name}.weight_shape": ("I64", [2]),
    }


def nvfp4(name: str, out: int, inputs: int) -> Tensors:
    """compressed-tensors, NVFP4."""
    return {
        f"{name}.weight_packed": ("U8", [out, inputs // 2]),
        f"{name}.weight_scale": ("F8_E4M3", [out, inputs // 16]),
        f"{name}.weight_global_scale": ("F32", [1]),
        f"{name}.input_global_scale": ("F32", [1]),
    }


def awq(name: str, out: int, inputs: int) -> Tensors:
    """AWQ packs along the outputs."""
    return {
        f"{name}.qweight": ("I32", [inputs, out // 8]),
        f"{name}.qzeros": ("I32", [inputs // 128, out // 8]),
        f"{name}.scales": ("F16", [inputs // 128, out]),
    }


def gptq(name: str, out: int, inputs: int) -> Tensors:
    """GPTQ packs along the inputs."""
    return {
        f"{name}.qweight": ("I32", [inputs // 8, out]),
        f"{name}.qzeros": ("I32", [inputs // 128, out // 8]),
        f"{name}.scales": ("F16", [inputs // 128, out]),
        f"{name}.g_idx": ("I32", [inputs]),
    }


def bitsandbytes(name: str, out: int, inputs: int) -> Tensors:
    """Four bits, scales in eight bits."""
    return {
        f"{name}.weight": ("U8", [out * inputs // 2, 1]),
        f"{name}.weight.absmax": ("U8", [out * inputs // 64]),
        f"{name}.weight.nested_absmax": ("F32", [-(-out * inputs // 64 // 256)]),
        f"{name}.weight.nested_quant_map": ("F32", [256]),
        f"{name}.weight.quant_map": ("F32", [16]),
        f"{name}.weight.quant_state.bitsandbytes__nf4": ("U8", [80]),
    }


def layer(number: int, linear: Linear) -> Tensors:
    """A decoder layer of Qwen3-MoE, tensors of each expert by name; the router is never quantized."""
    prefix = f"model.layers.{number}"
    tensors = {f"{prefix}.input_layernorm.weight": ("BF16", [HIDDEN])}
    for part in "qkvo":
        tensors |= linear(f"{prefix}.self_attn.{part}_proj", HIDDEN, HIDDEN)
    tensors[f"{prefix}.mlp.gate.weight"] = ("BF16", [EXPERTS, HIDDEN])
    for expert in range(EXPERTS):
        for part, out, inputs in (("gate", INTER, HIDDEN), ("up", INTER, HIDDEN), ("down", HIDDEN, INTER)):
            tensors |= linear(f"{prefix}.mlp.experts.{expert}.{part}_proj", out, inputs)
    return tensors


def stacked(number: int) -> Tensors:
    """The same layer as transformers 5 saves it, in bf16."""
    experts = {
        "gate_up_proj": ("BF16", [EXPERTS, 2 * INTER, HIDDEN]),
        "down_proj": ("BF16", [EXPERTS, HIDDEN, INTER]),
    }
    return _with_stacked(number, "gate", experts)


def mxfp4(number: int) -> Tensors:
    """A layer of gpt-oss."""
    experts: Tensors = {}
    for part, out, inputs in (("gate_up_proj", 2 * INTER, HIDDEN), ("down_proj", HIDDEN, INTER)):
        experts[f"{part}_blocks"] = ("U8", [EXPERTS, out, inputs // 32, 16])
        experts[f"{part}_scales"] = ("U8", [EXPERTS, out, inputs // 32])
        experts[f"{part}_bias"] = ("BF16", [EXPERTS, out])
    tensors = _with_stacked(number, "router", experts)
    return tensors | {f"model.layers.{number}.mlp.router.bias": ("BF16", [EXPERTS])}


def mlx(number: int) -> Tensors:
    """A layer as mlx-lm saves it, four bits, the router too."""
    prefix = f"model.layers.{number}"
    tensors = {f"{prefix}.self_attn.{part}_proj.weight": ("BF16", [HIDDEN, HIDDEN]) for part in "qkvo"}
    matrices = [("mlp.gate", [EXPERTS], HIDDEN), ("mlp.switch_mlp.down_proj", [EXPERTS, HIDDEN], INTER)]
    matrices += [(f"mlp.switch_mlp.{part}_proj", [EXPERTS, INTER], HIDDEN) for part in ("gate", "up")]
    for name, rows, inputs in matrices:
        tensors[f"{prefix}.{name}.weight"] = ("U32", [*rows, inputs // 8])
        tensors[f"{prefix}.{name}.scales"] = ("BF16", [*rows, inputs // 64])
        tensors[f"{prefix}.{name}.biases"] = ("BF16", [*rows, inputs // 64])
    return tensors


def _with_stacked(number: int, router: str, experts: Tensors) -> Tensors:
    prefix = f"model.layers.{number}"
    tensors = {f"{prefix}.self_attn.{part}_proj.weight": ("BF16", [HIDDEN, HIDDEN]) for part in "qkvo"}
    tensors[f"{prefix}.mlp.{router}.weight"] = ("BF16", [EXPERTS, HIDDEN])
    return tensors | {f"{prefix}.mlp.experts.{name}": value for name, value in experts.items()}


@dataclass(frozen=True)
class Format:
    """What the layers and the config of a checkpoint hold."""

    layer: Callable[[int], Tensors]
    quantization: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = "qwen3_moe"
    key: str = "quantization_config"


def _by_expert(linear: Linear, **quantization: object) -> Format:
    return Format(lambda number: layer(number, linear), quantization)


def _compressed(name: str, linear: Linear) -> Format:
    groups = {"group_0": {"targets": ["Linear"], "format": name}}
    return _by_expert(linear, quant_method="compressed-tensors", format=name, config_groups=groups)


FORMATS = {
    "bf16": _by_expert(plain),
    "bf16-stacked": Format(stacked),
    "mxfp4": Format(mxfp4, {"quant_method": "mxfp4"}, "gpt_oss"),
    "fp8": _by_expert(fp8, quant_method="fp8", weight_block_size=[128, 128]),
    "int4": _compressed("pack-quantized", packed),
    "nvfp4": _compressed("nvfp4-pack-quantized", nvfp4),
    "awq": _by_expert(awq, quant_method="awq", bits=4, group_size=128),
    "gptq": _by_expert(gptq, quant_method="gptq", bits=4, group_size=128),
    "bitsandbytes": _by_expert(bitsandbytes, quant_method="bitsandbytes", load_in_4bit=True),
    "mlx": Format(mlx, {"bits": 4, "group_size": 64}, key="quantization"),
}
GGUF = "gguf"  # Q4_K, in one file
NAMES = (*FORMATS, GGUF)


def size_of(tensors: Tensors) -> int:
    """What tensors take on the disk."""
    return sum(math.prod(shape) * BYTES[dtype] for dtype, shape in tensors.values())


class Noise:
    """Bytes without end, and without the cost of drawing all of them."""

    def __init__(self) -> None:
        self.block = np.random.default_rng(0).bytes(1 << 24)

    def pieces(self, count: int) -> Iterable[bytes]:
        """`count` bytes in pieces."""
        for start in range(0, count, len(self.block)):
            yield self.block[: min(len(self.block), count - start)]


def make(folder: Path, gigabytes: float, name: str) -> dict[str, list[int]]:
    """A checkpoint of about that size; gives a plan that keeps every second expert, other ones in every layer."""
    folder.mkdir(parents=True)
    layers = _gguf(folder, gigabytes) if name == GGUF else _safetensors(folder, gigabytes, FORMATS[name])
    block = "blk" if name == GGUF else "model.layers"
    return {f"{block}.{n}": [(e + n) % 2 + 2 * (e // 2) for e in range(0, EXPERTS, 2)] for n in range(layers)}


def _safetensors(folder: Path, gigabytes: float, form: Format) -> int:
    per_layer = size_of(form.layer(0))
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    together = max(1, SHARD_BYTES // per_layer)
    weight_map: dict[str, str] = {}
    for first in range(0, layers, together):
        name = f"model-{first // together + 1:05d}-of-{-(-layers // together):05d}.safetensors"
        tensors = {k: v for n in range(first, min(first + together, layers)) for k, v in form.layer(n).items()}
        if first == 0:
            tensors["model.embed_tokens.weight"] = ("BF16", [1000, HIDDEN])
        write_shard(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": form.model_type, "num_hidden_layers": layers, "hidden_size": HIDDEN}
    config |= {"num_local_experts" if form.model_type == "gpt_oss" else "num_experts": EXPERTS}
    config |= {"num_experts_per_tok": 4, **({form.key: form.quantization} if form.quantization else {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return layers


def write_shard(path: Path, tensors: Tensors) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(Noise().pieces(at))


def _gguf(folder: Path, gigabytes: float) -> int:
    """llama.cpp's names; experts in Q4_K (type 12: 144 bytes for 256 values), the rest in F32 (type 0)."""
    one = [("ffn_gate_inp", 0, [HIDDEN, EXPERTS]), ("attn_q", 0, [HIDDEN, HIDDEN]), ("attn_v", 0, [HIDDEN, HIDDEN])]
    one += [(f"ffn_{part}_exps", 12, [HIDDEN, INTER, EXPERTS]) for part in ("gate", "up")]
    one.append(("ffn_down_exps", 12, [INTER, HIDDEN, EXPERTS]))
    sizes = [math.prod(shape) * 4 if kind == 0 else math.prod(shape) // 256 * 144 for _, kind, shape in one]
    layers = max(1, round(gigabytes * 1e9 / sum(sizes)))
    infos, at = b"", 0
    for n in range(layers):
        for (part, kind, shape), size in zip(one, sizes, strict=True):
            infos += _text(f"blk.{n}.{part}.weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)
            at += size
    counts = {"block_count": layers, "expert_count": EXPERTS, "expert_used_count": 4, "embedding_length": HIDDEN}
    pairs = _text("general.architecture") + struct.pack("<I", 8) + _text("qwen3moe")
    for name, value in counts.items():
        pairs += _text(f"qwen3moe.{name}") + struct.pack("<II", 4, value)
    head = b"GGUF" + struct.pack("<IQQ", 3, layers * len(one), 1 + len(counts)) + pairs + infos
    with (folder / "model-Q4_K.gguf").open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        file.writelines(Noise().pieces(at))
    return layers


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
