"""The tokenizer of a GGUF file: the original one where its files lie beside it, else the one the metadata describes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from moeprune.checkpoint import gguf
from moeprune.console import warn
from moeprune.errors import InputError, reason

BESIDE = "put tokenizer.json and tokenizer_config.json of the original model beside the file"
USUAL_SPLITS = {"", "default", "gpt-2"}  # how byte-level vocabularies split text unless told otherwise
SPELLING: dict[int, str] = bytes_to_unicode()
ALPHABET = frozenset(SPELLING.values())
SPECIAL = ("bos", "eos", "unknown", "padding")


def load(file: Path) -> Any:
    """For the first file of a set, or the only one."""
    if (file.parent / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(file.parent)
    header = gguf.read_header(file)
    if wrong := next(_wrong(header), ""):
        raise InputError(f"{file} describes no tokenizer: {wrong}; {BESIDE}")
    said = gguf.values([header])
    split = str(said.get("tokenizer.ggml.pre", ""))
    if said.get("tokenizer.ggml.model") == "gpt2" and split not in USUAL_SPLITS | GGUF_PRE_TOKENIZER_SPLITS.keys():
        warn(f"{file.name} splits text as {split} does, which transformers does not know: some tokens differ; {BESIDE}")
    try:
        return _within_vocabulary(PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name), file)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{file} describes no tokenizer that transformers can build ({reason(error)}); {BESIDE}"
        ) from None


def _wrong(header: gguf.Header) -> Iterator[str]:
    """What libraries would take amiss, or for something else."""
    entries = {name.removeprefix("tokenizer."): entry for name, entry in header.entries.items()}
    tokens = gguf.texts(entries["ggml.tokens"]) if "ggml.tokens" in entries else None
    if not tokens:
        yield "tokenizer.ggml.tokens is no list of texts"
        return
    rows = header.tensors["token_embd.weight"].shape if "token_embd.weight" in header.tensors else (len(tokens),)
    if len(tokens) > rows[0]:
        yield f"it lists {len(tokens)} tokens, and its model has rows for {rows[0]}"
    for name in SPECIAL:
        value = entries[key].value if (key := f"ggml.{name}_token_id") in entries else 0
        if type(value) is not int or not 0 <= value < len(tokens):
            yield f"tokenizer.{key} = {value!r:.60} is none of its {len(tokens)} tokens"
    for name in ("ggml.scores", "ggml.token_type"):
        if name in entries and not _each_finite(entries[name], len(tokens)):
            yield f"tokenizer.{name} is no list of a number for each of its {len(tokens)} tokens"
    if "ggml.merges" in entries:
        byte_level = "ggml.model" in entries and entries["ggml.model"].value == "gpt2"
        yield from _wrong_merges({_spelled(token) if byte_level else token for token in tokens}, entries["ggml.merges"])
    for name in ("chat_template", "ggml.model", "ggml.pre"):
        if name in entries and not isinstance(entries[name].value, str):
            yield f"tokenizer.{name} is no text"


def _each_finite(entry: gguf.Entry, count: int) -> bool:
    numbers = gguf.numbers(entry)
    return len(numbers) == count and all(math.isfinite(number) for number in numbers)


def _spelled(token: str) -> str:
    """As a byte-level vocabulary spells it, where the file does not."""
    return token if ALPHABET.issuperset(token) else "".join(SPELLING[byte] for byte in token.encode())


def _wrong_merges(known: set[str], entry: gguf.Entry) -> Iterator[str]:
    """A merge is of two tokens into a third."""
    if (merges := gguf.texts(entry)) is None:
        yield "tokenizer.ggml.merges is no list of texts"
    for number, merge in enumerate(merges or ()):
        parts = merge.split(" ")
        if len(parts) != 2 or not known.issuperset((*parts, "".join(parts))):
            yield f"merge {number}, {merge!r:.60}, is not of two of its tokens into a third"


def _within_vocabulary(tokenizer: Any, file: Path) -> Any:
    """Without tokens behind the last of the file: the class adds one of its own, for which the model has no row."""
    entry = gguf.read_header(file).entries["tokenizer.ggml.tokens"]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < gguf.length(entry)]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer
