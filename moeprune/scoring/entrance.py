"""Where token ids go into a model, and what else it has to be given along with them.

most models              ids alone
Qwen3-Omni               ids to the part that thinks; the part that talks is not run
encoder and decoder      the same ids to both: the decoder goes over the text that the encoder has read
DiffusionGemma           ids to the half that reads; the half that refines a canvas of noise shares its weights
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


class Forgetful(DynamicCache):
    """What a model without an off-switch may write its keys and values to: nobody will read them again."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of this forward are all there are."""
        return key_states, value_states


def entrance(model: PreTrainedModel) -> Any:
    """The part of a model that takes token ids."""
    if hasattr(model, "thinker"):
        return model.get_submodule("thinker")
    return model.get_submodule("model.encoder") if _refines(model) else model


def also_given(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the entrance takes beside `inputs`."""
    if _refines(model):
        return {"past_key_values": Forgetful()}
    if not getattr(model.config, "is_encoder_decoder", False):
        return {}
    given = {"decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": inputs.get("attention_mask")}
    return {name: value for name, value in given.items() if value is not None}


def _refines(model: PreTrainedModel) -> bool:
    """Whether the model writes by refining a canvas, as DiffusionGemma does."""
    return hasattr(model.config, "canvas_length")
