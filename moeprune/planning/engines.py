"""Which numbers of experts the serving engines accept, and the nearest number that suits the chosen ones.

To add an engine or a rule, add a line to ENGINES. What the router itself demands (groups, top-k) is in plan.Limits.
Neither tensor parallelism nor a quantized format restricts the number of experts: they split or pack the insides of an
expert, which a cut leaves as they are. Tensor parallelism only bounds the expert parallelism that goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moeprune.errors import UsageError
from moeprune.planning.plan import Limits

SEVERITIES = {  # hardest first
    "fail": "does not run on",
    "old": "does not run on older releases of",
    "slow": "takes a slower path on",
}
COMMON = ("vllm", "sglang", "llama.cpp", "transformers")  # warned about when no engine was named


@dataclass(frozen=True, slots=True)
class Case:
    """A number of experts and all that an engine's opinion of it depends on."""

    count: int
    limits: Limits
    model_type: str = ""
    expert_parallel: int = 1
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that an engine demands."""

    severity: str
    accepts: Callable[[Case], bool]
    why: str  # with {count}, {ep}, {tp}, {groups}
    source: str


@dataclass(frozen=True, slots=True)
class Objection:
    """A rule that a count breaks."""

    engine: str
    severity: str
    why: str
    source: str

    def __str__(self) -> str:
        return f"{SEVERITIES[self.severity]} {self.engine}: {self.why}"


def _is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def _is_deepseek_v4(case: Case) -> bool:
    return case.model_type.startswith("deepseek_v4")


def _divides_by_ep(case: Case) -> bool:
    return case.count % case.expert_parallel == 0


VLLM_DEEPSEEK_V4 = {1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576}

ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": (
        Rule(
            "fail",
            lambda c: not _is_deepseek_v4(c) or c.count in VLLM_DEEPSEEK_V4,
            "its DeepSeek-V4 router kernel knows only " + ", ".join(map(str, sorted(VLLM_DEEPSEEK_V4))),
            "vllm-project/vllm#51521",
        ),
        Rule(
            "fail",
            _divides_by_ep,
            "{count} experts do not divide among {ep} expert-parallel ranks (needed with EPLB and for DeepSeek-V4)",
            "vllm-project/vllm#52435",
        ),
        Rule(
            "fail",
            lambda c: c.expert_parallel == 1 or c.expert_parallel % c.tensor_parallel == 0,
            "{ep} expert-parallel ranks are not a multiple of {tp} tensor-parallel ranks (it runs tensor x data ranks)",
            "vllm documentation, expert parallel deployment",
        ),
        Rule(
            "slow",
            lambda c: _is_deepseek_v4(c) or (_is_power_of_two(c.count) and c.count <= 256),
            "its fused top-k kernel takes powers of two up to 256",
            "vllm-project/vllm#22211",
        ),
        Rule(
            "slow",
            lambda c: c.limits.groups == 1 or c.count <= 256,
            "its fused grouped top-k kernel takes at most 256 experts in several groups",
            "vllm-project/vllm#34206",
        ),
    ),
    "sglang": (
        Rule("fail", _divides_by_ep, "{count} experts do not divide among {ep} expert-parallel ranks", "sglang source"),
        Rule(
            "fail",
            lambda c: c.tensor_parallel == 1 or c.tensor_parallel % c.expert_parallel == 0,
            "{tp} tensor-parallel ranks are not a multiple of {ep} expert-parallel ranks",
            "sglang source",
        ),
        Rule(
            "slow",
            lambda c: _is_power_of_two(c.count) or c.count == 384,
            "its fused gate takes powers of two and 384",
            "sgl-project/sglang#26303",
        ),
        Rule(
            "slow",
            lambda c: c.limits.groups == 1 or c.count <= 32 * c.limits.groups,
            "its fused gate takes at most 32 experts in a group",
            "sgl-project/sglang#26303",
        ),
        Rule("old", lambda c: _is_power_of_two(c.count), "its ROCm kernels demanded a power of two", "ROCm/aiter#2604"),
    ),
    "llama.cpp": (
        Rule("fail", lambda c: c.count <= 512, "it is built for at most 512 experts", "llama.cpp LLAMA_MAX_EXPERTS"),
        Rule(
            "fail",
            lambda c: not c.model_type.startswith("llama4") or c.limits.experts != 128 or c.count == 128,
            "it norms the queries and keys of every Llama 4 but that of 128 experts, which was trained without",
            "llama.cpp src/models/llama4.cpp",
        ),
        Rule(
            "slow",
            lambda c: _is_power_of_two(c.count) or c.count in {288, 384, 576},
            "its CUDA top-k fusion takes powers of two, 288, 384 and 576",
            "ggml-org/llama.cpp#16130",
        ),
    ),
    "trtllm": (
        Rule(
            "fail",
            lambda c: not _is_deepseek_v4(c) or c.count % 32 == 0,
            "its DeepSeek-V4 gate kernel takes multiples of 32",
            "flashinfer-ai/flashinfer#4152",
        ),
        Rule(
            "fail",
            lambda c: c.tensor_parallel == 1 or c.tensor_parallel % c.expert_parallel == 0,
            "{tp} tensor-parallel ranks are not a multiple of {ep} expert-parallel ranks",
            "TensorRT-LLM documentation, moe_tp_size x moe_ep_size = tp_size",
        ),
        Rule(
            "old",
            _divides_by_ep,
            "{count} experts do not divide among {ep} expert-parallel ranks",
            "NVIDIA/TensorRT-LLM#13888",
        ),
        Rule(
            "old",
            lambda c: c.limits.groups == 1 or (c.limits.top_k <= 8 and c.limits.top_groups <= 4),
            "grouped routing took at most 8 experts per token out of 4 groups",
            "NVIDIA/TensorRT-LLM#15656",
        ),
        Rule("slow", lambda c: _is_power_of_two(c.count), "it pads to a power of two", "NVIDIA/TensorRT-LLM#3751"),
    ),
    "mlx": (),
    "transformers": (),
}


def parse_engines(text: str) -> tuple[str, ...]:
    """`vllm,llama.cpp` as a tuple; every name is in ENGINES."""
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in ENGINES:
            raise UsageError(f"engine {name!r} is not known; use {', '.join(ENGINES)}")
    return names


def objections(case: Case, engines: Sequence[str]) -> list[Objection]:
    """Every rule of these engines that the case breaks, the hard ones first."""
    words = {
        "count": case.count,
        "ep": case.expert_parallel,
        "tp": case.tensor_parallel,
        "groups": case.limits.groups,
    }
    found = [
        Objection(engine, rule.severity, rule.why.format(**words), rule.source)
        for engine in engines
        for rule in ENGINES[engine]
        if not rule.accepts(case)
    ]
    return sorted(found, key=lambda o: list(SEVERITIES).index(o.severity))


def summary(found: Sequence[Objection]) -> list[str]:
    """The objections as one line for each severity."""
    lines = []
    for severity, words in SEVERITIES.items():
        parts = [f"{o.engine} ({o.why})" for o in found if o.severity == severity]
        if parts:
            lines.append(f"{words} {', '.join(parts)}")
    return lines


def works(case: Case, engines: Sequence[str]) -> bool:
    """Whether the router and every one of the engines can run this count, be it slowly."""
    hard = any(o.severity == "fail" for o in objections(case, engines))
    return not hard and not case.limits.objection(case.count) and case.count % case.expert_parallel == 0


def is_free(case: Case, engines: Sequence[str]) -> bool:
    """Whether the router can use this count and no engine has anything against it."""
    return works(case, engines) and not objections(case, engines)


def snap(case: Case, engines: Sequence[str], step: int) -> int:
    """The nearest count that works, going up (step 1: never below what was asked) or down (step -1)."""
    end = case.limits.experts + 1 if step > 0 else 0
    for count in range(case.count, end, step):
        if works(replace(case, count=count), engines):
            return count
    reasons = "; ".join(str(o) for o in objections(case, engines) if o.severity == "fail")
    bound = "at least" if step > 0 else "at most"
    raise UsageError(
        f"no count of {bound} {case.count} of {case.limits.experts} experts suits {' and '.join(engines) or 'this'}"
        f" with {case.expert_parallel} expert-parallel ranks{': ' + reasons if reasons else ''}; ask for another count"
    )
