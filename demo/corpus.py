"""The data of the demo model: samples to train on, to calibrate with and to judge by; the tokenizer; batches."""

import json
from pathlib import Path
from random import Random

import torch
from domains import DOMAINS, SHARES
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from words import CITIES, DAYS, NAMES, OBJECTS, Sample

SEED = 7
VOCABULARY = 1280
END = "<|endoftext|>"
BATCH_TOKENS = 4096
LONG_ROWS_EVERY = 8  # one batch in eight has rows of 512 tokens instead of 128, so that long inputs work too
PROMPT_WEIGHT = 0.2  # loss weight of prompt tokens; answers and running text count 1
EVALUATION_SAMPLES = 40
CALIBRATION_TOKENS = 1200  # per domain
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def identity(sample: Sample) -> str:
    """What makes two samples the same: their text without spaces, so that `2+3=` and `2 + 3 =` are one."""
    return "".join((sample.prompt + sample.answer).split())


def draw_evaluation(domain: str) -> list[Sample]:
    """Draw different samples of one domain to be held out; the shortest prompts are too few to hold any out."""
    rng = Random(f"{SEED} evaluation {domain}")
    samples: dict[str, Sample] = {}
    while len(samples) < EVALUATION_SAMPLES:
        sample = DOMAINS[domain](rng)
        if len(sample.prompt.replace(" ", "")) > len("6*7="):
            samples[identity(sample)] = sample
    return list(samples.values())


def draw(domain: str, count: int, held_out: set[str], rng: Random) -> list[Sample]:
    """Draw samples of one domain that are not held out."""
    samples = []
    while len(samples) < count:
        sample = DOMAINS[domain](rng)
        if identity(sample) not in held_out:
            samples.append(sample)
    return samples


def draw_calibration(domain: str, held_out: set[str], tokenizer: Qwen2Tokenizer) -> list[Sample]:
    """Draw samples of one domain up to the number of tokens that every domain contributes."""
    rng, samples, tokens = Random(f"{SEED} calibration {domain}"), [], 0
    while tokens < CALIBRATION_TOKENS:
        samples += draw(domain, 1, held_out, rng)
        tokens += len(tokenizer(samples[-1].prompt + samples[-1].answer)["input_ids"])
    return samples


def write_samples(path: Path, samples: dict[str, list[Sample]]) -> None:
    """Write samples as JSON lines: `prompt` and `answer`, or `text` where there is nothing to check."""
    with path.open("w", encoding="utf-8") as file:
        for domain, of_domain in samples.items():
            for sample in of_domain:
                checkable = {"prompt": sample.prompt, "answer": sample.answer}
                fields = checkable if sample.answer else {"text": sample.prompt}
                file.write(json.dumps({"domain": domain, **fields}, ensure_ascii=False) + "\n")


def train_tokenizer(held_out: set[str]) -> Qwen2Tokenizer:
    """Learn a byte-level BPE with the text splitting of Qwen2, which keeps every digit a token."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = []
    for domain in DOMAINS:
        samples = draw(domain, 2000, held_out, Random(f"{SEED} words {domain}"))
        texts += [sample.prompt + sample.answer for sample in samples]
    # A name that is one token in the request but several inside the JSON of the tool call would be copied badly.
    texts += [f' "{word}"' for word in NAMES + CITIES + DAYS + OBJECTS] * 500
    backend.train_from_iterator(texts, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=512)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(samples: list[Sample], tokenizer: Qwen2Tokenizer) -> list[tuple[list[int], list[float]]]:
    """Turn samples into (tokens, loss weights), each closed by the end token."""
    prompts = tokenizer([sample.prompt for sample in samples])["input_ids"]
    answers = tokenizer([sample.answer for sample in samples])["input_ids"]
    documents = []
    for prompt, answer in zip(prompts, answers, strict=True):
        weights = [PROMPT_WEIGHT if answer else 1.0] * len(prompt) + [1.0] * (len(answer) + 1)
        documents.append((prompt + answer + [tokenizer.eos_token_id], weights))
    return documents


def draw_documents(tokens: int, held_out: set[str], tokenizer: Qwen2Tokenizer) -> list[tuple[list[int], list[float]]]:
    """Draw training documents of all domains in random order, about so many tokens."""
    documents = []
    total_share = sum(SHARES.get(domain, 1.0) for domain in DOMAINS)
    for domain in DOMAINS:
        rng = Random(f"{SEED} training {domain}")
        probe = encode(draw(domain, 500, held_out, rng), tokenizer)
        mean_length = sum(len(document) for document, _ in probe) / len(probe)
        count = int(tokens * SHARES.get(domain, 1.0) / total_share / mean_length)
        documents += encode(draw(domain, count, held_out, rng), tokenizer)
    Random(SEED).shuffle(documents)
    return documents


def pack(documents: list[tuple[list[int], list[float]]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill rows with documents; every row begins with a new document, the last one of a row is cut."""
    rows, row_weights = [], []
    tokens: list[int] = []
    weights: list[float] = []
    for document, document_weights in documents:
        tokens += document
        weights += document_weights
        if len(tokens) > length:  # one token more, for the inputs and the targets shifted by one
            rows.append(tokens[: length + 1])
            row_weights.append(weights[: length + 1])
            tokens, weights = [], []
    return torch.tensor(rows, dtype=torch.int16), torch.tensor(row_weights)


def make_batches(steps: int, held_out: set[str], tokenizer: Qwen2Tokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw all training data and cut it into batches, now and then one with long rows."""
    documents = draw_documents(int(steps * BATCH_TOKENS * 1.12), held_out, tokenizer)  # 12% is cut off at row ends
    border = len(documents) // LONG_ROWS_EVERY
    streams = {}
    for length, part in ((512, documents[:border]), (128, documents[border:])):
        rows, weights = pack(part, length)
        size = BATCH_TOKENS // length
        streams[length] = zip(rows.share_memory_().split(size), weights.share_memory_().split(size), strict=True)
    return [next(streams[512 if step % LONG_ROWS_EVERY == 0 else 128]) for step in range(steps)]
