"""Samples -> documents: the tokens of each, its domain, its slice, and the images that belong to it."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from moeprune import console
from moeprune.errors import InputError
from moeprune.metadata import IMAGE
from moeprune.scoring.calibration import images, processors
from moeprune.scoring.calibration.pixels import digest_of, forgotten
from moeprune.scoring.calibration.samples import Sample
from moeprune.scoring.calibration.templates import Refused, Rules, encode, render, thinking_switch

DIGEST_LETTERS = 12  # a million samples make an accidental pair with a chance of 1 in 500
SLICES = 4  # parts of each domain's samples, to see how stable the scores are


@dataclass(frozen=True)
class Document:
    """The tokens of one sample and, where it shows images, what the model gets besides."""

    ids: Sequence[int]  # as an array where there are many: a list takes nine times the memory
    domain: str
    slice: int
    image_tokens: frozenset[int] = frozenset()  # ids that stand for pieces of images
    uncounted: frozenset[int] = frozenset()  # ids that the model gets but the sums leave out
    aligned: Mapping[str, torch.Tensor] = field(default_factory=dict)  # inputs with one value per token
    stacked: Mapping[str, torch.Tensor] = field(default_factory=dict)  # inputs with one entry per image or patch

    @cached_property
    def seen(self) -> int:
        """How many of the tokens are pieces of images."""
        return sum(token in self.image_tokens for token in self.ids) if self.image_tokens else 0

    @cached_property
    def read(self) -> int:
        """How many of the tokens count as text."""
        apart = self.image_tokens | self.uncounted
        return sum(token not in apart for token in self.ids) if apart else len(self.ids)


@dataclass
class Encoder:
    """Turns samples into documents and counts what could not be used."""

    tokenizer: Any
    config: Any
    rules: Rules
    reader: images.Reader
    trust_remote_code: bool = False
    count_special: bool = True
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    refusal: str = ""

    def documents(self, samples: Sequence[Sample]) -> list[Document]:
        """Documents in the order of the samples; those of a domain go round its slices."""
        turn: Counter[str] = Counter()
        made: list[Document] = []
        for sample in samples:
            document = self._document(sample, turn[sample.domain] % SLICES)
            if document is not None:
                turn[sample.domain] += 1
                made.append(document)
        self._report(len(samples), made)
        if self.rules.thinking != "auto" and not thinking_switch(self._text_tokenizer):
            console.warn(f"the chat template has no thinking switch, so thinking={self.rules.thinking} changes nothing")
        return made

    def _report(self, asked: int, made: Sequence[Document]) -> None:
        self.reader.judge()
        if self.skipped[REFUSED]:
            refused = f"the chat template refused {self.skipped[REFUSED]} of {asked} samples, such as {self.refusal}"
            if self.skipped[REFUSED] > asked / 2:  # what is left is other data than was asked for
                raise InputError(f"{refused}; mend the template or give data that it takes")
            console.warn(refused)
        if self.skipped[BLIND]:
            console.warn(f"the model takes no images: of {self.skipped[BLIND]} samples only the text is used")
            del self.skipped[BLIND]
        if not made:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items() if count)
            raise InputError(f"none of {asked} calibration samples can be used: {reasons}")

    def _document(self, sample: Sample, slice_: int) -> Document | None:
        if sample.images and not images.takes_images(self.config):
            self.skipped[BLIND] += 1
            sample = images.without_images(sample)
        try:
            if sample.images:
                return self._with_images(sample, slice_)
            ids = encode(*render(sample, self._text_tokenizer, self.rules), self._text_tokenizer)
        except Refused as error:
            self.refusal = f"{sample.origin}: {error}"
            self.skipped[REFUSED] += 1
            return None
        except images.BadImage:
            self.skipped["an image that cannot be used"] += 1
            return None
        if len(ids) < 2:
            self.skipped["shorter than 2 tokens"] += 1
            return None
        self.cut += len(ids) > self.rules.max_seq_len
        return Document(array("i", ids[: self.rules.max_seq_len]), sample.domain, slice_, uncounted=self._uncounted)

    def _with_images(self, sample: Sample, slice_: int) -> Document | None:
        """A sample with images is used whole or not at all: a cut image is none."""
        made = images.encode_images(sample, self._processor, self.rules, self.reader)
        ids, aligned, stacked = images.split_inputs(made)
        again = partial(images.encode_again, sample, self._processor, self.rules, self.reader.max_pixels)
        if len(ids) > self.rules.max_seq_len:
            self.skipped["longer than max_seq_len with its images"] += 1
            return None
        tokens = processors.image_tokens(self.config, self._processor)
        uncounted = self._uncounted - tokens
        stacked = forgotten(stacked, again, sample.origin)
        document = Document(array("i", ids), sample.domain, slice_, frozenset(tokens), uncounted, aligned, stacked)
        if not document.seen:
            raise InputError(f"{sample.origin}: no image tokens in the model's input; its processor is not understood")
        return document

    @cached_property
    def _uncounted(self) -> frozenset[int]:
        """The special tokens, where they are not to count: begin and end of text, the marks of roles."""
        if self.count_special:
            return frozenset()
        added = self._text_tokenizer.added_tokens_decoder
        return frozenset(self._text_tokenizer.all_special_ids) | {id_ for id_, token in added.items() if token.special}

    @property
    def _text_tokenizer(self) -> Any:
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)

    @cached_property
    def _processor(self) -> Any:
        return processors.load_processor(self.tokenizer, self.config, self.trust_remote_code)


REFUSED = "refused by the chat template"
BLIND = "with images"


def domains_of(documents: Sequence[Document]) -> tuple[str, ...]:
    """The domains in use, sorted; image tokens have domains of their own."""
    named = {document.domain for document in documents}
    return tuple(sorted(named | {document.domain + IMAGE for document in documents if document.seen}))


def per_domain(documents: Sequence[Document]) -> dict[str, dict[str, int]]:
    """Samples and tokens of each domain."""
    counted = {name: {"samples": 0, "tokens": 0} for name in domains_of(documents)}
    for document in documents:
        for name, tokens in ((document.domain, document.read), (document.domain + IMAGE, document.seen)):
            if tokens:
                counted[name]["samples"] += 1
                counted[name]["tokens"] += tokens
    return counted


def fingerprint(documents: Sequence[Document]) -> str:
    """Equal for equal tokens, domains, slices and images in the same order."""
    total = hashlib.sha256()
    for document in documents:
        total.update(f"{document.domain}\0{document.slice}\0".encode() + _content(document))
    return total.hexdigest()


def sample_digests(documents: Sequence[Document]) -> list[str]:
    """One short digest of each document's tokens and images, by which other runs are seen to have used it too."""
    return sorted(hashlib.sha256(_content(document)).hexdigest()[:DIGEST_LETTERS] for document in documents)


def _content(document: Document) -> bytes:
    parts = [f"{len(document.ids)}\0".encode(), struct.pack(f"<{len(document.ids)}q", *document.ids)]
    for name, value in sorted(document.stacked.items()):
        parts.append(f"{name}\0{digest_of(value)}".encode())
    return b"".join(parts)


def check_vocabulary(documents: Sequence[Document], config: Any) -> None:
    """A tokenizer of another model would index past the embedding, which on a GPU ends in an unreadable error."""
    size = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)
    largest = max(max(document.ids) for document in documents)
    if size is not None and largest >= size:
        raise InputError(
            f"the tokenizer makes token {largest}, the model knows {size}: the tokenizer is another model's"
        )
