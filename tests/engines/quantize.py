"""A random model in the number formats whose experts vLLM runs on a processor, whole and cut.

    python tests/engines/quantize.py FOLDER   ->   [{"model", "prompts", ...}, ...], jobs for ask_vllm.py by threes:
                                                    the parent, the parent without the dropped experts, the cut

Plain rounding to the nearest, laid out as the libraries lay it out; what the libraries themselves wrote, in tests/data,
is too small for vLLM.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.engines import families

GROUP = 32
Tensors = dict[str, torch.Tensor]


def int8(weight: torch.Tensor) -> Tensors:
    """One scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def int4(weight: torch.Tensor) -> Tensors:
    """One scale for each group of a row; eight values a word, the first in the lowest bits."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2) / 7
    values = (groups / scale[..., None]).round().flatten(1).long() + 8
    packed = (values.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(2)
    return {
        "weight_packed": packed.to(torch.uint32).view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def gptq(weight: torch.Tensor) -> Tensors:
    """The same numbers, words along the inputs; a stored zero point is one less than the real one, which is eight."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2) / 7
    values = (groups / scale[..., None]).round().flatten(1).long() + 8
    packed = (values.T.unflatten(0, (-1, 8)) << torch.arange(0, 32, 4)[:, None]).sum(1)
    zeros = torch.full((scale.shape[1], len(weight) // 8), 0x77777777)
    return {
        "qweight": packed.to(torch.uint32).view(torch.int32),
        "qzeros": zeros.int(),
        "scales": scale.T,
        "g_idx": torch.arange(weight.shape[1]).int() // GROUP,
    }


def compressed(form: str, **weights: object) -> dict[str, object]:
    """What compressed-tensors says in the config."""
    args = {"symmetric": True, "dynamic": False, "type": "int"} | weights
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": args, "input_activations": inputs if form == "int-quantized" else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


FORMATS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, object]]] = {
    "ct_int8": (int8, compressed("int-quantized", num_bits=8, strategy="channel")),
    "ct_int4": (int4, compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP)),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
                    "lm_head": False, "dynamic": {r"-:.*mlp\.gate$": {}}}),
}  # fmt: skip


def quantize(folder: Path, form: str) -> Path:
    """Rewrite a checkpoint in this format: every matrix of attention and experts."""
    change, config = FORMATS[form]
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 2 and name.endswith("_proj.weight"):
            tensors |= {f"{name.removesuffix('weight')}{part}": t for part, t in change(tensor.float()).items()}
        else:
            tensors[name] = tensor
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32:
            tensors[name] = tensor.bfloat16()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


def main(folder: Path) -> None:
    """Make, cut, and say what vLLM shall be asked."""
    jobs = []
    for form in FORMATS:
        parent = tiny.make("qwen3_moe", folder / form, dtype=torch.bfloat16, **families.SIZES)
        child, keep = families.cut(quantize(parent, form))
        dropped = {f"{block}.mlp.gate": sorted(set(range(8)) - set(kept)) for block, kept in keep.items()}
        asked = {"prompts": families.PROMPTS, "dtype": "bfloat16"}
        jobs += [{"model": str(parent)} | asked, {"model": str(parent), "dropped": dropped} | asked]
        jobs.append({"model": str(child)} | asked)
    print(json.dumps(jobs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
