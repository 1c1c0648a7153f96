"""What a loaded model takes is known before it is loaded, whatever transformers makes of its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moeprune.checking import subject
from moeprune.settings import Settings
from tests import gguf_files, tiny
from tests.scoring import streamed

DATA = Path(__file__).parent.parent / "data"


def held(model: Any) -> int:
    """The bytes of all memory that tensors of the model lie in."""
    places = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({place.data_ptr(): place.nbytes() for place in places}.values())


@pytest.mark.parametrize("form", ["bf16", "ct_fp8", "ct_mxfp4", "modelopt_fp8", "gguf"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_memory_of_a_loaded_model(form: str, dtype: str, tmp_path: Path) -> None:
    folder = DATA / form if (DATA / form).exists() else MADE[form](tmp_path)
    settings = Settings(device="cpu", dtype=dtype)
    assert subject.loaded_bytes(folder, settings) == held(subject.load_model(folder, settings))


def _gguf(folder: Path) -> Path:
    gguf_files.convert(streamed.checkpoint("qwen3_moe"), folder / "model.gguf", kind="Q8_0")
    return folder / "model.gguf"


MADE = {"bf16": lambda folder: tiny.make("mixtral", folder, dtype=torch.bfloat16), "gguf": _gguf}


def test_where_a_quantizer_cannot_be_asked_all_weights_count_as_turned() -> None:
    """The package for AWQ is not here."""
    config = tiny.read_config(DATA / "awq")
    del config["quantization_config"]
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float16)
    assert subject.loaded_bytes(DATA / "awq", Settings()) == held(plain)


def test_a_model_for_mlx_cannot_be_loaded() -> None:
    with pytest.raises(subject.CannotLoad, match="laid out for MLX"):
        subject.loaded_bytes(DATA / "mlx", Settings())


@pytest.mark.parametrize("ask", [subject.loaded_bytes, subject.load_model])
def test_a_model_that_loads_in_part_cannot_be_loaded(ask: Callable[[Path, Settings], Any]) -> None:
    """It can still be streamed, which knows more layouts; unsloth makes a linear layer of each expert."""
    with pytest.raises(subject.CannotLoad, match=r"lacks or misshapes 8 weights, such as model.layers.0.mlp.experts"):
        ask(DATA / "unsloth", Settings(device="cpu"))
