"""A model that can be asked: final hidden states for batches, logits for hidden states, greedy text for prompts.

Fidelity needs the logits of two models at the same tokens. Final hidden states (tokens x hidden) are small and are
kept; logits (tokens x vocabulary) are made chunk by chunk, by the model's own head code.

Legend: N judged positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import AutoConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from moeprune import metadata
from moeprune.checking import masking
from moeprune.checking.samples import Batch
from moeprune.checkpoint.folder import Checkpoint, open_checkpoint
from moeprune.errors import InputError
from moeprune.scoring.building import DTYPES, build, pick_device
from moeprune.scoring.formats.dequantize import DTYPES as STORED
from moeprune.scoring.formats.mlx import is_mlx
from moeprune.scoring.loading import OUTSIDE
from moeprune.scoring.streaming import LayerStream
from moeprune.settings import Settings

UNLOADABLE = (ValueError, KeyError, OSError, RuntimeError, ImportError)  # what transformers raises
Head = Callable[[torch.Tensor], torch.Tensor]  # final hidden states [N, D] -> logits, float32 [N, V]


class Subject(Protocol):
    """What fidelity needs of a model, loaded or streamed."""

    model: Any
    vocabulary: int

    def variants(self, batches: Sequence[Batch], keeps: Sequence[masking.Keep | None]) -> list[list[torch.Tensor]]:
        """Final hidden states [N, D] at the judged positions of each batch, for each variant of the model.

        A variant is a plan: the model with only those experts; None is the model as it is.
        """

    def head(self) -> AbstractContextManager[Head]:
        """The model's head, for as long as it is needed."""


class Loaded:
    """A model that fits into memory, as plain transformers loads it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.model = load_model(folder, settings)
        self.vocabulary = vocabulary(self.model)

    def variants(self, batches: Sequence[Batch], keeps: Sequence[masking.Keep | None]) -> list[list[torch.Tensor]]:
        """See `Subject`."""
        found = []
        for keep in keeps:
            blocks = masking.routed_blocks(self.model) if keep is not None else ()
            with masking.maskable(blocks), masking.keeping(keep):
                found.append([judged_states(self.model, batch) for batch in batches])
        return found

    def head(self) -> AbstractContextManager[Head]:
        """See `Subject`."""
        return nullcontext(lambda states_ND: head_logits(self.model, states_ND))


def load_model(folder: Path, settings: Settings) -> Any:
    """The model as plain transformers loads it, on the device that was asked for; every weight must be there."""
    if (checkpoint := open_checkpoint(folder)).container == "gguf":
        return _load_dequantized(checkpoint, settings)
    with _loading(folder):
        return _from_pretrained(folder, settings, folder).eval().to(device(settings))


def loaded_bytes(folder: Path, settings: Settings) -> int:
    """What `load_model` will take; nothing is read.

    transformers alone knows which quantized weights it keeps, and which it turns into the type that computes. Where a
    quantizer of it has to see content, all are taken to be turned.
    """
    checkpoint = open_checkpoint(folder)
    if is_mlx(checkpoint):
        raise CannotLoad(f"{folder} is laid out for MLX, which transformers cannot load")
    model: Any = None
    if checkpoint.container != "gguf":
        with suppress(*UNLOADABLE, TypeError, AttributeError):
            model = _without_content(checkpoint, settings)
    if model is None:
        model = build(checkpoint, settings)
        model.tie_weights()
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _without_content(checkpoint: Checkpoint, settings: Settings) -> Any:
    """The model as plain transformers loads it, of tensors that have a type and a shape alone."""
    folder, stored = checkpoint.folder, checkpoint.tensors.items()
    empty = {name: torch.empty(each.shape, dtype=STORED[each.dtype], device="meta") for name, each in stored}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    return _from_pretrained(folder, settings, None, config=config, state_dict=empty, device_map="meta")


def _from_pretrained(folder: Path, settings: Settings, source: Path | None, **options: Any) -> Any:
    transformers.utils.logging.disable_progress_bar()
    options |= {"trust_remote_code": settings.trust_remote_code, "local_files_only": True, "output_loading_info": True}
    model, info = _model_class(folder).from_pretrained(source, dtype=DTYPES.get(settings.dtype, "auto"), **options)
    astray = [*info["missing_keys"], *(str(entry[0]) for entry in info["mismatched_keys"])]
    if astray:
        raise CannotLoad(f"for transformers {folder} lacks or misshapes {len(astray)} weights, such as {min(astray)}")
    return model


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """What transformers says where it cannot load a model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNLOADABLE as error:
        raise CannotLoad(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}") from None


def _load_dequantized(checkpoint: Checkpoint, settings: Settings) -> Any:
    """A GGUF model, all its layers at once: transformers knows few of its architectures in full."""
    stream = LayerStream(checkpoint, settings)
    for layer in (OUTSIDE, *stream.layers):
        stream.loader.load(layer)
    stream.model.tie_weights()
    stream.loader.close()
    return stream.model


class CannotLoad(InputError):
    """Plain transformers cannot load this model here; its layers may still be streamed."""


def _model_class(folder: Path) -> Any:
    """The class that the checkpoint names, where transformers has it."""
    named = metadata.read_json(folder / "config.json", "the model's configuration").get("architectures") or [""]
    return getattr(transformers, str(named[0]), None) or transformers.AutoModelForCausalLM


def device(settings: Settings) -> str:
    """The device to compute on; one that was asked for and is not there is refused."""
    return pick_device(settings).type


def speaking(model: Any) -> Any:
    """The part of a model that has the language head: the model itself, or the text model inside of it."""
    if hasattr(model.config, "canvas_length"):
        name = type(model).__name__
        raise InputError(f"{name} refines a canvas and predicts no next token; it cannot be judged token by token")
    for part in (model, *(getattr(model, name, None) for name in ("language_model", "thinker", "text_model"))):
        if _has_head(part) and (_body(part) is not None or part.config.is_encoder_decoder):
            return part
    raise InputError(f"{type(model).__name__} has no language head; it cannot be judged token by token")


def _has_head(part: Any) -> bool:
    return callable(getattr(part, "get_output_embeddings", None)) and part.get_output_embeddings() is not None


def _body(part: Any) -> Any:
    """What computes the final hidden states."""
    found = part.base_model if part.base_model is not part else getattr(part, "model", None)
    return found if isinstance(found, torch.nn.Module) else None


def vocabulary(model: Any) -> int:
    """Width of the model's logits."""
    return int(speaking(model).get_output_embeddings().weight.shape[0])


@torch.no_grad()
def judged_states(model: Any, batch: Batch) -> torch.Tensor:
    """Final hidden states at the positions whose next token is judged, on the CPU."""
    part = speaking(model)
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attended_BT}
    inputs = {name: value.to(_device_of(part)) for name, value in inputs.items()}
    if part.config.is_encoder_decoder:  # the decoder goes over the text that the encoder has read
        read_BTD = part.get_encoder()(**inputs)[0]
        seen = {"encoder_hidden_states": read_BTD, "encoder_attention_mask": inputs["attention_mask"]}
        states_BTD: torch.Tensor = part.get_decoder()(**inputs, **seen, use_cache=False)[0]
    else:
        states_BTD = _body(part)(**inputs, use_cache=False)[0]
    if states_BTD.shape[:2] != batch.ids_BT.shape:
        raise InputError(f"{type(model).__name__} does not predict the next token; it cannot be judged token by token")
    return states_BTD[batch.scored_BT.to(states_BTD.device)].cpu()


@torch.no_grad()
def head_logits(model: Any, states_ND: torch.Tensor) -> torch.Tensor:
    """Run everything behind the base model (head, scaling, soft caps) on hidden states that were computed before."""
    part = speaking(model)
    states = states_ND.unsqueeze(0).to(_device_of(part))
    token = torch.zeros(1, states.shape[1], dtype=torch.long, device=states.device)
    answer, inputs = _Answer(last_hidden_state=states), dict[str, Any](input_ids=token)
    if part.config.is_encoder_decoder:
        inputs = {"encoder_outputs": answer, "decoder_input_ids": token}
    body = part.get_decoder() if part.config.is_encoder_decoder else _body(part)
    with masking.replaced_forward(body, lambda *_args, **_kwargs: answer):
        logits_NV: torch.Tensor = part(**inputs, use_cache=False).logits[0]
    return logits_NV.float()


class _Answer(MoeModelOutputWithPast):
    """What a base model returns; whatever else a head asks for (image states, caches) is not there."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _device_of(part: Any) -> Any:
    return part.get_output_embeddings().weight.device
