"""Real serving engines load what the cut wrote, and answer: vLLM, llama.cpp, MLX, and the libraries that quantize.

    ./run.sh engines [vllm] [llama.cpp] [mlx] [libraries]

It makes an environment for each in .engines/ (several GB, minutes;
later runs skip that), cuts models in the form that each engine reads, and compares answers. Not part of
`./run.sh check`: too heavy for every change. Exit status 1 when an engine does not load or answers something else.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tests.engines.environments import ENVIRONMENTS, HERE, PROJECT, call, python_of, zentorch

WORK = ENVIRONMENTS / "models"
DEMO = PROJECT / "demo" / "model"
PROMPTS = ["12+30=", "2 + 2 =", "The capital of France is", "binary of 5:"]
SAME = 1e-4  # in log probabilities, when both sides compute in float32, or the same engine in the same numbers
NEAR = 0.005  # of the largest logit; llama.cpp keeps keys and values in 16 bits
ROUNDED = 0.1  # the same in bfloat16: vLLM's GPTQ experts come out up to 0.04 apart, at times not at all
SAME_SUMS = 1e-6  # of the largest

Outcome = tuple[str, bool | None, str]  # what was tried, whether it was right (None: not possible here), what was seen
Numbers = list[list[float]]  # of every token, for each prompt


def last_json(text: str) -> Any:
    """The JSON in the last line; engines print other things before it."""
    return json.loads(text.strip().splitlines()[-1])


def score_demo() -> None:
    """Scores of the demo model, which also serve its copies in other formats."""
    call(sys.executable, "reap.py", "--model-path", "demo/model", "--output-path", WORK, "--calibration-path",
         "demo/calibration.jsonl")  # fmt: skip


def cut(model: Path, name: str, *flags: str) -> Path:
    """A quarter of the experts goes: the demo model still answers these prompts."""
    target = WORK / name
    call(sys.executable, "prune_model.py", "--model-path", model, "--output-path", WORK, "--pruned-output-path", target,
         "--prune-ratio", "0.25", "--force", *flags)  # fmt: skip
    return target


def same_answers(what: str, before: list[str], after: list[str]) -> Outcome:
    """The cut model answers what its parent does, which is right."""
    return what, before == after and before[0].strip() == "42", f"parent {before}, cut {after}"


def apart(some: Numbers, others: Numbers) -> float:
    """The largest difference."""
    return max(abs(a - b) for a, b in zip(chain(*some), chain(*others), strict=True))


def ask_vllm(jobs: list[dict[str, Any]], **environment: str) -> list[Any]:
    """The answers to each job, or why vLLM refuses its model."""
    path = WORK / "jobs.json"
    path.write_text(json.dumps(jobs))
    return list(last_json(call(python_of("vllm"), HERE / "ask_vllm.py", path, **environment)))


def try_vllm() -> Iterator[Outcome]:
    """The demo model; random models of many families against transformers; number formats that it runs here."""
    demo = [{"model": str(model), "prompts": PROMPTS} for model in (DEMO, cut(DEMO, "demo-cut"))]
    expected = last_json(call(sys.executable, HERE / "families.py", WORK))
    tokens = expected.pop("prompts")
    before, after, *seen = ask_vllm([*demo, *({"model": model, "prompts": tokens} for model in expected)])
    yield same_answers("vllm: demo model", before, after)
    for model, theirs in zip(expected, seen, strict=True):
        what = f"vllm: {Path(model).name}, random"
        if isinstance(theirs, str):
            yield what, False, theirs
        else:
            off = apart(theirs, expected[model])
            yield what, off < SAME, f"log probabilities of all next tokens within {off:.1e} of transformers'"
    yield from vllm_formats()


def vllm_formats() -> Iterator[Outcome]:
    """The cut computes what the parent does whose router does not choose the dropped experts."""
    jobs = last_json(call(sys.executable, HERE / "quantize.py", WORK))
    seen = ask_vllm(jobs, **zentorch())
    for place in range(0, len(jobs), 3):
        what = f"vllm: {Path(jobs[place]['model']).name}, random, cut"
        whole, masked, child = seen[place : place + 3]
        if isinstance(whole, str):
            yield what, None, f"vLLM does not run this format on this processor: {whole}"
        elif isinstance(child, str):
            yield what, False, child
        else:
            off, moved = apart(masked, child), apart(masked, whole)
            yield (
                what,
                off < ROUNDED < moved,
                f"within {off:.1e} of the masked parent, which is {moved:.1f} off the whole",
            )


def ask(engine: str, model: Path) -> list[str]:
    """The engine's most likely continuation of each prompt."""
    script = HERE / f"ask_{engine.replace('.', '_')}.py"
    return list(last_json(call(python_of(engine), script, model, json.dumps(PROMPTS))).values())


def try_llama_cpp() -> Iterator[Outcome]:
    """GGUF with 8-bit and 16-bit experts."""
    for kind in ("Q8_0", "F16"):
        parent = WORK / f"demo-{kind}.gguf"
        call(python_of("llama.cpp"), HERE / "to_gguf.py", DEMO, parent, kind)
        child = next(cut(parent, f"demo-{kind}-cut", "--other-scores").glob("*.gguf"))
        yield same_answers(f"llama.cpp: demo model, {kind}", ask("llama.cpp", parent), ask("llama.cpp", child))
    folder = WORK / "gguf"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found = last_json(call(sys.executable, HERE / "gguf_families.py", folder))
    asked = json.dumps(found.pop("prompts"))
    for name, ours in found.items():
        theirs = last_json(call(python_of("llama.cpp"), HERE / "logits_llama_cpp.py", folder / f"{name}.gguf", asked))
        off, largest = apart(theirs["logits"], ours), max(abs(a) for a in chain(*ours))
        seen = f"logits within {off:.4f} of ours, which reach {largest:.1f}"
        yield f"llama.cpp: {name}, random", off < NEAR * largest, seen


def try_mlx() -> Iterator[Outcome]:
    """MLX's affine 4-bit and its mxfp4, both with a quantized router."""
    for mode, flags in {"affine": ("--q-group-size", "32"), "mxfp4": ()}.items():
        parent = WORK / f"demo-mlx-{mode}"
        if not parent.exists():
            call(python_of("mlx"), "-m", "mlx_lm", "convert", "--hf-path", "demo/model", "--mlx-path", parent, "-q",
                 "--q-mode", mode, *flags)  # fmt: skip
        child = cut(parent, f"demo-mlx-{mode}-cut", "--other-scores")
        yield same_answers(f"mlx: demo model, {mode}", ask("mlx", parent), ask("mlx", child))
    folder = WORK / "mlx"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    call(sys.executable, HERE / "mlx_families.py", "make", folder)
    refused = last_json(call(python_of("mlx"), HERE / "to_mlx.py", folder))
    apart = last_json(call(sys.executable, HERE / "mlx_families.py", "compare", folder))
    for name, why in refused.items():
        worst = why or apart[name]
        seen = worst if isinstance(worst, str) else f"sums within {worst:.0e} of the original's"
        yield f"mlx: {name}, random, scored", not isinstance(worst, str) and worst < SAME_SUMS, seen


def try_libraries() -> Iterator[Outcome]:
    """By the quantization libraries: the cut computes what the parent does without the dropped experts."""
    jobs, path = last_json(call(sys.executable, HERE / "libraries.py", WORK / "libraries")), WORK / "jobs.json"
    path.write_text(json.dumps(jobs))
    for job, seen in zip(jobs, last_json(call(python_of("libraries"), HERE / "ask_libraries.py", path)), strict=True):
        off, moved = apart(seen["masked"], seen["cut"]), apart(seen["masked"], seen["whole"])
        what = f"libraries: {Path(job['parent']).parent.name}, random, cut"
        yield what, off < SAME < moved, f"within {off:.1e} of the masked parent, which is {moved:.1f} off the whole"


ENGINES = {"vllm": try_vllm, "llama.cpp": try_llama_cpp, "mlx": try_mlx, "libraries": try_libraries}
MARKS = {True: "ok  ", False: "FAIL", None: "--  "}


def main(names: list[str]) -> int:
    """Try each engine and print a line for everything that was tried."""
    WORK.mkdir(parents=True, exist_ok=True)
    score_demo()
    failed = 0
    for name in names or ENGINES:
        for what, right, seen in ENGINES[name]():
            print(f"{MARKS[right]}  {what}: {seen[:400]}", flush=True)
            failed += right is False
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
