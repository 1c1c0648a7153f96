"""The tokenizer of a GGUF file: the original one where its files lie beside it, else the one the metadata describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from moeprune.checkpoint import gguf
from moeprune.console import warn
from moeprune.errors import InputError

BESIDE = "put tokenizer.json and tokenizer_config.json of the original model beside the file"
USUAL_SPLITS = {"", "default", "gpt-2"}  # how byte-level vocabularies split text unless told otherwise


def load(file: Path) -> Any:
    """For the first file of a set, or the only one."""
    if (file.parent / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(file.parent)
    said = gguf.values([gguf.read_header(file)])
    split = str(said.get("tokenizer.ggml.pre", ""))
    if said.get("tokenizer.ggml.model") == "gpt2" and split not in USUAL_SPLITS | GGUF_PRE_TOKENIZER_SPLITS.keys():
        warn(f"{file.name} splits text as {split} does, which transformers does not know: some tokens differ; {BESIDE}")
    try:
        return _within_vocabulary(PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name), file)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{file} describes no tokenizer that transformers can build ({reason}); {BESIDE}") from None


def _within_vocabulary(tokenizer: Any, file: Path) -> Any:
    """Without tokens behind the last of the file: the class adds one of its own, for which the model has no row."""
    entry = gguf.read_header(file).entries["tokenizer.ggml.tokens"]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < gguf.length(entry)]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer
