"""What sets the GGUF file of a family apart, as llama.cpp's converter makes it. To add a family, add an entry."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.gguf_files.family import Config, Family, Written, block, granite, joined, rotated, sigmoid
from tests.gguf_files.hybrid import HYBRID
from tests.gguf_files.plain import PLAIN
from tests.gguf_files.shared import SHARED


def _gpt_oss(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Columns of gate and up by turns; matrices [E, inputs, outputs]."""
    if ".experts." not in name:
        return
    ending = "bias" if name.endswith("bias") else "weight"
    turned = array.swapaxes(1, 2) if ending == "weight" else array
    back = (lambda value: value.swapaxes(1, 2)) if ending == "weight" else (lambda value: value)
    if "down" in name:
        yield f"{block(name)}.ffn_down_exps.{ending}", turned, lambda value: {name: back(value)}
        return
    join = joined(lambda gate, up: {name: back(np.stack((gate, up), axis=2).reshape(turned.shape))})
    yield f"{block(name)}.ffn_gate_exps.{ending}", turned[:, ::2], join
    yield f"{block(name)}.ffn_up_exps.{ending}", turned[:, 1::2], join


FAMILIES = {
    **PLAIN,
    **SHARED,
    "qwen2_moe": Family("qwen2moe"),
    "qwen3_moe": Family("qwen3moe", overrides={"norm_topk_prob": True}),
    "mixtral": Family("llama", overrides={"sliding_window": None}, turned=rotated),
    "gpt_oss": Family(  # llama.cpp rounds its scaled positions in a way of its own
        "gpt-oss", engine={"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}, turned=_gpt_oss
    ),
    "minimax_m2": Family("minimax-m2", keys=sigmoid),
    "olmoe": Family("olmoe", engine={"num_key_value_heads": 4}),
    "granitemoe": Family("granitemoe", turned=granite),
    "granitemoeshared": Family(
        "granitemoe",
        keys=lambda config: {"expert_shared_feed_forward_length": config["shared_intermediate_size"]},
        turned=granite,
    ),
    **HYBRID,
}
