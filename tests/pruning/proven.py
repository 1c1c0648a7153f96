"""The README's table of what was proven, made from the lists that the tests run over.

`python -m tests.pruning.proven` rewrites it; test_proven.py compares.
"""

from __future__ import annotations

import json

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.checkpoint.formats import FORMATS, format_of
from tests import tiny
from tests.checkpoint import hub
from tests.contracts import documents
from tests.data.make import FOLDER, MAKERS
from tests.gguf_files.families import FAMILIES
from tests.pruning import test_quantized

MARKS = ("<!-- proven -->", "<!-- end of proven -->")
MASKED = (
    "computes what the parent computes when the dropped experts' router logits are minus infinity, within 1e-5 in fp32"
)
BYTES = "every byte compared with an oracle that knows the layout"
INTEGERS = "numbers against known integers"
WHOLE = f"a matrix of each expert, whole and renamed: {BYTES}"
AGAIN = "tried by hand with transformers 4.57: it loads the cut and computes what the masked parent does"
LIBRARY = "numbers as the library reads them, bit for bit; the cut changes none; parent and cut scored as their values"
# How each number format of formats.FORMATS was proven, beside the containers and plain types.
HOW = {
    "bf16, fp16, fp32": "fp32: the families above; bf16: the demo model from scores to answers; fp16: the same code",
    "mxfp4": f"gpt-oss as OpenAI ships it, 32 to 24, 16, 8, 6 and 4 experts: {MASKED}; {BYTES}",
    "fp8": f"Qwen3-MoE and DeepSeek-V3 in blocks: {MASKED}; Step-3.5 and Llama-4 stacked: {BYTES}",
    "deepseek_fp4": BYTES,
    "nvfp4": BYTES,
    "ct_int4": BYTES,
    "modelopt_nvfp4": f"per expert and stacked: {BYTES}; slicing commutes with dequantizing",
    "awq": f"{BYTES}; gemv: {INTEGERS}",
    "gptq": BYTES,
    "bitsandbytes": f"unsloth's gpt-oss: {BYTES}; scales that were scaled again are written out as the same numbers",
    "torchao": f"{BYTES}; Int4 in tiles and in words, MX and NVFP4: {INTEGERS}",
    "modelopt": f"INT4 and low-rank parts: {BYTES}; {INTEGERS}",
    "mlx": f"quantized routers too: {BYTES}; slicing commutes with dequantizing",
    "hqq": f"{WHOLE}; quantized routers are packed anew, their values to the bit; {AGAIN}",
    "quanto": f"{WHOLE}; {AGAIN}",
    **dict.fromkeys(("aqlm", "vptq", "spqr", "higgs", "fp_quant", "eetq", "fouroversix"), WHOLE),
    "bitnet": f"{WHOLE}; numbers as transformers packs them",
    "gemma": f"also a quantized router: {BYTES}; numbers as transformers' own layers read them",
    "gguf": f"single, split, one tensor per expert, rows that neighbours share, without MTP layers: {BYTES}",
}
SCORED = (
    "the sums of the plain checkpoint with the same values, to the bit; every type but Q8_K and Q1_0 to the "
    "bit as the gguf package reads it; other architectures are refused and cut with the original's scores"
)


def by_libraries() -> dict[str, str]:
    """Format -> the libraries that wrote checkpoints in it for the tests."""
    wrote: dict[str, dict[str, None]] = {}
    for name in MAKERS:
        versions = json.loads((FOLDER / name / "made.json").read_text(encoding="utf-8"))["made_by"]
        library = next(iter(versions))
        wrote.setdefault(format_of(open_checkpoint(FOLDER / name)), {})[f"{library} {versions[library]}"] = None
    return {form: f"written by {', '.join(libraries)}: {LIBRARY}" for form, libraries in wrote.items()}


def how(form: str, wrote: dict[str, str]) -> str:
    """How one format was proven."""
    return "; ".join(text for text in (HOW.get(form), wrote.get(form)) if text)


def table() -> str:
    """The rows of the README's table."""
    families = ", ".join(f"`{name}`" for name in tiny.FAMILIES)
    layouts = "; ".join(hub.CASES)
    rows = [
        "| what | how it was proven |",
        "|---|---|",
        f"| {len(tiny.FAMILIES)} configurations of transformers: {families} | tiny random model, other experts stay in "
        f"each block; loads with no key missing, unexpected or of another size, and {MASKED} |",
        f"| {len(hub.CASES)} layouts of the hub, written by hand: {layouts} | {BYTES} |",
        f"| formats bf16, fp16, fp32 | {HOW['bf16, fp16, fp32']} |",
    ]
    wrote = by_libraries()
    rows += [f"| format {entry.name}: {entry.text} | {how(entry.name, wrote)} |" for entry in FORMATS]
    rows.append(f"| format gguf | {HOW['gguf']} |")
    gguf = ", ".join(f"`{name}`" for name in dict.fromkeys(way.architecture for way in FAMILIES.values()))
    rows.append(f"| GGUF files, scored and judged: {gguf} | {SCORED} |")
    commuting = ", ".join(test_quantized.STACKED)
    rows.append(f"| slice, then dequantize = dequantize, then slice | bit for bit, stacked: {commuting} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Rewrite the table."""
    path = documents.ROOT / "README.md"
    head, _, tail = documents.between(path.read_text(encoding="utf-8"), *MARKS)
    path.write_text(head + table() + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
