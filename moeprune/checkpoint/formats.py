"""Number formats: which one a checkpoint is in, what of it cannot be cut exactly, and which entries name experts.

Nothing is decoded here or in the cut. Packed weights, scales and zero points of an expert carry its number in their
name, or lie along the same first axis, so the rules of structure.py find them in every format. What a format adds are
lists of module names in its settings, which have to follow when experts get new numbers (renumber.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.checkpoint.families import Block, Layout
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.structure import SHARED
from moeprune.errors import InputError
from moeprune.metadata import read_json

Settings = Mapping[str, Any]
HF_QUANT_CONFIG = Path("hf_quant_config.json")  # modelopt's own copy of the settings
# Side files that name modules: NVIDIA's; AutoRound's and GPTQModel's own copies of the settings.
NVIDIA_LISTS = (HF_QUANT_CONFIG, Path("quantized_layers_manifest.json"))
QUANTO_MAP = Path("quanto_qmap.json")  # of optimum-quanto, which says nothing in config.json
NAME_LISTS = (*NVIDIA_LISTS, Path("quantization_config.json"), Path("quantize_config.json"), Path("quant_config.json"),
              QUANTO_MAP)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One way to store numbers."""

    name: str
    text: str
    recognise: Callable[[Settings], bool]  # given the quantization settings
    unscored: Callable[[Settings], str] = lambda _settings: ""  # why its numbers are not understood, if they are not
    packed: str = ""  # pattern of names whose values are packed or shuffled across rows: only whole matrices are moved


def _method(*names: str) -> Callable[[Settings], bool]:
    return lambda settings: str(settings.get("quant_method", "")).lower() in names


def _compressed(*formats: str) -> Callable[[Settings], bool]:
    def recognise(settings: Settings) -> bool:
        groups = settings.get("config_groups", {})
        inner = [group.get("format") for group in groups.values()] if isinstance(groups, dict) else []
        return _method("compressed-tensors")(settings) and bool({settings.get("format"), *inner} & set(formats))

    return recognise


def _modelopt(word: str) -> Callable[[Settings], bool]:
    def recognise(settings: Settings) -> bool:
        by_modelopt = _method("modelopt", "modelopt_fp4")(settings) or "producer" in settings
        return by_modelopt and word in json.dumps(settings).upper()

    return recognise


def _never(reason: str) -> Callable[[Settings], str]:
    return lambda _settings: reason


def _awq_kernel(settings: Settings) -> str:
    version = str(settings.get("version", "gemm")).lower()
    return "" if version in ("gemm", "gemv") else f"its version {version!r} is shuffled for one kernel"


def _quark_rotation(settings: Settings) -> str:
    rotated = "rotation" in json.dumps(settings.get("algo_config") or {}).lower()
    return "Quark rotated the inputs of these weights, which the model's own code does not do" if rotated else ""


def _bitnet_layers(settings: Settings) -> str:
    if settings.get("use_rms_norm"):
        return "its layers begin with a norm of their own, which the model's own code does not have"
    return "its weights are rounded when the model runs" if settings.get("quantization_mode") == "online" else ""


ROTATED = "its weights fit rotated inputs only"
BLOCKED = "its scales are laid out in blocks for a GPU"
FORMATS = (
    Format("mxfp4", "gpt-oss: blocks and scales, stacked", _method("mxfp4")),
    Format(
        "deepseek_fp4",
        "DeepSeek-V4: packed FP4 with a power of two per 32",
        lambda settings: _method("fp8")(settings) and settings.get("expert_dtype") == "fp4",
    ),
    Format("fp8", "FP8 by block, tensor or channel, also with static scales", _method("fp8", "fbgemm_fp8", "mxfp8")),
    Format("nvfp4", "compressed-tensors NVFP4", _compressed("nvfp4-pack-quantized")),
    Format("mxfp4_ct", "compressed-tensors MXFP4", _compressed("mxfp4-pack-quantized")),
    Format("ct_int4", "compressed-tensors INT4 and INT8, packed", _compressed("pack-quantized")),
    Format("ct_fp8", "compressed-tensors FP8", _compressed("float-quantized", "naive-quantized", "mxfp8-quantized")),
    Format("ct_int8", "compressed-tensors INT8", _compressed("int-quantized")),
    Format("modelopt_nvfp4", "modelopt NVFP4, also mixed with FP8", _modelopt("FP4")),
    Format("modelopt_fp8", "modelopt FP8", _modelopt("FP8")),
    Format("modelopt", "modelopt, other", _modelopt("")),
    Format("awq", "AWQ: gemm and gemv", _method("awq"), _awq_kernel),
    Format("gptq", "GPTQ and GPTQModel", _method("gptq", "gptqmodel")),
    Format("auto_round", "AutoRound", _method("auto-round", "auto_round", "intel/auto-round")),
    Format("quark", "AMD Quark: FP8 and MXFP4", _method("quark"), _quark_rotation),
    Format("bitsandbytes", "bitsandbytes 4-bit and 8-bit", _method("bitsandbytes")),
    Format("torchao", "torchao: FP8, INT8, INT4, MX and NVFP4", _method("torchao")),
    Format(
        "mlx",
        "MLX: affine, mxfp4, nvfp4, mxfp8; transformers' own for Metal",
        lambda settings: {"bits", "group_size"} <= {*settings} and settings.get("quant_method", "metal") == "metal",
    ),
    Format("gemma", "Gemma's own: INT8, INT4 and INT2", _method("gemma")),
    # Those below are cut where experts are modules of their own, as transformers had them up to 4.57.
    Format("hqq", "HQQ", _method("hqq")),
    Format("quanto", "Quanto: 8 bits; 4 and 2 bits are cut only", _method("quanto"), packed=r"\._data\._data$"),
    Format("aqlm", "AQLM", _method("aqlm"), packed=r"\.codes$"),
    Format("vptq", "VPTQ", _method("vptq"), packed=r"\.indices$"),
    Format("spqr", "SpQR, cut only", _method("spqr"), _never("its outliers lie in sparse rows"), r"\.dense_weights$"),
    Format("higgs", "HIGGS, cut only", _method("higgs"), _never(f"{ROTATED}, and FLUTE shuffled them"), r"\.tables2$"),
    Format("fp_quant", "FP-Quant, cut only", _method("fp_quant"), _never(ROTATED), r"\.(qweight|dqweight|\w+_matrix)$"),
    Format(
        "eetq", "EETQ, cut only", _method("eetq"), _never("its weights are shuffled for a GPU"), r"\.weight_scales$"
    ),
    Format("bitnet", "BitNet", _method("bitnet"), _bitnet_layers, r"\.weight_scale$"),
    Format("fouroversix", "Four Over Six, cut only", _method("fouroversix"), _never(BLOCKED), r"\.quantized_\w+$"),
)
# What is known and left alone, and why.
REFUSED = {
    "sinq": "it stores experts and what their numbers mean under names of its own, in a further file",
    "nvfp4": "transformers makes such numbers while it loads a plain checkpoint, and neither writes nor loads them",
}
QDATA = re.compile(r"(?P<module>.*\.)_(?P<attribute>\w+)_qdata")  # torchao's: of module.attribute
STACK_SIZES = ("shape", "block_size")  # what torchao says of a tensor axis by axis
SHUFFLED = re.compile(r'"is_swizzled_scales": *true')  # torchao, beside a tensor
PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The quantization settings, wherever they are kept; empty for a plain checkpoint."""
    config = checkpoint.config
    inner = [value for value in config.values() if isinstance(value, dict)]
    for scope in [config, *inner]:
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(scope.get(key), dict):
                return {**({"expert_dtype": config["expert_dtype"]} if "expert_dtype" in config else {}), **scope[key]}
    if QUANTO_MAP in checkpoint.side_files:
        return {"quant_method": "quanto"}
    if HF_QUANT_CONFIG in checkpoint.side_files:
        return read_json(checkpoint.folder / HF_QUANT_CONFIG, "modelopt's hf_quant_config.json")
    return {}


def format_of(checkpoint: Checkpoint) -> str:
    """The name of the checkpoint's format: an entry of FORMATS, or the type that most of its weights have."""
    if checkpoint.container == "gguf":
        return "gguf"
    settings = quantization_of(checkpoint)
    if not settings:
        sizes: Counter[str] = Counter()
        for tensor in checkpoint.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        dtype = sizes.most_common(1)[0][0] if sizes else "F32"
        return PLAIN.get(dtype, dtype.lower())
    return _known(checkpoint, settings).name


def _known(checkpoint: Checkpoint, settings: Settings) -> Format:
    """The entry of FORMATS for these settings."""
    check_not_refused(checkpoint)
    found = next((entry for entry in FORMATS if entry.recognise(settings)), None)
    if found is None:
        what = f"{settings.get('quant_method', 'an unnamed method')} (format {settings.get('format', 'not given')})"
        raise InputError(
            f"{checkpoint.folder} is quantized by {what}, which is not known; add it to FORMATS "
            "in moeprune/checkpoint/formats.py"
        )
    return found


def check_not_refused(checkpoint: Checkpoint) -> None:
    """Refuse the formats that are known and left alone."""
    method = str(quantization_of(checkpoint).get("quant_method", "")).lower()
    if method in REFUSED:
        raise InputError(
            f"{checkpoint.folder} is quantized by {method}, which is refused: {REFUSED[method]}. Take the original "
            "checkpoint, and quantize the result"
        )


def check_scorable(checkpoint: Checkpoint) -> None:
    """Refuse the formats whose numbers are not understood, or mean something in other code than the model's own."""
    settings = quantization_of(checkpoint)
    check_not_refused(checkpoint)
    entry = next((entry for entry in FORMATS if settings and entry.recognise(settings)), None)
    if entry is not None and (reason := entry.unscored(settings)):
        raise InputError(
            f"{checkpoint.folder} cannot be scored: {reason}; score the original checkpoint and cut this one with its "
            "scores"
        )


def check_cuttable(checkpoint: Checkpoint, layout: Layout) -> None:
    """Refuse what slicing bytes would not cut exactly; most such cases structure.py has refused already."""
    _check_apart(checkpoint, layout)
    stacked = {part.tensor for block in layout.blocks for part in block.parts if part.kind == "rows"}
    described = torchao_stacks(layout)
    for shard, metadata in checkpoint.shard_metadata.items():
        for name, text in metadata.items():
            if SHUFFLED.search(text) and any(tensor.startswith(name.rpartition(".")[0]) for tensor in stacked):
                raise InputError(
                    f"{shard.name}: the scales of {name} are shuffled for a GPU, across experts, so they cannot be cut "
                    "byte by byte; quantize with plain scales"
                )
        for name, key, shape in _shapes_in(metadata, described):
            if shape[:1] == [layout.experts] and any(tensor.startswith(name.rpartition(".")[0]) for tensor in stacked):
                raise InputError(
                    f"{shard.name} keeps the {key} {shape} of {name} in its metadata, so its experts cannot be cut "
                    "byte by byte; dequantize the model first"
                )


def _check_apart(checkpoint: Checkpoint, layout: Layout) -> None:
    """Refuse rows of a matrix, or of a stack, in a format that can only be moved in whole matrices."""
    settings = quantization_of(checkpoint)
    packed = next((entry.packed for entry in FORMATS if settings and entry.recognise(settings)), "")
    if not packed:
        return
    parts = [part for block in layout.blocks for part in block.parts]
    single = {part.tensor for part in parts if part.kind in ("expert", "tail")}
    inside: dict[str, str] = {}  # module -> its packed tensor
    for name in checkpoint.tensors:
        if (match := re.search(packed, name)) and name not in single and not SHARED.search(name):
            inside[name[: match.start()]] = name
    for part in parts:
        if part.tensor not in single and (found := inside.get(part.tensor.rpartition(".")[0])):
            raise InputError(
                f"{found} is packed across experts and cannot be cut; leave routers and stacks of experts unquantized"
            )


def torchao_stacks(layout: Layout) -> dict[str, Block]:
    """Stacks of experts in torchao's formats, under the names by which headers of shards describe them."""
    rows = {part.tensor: block for block in layout.blocks for part in block.parts if part.kind == "rows"}
    routers = {part.tensor for block in layout.blocks for part in block.parts if part.router}
    return {
        f"{match['module']}{match['attribute']}": block
        for tensor, block in rows.items()
        if tensor not in routers and (match := QDATA.fullmatch(tensor))
    }


def _shapes_in(metadata: Mapping[str, str], follow: Collection[str]) -> Iterator[tuple[str, str, list[Any]]]:
    """Shapes that torchao stores beside tensors, as JSON in the header of the shard: tensor, key, shape.

    Left out are those that follow the cut (renumber.py).
    """
    for name, text in metadata.items():
        if re.search(r'"(shape|_?size|original_shape|block_size)"', text):
            try:
                data = json.loads(text)
            except ValueError:
                continue
            if name in follow and isinstance(data.get("_data"), dict):
                data = {key: value for key, value in data["_data"].items() if key not in STACK_SIZES}
            yield from ((name, key, shape) for key, shape in _find(data))


def _find(data: Any) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(data, dict):
        for key, value in data.items():
            if key in (*STACK_SIZES, "size", "_size", "original_shape") and isinstance(value, list):
                yield key, value
            else:
                yield from _find(value)
