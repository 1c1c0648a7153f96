"""A model of transformers without its weights: every module in place, parameters on the meta device, buffers real."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_tie_weights
from transformers.modeling_utils import local_torch_dtype

from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import InputError, MachineError, UsageError, reason
from moeprune.scoring.gguf import weights as gguf_weights
from moeprune.settings import Settings

LARGE = 2**26  # elements; no buffer that a model computes with is that large and made empty
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_MODEL = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
REMOTE_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForConditionalGeneration",
    "AutoModel",
)


def pick_device(settings: Settings) -> torch.device:
    """The device to compute on; `auto` takes an accelerator that is there."""
    if settings.device != "auto":
        wanted = torch.device(settings.device)
        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not available[wanted.type]:
            raise MachineError(f"no {wanted.type} device answers here; set REAP_DEVICE=cpu or auto")
        return wanted
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(config: PreTrainedConfig, settings: Settings) -> torch.dtype:
    """The type to compute in: the setting, else the checkpoint's, else bfloat16."""
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    named = (getattr(place, "dtype", None) for place in (config, config.get_text_config()))
    return next((dtype for dtype in named if isinstance(dtype, torch.dtype)), torch.bfloat16)


def read_config(checkpoint: Checkpoint, settings: Settings) -> PreTrainedConfig:
    """The model's configuration as transformers understands it, without any quantization: layers arrive dequantized."""
    if checkpoint.container == "gguf":
        return gguf_weights.config_of(checkpoint)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=settings.trust_remote_code
        )
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise InputError(
            f"transformers {transformers.__version__} cannot read the config of {checkpoint.folder}: {reason(error)}"
            + _remote_hint(checkpoint, settings)
        ) from None
    for part in _configs(config):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A configuration and those nested in it."""
    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for inner in nested for part in _configs(inner))]


def model_class(checkpoint: Checkpoint, config: PreTrainedConfig, settings: Settings) -> type[PreTrainedModel]:
    """The class the checkpoint names: one of transformers, else the code that comes with the checkpoint."""
    names = config.architectures or []
    known = getattr(transformers, names[0], None) if names else None
    if known is not None:
        return known  # type: ignore[no-any-return]
    remote: dict[str, Any] = checkpoint.config.get("auto_map") or {}
    found = next((remote[name] for name in REMOTE_CLASSES if name in remote), None)
    if found is None or not settings.trust_remote_code:
        raise InputError(
            f"transformers {transformers.__version__} has no model class {names[0] if names else '(none named)'} for "
            f"{checkpoint.folder}" + _remote_hint(checkpoint, settings)
        )
    if isinstance(found, str):
        return get_class_from_dynamic_module(found, os.fspath(checkpoint.folder))
    raise UsageError(f"{checkpoint.folder}: auto_map in config.json is damaged; it must name a class")


def _remote_hint(checkpoint: Checkpoint, settings: Settings) -> str:
    if checkpoint.config.get("auto_map") and not settings.trust_remote_code:
        return "; the checkpoint brings its own code: --trust-remote-code runs it, if you trust its author"
    if not checkpoint.config.get("auto_map"):
        return "; fetch the code that the model came with (its *.py files), or cut it with --plan, which needs no code"
    return ""


class _LargeOnMeta(TorchFunctionMode):
    """Large tensors without content are made on the meta device: a stack of experts may exceed the memory by itself."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros) and kwargs.get("device") is None:
            size = args[0] if args and not isinstance(args[0], int) else args or kwargs.get("size", ())
            if math.prod(size) >= LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that modules make in here take no memory and get no initial values; buffers are made as usual."""
    register = Module.register_parameter

    def register_empty(module: Module, name: str, parameter: Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        with _LargeOnMeta():
            yield
    finally:
        Module.register_parameter = register  # type: ignore[method-assign]


def build(checkpoint: Checkpoint, settings: Settings) -> PreTrainedModel:
    """The checkpoint's model, empty. Its dtype plan and conversions are those that from_pretrained would use."""
    config = read_config(checkpoint, settings)
    chosen = model_class(checkpoint, config, settings)
    dtype = compute_dtype(config, settings)
    # A class may take a nested configuration (the text model of a multimodal checkpoint, say).
    wanted = chosen.config_class or PreTrainedConfig
    if not isinstance(config, wanted) and isinstance(config.get_text_config(), wanted):
        config = config.get_text_config()
    with torch.no_grad(), local_torch_dtype(dtype, chosen.__name__), no_tie_weights(), parameters_on_meta():
        try:
            model: PreTrainedModel = chosen(config)
        except NO_MODEL as error:
            raise InputError(
                f"{checkpoint.folder}: {chosen.__name__} cannot be built of its configuration: {reason(error)}"
            ) from None
    model.eval()
    return model
