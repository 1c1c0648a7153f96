"""Checkpoints of torchao: stacks of experts through transformers, and a matrix of each expert."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.data.plain import Values, base, linear_layers, load, write_config


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
