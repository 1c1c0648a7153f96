"""The README's table of what was proven, made from the lists that the tests run over.

`python -m tests.pruning.proven` rewrites it; test_proven.py compares.
"""

from __future__ import annotations

from moeprune.checkpoint.formats import FORMATS
from tests import tiny
from tests.checkpoint import hub
from tests.contracts import documents
from tests.pruning import test_quantized

MARKS = ("<!-- proven -->", "<!-- end of proven -->")
MASKED = (
    "computes what the parent computes when the dropped experts' router logits are minus infinity, within 1e-5 in fp32"
)
BYTES = "every byte compared with an oracle that knows the layout"
# How each number format of formats.FORMATS was proven, beside the containers and plain types.
HOW = {
    "bf16, fp16, fp32": "fp32: the families above; bf16: the demo model from scores to answers; fp16: the same code",
    "mxfp4": f"gpt-oss as OpenAI ships it, 32 to 24, 16, 8, 6 and 4 experts: {MASKED}; {BYTES}",
    "fp8": f"Qwen3-MoE and DeepSeek-V3 in blocks: {MASKED}; Step-3.5 and Llama-4 stacked: {BYTES}",
    "deepseek_fp4": BYTES,
    "nvfp4": BYTES,
    "ct_int4": BYTES,
    "modelopt_nvfp4": f"per expert and stacked: {BYTES}; slicing commutes with dequantizing",
    "awq": BYTES,
    "gptq": BYTES,
    "bitsandbytes": f"{BYTES}; scales that were scaled again are written out as the same numbers",
    "torchao": BYTES,
    "mlx": f"quantized routers too: {BYTES}; slicing commutes with dequantizing",
    "gguf": f"single, split, and one tensor per expert: {BYTES}",
}
RECOGNISED = "recognised; cut by the same rules, no case of its own"


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
    rows += [f"| format {entry.name}: {entry.text} | {HOW.get(entry.name, RECOGNISED)} |" for entry in FORMATS]
    rows.append(f"| format gguf | {HOW['gguf']} |")
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
