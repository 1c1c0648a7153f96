"""A byte-level tokenizer with the special tokens of a family, which puts begin-of-text in front as real ones do."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.scoring.chat_templates import FAMILIES


def plain(special: tuple[str, ...] = ("<pad>",), bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, behind the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", pair=f"{special[0]} $A $B", special_tokens=[(special[0], 0)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=raw)
    made.pad_token = special[0]
    if bos:
        made.bos_token = made.cls_token = special[0]
        made.eos_token = special[1]
    return made


def of_family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one family in `chat_templates`."""
    family = FAMILIES[name]
    made = plain(family.special, family.bos)
    made.chat_template = family.template
    return made
