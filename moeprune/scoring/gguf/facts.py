"""What a GGUF file says about its model: its metadata, the sizes of its tensors, and what all configurations share."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from moeprune.checkpoint import gguf
from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import InputError

INSTEAD = "score the original model and cut this file with those scores (./run.sh prune --other-scores)"
SIGMOID = 2  # expert_gating_func
LARGEST = 2**20  # of what is no length of a text: sizes, heads, layers, experts
LENGTH = re.compile(r"(context_length|temperature_length|sliding_window|chunk_size)$")
POSITIVE = re.compile(r"freq_base|epsilon$|scaling\.factor$")
WORDS = frozenset({"rope.scaling.type"})
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


LAYER = re.compile(r"blk\.(\d{1,6})\.")


class Facts:
    """What a file says about its model, with an InputError for what it should say and does not."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.file = checkpoint.shards[0]
        self.architecture = str(checkpoint.config.get("general.architecture", ""))

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.file} does not say {self.architecture}.{key}, so its model cannot be built")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the model's own section. Of a list with one value for each layer the largest."""
        name = f"{self.architecture}.{key}"
        if name in self.checkpoint.config:
            self._refuse_nonsense(key, [self.checkpoint.config[name]])
            return shortest(self.checkpoint.config[name])
        return max(found) if (found := self.each(key)) else default

    def each(self, key: str) -> list[int]:
        """A list with one number for each layer."""
        entry = self._entries.get(f"{self.architecture}.{key}")
        if entry is None or entry.value is not None:
            return []
        found = gguf.numbers(entry)
        self._refuse_nonsense(key, found or [f"{gguf.length(entry)} values that are no numbers"])
        return found

    def _refuse_nonsense(self, key: str, values: Sequence[Any]) -> None:
        """An InputError where a value cannot be, whatever the model."""
        for value in values:
            if key in WORDS and isinstance(value, str):
                continue
            if isinstance(value, str) or not math.isfinite(value) or not self._possible(key, value):
                raise self.damaged(f"{key} = {value!r:.60}")

    def _possible(self, key: str, value: float) -> bool:
        if isinstance(value, float):
            return value > 0 or not POSITIVE.search(key)
        return 0 <= value <= LARGEST or (value > 0 and LENGTH.search(key) is not None)

    def damaged(self, said: str) -> InputError:
        """For what cannot be."""
        return InputError(f"{self.file} says {self.architecture}.{said}, which cannot be; fetch the file again")

    def by_layer(self, key: str) -> list[Any]:
        """A value for each layer of the trunk, where the file says one for all or a list."""
        found = self.each(key) or [self[key]] * self.layers
        if len(found) < self.layers:
            raise InputError(f"{self.file}: {self.architecture}.{key} has {len(found)} values for {self.layers} layers")
        return found[: self.layers]

    @cached_property
    def _entries(self) -> Mapping[str, gguf.Entry]:
        return gguf.read_header(self.file).entries

    @cached_property
    def layers(self) -> int:
        """Layers of the trunk; those behind predict further tokens."""
        count, further = int(self["block_count"]), int(self.get("nextn_predict_layers", 0))
        held = {int(match[1]) for name in self.checkpoint.tensors if (match := LAYER.match(name))}
        if held - set(range(count)) or set(range(count - further)) - held or further >= count:
            raise self.damaged(f"block_count = {count}, and holds {len(held)} layers up to {max(held, default=0)}")
        return count - further

    def has(self, leaf: str) -> bool:
        """Whether some layer has this tensor, or the file where it is no layer's."""
        return bool(self.shape(leaf))

    def kinds(self, leaf: str, there: str, elsewhere: str) -> list[str]:
        """The kind of each layer of the trunk, by whether it has this tensor."""
        names = (f"blk.{layer}.{leaf}" for layer in range(self.layers))
        return [there if name in self.checkpoint.tensors else elsewhere for name in names]

    def values(self, name: str) -> list[float]:
        """The numbers of a small tensor in 32 bits, none where the file lacks it."""
        if name not in self.checkpoint.tensors:
            return []
        if self.checkpoint.tensors[name].dtype != "F32":
            raise InputError(f"{self.file}: {name} is not stored in 32 bits; {INSTEAD}")
        return [value for (value,) in struct.iter_unpack("<f", self.checkpoint.read_bytes(name))]

    def rows(self, leaf: str) -> int:
        """How many rows this tensor has."""
        if not (shape := self.shape(leaf)):
            raise InputError(f"{self.file} lacks {leaf}; fetch the file again")
        return shape[0]

    def token(self, name: str) -> int | None:
        """The number of a special token."""
        found = self.checkpoint.config.get(f"tokenizer.ggml.{name}")
        if found is not None and not (type(found) is int and 0 <= found < self.rows("token_embd.weight")):
            raise InputError(f"{self.file} says tokenizer.ggml.{name} = {found!r:.60}, which is no token of its model")
        return found

    def shape(self, leaf: str) -> tuple[int, ...]:
        """The shape of this tensor, of a layer's in the first that has it."""
        names = (leaf, *(f"blk.{layer}.{leaf}" for layer in range(self.layers)))
        return next((t.shape for name in names if (t := self.checkpoint.tensors.get(name))), ())

    @cached_property
    def dense(self) -> list[int]:
        """Layers of the trunk without a router."""
        return [i for i in range(self.layers) if f"blk.{i}.ffn_gate_inp.weight" not in self.checkpoint.tensors]

    @cached_property
    def leading_dense(self) -> int:
        """How many dense layers come first; refused where one comes later."""
        if self.dense != list(range(len(self.dense))):
            raise InputError(f"{self.file}: layer {self.dense[-1]} has no experts though one before it has")
        return len(self.dense)

    @cached_property
    def expert_width(self) -> int:
        """Inner size of an expert."""
        shape = self.shape("ffn_down_exps.weight") or self.shape("ffn_down.0.weight")
        return shape[-1] if shape else int(self["expert_feed_forward_length"])

    @cached_property
    def head_dim(self) -> int:
        """Size of a head of the attention."""
        return int(self.get("attention.key_length") or self["embedding_length"] // self["attention.head_count"])


def shortest(value: Any) -> Any:
    """A number of 32 bits as its maker wrote it: 1e-06 and not 9.999999974752427e-07."""
    if not isinstance(value, float):
        return value
    as_stored = struct.pack("<f", value)
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next((float(text) for text in texts if struct.pack("<f", float(text)) == as_stored), value)


def rope(facts: Facts, **more: Any) -> dict[str, Any]:
    """The rotary embedding."""
    kind = str(facts.get("rope.scaling.type", "none"))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", 10000.0), **more}
    if divisors := facts.values("rope_freqs.weight"):  # of the frequencies, as Llama 3 scales them
        length = facts["context_length"]
        names = {"short_factor": divisors, "long_factor": divisors, "original_max_position_embeddings": length}
        return found | names | {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
    if kind == "none" or not facts.get("rope.scaling.factor"):
        return found
    if kind not in ("linear", "yarn"):
        raise InputError(f"{facts.file}: rope scaling of type {kind} cannot be read; {INSTEAD}")
    found |= {"rope_type": kind, "factor": facts["rope.scaling.factor"]}
    if kind == "yarn":
        found["original_max_position_embeddings"] = facts["rope.scaling.original_context_length"]
        found |= {name: facts.get(f"rope.scaling.yarn_{name}", usual) for name, usual in BETAS.items()}
        if (factor := facts.get("rope.scaling.yarn_attn_factor")) is not None:
            found["attention_factor"] = factor
    return found


def layer_types(facts: Facts, usual: Callable[[int], object] | None = None) -> list[str]:
    """Which layers attend within a window: by a list, or as usual; a period may be counted in several ways."""
    if facts.each(key := "attention.sliding_window_pattern"):
        slides = facts.by_layer(key)
    elif usual is not None and facts.get(key) is None:
        slides = [usual(layer) for layer in range(facts.layers)]
    else:
        raise InputError(f"{facts.file} has no list {facts.architecture}.{key}; {INSTEAD}")
    return ["sliding_attention" if within else "full_attention" for within in slides]


def rotating_part(facts: Facts) -> dict[str, Any]:
    """The rotary embedding where it may turn a part of each head only."""
    part = facts.get("rope.dimension_count", facts.head_dim) / facts.head_dim
    return rope(facts, **({"partial_rotary_factor": part} if part < 1 else {}))


def common(facts: Facts) -> dict[str, Any]:
    """What the configurations of all models have."""
    shape, width = facts.shape("token_embd.weight"), facts["embedding_length"]
    if len(shape) != 2 or shape[1] != width:
        raise InputError(f"{facts.file}: token_embd.weight has the shape {list(shape)}, not rows of {width}")
    experts, groups = facts["expert_count"], facts.get("expert_group_count", 1) or 1
    for key, most in {"expert_used_count": experts, "expert_group_used_count": groups}.items():
        if facts.get(key, 0) > most:
            raise facts.damaged(f"{key} = {facts[key]} of {most}")
    if experts % groups:
        raise facts.damaged(f"expert_group_count = {groups}, with {experts} experts")
    kinds = {tensor.dtype for tensor in facts.checkpoint.tensors.values()}
    return {
        "vocab_size": shape[0],
        "hidden_size": width,
        "intermediate_size": facts.get("feed_forward_length", 0) or facts.expert_width,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts["attention.head_count"],
        "num_key_value_heads": facts.get("attention.head_count_kv", facts["attention.head_count"]),
        "rms_norm_eps": facts.get("attention.layer_norm_epsilon") or facts["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": facts["context_length"],
        "num_experts_per_tok": facts["expert_used_count"],
        "rope_parameters": rope(facts),
        "tie_word_embeddings": "output.weight" not in facts.checkpoint.tensors,
        "dtype": "float32" if kinds <= {"F32"} else "bfloat16",
        "bos_token_id": facts.token("bos_token_id"),
        "eos_token_id": facts.token("eos_token_id"),
        "pad_token_id": facts.token("padding_token_id"),
    }
